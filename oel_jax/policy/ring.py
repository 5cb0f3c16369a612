"""Attention of one query a row over a ring of columns, of which only those that the row fills are read.

In plain XLA the whole ring is read and masked, and a product of a few queries with many keys keeps no GPU busy: on NVIDIA GPUs this is a
Triton kernel by way of Pallas. A row's tokens are the `filled` columns written last, the last of them at `column`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from oel_jax.policy import attention

BLOCK = 64  # columns that are read at once; divides the ring
PROGRAMS = 512  # a GPU is busy with so many; rows are cut into parts where there are fewer
ROWS = 16  # of the smallest matrix product; the queries of one key-value head are fewer


def attend(
    q_BxNxH: Float[Array, "B N H"], k_BxKxSxH: Float[Array, "B K S H"], v_BxKxSxH: Float[Array, "B K S H"], column: Int[Array, ""],
    filled_B: Int[Array, "B"], path: str = "xla", interpret: bool = False,
) -> Float[Array, "B N H"]:  # fmt: skip
  """Softmax attention of each row's query over its `filled_B` columns, at least 1; path "xla" or "triton"."""
  S = k_BxKxSxH.shape[2]
  if path == "xla":
    seen = jnp.mod(column - jnp.arange(S), S) < filled_B[:, None]
    return attention.attend(q_BxNxH[:, None], k_BxKxSxH, v_BxKxSxH, seen[:, None])[:, 0]
  B, N, H = q_BxNxH.shape
  K = k_BxKxSxH.shape[1]
  G, parts = N // K, max(1, min(PROGRAMS // (B * K), S // BLOCK))
  of_row = lambda *block: pl.BlockSpec((None, None, *block), lambda b, k, p: (b, k) + (0,) * len(block))
  of_part = lambda *block: pl.BlockSpec((None, None, None, *block), lambda b, k, p: (b, k, p) + (0,) * len(block))
  parted = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, K, parts, *shape), dtype)
  value, mass, top = pl.pallas_call(
      functools.partial(_kernel, queries=G, blocks=S // BLOCK, parts=parts),
      grid=(B, K, parts),
      in_specs=[
          pl.BlockSpec((None,), lambda b, k, p: (b,)), pl.BlockSpec((None,), lambda b, k, p: (0,)),
          of_row(G, H), of_row(S, H), of_row(S, H),
      ],  # fmt: skip
      out_specs=[of_part(G, H), of_part(G), of_part(G)],
      out_shape=[parted(G, H, dtype=q_BxNxH.dtype if parts == 1 else jnp.float32), parted(G), parted(G)],
      compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
      interpret=interpret,
      name="ring_attention",
  )(filled_B, column[None], q_BxNxH.reshape(B, K, G, H), k_BxKxSxH, v_BxKxSxH)
  if parts > 1:
    mass *= jnp.exp(top - top.max(2, keepdims=True))  # [B, K, parts, G]
    value = jnp.sum(value * (mass / mass.sum(2, keepdims=True))[..., None], 2).astype(q_BxNxH.dtype)
  return value.reshape(B, N, H)


def _kernel(filled_ref, column_ref, q_ref, k_ref, v_ref, value_ref, mass_ref, top_ref, *, queries, blocks, parts):
  """One part of one row and key-value head: every `parts`-th block back from the newest, by a running softmax."""
  part, filled, column = pl.program_id(2), filled_ref[()], column_ref[()]
  S, H = k_ref.shape
  row = jnp.arange(ROWS) < queries
  q = triton.load(q_ref.at[pl.ds(0, ROWS), :], mask=row[:, None], other=0.0) * jnp.asarray(H**-0.5, q_ref.dtype)
  newest = column // BLOCK
  # The newest block holds column % BLOCK + 1 of the columns or fewer; the others lie behind it, in the last resort around the ring.
  count = jnp.minimum(1 + pl.cdiv(jnp.maximum(filled - column % BLOCK - 1, 0), BLOCK), blocks)

  def body(i, carry):
    value, mass, top = carry
    start = (newest - part - i * parts + blocks) % blocks * BLOCK
    here = pl.ds(start, BLOCK)
    seen = (column - start - jnp.arange(BLOCK) + S) % S < filled
    scores = jnp.where(seen[None], triton.dot(q, k_ref[here, :].T), attention.MASKED)
    above = jnp.maximum(top, scores.max(-1))
    weights, kept = jnp.exp(scores - above[:, None]), jnp.exp(top - above)
    v = v_ref[here, :]
    return value * kept[:, None] + triton.dot(weights.astype(v.dtype), v), mass * kept + weights.sum(-1), above

  start = (jnp.zeros((ROWS, H), jnp.float32), jnp.zeros((ROWS,), jnp.float32), jnp.full((ROWS,), attention.MASKED, jnp.float32))
  value, mass, top = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(count - part, 0), parts), body, start)
  value = value / jnp.maximum(mass, 1e-30)[:, None]  # a part may have no block
  triton.store(value_ref.at[pl.ds(0, ROWS), :], value.astype(value_ref.dtype), mask=row[:, None])
  triton.store(mass_ref.at[pl.ds(0, ROWS)], mass, mask=row)
  triton.store(top_ref.at[pl.ds(0, ROWS)], top, mask=row)
