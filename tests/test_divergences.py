"""The table of divergences against NumPy in float64, and what a new entry takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused import assert_same, dense, random_case

from oel_jax.consolidation import losses
from oel_jax.consolidation.divergences import DIVERGENCES, Divergence

RIGHT = {  # of probabilities
  "reverse_kl": lambda p, q: (p * np.log(p / q)).sum(-1),
  "forward_kl": lambda p, q: (q * np.log(q / p)).sum(-1),
  "jsd": lambda p, q: (p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q))).sum(-1) / 2,
}


def two_sides(seed=0):
  """log p and log q of seven tokens over eleven outcomes, float32."""
  x = np.random.default_rng(seed).normal(size=(2, 7, 11))
  return jax.nn.log_softmax(jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_terms_add_up_to_the_divergence(kind):
  log_p, log_q = two_sides()
  p, q = (np.exp(np.asarray(x, np.float64)) for x in (log_p, log_q))
  found = DIVERGENCES[kind].terms(log_p, log_q).sum(-1)
  np.testing.assert_allclose(found, RIGHT[kind](p, q), rtol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_slopes_are_those_of_the_terms(kind):
  entry, (log_p, log_q) = DIVERGENCES[kind], two_sides(1)
  right = jax.grad(lambda x: entry.terms(x, log_q).sum())(log_p)
  np.testing.assert_allclose(entry.slope(log_p, log_q), right, atol=1e-6)
  multiple = (entry.slope(log_p, log_q) - entry.balanced(log_p, log_q)) / jnp.exp(log_p)
  np.testing.assert_allclose(multiple, np.full_like(multiple, multiple.mean()), atol=1e-5)
  np.testing.assert_array_equal(entry.balanced(log_p, log_p), 0)
  if entry.balanced_sum:
    found = entry.balanced_sum(entry.terms(log_p, log_q).sum(-1))
    np.testing.assert_allclose(entry.balanced(log_p, log_q).sum(-1), found, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_one_outcome_alike_among_others_that_differ_has_its_slope(kind):
  """The losses differentiate `terms`: a corner at p = q has another slope there."""
  log_p, log_q = two_sides(2)
  rest = jnp.log1p(-jnp.exp(log_p[:, :1])) + jax.nn.log_softmax(log_q[:, 1:])
  log_q = jnp.concatenate([log_p[:, :1], rest], axis=-1)
  entry, step = DIVERGENCES[kind], 1e-2
  above, below = (entry.terms(log_p + h, log_q)[:, 0] for h in (step, -step))
  found = jax.grad(lambda x: entry.terms(x, log_q).sum())(log_p)[:, 0]
  np.testing.assert_allclose(found, (above - below) / (2 * step), atol=1e-4)
  np.testing.assert_allclose(entry.slope(log_p, log_q)[:, 0], found, atol=1e-6)


@pytest.mark.parametrize("support", losses.SUPPORTS)
def test_a_new_divergence_is_one_entry(monkeypatch, support):
  """The squared Hellinger distance, 1 − Σ √(p q): known to no other file."""
  geometric = lambda log_p, log_q: jnp.exp((log_p + log_q) / 2)
  slope = lambda log_p, log_q: (jnp.exp(log_p) - geometric(log_p, log_q)) / 2
  entry = Divergence(
    terms=lambda log_p, log_q: (jnp.exp(log_p / 2) - jnp.exp(log_q / 2)) ** 2 / 2,
    slope=slope,
    balanced=slope,
  )
  monkeypatch.setitem(DIVERGENCES, "hellinger", entry)
  case = random_case(8)
  how = dict(kind="hellinger", support=support, k=5, temperature=0.7)
  assert_same(case, 16, **how)
  if support == "full":
    hs, ws, ht, wt, mask = (np.asarray(x, np.float64) for x in case)
    p, q = (np.exp(x / 0.7) for x in (hs @ ws.T, ht @ wt.T))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    right = ((1 - np.sqrt(p * q).sum(-1)) * mask).sum()
    np.testing.assert_allclose(dense(*case, **how)[0], right, rtol=1e-5)
