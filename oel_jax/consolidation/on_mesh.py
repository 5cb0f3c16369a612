"""The fast step on a mesh: the program of one device, on every device for its own rows, and over
"tensor" for its own heads and slice of the vocabulary, inside `jax.shard_map`.

So kernels see whole arrays of one device, as they must. Matrices and tables lie split over "fsdp"
and are gathered where they are used (`policy.ops.split`); over "data" nothing travels but the
gradient, once a step. Over "tensor" they lie split, too, and stay so: devices along it have the
same rows, and add up hidden states (`policy.ops.products`) and a few numbers a token of the loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from oel_jax.policy import parameters, unrolled
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import split
from oel_jax.runtime import mesh as mesh_lib

ROWS = ("data", "fsdp")


def undivided(a: Architecture, mesh: Mesh) -> list[str]:
  """What the devices along "tensor" cannot share equally, and the fast step is not for: "kv_heads
  (2)".
  """
  size, names = mesh.shape["tensor"], ("heads", "kv_heads", "feedforward", "vocabulary")
  return [f"{name} ({getattr(a, name)})" for name in names if getattr(a, name) % size]


def check(a: Architecture, mesh: Mesh) -> None:
  """Raises a ValueError where the fast step is not for these weights on this mesh."""
  if wrong := undivided(a, mesh):
    raise ValueError(
      f"layers without a loop got a mesh with {mesh.shape['tensor']} devices along tensor, which "
      f"do not divide the weights' {', '.join(wrong)}: they must"
    )


def axes_of(mesh: Mesh, weights: Any) -> split.Axes:
  """The axes over which these weights (any form) lie split: along their width not where there is
  one device along "fsdp", or it does not divide the width.
  """
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  width = weights["norm"]["scale"].shape[0]
  return split.Axes(
    "fsdp" if fsdp > 1 and width % fsdp == 0 else None, "tensor" if tensor > 1 else None
  )


def fuse(params: Any, a: Architecture, dtype: Any, mesh: Mesh | None) -> Any:
  """`unrolled.fuse`; where heads are split over "tensor", each device fuses its own, and nothing
  travels: the columns of all stand device by device.
  """
  if mesh is None or mesh.shape["tensor"] == 1:
    return unrolled.fuse(params, dtype)
  run = lambda params: unrolled.fuse(params, dtype)
  weights = unrolled.specs(jax.eval_shape(run, params), axes_of(mesh, params))
  return jax.shard_map(
    run, mesh=mesh, in_specs=(_specs(mesh, a),), out_specs=weights, check_vma=False
  )(params)


def unfuse(weights: Any, a: Architecture, mesh: Mesh | None) -> Any:
  """Undoes `fuse`, but for the type (`unrolled.unfuse`)."""
  if mesh is None or mesh.shape["tensor"] == 1:
    return unrolled.unfuse(weights, a)
  return jax.shard_map(
    lambda weights: unrolled.unfuse(weights, a.share(mesh.shape["tensor"])),
    mesh=mesh,
    in_specs=(unrolled.specs(weights, axes_of(mesh, weights)),),
    out_specs=_specs(mesh, a),
    check_vma=False,
  )(weights)


def _specs(mesh: Mesh, a: Architecture) -> Any:
  """How the parameters lie."""
  places = mesh_lib.param_shardings(mesh, parameters.abstract(a))
  return jax.tree.map(lambda place: place.spec, places)


def weight_shardings(mesh: Mesh | None, params: Any, dtype: Any) -> Any:
  """How `fuse(params, …, dtype, mesh)` lies; None on one device."""
  if mesh is None or mesh.size == 1:
    return None
  weights = jax.eval_shape(lambda params: unrolled.fuse(params, dtype), params)
  specs = unrolled.specs(weights, axes_of(mesh, params))
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def by_rows(
  run: Callable[..., Any], mesh: Mesh, params: Any, teacher: Any, batch: Any, *, gradient: bool
) -> Any:
  """`run(params, teacher, batch, axes=…, check_vma=False)` on every device, for its own rows of the
  batch and its own heads.

  Args:
    run: gives sums over the rows; with `gradient`, the last of them is the gradient in `params`, of
      what is split each device's own part, already added up over "fsdp".
    mesh: of the devices.
    params: from `fuse`.
    teacher: a `teacher.Teacher` with such parameters.
    batch: rows a multiple of data x fsdp.

  Returns:
    The sums over all rows; the gradient lies as `params` do.
  """
  axes, whole = axes_of(mesh, params), PartitionSpec()
  weights, texts = unrolled.specs(params, axes), PartitionSpec(None, None, axes.heads)
  read = type(teacher)(unrolled.specs(teacher.params, axes), texts, texts, whole, whole)

  def add_up(path, slope, spec):
    # Each device has what its own heads give to the norms that all heads share.
    apart = axes.vocabulary() if path[-1].key == "qk_norm" else ()
    return jax.lax.psum(slope, (*(name for name in ROWS if name not in spec), *apart))

  def local(params, teacher, batch):
    found = run(params, teacher, batch, axes=axes, check_vma=False)
    if not gradient:
      return jax.lax.psum(found, ROWS)
    *sums, slope = found
    return *jax.lax.psum(sums, ROWS), jax.tree_util.tree_map_with_path(add_up, slope, weights)

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
  empty ones where there are not as many for each; `params` are stacked, and heads are not split.
  """
  axis, G = axes_of(mesh, params).width, len(length_G)
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
