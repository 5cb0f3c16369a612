"""The arrays of the slots that the sampler's programs work on: a circular key-value cache, and of
each row what is needed to go on drawing. The engine's docstring draws them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Bool, Int, UInt

from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import groups
from oel_jax.policy.sampling.token_sampling import NOT_FINITE


class Slots(NamedTuple):
  """The state of B rows that decode side by side over a circular cache of S columns.

  Attributes:
    keys: L arrays [B, K, S, H], or [B, K, H, S] for the attention "xla": a CPU multiplies
      these faster with a query.
    values: L arrays [B, K, S, H].
    column: [] int32, the one that the next step writes.
    filled: [B] int32, tokens of the row in the cache: the columns last written. 0 for a row that
      is not active.
    token: [B] int32, the last id drawn, not in the cache yet.
    drawn: [B] int32, ids drawn for the response so far.
    active: [B] bool, whether the row has not ended.
    seeds: [B] uint32, of the rows' random streams.
    limits: [B] int32, most ids of the response.
    eos_ids: [B, E] int32, ids any of which ends the response; -1 fills.
    text: [B] int32, the text in `text_cache` that stands before the row's own tokens, -1 for none;
      None where there are no texts.
  """

  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  column: Int[Array, ""]
  filled: Int[Array, "B"]
  token: Int[Array, "B"]
  drawn: Int[Array, "B"]
  active: Bool[Array, "B"]
  seeds: UInt[Array, "B"]
  limits: Int[Array, "B"]
  eos_ids: Int[Array, "B E"]
  text: Int[Array, "B"] | None


def column_axis(attn_impl: str) -> int:
  """The axis of `Slots.keys` along which the columns lie."""
  return 3 if attn_impl == "xla" else 2


@functools.partial(
  jax.jit,
  static_argnames=(
    *("architecture", "rows", "columns", "eos_ids", "dtype", "attn_impl", "mesh", "texts"),
  ),
)
def empty(
  *,
  architecture: Architecture,
  rows: int,
  columns: int,
  eos_ids: int,
  dtype: Any,
  attn_impl: str,
  mesh: Mesh | None = None,
  texts: bool = False,
) -> Slots:
  """`rows` slots that wait for a prompt, over so many columns, with room for so many end ids each;
  on a mesh the rows are spread over its groups, and heads over the devices of a group, of which
  each runs `architecture`. `texts`: whether rows may stand behind texts.
  """
  H = architecture.head_size

  def cache(*shape: int) -> tuple[Array, ...]:
    shape = (rows, architecture.kv_heads * groups.size_of(mesh), *shape)
    return tuple(jnp.zeros(shape, dtype) for _ in range(architecture.layers))

  zero = jnp.zeros((rows,), jnp.int32)
  slots = Slots(
    keys=cache(H, columns) if column_axis(attn_impl) == 3 else cache(columns, H),
    values=cache(columns, H),
    column=jnp.int32(0),
    filled=zero,
    token=zero,
    drawn=zero,
    active=zero > 0,
    seeds=zero.astype(jnp.uint32),
    limits=zero,
    eos_ids=jnp.full((rows, eos_ids), -1, jnp.int32),
    text=zero - 1 if texts else None,
  )
  if mesh is None:
    return slots
  place = lambda leaf, spec: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
  return jax.tree.map(place, slots, specs(mesh, slots))


@functools.lru_cache(maxsize=64)
def committed(make: Callable, device: jax.Device | None, **static: Any) -> Callable:
  """`make` with these static arguments, as one program whose results are committed to the device;
  None: `make` itself, which says where on a mesh they lie.

  Of committed arrays a program returns such ones. Of others it does not: to jit, arrays on a mesh
  of one device, and arrays of a program that was given none, differ from those that come back, and
  each program would be compiled for its first call and again for the next. To commit hundreds of
  arrays afterwards, one by one, takes the host 10 ms.
  """
  make = functools.partial(make, **static)
  return jax.jit(make, out_shardings=SingleDeviceSharding(device)) if device else make


def device_of(tree: Any) -> jax.Device:
  """A device on which the arrays lie; of NumPy's arrays, the one where jit puts them."""
  arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
  return next(iter((arrays[0] if arrays else jnp.zeros(())).devices()))


