"""Matrices of a file → their place in the parameter tree: read ahead by a thread, decoded, turned
round and cast on the devices, layers written into their stack there.

Of the host's memory this takes what `Tensor.raw` takes, for one matrix at a time (two on a CPU,
where the devices share it); of the devices', beside the parameters, what is read of three matrices
and the float32 numbers of one.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from oel_jax.policy.architecture import Architecture
from oel_jax.policy.parameters import Parameter
from oel_jax.runtime import distributed

# What is read of a matrix, [rows, columns or blocks, ...] → its numbers [out, in], or the same in
# blocks, [out, blocks, numbers]; and whether all are finite in float32.
Decode = Callable[[Array], tuple[Array, Bool[Array, ""]]]


def plain(numbers: Float[Array, "rows columns"]) -> tuple[Array, Bool[Array, ""]]:
  """The `Decode` of numbers that are floats as they are."""
  # Not the largest, which would be a NaN on one device: a maximum over devices loses NaNs.
  return numbers, jnp.isfinite(numbers).all()


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, not yet read.

  Attributes:
    shape: of its numbers; [out, in] for a matrix.
    checked: returns the numbers, on the host; raises ValueError if one is not finite in float32.
    raw: returns what goes to the devices, [rows, columns or blocks, ...]: best a view of the mapped
      file.
    raw_type: its shape and dtype.
    decode: makes numbers of it; the same object for tensors that are read alike.
    interleaved: the size of the heads whose halves' rows come in turn; 0: they do not.
  """

  shape: tuple[int, ...]
  checked: Callable[[], np.ndarray]
  raw: Callable[[], np.ndarray]
  raw_type: jax.ShapeDtypeStruct
  decode: Decode = plain
  interleaved: int = 0


def halves_apart(tensor: Any, head_size: int) -> Any:
  """Rows of heads, [out, ...], whose halves come in turn → all of one half, then the other."""
  pairs = tensor.reshape(-1, head_size // 2, 2, *tensor.shape[1:])
  return pairs.swapaxes(1, 2).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class _Program:
  """What tells one compiled program from another: no names, no layers."""

  decode: Decode
  raw: jax.ShapeDtypeStruct  # placed
  stored: tuple[int, ...]
  interleaved: int
  turned: bool
  found: jax.ShapeDtypeStruct  # the whole leaf, placed
  stacked: bool


def _program(
  tensor: Tensor, parameter: Parameter, architecture: Architecture, dtype: Any, whole: Any
) -> _Program:
  shape, raw = parameter.sizes(architecture), tensor.raw_type
  return _Program(
    decode=tensor.decode,
    raw=jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=_raw_place(parameter, raw, whole)),
    stored=tensor.shape,
    interleaved=tensor.interleaved,
    turned=parameter.inputs is not None,
    found=jax.ShapeDtypeStruct(shape, dtype, sharding=whole),
    stacked=parameter.stacked,
  )


def _raw_place(parameter: Parameter, raw: jax.ShapeDtypeStruct, whole: Any) -> Any:
  """Where what is read goes: each device gets the rows and the columns, or blocks, of its numbers,
  where they divide.
  """
  if whole is None:
    return None
  axes = (*whole.spec, *[None] * len(parameter.axes))[: len(parameter.axes)]
  axes = axes[parameter.stacked :]
  if parameter.inputs is None:
    rows, columns = axes
  else:
    rows, columns = axes[parameter.inputs], axes[0]
  names = lambda axis: axis if isinstance(axis, tuple) else (axis,)
  parts = lambda axis: math.prod(whole.mesh.shape[name] for name in names(axis))
  fits = [
    axis if axis and size % parts(axis) == 0 else None
    for axis, size in zip((rows, columns), raw.shape, strict=False)
  ]
  return NamedSharding(whole.mesh, PartitionSpec(*fits))


