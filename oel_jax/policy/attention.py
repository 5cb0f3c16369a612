"""Attention behind one signature. The XLA form is the reference and runs everywhere; cuDNN's runs
on NVIDIA GPUs, JAX's splash attention on TPUs, both in bfloat16.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from oel_jax.policy.architecture import Architecture, Llama3Scaling
from oel_jax.policy.ops import common, splash

IMPLEMENTATIONS = ("xla", "cudnn", "flash", "splash")
MASKED = -1e30  # finite, so that a row with nothing to attend to gives a mean instead of NaN
TILE = 128  # keys that cuDNN's backward pass takes at a time


def attend(
  q_BxTxNxH: Float[Array, "B T N H"],
  k_BxKxSxH: Float[Array, "B K S H"],
  v_BxKxSxH: Float[Array, "B K S H"],
  mask_BxTxS: Bool[Array, "B T S"],
  attn_impl: str = "xla",
  segments_BxT: Int[Array, "B T"] | None = None,
  mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
  """Softmax attention of T queries over S keys, each key-value head serving N / K query heads;
  scores and softmax in float32.

  Keys and values lie [batch, heads, time, size]: several times faster on a CPU than [batch, time,
  heads, size]. `attn_impl` is "xla", or one of cuDNN's: "cudnn" gets the mask whole, so segments
  and padding count there too; "flash" does not see it and is causal: right for rows that
  hold one sequence, padded on the right, and S = T. Or "splash", a TPU's, which does not see it
  either: it is causal within `segments_BxT`, or without them as "flash". All but "xla" must be told
  the mesh: each device attends for its own rows and heads.

  Raises:
    ValueError: another attention implementation.
  """
  if attn_impl not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention implementation is {attn_impl!r}: it must be one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  if attn_impl == "splash":
    return splash.attend(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, segments_BxT, mesh)
  if attn_impl != "xla":
    own = q_BxTxNxH.swapaxes(1, 2), k_BxKxSxH, v_BxKxSxH
    mask = (mask_BxTxS,) if attn_impl == "cudnn" else ()
    return common.spread(_by_cudnn, mesh, own, *mask).swapaxes(1, 2)
  B, T, N, H = q_BxTxNxH.shape
  K = k_BxKxSxH.shape[1]
  q = q_BxTxNxH.reshape(B, T, K, N // K, H) * (H**-0.5)
  scores = jnp.einsum("btkgh,bksh->bkgts", q, k_BxKxSxH, preferred_element_type=jnp.float32)
  scores = jnp.where(mask_BxTxS[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BxKxSxH.dtype)
  return jnp.einsum("bkgts,bksh->btkgh", weights, v_BxKxSxH).reshape(B, T, N, H)


def _by_cudnn(
  own: tuple[Array, Array, Array], mask_BxTxS: Array | None = None
) -> Float[Array, "B N T H"]:
  """One device's attention of queries [B, N, T, H]; causal without a mask."""
  q, k, v = own
  k = _centred(k)
  how = dict(is_causal=True)
  if mask_BxTxS is not None:
    k, v, mask_BxTxS = _whole_tiles(k, v, mask_BxTxS)
    how = dict(mask=mask_BxTxS[:, None])
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **how).swapaxes(1, 2)


def _centred(k_BxKxSxH: Array) -> Array:
  """The keys less their mean, which adds the same to all scores of a query: the softmax is what it
  was.

  cuDNN rounds the gradient in the scores to bfloat16 before it multiplies it by the keys. Its sum
  over the keys is 0 but for that rounding, so what the keys have in common comes out as an error
  of the gradient in the queries: keys with a bias of 250 made it 7% of it, with 900 27%, where the
  plain form has 0.3% (tests/test_attention_cudnn.py).
  """
  mean = jax.lax.stop_gradient(jnp.mean(k_BxKxSxH, axis=2, keepdims=True, dtype=jnp.float32))
  return (k_BxKxSxH - mean).astype(k_BxKxSxH.dtype)


