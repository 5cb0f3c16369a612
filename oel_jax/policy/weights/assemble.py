"""Tensors of a file, named and laid out as others do → the parameter tree."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np

from oel_jax.policy import parameters
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.parameters import Parameter
from oel_jax.policy.weights import place


def names(
  architecture: Architecture, name_of: Callable[[Parameter], str]
) -> dict[str, tuple[Parameter, int | None]]:
  """Each tensor that a file of this architecture holds: name → parameter, and layer or None.

  Args:
    architecture: of the file.
    name_of: parameter → its name in such a file, {} for the layer.
  """
  return {
    name_of(parameter).format(layer): (parameter, layer)
    for parameter in parameters.of(architecture).values()
    for layer in (range(architecture.layers) if parameter.stacked else (None,))
  }


def assemble(
  complaint: str,
  tensors: dict[str, place.Tensor],
  architecture: Architecture,
  name_of: Callable[[Parameter], str],
  *,
  dtype: Any,
  shardings: Any,
) -> Any:
  """Puts the tensors of a file, one by one and each straight to its devices, where
  `parameters.init` has them.

  Args:
    complaint: how an error begins.
    tensors: all that are there, by name, best in the file's order.
    architecture: what the tensors should make.
    name_of: as in `names`.
    dtype: of the parameters returned.
    shardings: tree of shardings (`mesh.param_shardings`); None for the default device.

  Returns:
    The parameter tree of `parameters.init`, layers stacked.

  Raises:
    ValueError: tensors are missing, unknown or misshaped: one error lists them all; or one holds a
      number that is not finite in float32.
  """
  _check(complaint, {name: one.shape for name, one in tensors.items()}, architecture, name_of)
  held = names(architecture, name_of)
  places = flax.traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
  matrices = [
    (place.Place(*held[name]), one) for name, one in tensors.items() if len(one.shape) > 1
  ]
  flat = place.matrices(matrices, architecture, dtype=dtype, shardings=places)
  for path, parameter in parameters.of(architecture).items():
    if path not in flat:
      found = _vectors(parameter, tensors, architecture, name_of, dtype)
      flat[path] = jax.device_put(found, places.get(path))
  ordered = {path: flat[path] for path in parameters.of(architecture)}
  return flax.traverse_util.unflatten_dict(ordered, sep="/")


def _vectors(
  parameter: Parameter,
  tensors: dict[str, place.Tensor],
  architecture: Architecture,
  name_of: Callable[[Parameter], str],
  dtype: Any,
) -> np.ndarray:
  """A leaf of vectors, made on the host: all layers' are smaller than one matrix."""
  layers = range(architecture.layers) if parameter.stacked else (None,)
  found = []
  for layer in layers:
    tensor = tensors[name_of(parameter).format(layer)]
    numbers = tensor.checked()
    if tensor.interleaved:
      numbers = place.halves_apart(numbers, tensor.interleaved)
    found.append(parameter.from_stored(numbers, architecture))
  leaf = np.stack(found) if parameter.stacked else found[0]
  return leaf.astype(dtype)  # which copies: the leaf must not share the file's mapped pages


def _check(
  complaint: str,
  shapes: dict[str, tuple[int, ...]],
  architecture: Architecture,
  name_of: Callable[[Parameter], str],
) -> None:
  """Raises one ValueError that lists all tensors that are missing, unknown or misshaped."""
  wanted = {
    name: parameter.stored(architecture)
    for name, (parameter, _) in names(architecture, name_of).items()
  }
  wrong = [f"{name}: missing" for name in wanted.keys() - shapes.keys()]
  wrong += [f"{name}: unknown" for name in shapes.keys() - wanted.keys()]
  wrong += [
    f"{name}: {shapes[name]} instead of {wanted[name]}"
    for name in wanted.keys() & shapes.keys()
    if shapes[name] != wanted[name]
  ]
  if wrong:
    shown = "; ".join(sorted(wrong)[:20])
    shown += f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    raise ValueError(f"{complaint}: {shown}")
