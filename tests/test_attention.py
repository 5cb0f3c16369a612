"""Two attentions over disjoint keys joined into one (trap 24b); cuDNN's paths run on a GPU only: experiments/benchmarks compares them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import attention


def _apart(q, k, v, scale):
  """Attention in float64 and its log-sum-exp."""
  scores = np.einsum("th,sh->ts", q, k) * scale
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights @ v / weights.sum(-1, keepdims=True), np.log(weights.sum(-1, keepdims=True)) + scores.max(-1, keepdims=True)


@pytest.mark.parametrize("scale", [0.3, 6.0])  # even and peaked scores
def test_joined_attention_is_attention_over_all(scale):
  rng = np.random.default_rng(0)
  q, first, second = (rng.normal(size=(n, 2, 8)) for n in (20, 15, 40))
  parts = [_apart(q[:, 0], keys[:, 0], keys[:, 1], scale) for keys in (first, second)]
  whole, _ = _apart(q[:, 0], *np.concatenate([first, second]).swapaxes(0, 1), scale)
  parts = [jnp.asarray(x, jnp.float32) for part in parts for x in part]
  np.testing.assert_allclose(attention.join(*parts, jnp.ones((20, 1), bool)), whole, atol=2e-6)
  np.testing.assert_array_equal(attention.join(*parts, jnp.zeros((20, 1), bool)), parts[0])
  # In bfloat16 the log-sum-exps make weights that are wrong by percents: the reason why they must be float32.
  rounded = [x.astype(jnp.bfloat16) if i % 2 else x for i, x in enumerate(parts)]
  assert scale < 1 or np.abs(attention.join(*rounded, jnp.ones((20, 1), bool)) - whole).max() > 1e-3


def test_an_unknown_path_is_refused():
  zeros = jnp.zeros((1, 1, 1, 2))
  with pytest.raises(ValueError, match="attention path is 'splash': it must be one of 'xla', 'cudnn', 'flash'"):
    attention.attend(zeros, zeros, zeros, jnp.ones((1, 1, 1), bool), "splash")