@functools.lru_cache(maxsize=64)
def _compiled(program: _Program) -> Any:
  """(stack, raw, layer) → (stack with the layer in it, whether its numbers are finite), the stack
  in place; of a leaf without layers (raw,) → (leaf, whether finite).
  """
  whole = program.found

  def leaf(raw: Array) -> tuple[Array, Array]:
    numbers, finite = program.decode(raw)
    numbers = numbers.reshape(program.stored)
    if program.interleaved:
      numbers = halves_apart(numbers, program.interleaved)
    each = whole.shape[1:] if program.stacked else whole.shape
    # A copy even where nothing changes: the leaf must not share the file's mapped pages.
    turned = (numbers.T if program.turned else numbers).reshape(each)
    return jnp.array(turned, whole.dtype, copy=True), finite

  def place(stack: Array, raw: Array, layer: Array) -> tuple[Array, Array]:
    numbers, finite = leaf(raw)
    return jax.lax.dynamic_update_index_in_dim(stack, numbers, layer, 0), finite

  places = None if whole.sharding is None else (whole.sharding, _everywhere(whole.sharding))
  if not program.stacked:
    return jax.jit(leaf, out_shardings=places).lower(program.raw).compile()
  jitted = jax.jit(place, donate_argnums=0, out_shardings=places)
  return jitted.lower(whole, program.raw, np.int32(0)).compile()


def _everywhere(sharding: NamedSharding) -> NamedSharding:
  return NamedSharding(sharding.mesh, PartitionSpec())


@functools.lru_cache(maxsize=8)
def _zeros(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
  """() → a list of zeros, by one program for all."""
  make = lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
  return jax.jit(make, out_shardings=[leaf.sharding for leaf in leaves]).lower().compile()


def _put(tensor: Tensor, sharding: Any) -> Array:
  """What is read of it, on its devices: each one's share straight from the file's pages."""
  raw = tensor.raw()
  if sharding is None:
    return jax.block_until_ready(jax.device_put(raw))
  return jax.block_until_ready(
    jax.make_array_from_callback(raw.shape, sharding, lambda index: raw[index])
  )


def _ahead(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
  """Yields (item, what the function makes of it), of one or more; a thread makes the next one
  meanwhile.
  """
  with futures.ThreadPoolExecutor(1) as pool:
    made = pool.submit(function, items[0])
    for item, following in zip(items, [*items[1:], None], strict=True):
      found = made.result()
      made = None if following is None else pool.submit(function, following)
      yield item, found


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor belongs: which parameter, and which layer of it, None if it is of no layer."""

  parameter: Parameter
  layer: int | None


def matrices(
  tensors: Sequence[tuple[Place, Tensor]],
  architecture: Architecture,
  *,
  dtype: Any,
  shardings: dict[str, NamedSharding],
) -> dict[str, Array]:
  """Reads matrices in the order given, those of no layer before the others.

  Args:
    tensors: each with its place; of a parameter with layers, all layers.
    architecture: what they make.
    dtype: of the leaves returned.
    shardings: parameter's path → where the leaf is to lie; none for the default device.

  Returns:
    Path → leaf, layers stacked.

  Raises:
    ValueError: a number is not finite, as `Tensor.checked` says.
  """
  jobs = [
    (place, tensor, _program(tensor, place.parameter, architecture, dtype, shardings.get(path)))
    for place, tensor in sorted(tensors, key=lambda pair: pair[0].layer is not None)
    for path in [place.parameter.path]
  ]
  stacked = {job[0].parameter.path: job[2].found for job in jobs if job[2].stacked}
  found: dict[str, Array] = {}
  waiting: tuple[Place, Tensor, Array] | None = None
  with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    different = dict.fromkeys(program for _, _, program in jobs)
    programs = {program: pool.submit(_compiled, program) for program in different}
    zeros = pool.submit(_zeros, tuple(stacked.values()))
    for (place, tensor, program), raw in _ahead(
      lambda job: _put(job[1], job[2].raw.sharding), jobs
    ):
      run, path = programs[program].result(), place.parameter.path
      if place.layer is None:
        found[path], finite = distributed.in_turn(run(raw))
      else:
        if path not in found:
          found |= dict(zip(stacked, zeros.result()(), strict=True))
        found[path], finite = distributed.in_turn(run(found[path], raw, np.int32(place.layer)))
      del raw
      # The one before: the devices work on this one while the next is read.
      _check(waiting)
      waiting = place, tensor, finite
  _check(waiting)
  return found


def _check(done: tuple[Place, Tensor, Array] | None) -> None:
  """Raises ValueError, which names the tensor, if a device found a number that is not finite."""
  if done is None or done[2]:
    return
  place, tensor, _ = done
  tensor.checked()
  layer = "" if place.layer is None else f" of layer {place.layer}"
  raise ValueError(
    f"{place.parameter.path}{layer}: a device finds a number that is not finite, the host finds "
    "none in the file: try again on another device"
  )
