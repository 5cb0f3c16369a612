"""The frozen teacher: the round's first weights, with the knowledge read once a round.

Knowledge and teacher are constant through a round, so each text's keys and values are computed
once; every sample then costs the teacher its own tokens only, which attend to the text's and to
their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import on_mesh
from oel_jax.policy import transformer, unrolled
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import split
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime import target

MULTIPLE = 32  # so that a text a little longer has the same shapes
MULTIPLE_CPU = 128  # there, to compile a step takes as long as to run eight


class Teacher(NamedTuple):
  """What a step needs of π_teacher(·|e, x, y<t) for the G texts e of a round.

  The form of its parameters says how the layers run, the student's too: two decoders would differ
  by their rounding.

  Attributes:
    params: in the type of the computation, stacked or fused (`unrolled.fuse`).
    keys, values: [L, G, K, P, H], of each text.
    length: [G] int32, tokens of each.
    skip: [G] int32, or one for all: how many tokens at the beginning of a sample stand at the
      beginning of the text, too; the teacher does not read them again.
  """

  params: Any
  keys: Array
  values: Array
  length: Array
  skip: Array


def is_unrolled(teacher: Teacher | None) -> bool:
  """Whether the layers run without a loop (`policy.unrolled`). With no teacher, which imitation
  alone can do without, they run in one.
  """
  return teacher is not None and isinstance(teacher.params["layers"], tuple)


def prepare(
  params: Any,
  architecture: Architecture,
  knowledge: Sequence[Sequence[int]],
  *,
  dtype: Any,
  skip: int | Sequence[int] = 0,
  attn_impl: str = "xla",
  shardings: Any = None,
  on_host: bool = False,
  unroll: bool = False,
) -> Teacher:
  """Reads each knowledge text once.

  Args:
    params: of the teacher.
    architecture: its shapes.
    knowledge: the texts' ids; a text may be empty.
    dtype: of the computation. The teacher's parameters are kept in it: in bfloat16, that is half of
      the memory.
    skip: see `Teacher`.
    attn_impl: the attention implementation (`attention.attend`).
    shardings: of keys and values, as `mesh.param_shardings` gives them for {"teacher": {"keys": …,
      "values": …}}; None on one device.
    unroll: run the layers without a loop (`policy.unrolled`): faster on a GPU, compiled longer. Not
      with on_host.
    on_host: keep keys and values in the host's memory; every pass then fetches them layer by layer,
      in a loop. For a single process.

  Returns:
    The teacher. Keys and values take 2 L G K P H numbers: with Qwen3-4B and ten texts of 8,192
    tokens 11.3 GiB in bfloat16.
  """
  mesh = None if shardings is None else shardings[0].mesh
  if unroll and mesh is not None:
    on_mesh.check(architecture, mesh)
  params = _cast(params, dtype)
  length = np.array([len(ids) for ids in knowledge], np.int32)
  tokens = np.zeros((len(knowledge), room(knowledge)), np.int32)
  for row, ids in zip(tokens, knowledge, strict=True):
    row[: len(ids)] = ids
  by_texts = unroll and not on_host and mesh is not None and mesh_lib.row_shards(mesh) == mesh.size
  by_texts = by_texts and mesh.size > 1
  read = functools.partial(_read(architecture, dtype, attn_impl, shardings, by_texts), params)
  if on_host:
    keys, values = _to_host(read, tokens, length, shardings)
  else:
    keys, values = read(tokens, length)
  if unroll and not on_host:
    places = on_mesh.weight_shardings(mesh, params, dtype)
    fuse = jax.jit(on_mesh.fuse, static_argnums=(1, 2, 3), out_shardings=places)
    params = fuse(params, architecture, dtype, mesh)
  skip_G = np.broadcast_to(np.int32(skip), length.shape)
  # Not `jnp.asarray`, which compiles a program for each.
  return Teacher(params, keys, values, *jax.device_put((length, skip_G)))


def _to_host(
  read: Callable[..., tuple[Array, Array]],
  tokens_GxP: Int[np.ndarray, "G P"],
  length_G: Int[np.ndarray, "G"],
  shardings: Any,
) -> list[Array]:
  """Keys and values in the host's pinned memory, read text by text: the devices have no room for
  all.
  """
  kept = None
  for i in range(len(tokens_GxP)):
    parts = read(tokens_GxP[i : i + 1], length_G[i : i + 1])
    if kept is None:
      shape = parts[0].shape[0], len(tokens_GxP), *parts[0].shape[2:]
      kept = [np.empty(shape, part.dtype) for part in parts]
    for whole, part in zip(kept, parts, strict=True):
      whole[:, i : i + 1] = part
  places = shardings or (SingleDeviceSharding(jax.devices()[0]),) * 2
  return [
    jax.device_put(whole, place.with_memory_kind("pinned_host"))
    for whole, place in zip(kept, places, strict=True)
  ]


def without_knowledge(teacher: Teacher) -> Teacher:
  """The same teacher, which has read one text of no tokens; inside a jitted function."""
  layers, _, kv_heads, _, head_size = teacher.keys.shape
  nothing = jnp.zeros((layers, 1, kv_heads, 0, head_size), teacher.keys.dtype)
  zero = jnp.zeros(1, jnp.int32)
  return teacher._replace(keys=nothing, values=nothing, length=zero, skip=zero)


def room(knowledge: Sequence[Sequence[int]]) -> int:
  """P, the tokens that each text has room for: those of the longest, rounded up to MULTIPLE, on a
  CPU to MULTIPLE_CPU.
  """
  multiple = MULTIPLE_CPU if target.backend() == "cpu" else MULTIPLE
  return -(-max(map(len, knowledge)) // multiple) * multiple


def _cast(params: Any, dtype: Any) -> Any:
  """`transformer.cast`, tables too, in one program. Arrays that have their type stay what they are,
  and cost no memory: the program would copy them.
  """
  wanted = jax.eval_shape(lambda params: transformer.cast(params, dtype, tables=True), params)
  leaves, tree = jax.tree.flatten(params)
  types = [leaf.dtype for leaf in jax.tree.leaves(wanted)]
  others = [i for i, leaf in enumerate(leaves) if leaf.dtype != types[i]]
  if others:
    made = _as_type([leaves[i] for i in others], dtype)
    for i, leaf in zip(others, made, strict=True):
      leaves[i] = leaf
  return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, static_argnums=1)
def _as_type(arrays: Sequence[Array], dtype: Any) -> list[Array]:
  return [array.astype(dtype) for array in arrays]


@functools.cache
def _read(architecture, dtype, attn_impl, shardings, by_texts=False):
  """The jitted program that turns texts, [G, P], into keys and values, one text at a time; with
  `by_texts` one on each device (`on_mesh.by_texts`).
  """
  mesh = None if shardings is None else shardings[0].mesh

  def read(params, tokens_GxP, length_G, mesh=mesh, axis=None):
    G, P = tokens_GxP.shape
    if P == 0:
      return (
        jnp.zeros(
          (architecture.layers, G, architecture.kv_heads, 0, architecture.head_size), dtype
        ),
      ) * 2
    positions = jnp.arange(P, dtype=jnp.int32)[None]

    def one(text):
      ids, length = text
      segments = (positions < length).astype(jnp.int32)
      _, kv = transformer.apply(
        params,
        architecture,
        ids[None],
        positions,
        segments,
        dtype=dtype,
        attn_impl=attn_impl,
        keep_cache=True,
        mesh=mesh,
        axis=axis,
      )
      return jax.tree.map(lambda x: x[:, 0], kv)  # [L, K, P, H]

    return tuple(x.swapaxes(0, 1) for x in jax.lax.map(one, (tokens_GxP, length_G)))

  if by_texts:
    one_device = functools.partial(read, mesh=None)
    return jax.jit(
      lambda *given: on_mesh.by_texts(one_device, mesh, *given), out_shardings=shardings
    )
  return jax.jit(read, out_shardings=shardings)


def student_hidden(
  params: Any,
  architecture: Architecture,
  batch: batch_lib.Batch,
  *,
  dtype: Any,
  remat: str,
  attn_impl: str,
  mesh: Mesh | None = None,
  axes: split.Axes = split.Axes(),
) -> Float[Array, "S R D"]:
  """π_θ's last hidden states at the response positions, given (prompt, response), in `dtype`;
  `mesh` is None on one device and inside `jax.shard_map`, where `axes` is as in `unrolled.forward`.
  """
  how = dict(dtype=dtype, remat=remat, attn_impl=attn_impl, axes=axes)
  return _hidden(params, architecture, batch, mesh, **how)


def _hidden(params, architecture, batch, mesh, *, prefix=None, axes=split.Axes(), **how):
  """The last hidden states at the response positions; the form of the parameters says by which of
  the two decoders, of which the unrolled one is for a device's own rows.
  """
  read = batch.tokens, batch.positions, batch.segments
  if isinstance(params["layers"], tuple):
    return unrolled.forward(params, architecture, *read, batch.at, prefix=prefix, axes=axes, **how)
  return batch_lib.response_rows(
    transformer.apply(params, architecture, *read, prefix=prefix, mesh=mesh, **how)[0], batch.at
  )


def teacher_hidden(
  teacher: Teacher,
  architecture: Architecture,
  batch: batch_lib.Batch,
  *,
  dtype: Any,
  attn_impl: str,
  mesh: Mesh | None = None,
  axes: split.Axes = split.Axes(),
) -> Float[Array, "S R D"]:
  """π_teacher's last hidden states at the response positions, given (knowledge, prompt, response);
  no gradient flows. `mesh` and `axes` as in `student_hidden`. Those of a batch that has them
  already are its `target`.
  """
  if batch.target is not None:
    return jax.lax.stop_gradient(batch.target)
  how = dict(dtype=dtype, remat="none", attn_impl=attn_impl, axes=axes)
  rest, prefix = as_read(teacher, batch, attn_impl)
  return jax.lax.stop_gradient(
    _hidden(teacher.params, architecture, rest, mesh, prefix=prefix, **how)
  )


def as_read(
  teacher: Teacher, batch: batch_lib.Batch, attn_impl: str
) -> tuple[batch_lib.Batch, transformer.Prefix | None]:
  """The batch as the teacher reads it, behind its knowledge, and that; None without any."""
  if not teacher.keys.shape[3]:
    return batch, None
  prefix = transformer.Prefix(
    teacher.keys, teacher.values, teacher.length, batch.texts, batch.slots
  )
  skip_SxM = jnp.broadcast_to(teacher.skip, teacher.length.shape)[batch.texts]
  skip_SxT = jnp.take_along_axis(skip_SxM, batch.slots, axis=1)
  length_SxT = jnp.take_along_axis(teacher.length[batch.texts], batch.slots, axis=1)
  positions = batch.positions - skip_SxT + length_SxT
  # What is skipped becomes padding; for the attention that sees no segments, padding behind the
  # row's one sample.
  segments = jnp.where(batch.positions < skip_SxT, 0, batch.segments)
  rest = batch._replace(segments=segments, positions=jnp.maximum(positions, 0))
  if attn_impl == "flash":
    rest = to_the_end(rest, skip_SxM[:, 0])
  return rest, prefix


def to_the_end(batch: batch_lib.Batch, count: Array) -> batch_lib.Batch:
  """Puts the first tokens of each row behind its others, `count` of them, [S] or one for all.

  A row holds one sample, and the tokens are of its prompt.
  """
  count_S = jnp.broadcast_to(count, batch.at.shape[:1])
  roll = jax.vmap(lambda row, n: jnp.roll(row, -n))
  names = "tokens", "positions", "segments"
  moved = {name: roll(getattr(batch, name), count_S) for name in names}
  return batch._replace(**moved, at=jnp.maximum(batch.at - count_S[:, None], 0))