def _whole_tiles(
  k_BxKxSxH: Array, v_BxKxSxH: Array, mask_BxTxS: Array
) -> tuple[Array, Array, Array]:
  """The same keys, values and mask, and keys behind them that nobody sees, up to a multiple of
  TILE.

  In its last tile, if that is half full, the backward pass of cuDNN with a mask takes what lies
  behind the keys for visible keys of score 0. Where all scores of a query are below about -90, as
  the large key biases of Qwen2.5 make them, the exponential of their difference overflows, and the
  gradient in the query is NaN (tests/test_attention.py).
  """
  missing = -k_BxKxSxH.shape[2] % TILE
  if not missing:
    return k_BxKxSxH, v_BxKxSxH, mask_BxTxS
  k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (k_BxKxSxH, v_BxKxSxH))
  return k, v, jnp.pad(mask_BxTxS, ((0, 0), (0, 0), (0, missing)))


def causal(
  q_BxTxNxH: Float[Array, "B T N H"],
  k_BxKxTxH: Float[Array, "B K T H"],
  v_BxKxTxH: Float[Array, "B K T H"],
  attn_impl: str = "xla",
) -> Float[Array, "B T N H"]:
  """`attend` where every query sees the keys up to its own. Padding must stand on the right: cuDNN
  and splash attention are given no mask.
  """
  T = q_BxTxNxH.shape[1]
  return attend(
    q_BxTxNxH,
    k_BxKxTxH,
    v_BxKxTxH,
    jnp.tril(jnp.ones((1, T, T), bool)),
    "flash" if attn_impl == "cudnn" else attn_impl,
  )


