"""Tensors of a file, named and laid out as others do → the parameter tree."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from oel_jax.policy import parameters
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.parameters import Parameter


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
  shapes: dict[str, tuple[int, ...]],
  read: Callable[[str], Any],
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
    shapes: of every tensor there, by its name; matrices are [out, in].
    read: name → tensor.
    architecture: what the tensors should make.
    name_of: as in `names`.
    dtype: of the parameters returned.
    shardings: tree of shardings (`mesh.param_shardings`); None for the default device.

  Returns:
    The parameter tree of `parameters.init`, layers stacked.

  Raises:
    ValueError: tensors are missing, unknown or misshaped: one error lists them all.
  """
  _check(complaint, shapes, architecture, name_of)
  places = flax.traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
  flat = {}
  for path, parameter in parameters.of(architecture).items():
    name, whole = name_of(parameter), places.get(path)
    # Cast on the devices: on the host a float32 copy of a bfloat16 tensor would be twice its size.
    if not parameter.stacked:
      found = parameter.from_stored(read(name), architecture)
      flat[path] = jax.block_until_ready(jax.device_put(found, whole)).astype(dtype)
      continue
    layer_sharding = whole and NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:]))
    shape = parameter.sizes(architecture)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=whole)()
    # In place, unlike a scatter.
    update = lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x.astype(dtype), i, 0)
    place = jax.jit(update, donate_argnums=0, out_shardings=whole)
    for layer in range(architecture.layers):
      found = parameter.from_stored(read(name.format(layer)), architecture)
      # Waits: one tensor at a time on the host.
      stack = place(stack, jax.block_until_ready(jax.device_put(found, layer_sharding)), layer)
    flat[path] = stack
  return flax.traverse_util.unflatten_dict(flat, sep="/")


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
