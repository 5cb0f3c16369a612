"""Keys and values of texts that many prompts begin with, kept once, and the attention to them.

A slot's circular cache holds only what is its own; what stands before it is one of n texts. Each
query attends to both apart, and the two are joined by their log-sum-exps, which is exact:

    texts [n, K, P, H]          slots [B, K, S, H]
    text 0   a a a a a a .      row 0, text 0    x x x
    text 1   b b b b . . .      row 1, text 1    y y
                                row 2, none      z z z z z
                                row 3, text 0    w

Rows behind one text are put together, M of them into a block, so that a text is read once a block
and not once a row. How many blocks are needed depends on who sits where; there is room for the
most. With M = 2, the rows above:

    block 0, text 0    row 0, row 3
    block 1, text 1    row 1, -
    block 2, none      -, -

In prefill a row has many queries, and is a block of its own.

Both parts must multiply the same queries, rounded alike: where keys have a bias of hundreds, as in
Qwen2.5, a query's rounding moves all its scores by more than 1, which a softmax over all of them
forgets, but not the weight of one part against the other.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import beginnings, groups, kv_cache, model

BLOCK = 64  # of a text's columns that are read at once; divides P
QUERIES = 128  # of a key-value head that one program of the kernel takes, at most
PROGRAMS = 256  # texts are cut into parts where there are fewer


class Texts(NamedTuple):
  """n texts.

  Attributes:
    keys, values: L arrays [n, K, P, H].
    length: [n] int32, tokens of each.
  """

  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  length: Int[Array, "n"]


class LayerTexts(NamedTuple):
  """What one layer has of n texts.

  Attributes:
    keys, values: [n, K, P, H].
    length: [n] int32, tokens of each.
  """

  keys: Float[Array, "n K P H"]
  values: Float[Array, "n K P H"]
  length: Int[Array, "n"]


class Blocks(NamedTuple):
  """B rows, those behind one text together: C blocks of M places.

  Attributes:
    rows: [C, M] int32, the row in each place; 0 where there is none.
    text: [C] int32, which one each block is behind; -1 for a block of no rows.
    place: [B] int32, where in the blocks, one after the other, each row is; C M for none.
  """

  rows: Int[Array, "C M"]
  text: Int[Array, "C"]
  place: Int[Array, "B"]


def read(
  weights: Any,
  common: beginnings.Beginnings,
  *,
  architecture: Architecture,
  mesh: Mesh | None = None,
) -> Texts:
  """Reads each text once; places beyond the last are of no tokens. `weights` are from
  `model.prepare`; on a mesh every group gets all, each device of it those of its heads.
  """
  texts = common.texts
  room = beginnings.room(max(map(len, texts)))
  tokens = np.zeros((common.places, room), np.int32)
  length = np.zeros((common.places,), np.int32)
  for row, ids in enumerate(texts):
    # Filled up with a text's own last id: another one's embedding might be no number.
    tokens[row] = [*ids, *[ids[-1]] * (room - len(ids))]
    length[row] = len(ids)
  count = np.int32(len(texts))
  keys, values = _read(weights, tokens, count, architecture=architecture, mesh=mesh)
  return Texts(keys, values, length)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh"))
def _read(weights, tokens_nxP, count, *, architecture, mesh):
  """The keys and values of the first `count` texts, and zeros."""
  axis = groups.axis_of(mesh)
  n, P = tokens_nxP.shape
  shape = n, architecture.kv_heads, P, architecture.head_size
  dtype = weights["embed"]["embedding"].dtype

  def one(weights, tokens_P):
    def attend(layer, own, _):
      q, k, v = own
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
      attn_impl = model.prefill_attn_impl(architecture, dtype)
      return attention.causal(q, k, v, attn_impl), (k, v)

    positions = jnp.arange(len(tokens_P), dtype=jnp.int32)[None]
    split, nothing = model.heads_at(architecture, positions), [None] * architecture.layers
    _, kept = model.forward(weights, architecture, tokens_P[None], split, attend, nothing, axis)
    return tuple(map(list, zip(*kept, strict=True)))

  def run(weights, tokens_nxP, count):
    put = lambda i: lambda all_of_them, new: all_of_them.at[i].set(new[0])
    read = lambda i, found: jax.tree.map(put(i), found, one(weights, tokens_nxP[i]))
    nothing = [jnp.zeros(shape, dtype)] * architecture.layers
    found = jax.lax.fori_loop(0, count, read, (nothing, nothing))
    return tuple(map(tuple, found))

  if mesh is not None:
    given = model.specs(mesh, weights), PartitionSpec(), PartitionSpec()
    run = jax.shard_map(run, mesh=mesh, in_specs=given, out_specs=_by_heads(axis), check_vma=False)
  return run(weights, tokens_nxP, count)


def specs(mesh: Mesh, texts: Texts) -> Texts:
  """How texts lie on the mesh: all on each device, or those of its heads."""
  caches = jax.tree.map(lambda _: _by_heads(groups.axis_of(mesh)), texts.keys)
  return Texts(caches, caches, PartitionSpec())


def _by_heads(axis: str | None) -> PartitionSpec:
  return PartitionSpec(None, axis) if axis else PartitionSpec()


def by_layer(texts: Texts | None, layers: int) -> list[LayerTexts | None]:
  """What each of so many layers has of the texts; None where there are none."""
  if texts is None:
    return [None] * layers
  pairs = zip(texts.keys, texts.values, strict=True)
  return [LayerTexts(keys, values, texts.length) for keys, values in pairs]


def lengths(length_n: Int[Array, "n"], text_R: Int[Array, "R"]) -> Int[Array, "R"]:
  """The tokens of each one's text, of texts of these lengths; 0 for -1."""
  return jnp.where(text_R < 0, 0, jnp.asarray(length_n)[text_R])


