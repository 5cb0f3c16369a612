"""Attention of whole rows on a TPU: JAX's splash attention, which keeps no scores in memory.

The plain form is `attention.attend` under `attention.segment_mask`, and behind a prefix also under
`transformer.Prefix.mask`: here tokens and keys have ids in the place of a mask, and see each other
where these are equal. Tokens are padded to whole blocks. On a mesh each device attends for its own
rows and heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from oel_jax.policy.ops import common
from oel_jax.runtime import target

LANES = 128  # a vector register's: a block has so many tokens or a multiple
BLOCKS = (512, 256, LANES)


def supported(head_size: int, dtype: Any) -> bool:
  """Whether it is for heads of this size in this type, here: on a TPU, in bfloat16 (others would be
  rounded to it in the products), and half a register or whole ones a head.
  """
  fits = jnp.dtype(dtype) == jnp.bfloat16 and head_size % (LANES // 2) == 0
  return fits and target.backend() == "tpu"


def attend(
  q_BxTxNxH: Float[Array, "B T N H"],
  k_BxKxTxH: Float[Array, "B K T H"],
  v_BxKxTxH: Float[Array, "B K T H"],
  segments_BxT: Int[Array, "B T"] | None = None,
  mesh: Mesh | None = None,
  *,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Attention to the keys of a token's own segment up to its own.

  Args:
    q_BxTxNxH, k_BxKxTxH, v_BxKxTxH: of one type, which the result has, too.
    segments_BxT: int32; None: a row is one segment, and padding stands on the right.
    mesh: where they lie; None on one device, and inside `jax.shard_map`.
    interpret: run it without a TPU.
  """
  ids = () if segments_BxT is None else (_padded(segments_BxT, 1),)

  def local(own, segments=None):
    return _causal(own, segments, residuals=False, interpret=interpret)

  y_BxNxTxH = common.spread(local, mesh, _own(q_BxTxNxH, k_BxKxTxH, v_BxKxTxH), *ids)
  return y_BxNxTxH.swapaxes(1, 2)[:, : q_BxTxNxH.shape[1]]


def attend_apart(
  q_BxTxNxH: Float[Array, "B T N H"],
  own: tuple[Array, Array],
  prefix: tuple[Array, Array],
  ids: tuple[Array, Array, Array],
  mesh: Mesh | None = None,
  *,
  interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
  """`attend` to a row's own keys and values, [B, K, T, H], and attention to those of a prefix,
  [B, K, P, H]. Not differentiable.

  Args:
    q_BxTxNxH, own, prefix: of one type, which the outputs have, too.
    ids: int32, the segments [B, T]; which of the row's texts a token is given [B, T], from 1; and
      which of them stands in a place of the prefix [B, P], 0 for none.
    mesh, interpret: as in `attend`.

  Returns:
    For `attention.join`: the first output [B, T, N, H] and its log-sum-exps [B, T, N, 1], float32;
    the second and its. The log-sum-exp of a token that sees nothing is about -2e38.
  """

  def local(own, prefix, segments, texts, columns):
    first, first_logsumexp = _causal(own, segments, residuals=True, interpret=interpret)
    run = _kernel("full", own[0].shape, prefix[0].shape[2], residuals=True, interpret=interpret)
    second, (second_logsumexp,) = jax.vmap(run)(own[0], *prefix, _segment_ids(texts, columns))
    return first, first_logsumexp[..., None], second, second_logsumexp[..., None]

  texts = tuple(_padded(x, 2) for x in prefix)
  found = common.spread(local, mesh, _own(q_BxTxNxH, *own), texts, *(_padded(x, 1) for x in ids))
  return tuple(x.swapaxes(1, 2)[:, : q_BxTxNxH.shape[1]] for x in found)


def _own(q_BxTxNxH: Array, k_BxKxTxH: Array, v_BxKxTxH: Array) -> tuple[Array, Array, Array]:
  """A row's queries, keys and values as the kernel takes them; it does not scale the queries."""
  q_BxNxTxH = (q_BxTxNxH * q_BxTxNxH.shape[-1] ** -0.5).swapaxes(1, 2)
  return tuple(_padded(x, 2) for x in (q_BxNxTxH, k_BxKxTxH, v_BxKxTxH))


def _padded(x: Array, axis: int) -> Array:
  """Zeros behind the tokens, which lie along `axis`, up to whole blocks."""
  room = [(0, -x.shape[axis] % LANES if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, room)


def _causal(own: tuple[Array, Array, Array], segments: Array | None, **how: bool) -> Any:
  """The output [B, N, T, H]; with `residuals` the log-sum-exps [B, N, T], too."""
  q, k, v = own
  run = _kernel("causal", q.shape, k.shape[2], **how)
  out = jax.vmap(run)(q, k, v, *(() if segments is None else (_segment_ids(segments, segments),)))
  return (out[0], *out[1]) if how["residuals"] else out


def _segment_ids(q: Array, kv: Array) -> Any:
  from jax.experimental.pallas.ops.tpu import splash_attention

  return splash_attention.SegmentIds(q, kv)


def _kernel(
  kind: str, shape: tuple[int, ...], keys: int, *, residuals: bool, interpret: bool
) -> Callable[..., Any]:
  """The kernel of one row: queries of `shape` [B, N, T, H], so many keys, and the mask "causal" or
  "full", which the ids narrow. Differentiable without `residuals`.
  """
  # Here, so that no other device waits for what only a TPU needs.
  from jax.experimental.pallas.ops.tpu import splash_attention

  _, N, T, _ = shape
  mask = {"causal": splash_attention.CausalMask, "full": splash_attention.FullMask}[kind]((T, keys))
  block_q, block_kv = (next(size for size in BLOCKS if n % size == 0) for n in (T, keys))
  return splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * N),
    block_sizes=splash_attention.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    save_residuals=residuals,
    # Kept for the backward pass: the forward kernel does not run again there.
    residual_checkpoint_name=common.REMAT_SAVED,
    interpret=interpret,
  )
