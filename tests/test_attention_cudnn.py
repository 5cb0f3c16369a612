"""cuDNN's attention, value and gradients, on scores as real models have them, beside the plain
form.

Real models differ from normal random numbers: the key biases of Qwen2.5 (354 in its 1.5B) put all
scores of a head hundreds above or below 0, and one key may take all of the softmax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import attention

pytestmark = pytest.mark.gpu

SCORES = ("even", "far below 0", "far above 0", "drifting", "one key takes all")
LENGTHS = (2, 32, 34, 64, 66, 96, 128, 160, 190, 192, 224, 320, 448)
HEADS = {  # query heads, key-value heads, size
  "qwen2.5-1.5b": (12, 2, 128),
  "qwen2.5-0.5b": (14, 2, 64),
  "qwen3-1.7b": (16, 8, 128),
  "qwen3-4b": (32, 8, 128),
  "smollm2-135m": (9, 3, 64),
}
NAMES = ("value", "in queries", "in keys", "in values")


def arrays(T, heads):
  """A row for each of SCORES: queries [B, T, N, H], keys and values [B, K, T, H], the cotangent."""
  N, K, H = heads
  rng = np.random.default_rng(T)
  q, g = rng.normal(size=(2, len(SCORES), T, N, H))
  k, v = rng.normal(size=(2, len(SCORES), K, T, H))
  q[1:, ..., 5] = H**0.5  # with keys of x here, x is added to the scores
  k[1, ..., 5] -= 250
  k[2, ..., 5] += 900
  k[3, ..., 5] += 350 + np.linspace(0, 5, T)  # as the rotation leaves a bias in the slowest pair
  k[4, :, T // 2, 5] += 20  # all but 1e-6 of the softmax
  return [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, g)]


def segments(T, packed):
  """Two samples a row and padding behind them; one sample only, and little padding, if not
  packed.
  """
  if not packed:
    return np.broadcast_to(np.arange(T) < max(1, T - 3), (len(SCORES), T)).astype(np.int32)
  first, second = max(1, T // 3), max(1, T - T // 4)
  row = np.where(np.arange(T) < first, 1, np.where(np.arange(T) < second, 2, 0))
  return np.broadcast_to(row, (len(SCORES), T)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("attn_impl", "dtype"))
def value_and_gradients(q, k, v, g, segments_BxT, attn_impl, dtype):
  counts = (segments_BxT > 0)[..., None, None]
  mask = attention.segment_mask(segments_BxT)
  q, k, v, g = (x.astype(dtype) for x in (q, k, v, g))
  y, back = jax.vjp(
    lambda *qkv: jnp.where(counts, attention.attend(*qkv, mask, attn_impl), 0), q, k, v
  )
  return [x.astype(jnp.float32) for x in (y, *back(g))]


def errors(found, wanted):
  """[array, row]: the norm of the difference over the norm of what is wanted, or over 1 if that is
  larger.
  """
  norm = lambda x: np.sqrt(np.square(np.float64(x)).reshape(len(SCORES), -1).sum(1))
  return np.array(
    [norm(a - b) / np.maximum(norm(b), 1) for a, b in zip(found, wanted, strict=True)]
  )


def compare(T, heads, attn_impl):
  given = *arrays(T, heads), segments(T, attn_impl == "cudnn")
  found = jax.device_get(value_and_gradients(*given, attn_impl, jnp.bfloat16))
  with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
    given = jax.device_put(given, jax.devices("cpu")[0])
    plain, wanted = (
      jax.device_get(value_and_gradients(*given, "xla", x)) for x in (jnp.bfloat16, jnp.float32)
    )
  for name, array in zip(NAMES, found, strict=True):
    assert np.isfinite(array).all(), (
      f"{name}: not finite in rows {np.argwhere(~np.isfinite(array))[:5].tolist()}"
    )
  ours, plain = errors(found, wanted), errors(plain, wanted)
  ratios = ours / np.maximum(plain, 2**-8)
  for i, name in enumerate(NAMES):
    print(
      T,
      heads,
      attn_impl,
      name,
      *(f"{row}: {a:.1e} / {b:.1e}" for row, a, b in zip(SCORES, ours[i], plain[i])),
      sep=" | ",
    )
  assert ratios.max() <= 1.5, (T, heads, attn_impl, ratios.round(2).tolist())


@pytest.mark.parametrize("attn_impl", ["cudnn", "flash"])
@pytest.mark.parametrize("T", LENGTHS)
def test_every_length_is_as_right_as_the_plain_form(T, attn_impl):
  compare(T, HEADS["qwen2.5-1.5b"], attn_impl)


@pytest.mark.parametrize("attn_impl", ["cudnn", "flash"])
@pytest.mark.parametrize("heads", [name for name in HEADS if name != "qwen2.5-1.5b"])
def test_every_grouping_of_heads_is_as_right_as_the_plain_form(heads, attn_impl):
  compare(192, HEADS[heads], attn_impl)


@pytest.mark.parametrize("P", [32, 64, 192, 320])
@pytest.mark.parametrize("attn_impl", ["cudnn", "flash"])
def test_a_prefix_is_joined_as_right_as_in_the_plain_form(attn_impl, P):
  """The teacher's attention: a prefix of which each row fills another part, and none."""
  T, (N, K, H) = 192, HEADS["qwen2.5-1.5b"]
  q, k, v, _ = arrays(T, (N, K, H))
  _, prefix_k, prefix_v, _ = arrays(P, (N, K, H))
  length = jnp.array([P, P - 1, P // 2, 1, 0], jnp.int32)
  own = attention.segment_mask(jnp.ones((len(SCORES), T), jnp.int32))
  filled = (jnp.arange(P) < length[:, None])[:, None]
  mask = jnp.concatenate([jnp.broadcast_to(filled, (len(SCORES), T, P)), own], axis=-1)

  @functools.partial(jax.jit, static_argnames=("attn_impl", "dtype"))
  def run(q, k, v, prefix_k, prefix_v, mask, length, attn_impl, dtype):
    q, k, v, prefix_k, prefix_v = (x.astype(dtype) for x in (q, k, v, prefix_k, prefix_v))
    return [
      attention.attend_with_prefix(q, (k, v), (prefix_k, prefix_v), mask, length, attn_impl).astype(
        jnp.float32
      )
    ]

  given = q, k, v, prefix_k, prefix_v, mask, length
  found = jax.device_get(run(*given, attn_impl, jnp.bfloat16))
  with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
    given = jax.device_put(given, jax.devices("cpu")[0])
    plain, wanted = (jax.device_get(run(*given, "xla", x)) for x in (jnp.bfloat16, jnp.float32))
  assert np.isfinite(found[0]).all()
  ours, plain = errors(found, wanted), errors(plain, wanted)
  print(
    P,
    attn_impl,
    *(f"{row}: {a:.1e} / {b:.1e}" for row, a, b in zip(SCORES, ours[0], plain[0])),
    sep=" | ",
  )
  assert (ours / np.maximum(plain, 2**-8)).max() <= 1.5, (ours, plain)