def blocks(text_B: Int[Array, "B"], texts: Texts, group: int) -> Blocks:
  """The rows in blocks; rows of text -1 are in none. `group`: the queries of a key-value head."""
  B, n = len(text_B), len(texts.length)
  # No more than are likely to come together: what is not filled costs as much as what is.
  M = max(1, min(QUERIES // group, 1 << (-(-B // n) - 1).bit_length()))
  C = min(B, (B + n * (M - 1)) // M)
  member = text_B[:, None] == jnp.arange(n)
  count = member.sum(0)
  needed = -(-count // M)
  first = jnp.cumsum(needed) - needed  # the first block of each text
  nth = (jnp.cumsum(member, 0) * member).sum(1) - 1  # among the rows of its text
  place = jnp.where(text_B < 0, C * M, first[text_B] * M + nth)
  rows = jnp.zeros((C * M,), jnp.int32).at[place].set(jnp.arange(B), mode="drop")
  text = jnp.full((C,), -1, jnp.int32).at[place // M].set(text_B, mode="drop")
  return Blocks(rows.reshape(C, M), text, place)


def attend_rows(
  q_BxNxH: Float[Array, "B N H"],
  where: Blocks,
  texts: LayerTexts,
  attn_impl: str,
  scale: float,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
  """`attend` for one query a row; what rows in no block get means nothing."""
  value, logsumexp = attend(q_BxNxH[where.rows], where.text, texts, attn_impl, scale)
  place = jnp.minimum(where.place, where.rows.size - 1)
  return tuple(x.reshape(-1, *x.shape[2:])[place] for x in (value, logsumexp))


def attend(
  q_CxMxNxH: Float[Array, "C M N H"],
  text_C: Int[Array, "C"],
  texts: LayerTexts,
  attn_impl: str,
  scale: float,
) -> tuple[Float[Array, "C M N H"], Float[Array, "C M N"]]:
  """Softmax attention of each block's queries to the whole of its text, and the log-sum-exps of the
  scores, float32. For a block without a text both mean nothing.

  `attn_impl` is "xla", block by block, or "triton" on NVIDIA GPUs, in bfloat16. `scale` is applied
  where the attention beside it does that: to the queries in the one, to the scores in the other.
  """
  C, M, N, H = q_CxMxNxH.shape
  length_C, K = lengths(texts.length, text_C), texts.keys.shape[1]
  q = q_CxMxNxH.reshape(C, M, K, N // K, H).swapaxes(1, 2).reshape(C, K, -1, H)
  run = kernel if attn_impl == "triton" else _plain
  value, logsumexp = run(q, jnp.maximum(text_C, 0), length_C, texts.keys, texts.values, scale)
  back = lambda x: (
    x.reshape(C, K, M, N // K, *x.shape[3:]).swapaxes(1, 2).reshape(C, M, N, *x.shape[3:])
  )
  return back(value), back(logsumexp)


def attend_own(
  q_RxTxNxH: Float[Array, "R T N H"],
  k_RxKxSxH: Float[Array, "R K S H"],
  v_RxKxSxH: Float[Array, "R K S H"],
  mask_RxTxS: Bool[Array, "R T S"] | None,
  attn_impl: str,
) -> tuple[Float[Array, "R T N H"], Float[Array, "R T N"]]:
  """What `attend` is joined to in prefill, and its log-sum-exps: attention to a row's own tokens,
  by cuDNN if `model.prefill_attn_impl` says so, or else in plain XLA, also on a TPU; without a mask
  S is T, and each sees those up to itself.
  """
  if attn_impl == "cudnn":
    return attention.with_logsumexp(q_RxTxNxH, k_RxKxSxH, v_RxKxSxH, mask_RxTxS)
  if mask_RxTxS is None:
    R, T = q_RxTxNxH.shape[:2]
    mask_RxTxS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (R, T, T))
  return kv_cache.attend_many(q_RxTxNxH, k_RxKxSxH, v_RxKxSxH, mask_RxTxS)


def join(
  own: tuple[Array, Array], before: tuple[Array, Array], text_R: Int[Array, "R"]
) -> Float[Array, "R *shape H"]:
  """One attention from that to each row's own tokens and that to its text, [R, …, H] with
  log-sum-exps [R, …]; of rows without a text their own.
  """
  y, logsumexp = own
  there = (text_R >= 0).reshape(-1, *[1] * logsumexp.ndim)
  # What stands there without a text is another row's, and may be no number: 0 times it is none.
  value = jnp.where(there, before[0], 0)
  return attention.join(y, logsumexp[..., None], value, before[1][..., None], there)


def _plain(q_CxKxQxH, text_C, length_C, keys, values, scale):
  P = keys.shape[2]

  def one(block):
    q, text, length = block
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("kqh,kph->kqp", q * scale, keys[text])
    scores = jnp.where(jnp.arange(P) < length, scores, attention.MASKED)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    mass = weights.sum(-1, keepdims=True)
    value = product("kqp,kph->kqh", weights.astype(values.dtype), values[text]) / mass
    return value, (top + jnp.log(mass))[..., 0]

  return jax.lax.map(one, (q_CxKxQxH, text_C, length_C))


def kernel(
  q_CxKxQxH: Float[Array, "C K Q H"],
  text_C: Int[Array, "C"],
  length_C: Int[Array, "C"],
  keys_nxKxPxH: Float[Array, "n K P H"],
  values_nxKxPxH: Float[Array, "n K P H"],
  scale: float,
  *,
  interpret: bool = False,
) -> tuple[Float[Array, "C K Q H"], Float[Array, "C K Q"]]:
  """`_plain` as one kernel that keeps no scores: by a running softmax over the text, in parts where
  there are few blocks; `text_C` is at least 0, and a block of length 0 reads nothing.
  """
  C, K, Q, H = q_CxKxQxH.shape
  n, _, P, _ = keys_nxKxPxH.shape
  tile = min(QUERIES, max(kv_cache.ROWS, 1 << (Q - 1).bit_length()))
  tiles = -(-Q // tile)
  # Tiles beside each other, for the programs that read the same text to run at the same time.
  q = jnp.pad(q_CxKxQxH, ((0, 0), (0, 0), (0, tiles * tile - Q), (0, 0)))
  q = q.reshape(C, K, tiles, tile, H).swapaxes(1, 2).reshape(C * tiles, K, tile, H)
  text, length = jnp.repeat(text_C, tiles), jnp.repeat(length_C, tiles)
  parts = max(1, min(PROGRAMS // (C * tiles * K), P // BLOCK))
  one = pl.BlockSpec((None,), lambda c, k, p: (c,))
  whole = pl.BlockSpec((n, None, P, H), lambda c, k, p: (0, k, 0, 0))
  part = lambda *block: pl.BlockSpec(
    (None, None, None, *block), lambda c, k, p: (c, k, p) + (0,) * len(block)
  )
  parted = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
    (C * tiles, K, parts, *shape), dtype
  )
  value, logsumexp = pl.pallas_call(
    functools.partial(_kernel, parts=parts, scale=scale),
    grid=(C * tiles, K, parts),
    in_specs=[
      one,
      one,
      pl.BlockSpec((None, None, tile, H), lambda c, k, p: (c, k, 0, 0)),
      whole,
      whole,
    ],
    out_specs=[part(tile, H), part(tile)],
    out_shape=[parted(tile, H, dtype=q.dtype if parts == 1 else jnp.float32), parted(tile)],
    compiler_params=triton.CompilerParams(num_warps=8 if tile == QUERIES else 4, num_stages=3),
    interpret=interpret,
    name="text_attention",
  )(text, length, q, keys_nxKxPxH, values_nxKxPxH)
  top = logsumexp.max(2, keepdims=True)
  mass = jnp.exp(logsumexp - top)
  total = mass.sum(2, keepdims=True)
  value = (value * (mass / total)[..., None]).sum(2) if parts > 1 else value[:, :, 0]
  back = lambda x: (
    x.reshape(C, tiles, K, tile, *x.shape[3:])
    .swapaxes(1, 2)
    .reshape(C, K, tiles * tile, *x.shape[3:])[:, :, :Q]
  )
  return back(value), back((top + jnp.log(total))[:, :, 0])


def _kernel(
  text_ref, length_ref, q_ref, keys_ref, values_ref, value_ref, logsumexp_ref, *, parts, scale
):
  """One part of a text for one tile of queries and key-value head: every `parts`-th block."""
  part, text, length = pl.program_id(2), text_ref[()], length_ref[()]
  tile, H = q_ref.shape
  q = q_ref[...]

  def block(i, carry):
    start = (part + i * parts) * BLOCK
    here = pl.ds(start, BLOCK)
    scores = triton.dot(q, keys_ref[text, here, :].T) * scale
    scores = jnp.where((start + jnp.arange(BLOCK) < length)[None], scores, attention.MASKED)
    return kv_cache.online_softmax(scores, values_ref[text, here, :], carry)

  nothing = (
    jnp.zeros((tile, H), jnp.float32),
    jnp.zeros((tile,), jnp.float32),
    jnp.full((tile,), attention.MASKED, jnp.float32),
  )
  count = pl.cdiv(jnp.maximum(pl.cdiv(length, BLOCK) - part, 0), parts)
  value, mass, top = jax.lax.fori_loop(0, count, block, nothing)
  # Of a part that reads nothing the mass is 0, which the sum over the parts must forget.
  value_ref[...] = (value / jnp.where(mass > 0, mass, 1)[:, None]).astype(value_ref.dtype)
  logsumexp_ref[...] = jnp.where(mass > 0, top + jnp.log(mass), attention.MASKED)