def row_axes(mesh: Mesh | None) -> tuple[str, ...]:
  """The axes over which rows are spread. None where there are several processes: the host reads
  what was drawn, of others' rows it could not; there every group has all rows.
  """
  if mesh is None or mesh.is_multi_process:
    return ()
  return tuple(name for name in mesh.axis_names if name != groups.AXIS)


def specs(mesh: Mesh, tree: Any) -> Any:
  """How the arrays of a tree lie on the mesh: those of rows spread over its groups, keys and values
  also over the devices of a group, by heads; numbers whole.
  """
  rows, heads = row_axes(mesh) or None, groups.axis_of(mesh)

  def one(leaf: Any) -> PartitionSpec:
    if not jnp.ndim(leaf):
      return PartitionSpec()
    return PartitionSpec(rows, heads) if heads and jnp.ndim(leaf) == 4 else PartitionSpec(rows)

  return jax.tree.map(one, tree)


def by_rows(
  run: Callable, mesh: Mesh | None, shared: Any, shared_specs: Any, slots: Slots, *given: Any
) -> tuple[Slots, tuple[Array, ...]]:
  """`run` on the rows of each device, which returns the slots and arrays of rows. `shared`: weights
  and what else is not of rows, which lies as `shared_specs` say.
  """
  if mesh is None:
    return run(shared, slots, *given)
  placed = specs(mesh, (slots, *given))
  out = placed[0], PartitionSpec(row_axes(mesh) or None)
  # A kernel does not say over which axes its results differ, which a check would want to know.
  return jax.shard_map(
    run, mesh=mesh, in_specs=(shared_specs, *placed), out_specs=out, check_vma=False
  )(shared, slots, *given)


def put(
  cache: Array, rows_R: Int[Array, "R"], index_RxS: Int[Array, "R S"], new: Array, axis: int
) -> Array:
  """The cache of one layer, whose columns lie along `axis`, with prompts in these rows: of
  `new` [R, K, …, H] each column gets what `index_RxS` says. Rows beyond the last are dropped.
  """
  new = jnp.take_along_axis(new, index_RxS[:, None, :, None], axis=2)
  return cache.at[rows_R].set(new if axis == 2 else new.swapaxes(2, 3), mode="drop")


def enter(slots: Slots, rows_R: Int[Array, "R"], **entered: Array) -> Slots:
  """The slots with other fields [R, …] in these rows; rows beyond the last are dropped."""
  return slots._replace(
    **{name: getattr(slots, name).at[rows_R].set(new, mode="drop") for name, new in entered.items()}
  )


def ended(
  token_B: Int[Array, "B"],
  drawn_B: Int[Array, "B"],
  limits_B: Int[Array, "B"],
  eos_ids_BxE: Int[Array, "B E"],
) -> Bool[Array, "B"]:
  """Whether a response ends with this id, the `drawn_B`-th of it."""
  at_end = (token_B[:, None] == eos_ids_BxE).any(-1)
  return at_end | (drawn_B >= limits_B) | (token_B == NOT_FINITE)


@functools.partial(jax.jit, static_argnames=("columns", "attn_impl"))
def resize(
  slots: Slots, rows_R: Int[Array, "R"] | None = None, *, columns: int | None = None, attn_impl: str
) -> Slots:
  """The same slots over more columns, or these rows of them alone; None: as many as there are.

  A larger cache begins with the old one, turned so that the column written last is the last of the
  old ones. Both caches are alive meanwhile.
  """
  if rows_R is not None:
    slots = jax.tree.map(lambda leaf: leaf[rows_R] if leaf.ndim else leaf, slots)
  if columns is None:
    return slots
  S = slots.values[0].shape[2]

  def widen(cache: Array, axis: int) -> Array:
    room = [(0, columns - S if a == axis else 0) for a in range(cache.ndim)]
    return jnp.pad(jnp.roll(cache, -slots.column, axis=axis), room)

  return slots._replace(
    keys=tuple(widen(cache, column_axis(attn_impl)) for cache in slots.keys),
    values=tuple(widen(cache, 2) for cache in slots.values),
    column=jnp.int32(S),
  )
