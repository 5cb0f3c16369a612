"""Attention over the circular cache of keys and values: one query a row, and only the columns that
the row fills.

Every step writes the next of S columns, in all rows at once, and begins anew behind the last. A
row's tokens are the `filled` columns written last, round the end of the cache if need be:

    column             0  1  2  3  4  5  6  7      S = 8; column 3 is the next to be written
    row 0, filled 5    c  d  e  .  .  .  a  b      reads columns 6 7 0 1 2
    row 1, filled 2    .  x  y  .  .  .  .  .      reads columns 1 2

In plain XLA the whole cache is read and masked, and a step has more small kernels than large ones.
On NVIDIA GPUs a Triton kernel, by way of Pallas, does everything between two matrix products: it
norms and rotates queries and keys, writes the column, and attends to what is filled.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.runtime import target

BLOCK = 32  # columns that are read at once; divides the cache
PROGRAMS = 512  # a GPU is busy with so many; rows are cut into parts where there are fewer
ROWS = 16  # of the smallest matrix product; the queries of one key-value head are fewer


def attn_impl(architecture: Architecture, dtype: Any) -> str:
  """Which of the two a device is given: "triton" is `step`, "xla" `attend`. In float32 the kernel's
  products would be rounded to TF32.
  """
  size, queries = architecture.head_size, architecture.heads // architecture.kv_heads
  fits = (
    jnp.dtype(dtype) == jnp.bfloat16
    and size >= 2 * ROWS
    and size & (size - 1) == 0
    and queries <= ROWS
  )
  return "triton" if fits and target.backend() == "gpu" else "xla"


def attend(
  q_BxNxH: Float[Array, "B N H"],
  new_k_BxKxH: Float[Array, "B K H"],
  new_v_BxKxH: Float[Array, "B K H"],
  k_BxKxHxS: Float[Array, "B K H S"],
  v_BxKxSxH: Float[Array, "B K S H"],
  column: Int[Array, ""],
  filled_B: Int[Array, "B"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
  """Softmax attention of each row's query over its own new key and value and the `filled_B` columns
  before `column`, in plain XLA; and the log-sum-exps of the scores, float32.

  The new ones are not read from the cache: to read what it has just written, XLA copies the cache
  at every token.
  """
  B, K, H, S = k_BxKxHxS.shape
  seen = jnp.mod(column - 1 - jnp.arange(S), S) < filled_B[:, None]
  q = (q_BxNxH * H**-0.5).reshape(B, K, -1, H)
  scores = jnp.where(seen[:, None, None], _product(q, k_BxKxHxS, 2), attention.MASKED)
  own = jnp.einsum("bkgh,bkh->bkg", q, new_k_BxKxH, preferred_element_type=jnp.float32)[..., None]
  top = jnp.maximum(scores.max(-1, keepdims=True), own)
  weights, own = jnp.exp(scores - top), jnp.exp(own - top)
  value = _product(weights.astype(v_BxKxSxH.dtype), v_BxKxSxH, 2) + own * new_v_BxKxH[
    :, :, None
  ].astype(jnp.float32)
  mass = weights.sum(-1, keepdims=True) + own
  return (
    (value / mass).reshape(q_BxNxH.shape).astype(q_BxNxH.dtype),
    (top + jnp.log(mass)).reshape(q_BxNxH.shape[:2]),
  )


def attend_many(
  q_BxTxNxH: Float[Array, "B T N H"],
  k_BxKxSxH: Float[Array, "B K S H"],
  v_BxKxSxH: Float[Array, "B K S H"],
  mask_BxTxS: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """What `attention.attend` does in plain XLA, in the type of the queries, softmax in float32; on a
  CPU twice as fast, but its gradient is not. And the log-sum-exps of the scores, float32.
  """
  B, T, N, H = q_BxTxNxH.shape
  K, S = k_BxKxSxH.shape[1:3]
  q = (q_BxTxNxH * H**-0.5).reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
  seen = mask_BxTxS[:, None, None]
  scores = _product(q, k_BxKxSxH, 3).reshape(B, K, -1, T, S)
  if target.backend() == "cpu":
    # To the same bits, and faster: one choice for all heads, and a sum for each.
    scores += jax.lax.optimization_barrier(jnp.where(seen, 0.0, attention.MASKED))
  else:
    scores = jnp.where(seen, scores, attention.MASKED)
  top = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - top)
  mass = weights.sum(-1, keepdims=True)
  value = _product(weights.astype(v_BxKxSxH.dtype).reshape(B, K, -1, S), v_BxKxSxH, 2).reshape(
    B, K, -1, T, H
  )
  back = lambda x: x.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
  return back(value / mass).astype(q_BxTxNxH.dtype), back(top + jnp.log(mass))[..., 0]


def _product(x_BxKxTxI: Array, y_BxKxSxI: Array, axis: int) -> Float[Array, "B K T S"]:
  """Sums over x's last axis and y's `axis`, 2 or 3. With one batch dimension, and with the
  softmax's division last, faster on a CPU than `attention.attend`.
  """
  B, K, T, _ = x_BxKxTxI.shape
  x, y = (z.reshape(B * K, *z.shape[2:]) for z in (x_BxKxTxI, y_BxKxSxI))
  return jax.lax.dot_general(
    x, y, (((2,), (axis - 1,)), ((0,), (0,))), preferred_element_type=jnp.float32
  ).reshape(B, K, T, -1)


def step(
  qkv_BxAxH: Float[Array, "B A H"],
  bias_AxH: Float[Array, "A H"] | None,
  scale: Float[Array, "NK H"] | None,
  cos_sin_BxH: Float[Array, "B H"],
  k_BxKxSxH: Float[Array, "B K S H"],
  v_BxKxSxH: Float[Array, "B K S H"],
  column: Int[Array, ""],
  filled_B: Int[Array, "B"],
  *,
  eps: float,
  queries: bool = False,
  interpret: bool = False,
) -> tuple[Array, Array, Array, Array, Array | None]:
  """`attend` with what stands before it, as one kernel.

  Args:
    qkv_BxAxH: the heads as the projection leaves them: N of queries, K of keys, K of values.
    bias_AxH: float32, added to them, and not rounded before the rotation; None for no bias.
    scale: of the queries' and keys' RMS norm; None for no norm.
    cos_sin_BxH: cosines, then sines of the rotary angles, float32.
    k_BxKxSxH, v_BxKxSxH: the cache; it is written in place.
    column: the one to write.
    filled_B: columns that each row sees, the new one with them.
    eps: of the norm.
    queries: whether to return these, too.
    interpret: run it without a GPU.

  Returns:
    The attention's output [B, N, H]; the cache's keys and values; the log-sum-exps of the scores
    [B, N], float32; and the queries [B, N, H] as they were multiplied by the keys, or None.
  """
  B, K, S, H = k_BxKxSxH.shape
  N = qkv_BxAxH.shape[1] - 2 * K
  G, parts = N // K, max(1, min(PROGRAMS // (B * K), S // BLOCK))
  normed, biased = scale is not None, bias_AxH is not None
  scale = scale if normed else jnp.zeros((N + K, H), qkv_BxAxH.dtype)
  bias = bias_AxH if biased else jnp.zeros((N + 2 * K, H), qkv_BxAxH.dtype)
  heads = lambda count, first: pl.BlockSpec((None, count, H), lambda b, k, p: (b, first + k, 0))
  scales = lambda count, first: pl.BlockSpec((count, H), lambda b, k, p: (first + k, 0))
  cache = pl.BlockSpec((None, None, S, H), lambda b, k, p: (b, k, 0, 0))
  part = lambda *block: pl.BlockSpec(
    (None, None, None, *block), lambda b, k, p: (b, k, p) + (0,) * len(block)
  )
  parted = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, K, parts, *shape), dtype)
  value, mass, top, keys, values, *asked = pl.pallas_call(
    functools.partial(
      _kernel, queries=G, blocks=S // BLOCK, parts=parts, eps=eps if normed else None, biased=biased
    ),
    grid=(B, K, parts),
    in_specs=[
      pl.BlockSpec((None,), lambda b, k, p: (b,)),
      pl.BlockSpec((None,), lambda b, k, p: (0,)),
      heads(G, 0),
      heads(1, N),
      heads(1, N + K),
      scales(G, 0),
      scales(1, N),
      scales(1, N + K),
      scales(G, 0),
      scales(1, N),
      pl.BlockSpec((None, H), lambda b, k, p: (b, 0)),
      cache,
      cache,
    ],
    out_specs=[part(G, H), part(G), part(G), cache, cache]
    + [pl.BlockSpec((None, None, G, H), lambda b, k, p: (b, k, 0, 0))] * queries,
    out_shape=[
      parted(G, H, dtype=qkv_BxAxH.dtype if parts == 1 else jnp.float32),
      parted(G),
      parted(G),
      *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (k_BxKxSxH, v_BxKxSxH)),
    ]
    + [jax.ShapeDtypeStruct((B, K, G, H), k_BxKxSxH.dtype)] * queries,
    input_output_aliases={11: 3, 12: 4},
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="circular_attention",
  )(
    filled_B,
    column[None],
    qkv_BxAxH,
    qkv_BxAxH,
    qkv_BxAxH,
    bias,
    bias,
    bias,
    scale,
    scale,
    cos_sin_BxH,
    k_BxKxSxH,
    v_BxKxSxH,
  )
  highest = top.max(2, keepdims=True)
  if parts > 1:
    mass *= jnp.exp(top - highest)  # [B, K, parts, G]
    value = jnp.sum(value * (mass / mass.sum(2, keepdims=True))[..., None], 2).astype(
      qkv_BxAxH.dtype
    )
  logsumexp = highest[:, :, 0] + jnp.log(mass.sum(2))
  q = asked[0].reshape(B, N, H) if queries else None
  return value.reshape(B, N, H), keys, values, logsumexp.reshape(B, N), q


def _kernel(
  filled_ref,
  column_ref,
  q_ref,
  k_ref,
  v_ref,
  q_bias_ref,
  k_bias_ref,
  v_bias_ref,
  q_scale_ref,
  k_scale_ref,
  cos_sin_ref,
  _,
  __,
  value_ref,
  mass_ref,
  top_ref,
  keys_ref,
  values_ref,
  asked_ref=None,
  *,
  queries,
  blocks,
  parts,
  eps,
  biased,
):
  """One part of one row and key-value head: every `parts`-th block back from the newest, by a
  running softmax.
  """
  part, filled, column = pl.program_id(2), filled_ref[()], column_ref[()]
  S, H = keys_ref.shape
  dtype, low, high = keys_ref.dtype, pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
  rotated = functools.partial(
    _rotated, cos_sin_ref=cos_sin_ref, dtype=dtype, eps=eps, biased=biased
  )
  q_low, q_high = (
    half * jnp.asarray(H**-0.5, dtype) for half in rotated(q_ref, q_bias_ref, q_scale_ref, queries)
  )
  # Rows beyond the first are zeros: the sum is the row.
  new_low, new_high = (
    jnp.sum(half.astype(jnp.float32), 0).astype(dtype)
    for half in rotated(k_ref, k_bias_ref, k_scale_ref, 1)
  )
  new_value = v_ref[0, :]
  if biased:
    new_value = (new_value.astype(jnp.float32) + v_bias_ref[0, :]).astype(dtype)

  @pl.when(part == 0)  # no other part reads the newest block
  def _():
    keys_ref[column, low] = new_low
    keys_ref[column, high] = new_high
    values_ref[column, :] = new_value
    if asked_ref is not None:
      row = (jnp.arange(ROWS) < queries)[:, None]
      triton.store(asked_ref.at[pl.ds(0, ROWS), low], q_low, mask=row)
      triton.store(asked_ref.at[pl.ds(0, ROWS), high], q_high, mask=row)

  # The newest block holds column % BLOCK + 1 of the columns or fewer; the others lie behind it, in
  # the last resort around the end of the cache.
  newest = column // BLOCK
  count = jnp.minimum(1 + pl.cdiv(jnp.maximum(filled - column % BLOCK - 1, 0), BLOCK), blocks)

  def block(i, carry, newest_too=False):
    start = (newest - part - i * parts + blocks) % blocks * BLOCK
    here, columns = pl.ds(start, BLOCK), start + jnp.arange(BLOCK)
    keys_low, keys_high, values = keys_ref[here, low], keys_ref[here, high], values_ref[here, :]
    if newest_too:  # what was just written may not be seen yet by all threads
      fresh = (columns == column)[:, None]
      keys_low = jnp.where(fresh, new_low[None], keys_low)
      keys_high = jnp.where(fresh, new_high[None], keys_high)
      values = jnp.where(fresh, new_value[None], values)
    scores = triton.dot(q_low, keys_low.T) + triton.dot(q_high, keys_high.T)
    scores = jnp.where(((column - columns + S) % S < filled)[None], scores, attention.MASKED)
    return online_softmax(scores, values, carry)

  nothing = (
    jnp.zeros((ROWS, H), jnp.float32),
    jnp.zeros((ROWS,), jnp.float32),
    jnp.full((ROWS,), attention.MASKED, jnp.float32),
  )
  # The first block apart: the others go straight from memory to the products, and can be fetched
  # ahead. A part that has none reads one that nobody sees, which the sum over the parts forgets.
  value, mass, top = jax.lax.fori_loop(
    1, pl.cdiv(jnp.maximum(count - part, 0), parts), block, block(0, nothing, newest_too=True)
  )
  value = (value / mass[:, None]).astype(value_ref.dtype)
  row = jnp.arange(ROWS) < queries
  triton.store(value_ref.at[pl.ds(0, ROWS), :], value, mask=row[:, None])
  triton.store(mass_ref.at[pl.ds(0, ROWS)], mass, mask=row)
  triton.store(top_ref.at[pl.ds(0, ROWS)], top, mask=row)


def _rotated(ref, bias_ref, scale_ref, count, *, cos_sin_ref, dtype, eps, biased):
  """The two halves of `count` normed and rotated heads [ROWS, H / 2], rounded where the model
  rounds; rows beyond `count` are zeros.
  """
  H = ref.shape[-1]
  low, high = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
  mask = (jnp.arange(ROWS) < count)[:, None]
  load = lambda ref, half: triton.load(ref.at[pl.ds(0, ROWS), half], mask=mask, other=0.0)
  get = lambda ref, half: load(ref, half).astype(jnp.float32)
  x, y = get(ref, low), get(ref, high)
  if biased:
    x, y = x + get(bias_ref, low), y + get(bias_ref, high)
  if eps is not None:
    size = jax.lax.rsqrt((jnp.sum(x * x, -1) + jnp.sum(y * y, -1)) / H + eps)[:, None]
    rounded = lambda z, half: (z * (size * get(scale_ref, half))).astype(dtype).astype(jnp.float32)
    x, y = rounded(x, low), rounded(y, high)
  cos, sin = cos_sin_ref[low][None], cos_sin_ref[high][None]
  return (x * cos - y * sin).astype(dtype), (y * cos + x * sin).astype(dtype)


def online_softmax(
  scores: Array, values: Array, carry: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
  """Adds a block to a running softmax, within a kernel: the weighted sum of values, the mass, the
  largest score.
  """
  value, mass, top = carry
  above = jnp.maximum(top, scores.max(-1))
  weights, kept = jnp.exp(scores - above[:, None]), jnp.exp(top - above)
  value = value * kept[:, None] + triton.dot(weights.astype(values.dtype), values)
  return value, mass * kept + weights.sum(-1), above
