"""The fused losses on a mesh: tokens split over its "data" axis, the vocabulary of both heads over
"tensor" and "fsdp".

A device has a slice of the vocabulary and all tokens of its place along "data": what travels is
hidden states, once, and a few numbers a token. It has as much to do as if tokens alone were split;
where the vocabulary can be split so, no device ever holds a whole head or its gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from oel_jax.consolidation import fused


def linear_divergence(
  mesh: Mesh | None, *args: Array, chunk: int, **options: Any
) -> tuple[Array, Array, dict[str, Array]]:
  """`fused.linear_divergence` with its statistics, of arrays of the whole mesh; hidden states [B,
  T, …], B a multiple of data x fsdp.

  Chunks have as many logits on each device as `chunk` tokens have on one. No mesh is one device, or
  the inside of `jax.shard_map`, where `vocabulary_axes` is one of the options.
  """
  return _spread(
    functools.partial(fused.linear_divergence, statistics=True, **options),
    mesh,
    args,
    (1, 3),
    chunk,
  )


def linear_imitation(
  mesh: Mesh | None,
  *args: Array,
  chunk: int,
  statistics: bool = False,
  head_sink: Array | None = None,
  head_start: Array | None = None,
  vocabulary_axes: tuple[str, ...] = (),
) -> tuple[Array, Array, dict[str, Array]]:
  """`fused.linear_imitation` in the same way; {} in the place of statistics without them."""

  def loss(*args, vocabulary_axes=vocabulary_axes, **options):
    options |= dict(head_sink=head_sink, head_start=head_start, vocabulary_axes=vocabulary_axes)
    found = fused.linear_imitation(*args, statistics=statistics, **options)
    return found if statistics else (*found, {})

  return _spread(
    loss,
    mesh,
    args,
    (1,),
    chunk,
  )


def vocabulary_axes(mesh: Mesh, vocabulary: int) -> tuple[str, ...]:
  """The axes over which the heads' rows are split: the most that the vocabulary can be divided by,
  none if need be.
  """
  wide = tuple(axis for axis in ("tensor", "fsdp") if mesh.shape[axis] > 1)
  size = lambda axes: math.prod(mesh.shape[axis] for axis in axes)
  return max(
    (axes for axes in (wide, wide[:1], wide[1:], ()) if vocabulary % size(axes) == 0), key=size
  )


def _spread(
  loss: Callable[..., Any],
  mesh: Mesh | None,
  args: tuple[Array, ...],
  heads: tuple[int, ...],
  chunk: int,
):
  """The loss of `args`, of which those at `heads` are split by their vocabulary and the others by
  their tokens.
  """
  if mesh is None or mesh.size == 1:
    return loss(*args, chunk=chunk)
  axes = vocabulary_axes(mesh, args[1].shape[0])
  tokens = tuple(axis for axis in ("data", "fsdp") if axis not in axes)
  rows, head, whole = PartitionSpec(tokens), PartitionSpec(axes), PartitionSpec()
  chunk *= math.prod(mesh.shape[axis] for axis in axes)

  def local(*args):
    *sums, found = loss(*args, chunk=chunk, vocabulary_axes=axes)
    return *jax.lax.psum(sums, tokens), found

  places = tuple(head if i in heads else rows for i in range(len(args)))
  return jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=(whole, whole, rows))(*args)
