"""The fast step on a mesh of data x fsdp: the program of one device, on every device for its own
rows, inside `jax.shard_map`.

So kernels see whole arrays of one device, as they must. Matrices and tables lie split over "fsdp"
and are gathered where they are used (`policy.ops.split`); over "data" nothing travels but the
gradient, once a step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from oel_jax.policy import parameters, unrolled
from oel_jax.runtime import mesh as mesh_lib

ROWS = ("data", "fsdp")


def check(mesh: Mesh) -> None:
  """Raises a ValueError where the fast step is not for this mesh: heads are split."""
  if mesh.shape["tensor"] > 1:
    raise ValueError(
      f"layers without a loop got a mesh with {mesh.shape['tensor']} devices along tensor: they "
      "run on data and fsdp, tensor must be 1"
    )


def width_axis(mesh: Mesh, weights: Any) -> str | None:
  """The axis over which matrices and tables of these weights (any form) lie split along their
  width; None where there is one device along "fsdp", or it does not divide the width.
  """
  size, width = mesh.shape["fsdp"], weights["norm"]["scale"].shape[0]
  return "fsdp" if size > 1 and width % size == 0 else None


def weight_shardings(mesh: Mesh | None, params: Any, dtype: Any) -> Any:
  """How `unrolled.fuse(params, dtype)` lies; None on one device."""
  if mesh is None or mesh.size == 1:
    return None
  weights = jax.eval_shape(lambda params: unrolled.fuse(params, dtype), params)
  specs = unrolled.specs(weights, width_axis(mesh, params))
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def by_rows(
  run: Callable[..., Any], mesh: Mesh, params: Any, teacher: Any, batch: Any, *, gradient: bool
) -> Any:
  """`run(params, teacher, batch, axis=…, check_vma=False)` on every device, for its own rows of the
  batch.

  Args:
    run: gives sums over the rows; with `gradient`, the last of them is the gradient in `params`, of
      what is split each device's own part, already added up over "fsdp".
    mesh: of data x fsdp.
    params: fused.
    teacher: a `teacher.Teacher` with fused parameters.
    batch: rows a multiple of data x fsdp.

  Returns:
    The sums over all rows; the gradient lies as `params` do.
  """
  axis, whole = width_axis(mesh, params), PartitionSpec()
  weights = unrolled.specs(params, axis)
  read = type(teacher)(unrolled.specs(teacher.params, axis), *(whole,) * (len(teacher) - 1))

  def add_up(slope, spec):
    return jax.lax.psum(slope, tuple(name for name in ROWS if name not in spec))

  def local(params, teacher, batch):
    found = run(params, teacher, batch, axis=axis, check_vma=False)
    if not gradient:
      return jax.lax.psum(found, ROWS)
    *sums, slope = found
    return *jax.lax.psum(sums, ROWS), jax.tree.map(add_up, slope, weights)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(weights, read, PartitionSpec(ROWS)),
    out_specs=(whole, whole, whole, weights) if gradient else whole,
    check_vma=False,
  )(params, teacher, batch)


def by_texts(
  run: Callable[..., Any],
  mesh: Mesh,
  params: Any,
  tokens_GxP: Int[Array, "G P"],
  length_G: Int[Array, "G"],
) -> Any:
  """`run(params, tokens, length, axis=…)` → arrays [L, G, …], on every device for texts of its own,
  empty ones where there are not as many for each; `params` are stacked.
  """
  axis, G = width_axis(mesh, params), len(length_G)
  room = -G % mesh_lib.row_shards(mesh)
  tokens, length = jnp.pad(tokens_GxP, ((0, room), (0, 0))), jnp.pad(length_G, (0, room))

  def spec(path, _):
    axes = parameters.BY_PATH[jax.tree_util.keystr(path, simple=True, separator="/")].axes
    return PartitionSpec(*(axis if name == "fsdp" else None for name in axes))

  found = jax.shard_map(
    lambda *given: run(*given, axis=axis),
    mesh=mesh,
    in_specs=(jax.tree_util.tree_map_with_path(spec, params), *(PartitionSpec(ROWS),) * 2),
    out_specs=PartitionSpec(None, ROWS),
    check_vma=False,
  )(params, tokens, length)
  return jax.tree.map(lambda x: x[:, :G], found)
