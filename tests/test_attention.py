"""Two attentions over disjoint keys joined into one; cuDNN's paths run on a GPU only:
experiments/benchmarks compares them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import attention


def _apart(q, k, v, scale):
  """Attention in float64 and its log-sum-exp."""
  scores = np.einsum("th,sh->ts", q, k) * scale
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights @ v / weights.sum(-1, keepdims=True), np.log(
    weights.sum(-1, keepdims=True)
  ) + scores.max(-1, keepdims=True)


@pytest.mark.parametrize("scale", [0.3, 6.0])  # even and peaked scores
def test_joined_attention_is_attention_over_all(scale):
  rng = np.random.default_rng(0)
  q, first, second = (rng.normal(size=(n, 2, 8)) for n in (20, 15, 40))
  parts = [_apart(q[:, 0], keys[:, 0], keys[:, 1], scale) for keys in (first, second)]
  whole, _ = _apart(q[:, 0], *np.concatenate([first, second]).swapaxes(0, 1), scale)
  parts = [jnp.asarray(x, jnp.float32) for part in parts for x in part]
  np.testing.assert_allclose(attention.join(*parts, jnp.ones((20, 1), bool)), whole, atol=2e-6)
  np.testing.assert_array_equal(attention.join(*parts, jnp.zeros((20, 1), bool)), parts[0])
  # In bfloat16 the log-sum-exps make weights that are wrong by percents: the reason why they must
  # be float32.
  rounded = [x.astype(jnp.bfloat16) if i % 2 else x for i, x in enumerate(parts)]
  assert scale < 1 or np.abs(attention.join(*rounded, jnp.ones((20, 1), bool)) - whole).max() > 1e-3


def test_an_unknown_path_is_refused():
  zeros = jnp.zeros((1, 1, 1, 2))
  with pytest.raises(
    ValueError,
    match="attention implementation is 'triton': it must be one of 'xla', 'cudnn', 'flash', 'spl",
  ):
    attention.attend(zeros, zeros, zeros, jnp.ones((1, 1, 1), bool), "triton")


def test_what_is_done_to_keys_for_cudnn_changes_no_softmax():
  rng = np.random.default_rng(2)
  q, k, v = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in [(2, 40, 4, 8), *[(2, 2, 40, 8)] * 2]
  )
  k += 30  # in common
  mask = attention.segment_mask(jnp.asarray(np.repeat([[1] * 15 + [2] * 20 + [0] * 5], 2, axis=0)))
  run = lambda q, k, v, mask: attention.attend(q, k, v, mask)
  keys, values, wider = attention._whole_tiles(attention._centred(k), v, mask)
  assert keys.shape == values.shape == (2, 2, 128, 8) and wider.shape == (2, 40, 128)
  assert abs(keys[:, :, :40].mean(2)).max() < 1e-5 and not wider[..., 40:].any()
  np.testing.assert_allclose(run(q, keys, values, wider), run(q, k, v, mask), atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("attn_impl, segments", [("cudnn", 1), ("cudnn", 3), ("flash", 1)])
@pytest.mark.parametrize("peak", [1.0, 4.0])
def test_cudnn_is_the_plain_path(attn_impl, segments, peak):
  B, T, P, N, K, H = 4, 384, 256, 8, 4, 128
  rng = np.random.default_rng(1)
  q, *rest = (
    rng.normal(size=shape) for shape in [(B, T, N, H), *[(B, K, T, H)] * 2, *[(B, K, P, H)] * 2]
  )
  length = jnp.array([P, 200, 1, 0], jnp.int32)
  own = attention.segment_mask(jnp.broadcast_to(jnp.arange(T) * segments // T + 1, (B, T)))
  mask = jnp.concatenate(
    [jnp.broadcast_to((jnp.arange(P) < length[:, None])[:, None], (B, T, P)), own], axis=-1
  )

  @jax.default_matmul_precision("highest")
  def both(attn_impl, dtype):
    q_, k, v, prefix_k, prefix_v = (
      jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (q * peak, *rest)
    )
    alone = attention.attend(q_, k, v, own, attn_impl)
    return alone, attention.attend_with_prefix(
      q_, (k, v), (prefix_k, prefix_v), mask, length, attn_impl
    )

  for found, expected in zip(both(attn_impl, jnp.bfloat16), both("xla", jnp.float32), strict=True):
    # cudnn's keys are centred, so rounded once more: the largest of 1.6 million errors was 0.031 on
    # an H200
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.04)
