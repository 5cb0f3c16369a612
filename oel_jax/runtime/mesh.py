"""The device mesh, and how every array is split over it: parameters as `policy.parameters` says.

Axes: "data" splits the batch; "fsdp" splits the batch and, along the width, the parameters and
their optimizer state; "tensor" splits heads, feed-forward and vocabulary. XLA inserts the
collectives; all three may be 1, which is a single device.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oel_jax.policy import parameters

AXES = ("data", "fsdp", "tensor")

# Path of a parameter (regular expression for the whole path) → mesh axis of each of its dimensions.
TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  *((parameter.path, parameter.axes) for parameter in parameters.PARAMETERS),
  # LoRA's, small: every device has them whole
  (r"layers/.+/kernel/[ab]", (None, None, None)),
  # [L, G, K, P, H], of the knowledge texts
  (r"teacher/(keys|values)", (None, None, "tensor", None, None)),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Builds the mesh of `config.mesh`.

  Args:
    sizes: fields `data`, `fsdp` and `tensor`; one of them may be -1, which takes all devices that
      the others leave.
    devices: default: all devices of all processes.

  Returns:
    A mesh with axes ("data", "fsdp", "tensor"), all of type Auto.

  Raises:
    ValueError: a size is neither positive nor -1, two are -1, or the sizes do not use every device
      exactly once.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = [sizes[axis] for axis in AXES]
  for axis, size in zip(AXES, shape):
    if size != -1 and size < 1:
      raise ValueError(
        f"config.mesh.{axis} is {size}: it must be a positive number of devices, or -1 for all "
        "that are left"
      )
  if shape.count(-1) > 1:
    names = " and ".join(f"config.mesh.{axis}" for axis, size in zip(AXES, shape) if size == -1)
    raise ValueError(f"{names} are -1: at most one of them can take the devices that are left")
  fixed = math.prod(size for size in shape if size != -1)
  written = " x ".join(
    f"config.mesh.{axis} ({size})" for axis, size in zip(AXES, shape) if size != -1
  )
  if -1 in shape:
    if len(devices) % fixed:
      raise ValueError(f"{written} = {fixed} does not divide the number of devices, {len(devices)}")
    shape[shape.index(-1)] = len(devices) // fixed
  elif fixed != len(devices):
    raise ValueError(
      f"{written} = {fixed}, but there are {len(devices)} devices: the product must equal it; "
      "-1 for config.mesh.data takes all that are left"
    )
  # jax.make_mesh's default is Explicit since 0.9; here XLA finds the shardings within a program.
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
  """Axes of a row, without those that do not divide their dimension: that dimension is
  replicated.
  """
  return PartitionSpec(
    *(
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    )
  )


def _shardings(mesh: Mesh, tree: Any, above: str) -> Any:
  """`above` is the regular expression of what may stand before a parameter's own path."""
  wrong = []

  def one(path, leaf) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if above and leaf.ndim == 0:  # step counters and the like
      return NamedSharding(mesh, PartitionSpec())
    rows = [axes for pattern, axes in TABLE if re.fullmatch(above + pattern, name)]
    if len(rows) != 1 or len(rows[0]) != leaf.ndim:
      wrong.append(
        f"{name} {tuple(leaf.shape)} matches {len(rows)} rows"
        if len(rows) != 1
        else f"{name} {tuple(leaf.shape)} has {leaf.ndim} dimensions, its row {len(rows[0])}"
      )
      return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, _spec(mesh, rows[0], leaf.shape))

  shardings = jax.tree_util.tree_map_with_path(one, tree)
  if wrong:
    raise ValueError(
      "policy.parameters must have exactly one row for every parameter: " + "; ".join(wrong)
    )
  return shardings


def param_shardings(mesh: Mesh, abstract_params: Any) -> Any:
  """Looks every parameter up in `TABLE`.

  Args:
    mesh: from `make_mesh`.
    abstract_params: nested dict of arrays or ShapeDtypeStructs (only shapes are read).

  Returns:
    The same tree of NamedShardings. A dimension that its axis does not divide (say 2 key-value
    heads over 4 devices) is replicated.

  Raises:
    ValueError: a parameter matches no row, several rows, or a row of another rank; all of them are
      listed.
  """
  return _shardings(mesh, abstract_params, above="")