def attend_with_prefix(
  q_BxTxNxH: Float[Array, "B T N H"],
  own: tuple[Array, Array],
  prefix: tuple[Array, Array],
  mask_BxTxS: Bool[Array, "B T PT"],
  length_B: Int[Array, "B"],
  attn_impl: str = "xla",
  ids: tuple[Array, Array, Array] | None = None,
  mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
  """`attend` over the keys and values of a prefix, [B, K, P, H], and those of the tokens
  themselves, [B, K, T, H].

  "xla" and "cudnn" go by the mask, [B, T, P + T]. "flash" goes by length_B, how much of the prefix
  there is, "splash" by `ids` (`splash.attend_apart`): they attend to the two apart and join them by
  their log-sum-exps. Not differentiable there.
  """
  if attn_impl == "splash":
    # What sees nothing of the prefix has no weight there, by its log-sum-exp.
    return join(*splash.attend_apart(q_BxTxNxH, own, prefix, ids, mesh), jnp.bool_(True))
  if attn_impl != "flash":
    k, v = (jnp.concatenate(pair, axis=2) for pair in zip(prefix, own, strict=True))
    return attend(q_BxTxNxH, k, v, mask_BxTxS, attn_impl, mesh=mesh)
  own = q_BxTxNxH.swapaxes(1, 2), *own
  return common.spread(_apart_by_cudnn, mesh, own, prefix, length_B).swapaxes(1, 2)


def _apart_by_cudnn(
  own: tuple[Array, Array, Array], prefix: tuple[Array, Array], length_B: Array
) -> Float[Array, "B N T H"]:
  """One device's attention of queries [B, N, T, H] to their own keys and to a prefix."""
  q, *own = own
  q = q.swapaxes(1, 2)
  B, T = q.shape[:2]
  filled = dict(q_seqlen=jnp.full(B, T, jnp.int32), kv_seqlen=jnp.maximum(length_B, 1))
  there = (length_B > 0)[:, None, None, None]
  first, second = _cudnn(q, *own, "CAUSAL"), _cudnn(q, *prefix, "PADDING", **filled)
  return join(*first, *second, there).swapaxes(1, 2)


def with_logsumexp(
  q_BxTxNxH: Float[Array, "B T N H"],
  k_BxKxSxH: Float[Array, "B K S H"],
  v_BxKxSxH: Float[Array, "B K S H"],
  mask_BxTxS: Bool[Array, "B T S"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """`attend` by cuDNN, or `causal` where there is no mask, and the log-sum-exps of the scores,
  float32; not differentiable.
  """
  if mask_BxTxS is None:
    y, logsumexp = _cudnn(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, "CAUSAL")
  else:
    k_BxKxSxH, v_BxKxSxH, mask_BxTxS = _whole_tiles(k_BxKxSxH, v_BxKxSxH, mask_BxTxS)
    y, logsumexp = _cudnn(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, "NO_MASK", mask=mask_BxTxS[:, None])
  return y, logsumexp[..., 0]


def _cudnn(
  q_BxTxNxH: Array, k_BxKxSxH: Array, v_BxKxSxH: Array, mask_type: str, **how: Array
) -> tuple[Array, Array]:
  """cuDNN's attention and its log-sum-exps, [B, T, N, 1]."""
  # The public function rounds the log-sum-exp to the inputs' type: a 3% error in `join`'s weights.
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  y, logsumexp_BxNxT = cudnn.dot_product_attention(
    q_BxTxNxH,
    k_BxKxSxH.swapaxes(1, 2),
    v_BxKxSxH.swapaxes(1, 2),
    scale=q_BxTxNxH.shape[-1] ** -0.5,
    mask_type=cudnn.MaskType[mask_type],
    return_residual=True,
    **how,
  )
  return y, logsumexp_BxNxT.swapaxes(1, 2)[..., None]


def join(
  first: Array, first_logsumexp: Array, second: Array, second_logsumexp: Array, there: Array
) -> Array:
  """One attention from two over disjoint keys, [..., H] with log-sum-exps [..., 1], in float32;
  `second` counts where it is `there`.
  """
  second_logsumexp = jnp.where(there, second_logsumexp.astype(jnp.float32), MASKED)
  weight = jax.nn.sigmoid(second_logsumexp - first_logsumexp.astype(jnp.float32))
  return ((1 - weight) * first.astype(jnp.float32) + weight * second.astype(jnp.float32)).astype(
    first.dtype
  )


def segment_mask(segments_BxT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Causal within a segment; segment 0 is padding and is seen by nobody but itself."""
  T = segments_BxT.shape[1]
  same = segments_BxT[:, :, None] == segments_BxT[:, None, :]
  return same & jnp.tril(jnp.ones((T, T), bool))


def frequencies(
  size: int, theta: float, scaling: Llama3Scaling | None = None
) -> Float[Array, "half"]:
  """Radians a position that each pair of a head's `size` numbers turns by, float32."""
  plain = theta ** (-jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
  if scaling is None:
    return plain
  # Full turns within the original context.
  rotations = scaling.original_max_position_embeddings * plain / (2 * jnp.pi)
  fast = jnp.clip(
    (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor),
    0,
    1,
  )
  return plain * (fast + (1 - fast) / scaling.factor)


def cos_sin(
  positions: Int[Array, "*shape"], architecture: Architecture
) -> Float[Array, "*shape H"]:
  """Cosines, then sines of the angles that each pair of a head's numbers turns by, float32."""
  a = architecture
  turn = frequencies(a.head_size, a.rope_theta, a.rope_scaling)
  radians = positions[..., None].astype(jnp.float32) * turn
  return jnp.concatenate([jnp.cos(radians), jnp.sin(radians)], axis=-1)


def rotate_by(x: Float[Array, "... H"], cos_sin: Float[Array, "... H"]) -> Float[Array, "... H"]:
  """Rotates the two halves of each head against each other, in float32 (Su et al. 2021, eq. 34);
  `cos_sin`, float32, holds cosines, then sines.

  Returns the type of x.
  """
  cos, sin = jnp.split(cos_sin, 2, axis=-1)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
    x.dtype
  )
