"""Attention over a ring, against NumPy in float64; the Triton kernel in interpret mode."""

import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import ring


def by_hand(q, k, v, column, filled):
  """Row by row: the columns are counted back from the one written last."""
  B, N, H = q.shape
  K, S = k.shape[1:3]
  result = np.zeros((B, N, H))
  for b in range(B):
    columns = [(column - i) % S for i in range(filled[b])]
    for n in range(N):
      scores = k[b, n // (N // K), columns].astype(np.float64) @ q[b, n] / H**0.5
      weights = np.exp(scores - scores.max())
      result[b, n] = weights @ v[b, n // (N // K), columns] / weights.sum()
  return result


@pytest.mark.parametrize("programs", [1, 512])  # rows whole, and in parts
@pytest.mark.parametrize("column", [0, 5, 63, 64, 191])
@pytest.mark.parametrize("path", ["xla", "triton"])
def test_each_row_sees_what_it_fills(monkeypatch, path, column, programs):
  monkeypatch.setattr(ring, "PROGRAMS", programs)
  rng, S = np.random.default_rng(column), 192
  q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 4, 16), (5, 2, S, 16), (5, 2, S, 16)))
  filled = np.int32([1, S, 64, 65, 100])
  k[0, :, (column + 1) % S] = v[0, :, (column + 1) % S] = 1e4  # what an earlier sequence left there
  ours = ring.attend(*map(jnp.asarray, (q, k, v)), jnp.int32(column), jnp.asarray(filled), path, interpret=True)
  np.testing.assert_allclose(ours, by_hand(q, k, v, column, filled), atol=1e-5)