def undivided(mesh: Mesh, abstract_params: Any) -> list[str]:
  """What `param_shardings` replicates although the table splits it: the axis does not divide it.

  Args:
    mesh: from `make_mesh`.
    abstract_params: as there.

  Returns:
    A phrase for each such dimension: "layers/attention/k/kernel: 2 over tensor (4)".
  """
  told = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next(row for pattern, row in TABLE if re.fullmatch(pattern, name))
    spec = _spec(mesh, axes, leaf.shape)
    told += [
      f"{name}: {size} over {axis} ({mesh.shape[axis]})"
      for size, axis, given in zip(leaf.shape, axes, spec, strict=True)
      if axis and given is None
    ]
  return told


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
  """The same for a train state: moments, averages and copies of the parameters, under any name, lie
  where their parameter lies.

  Args:
    mesh: from `make_mesh`.
    abstract_state: any pytree; the path of each array ends in a parameter's path (optax keeps
      those), or the array is a scalar.

  Returns:
    The same tree of NamedShardings; scalars are replicated.

  Raises:
    ValueError: as in `param_shardings`.
  """
  return _shardings(mesh, abstract_state, above="(?:.*/)?")


def abstract_init(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
  """What `sharded_init` would return, without computing it: what a checkpoint is restored onto.

  Args:
    init: pure function of arrays that returns parameters or a train state.
    mesh: from `make_mesh`.
    *args: arrays.

  Returns:
    The tree that `init` returns, as ShapeDtypeStructs with the shardings of `state_shardings`.
  """
  shapes = jax.eval_shape(init, *args)
  shardings = state_shardings(mesh, shapes)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def sharded_init(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
  """Runs `init(*args)` with each output array born in its shards, so that no device ever holds the
  whole model.

  Args:
    init: pure function of arrays that returns parameters or a train state.
    mesh: from `make_mesh`.
    *args: arrays.

  Returns:
    What `init` returns, placed by `state_shardings`.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_init(init, mesh, *args))
  return jax.jit(init, out_shardings=shardings)(*args)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays whose leading axis is the batch: over "data" and "fsdp", replicated over
  "tensor".
  """
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put(tree: Any, shardings: Any) -> Any:
  """Places arrays of the host, the same in every process.

  Args:
    tree: pytree of arrays.
    shardings: one for all, or a tree of them.

  Returns:
    The tree of JAX arrays, so placed; of several processes each has its part.
  """
  first = jax.tree.leaves(shardings)
  if not first or first[0].is_fully_addressable:
    return jax.device_put(tree, shardings)
  # device_put would have the processes compare all numbers.
  one = lambda leaf, place: jax.make_array_from_callback(
    leaf.shape, place, np.asarray(leaf).__getitem__
  )
  if len(first) == 1:
    return jax.tree.map(lambda leaf: one(leaf, first[0]), tree)
  return jax.tree.map(one, tree, shardings)


def row_shards(mesh: Mesh | None) -> int:
  """Parts that a batch's rows are cut into, each on devices of its own; 1 without a mesh."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def pad_batch(batch: Any, mesh: Mesh, mask: str = "mask", multiple: int = 1) -> Any:
  """Adds masked-out rows until every data shard has the same number of rows, so that 3 items run on
  8 devices.

  The rows added repeat the last one (a row of zeros could be a sequence that attends to nothing,
  whose softmax is 0 / 0); only their mask is zero. Losses are sums over the mask, so they do not
  see these rows.

  Args:
    batch: pytree of NumPy arrays with the same leading axis.
    mesh: from `make_mesh`.
    mask: the name of the arrays that say what counts; at least one leaf has it as the last part of
      its path.
    multiple: the number of rows is made a multiple of this, too.

  Returns:
    The batch with a leading axis that is a multiple of data x fsdp; the batch itself if it was one.

  Raises:
    ValueError: the batch is empty, has no array named `mask`, or arrays of different length.
  """
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  lengths = {
    jax.tree_util.keystr(path, simple=True, separator="/"): len(leaf) for path, leaf in leaves
  }
  if mask not in {name.rpartition("/")[2] for name in lengths}:
    raise ValueError(
      f"pad_batch: the batch has no array {mask!r}, only {sorted(lengths)}: without it the rows "
      "added would count"
    )
  length, *others = set(lengths.values())
  if others or length == 0:
    raise ValueError(
      f"pad_batch: the arrays have lengths {lengths}: they must be the same, and at least 1"
    )
  missing = -length % math.lcm(row_shards(mesh), multiple)
  if not missing:
    return batch

  def pad(path, leaf: np.ndarray) -> np.ndarray:
    rows = np.repeat(leaf[-1:], missing, axis=0)
    return np.concatenate(
      [leaf, np.zeros_like(rows) if jax.tree_util.keystr(path[-1:], simple=True) == mask else rows]
    )

  return jax.tree_util.tree_map_with_path(pad, batch)
