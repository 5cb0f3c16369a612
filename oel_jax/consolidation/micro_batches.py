"""Sums over the rows of a batch, micro-batch by micro-batch, on one device or many.

How many micro-batches there are follows from the batch's shape, how many of them are run from its
mask: batches of few samples and of many are one program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import on_mesh
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy.ops import split
from oel_jax.runtime import mesh as mesh_lib


def over_rows(
  run: Callable[..., Any],
  zero: Callable[[Any], Any],
  params: Any,
  teacher: teacher_lib.Teacher,
  batch: batch_lib.Batch,
  *,
  mesh: Mesh | None,
  micro_tokens: int | None,
  gradient: bool,
) -> Any:
  """The sums that `run` gives, over all rows: micro-batch by micro-batch, and where layers run
  without a loop, on every device for its own rows.

  Args:
    run: (params, teacher, batch, so_far=None, **where) → so_far and the batch's sums, of which
      `where` says where it is: mesh, or axes and check_vma (`on_mesh.by_rows`).
    zero: params → the sums of no rows.
    mesh: where the rows lie; None on one device.
    micro_tokens: as in `step.make_step`.
    gradient: whether the last of the sums is the gradient in `params`.
  """

  def by_micro_batches(params, teacher, batch, **where):
    shards, axes = mesh_lib.row_shards(where.get("mesh")), where.get("axes")
    count = count_of(*batch.tokens.shape, shards, micro_tokens)
    if count == 1:
      return run(params, teacher, batch, **where)

    def add(so_far, micro_batch):
      held = _held(so_far, params, teacher, axes)
      return run(*held, micro_batch, so_far, **where)

    return _fold(add, zero(params), batch, count, axes)

  if teacher_lib.is_unrolled(teacher) and mesh is not None and mesh.size > 1:
    return on_mesh.by_rows(by_micro_batches, mesh, params, teacher, batch, gradient=gradient)
  return by_micro_batches(params, teacher, batch, mesh=mesh)


def add_up(
  total: Callable[..., Any],
  zero: Callable[[], Any],
  params: Any,
  teacher: teacher_lib.Teacher,
  batch: batch_lib.Batch,
  *,
  mesh: Mesh | None,
  micro_tokens: int | None,
) -> Any:
  """`over_rows` of the sums `total(params, teacher, batch, **where)`, without gradients; `zero()`
  are those of no rows.
  """

  def run(params, teacher, batch, so_far=None, **where):
    found = total(params, teacher, batch, **where)
    return found if so_far is None else jax.tree.map(jnp.add, so_far, found)

  how = dict(mesh=mesh, micro_tokens=micro_tokens, gradient=False)
  return over_rows(run, lambda _: zero(), params, teacher, batch, **how)


def count_of(rows: int, length: int, shards: int, micro_tokens: int | None) -> int:
  """Into how many equal parts, each with as many rows for every shard, the rows go for a part to
  have micro_tokens a shard at most.
  """
  each = max(1, rows // shards)
  fits = lambda count: each % count == 0 and each // count * length <= micro_tokens
  if micro_tokens is None:
    return 1
  return next(filter(fits, range(1, each)), each)


def _fold(
  add: Callable[[Any, batch_lib.Batch], Any],
  so_far: Any,
  batch: batch_lib.Batch,
  count: int,
  axes: split.Axes | None = None,
) -> Any:
  """add(so_far, micro-batch) → so_far, over so many equal parts of the rows, up to the last part of
  which a token counts. Devices along `axes.width` wait for one another in each part: they take as
  many.
  """
  parts = cut(batch, count)
  run = filled(parts)
  run = jax.lax.pmax(run, axes.width) if axes and axes.width else run
  return jax.lax.fori_loop(0, run, lambda p, so_far: add(so_far, part_of(parts, p)), so_far)


def cut(tree: Any, count: int) -> Any:
  """[rows, …] → [count, rows of each, …]. Every device has its part of every micro-batch: number p
  is rows p, p + count…
  """
  return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def filled(parts: batch_lib.Batch) -> Array:
  """How many of the micro-batches there are up to the last of which a token counts, int32. Those
  before it need not hold any: `samples.padded` puts samples first, a batch of others may not.
  """
  numbers = jnp.arange(1, len(parts.mask) + 1)
  return jnp.where(parts.mask.any(axis=(1, 2)), numbers, 0).max()


def part_of(parts: Any, p: Array) -> Any:
  """Micro-batch number p of those that `cut` made."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, p, keepdims=False), parts)


def _held(so_far: Any, params: Any, teacher: Any, axes: split.Axes | None) -> tuple[Any, Any]:
  """Student's parameters and teacher, held in the loop over micro-batches: what is split over
  `axes.width` would be gathered, all of it at once, before a loop in which it does not change.
  """
  if not (axes and axes.width):
    return params, teacher
  return jax.lax.optimization_barrier((params, teacher, so_far[0]))[:2]
