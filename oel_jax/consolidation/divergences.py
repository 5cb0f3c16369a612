"""The divergences of the student's distribution p from the teacher's q, one entry each.

`losses` sums an entry's terms over dense logits and is differentiated by JAX; `chunk_loss` uses
every field, to form value and gradient in one pass.

A new divergence is one more entry of `DIVERGENCES`; `consolidation.kind` takes its name. What its
functions must keep to:

- `terms` and `balanced` are 0 where p = q, exactly: `expm1` of the difference of the logarithms, no
  difference of exponentials.
- All are finite where log p is −1e30.
- `terms` has no corner (`max`, `abs`) at p = q, for JAX differentiates it.
- `moment` is for a KL alone. A constant of its own stands in the functions.

Its value in NumPy goes into `RIGHT` of tests/test_divergences.py and into both tables of
test_losses.py; test_config.py spells the names.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32

# (log p, log q) of any outcomes → a number for each.
OfOutcomes = Callable[[Float32[Array, "*any"], Float32[Array, "*any"]], Float32[Array, "*any"]]


class Divergence(NamedTuple):
  """One divergence, D = Σ terms over all outcomes, in nats.

  Attributes:
    terms: (log p, log q) → an outcome's share of D.
    slope: ∂ terms / ∂ log p.
    balanced: the slope less a multiple of p, which changes no gradient where the outcomes are all
      there is, as p − p Σ p = 0; chosen so that it is exactly 0 where p = q.
    balanced_sum: D → Σ balanced over all outcomes, where that follows from D, so that nothing is
      read once more; None: it is summed.
    moment: "student" or "teacher" where D is the mean over p or q of the difference of that side's
      log-probabilities from the other's, which comes out of the pass that normalises them; None: D
      is summed.
  """

  terms: OfOutcomes
  slope: OfOutcomes
  balanced: OfOutcomes
  balanced_sum: Callable[[Float32[Array, "C"]], Float32[Array, "C"]] | None = None
  moment: Literal["student", "teacher"] | None = None


def log_mean_ratio(x: Float32[Array, "*any"]) -> Float32[Array, "*any"]:
  """Returns log((1 + e^x) / 2), exact near 0 and for large x.

  At x = log q − log p it is log(m / p), where m is the mean of p and q.
  """
  return jnp.maximum(x, 0) + jnp.log1p(0.5 * jnp.expm1(-jnp.abs(x)))


def _jsd_terms(log_p, log_q):
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  return -0.5 * (p * log_mean_ratio(log_q - log_p) + q * log_mean_ratio(log_p - log_q))


def _jsd_slope(log_p, log_q):
  return -0.5 * jnp.exp(log_p) * log_mean_ratio(log_q - log_p)


DIVERGENCES = {
  # KL(p ‖ q): the method's loss (OEL, arXiv 2603.16856: the consolidation objective).
  "reverse_kl": Divergence(
    terms=lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q),
    slope=lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q + 1),
    balanced=lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q),
    balanced_sum=lambda value: value,
    moment="student",
  ),
  # KL(q ‖ p).
  "forward_kl": Divergence(
    terms=lambda log_p, log_q: jnp.exp(log_q) * (log_q - log_p),
    slope=lambda log_p, log_q: -jnp.exp(log_q),
    balanced=lambda log_p, log_q: jnp.exp(log_p) - jnp.exp(log_q),
    balanced_sum=jnp.zeros_like,
    moment="teacher",
  ),
  # ½ KL(p ‖ m) + ½ KL(q ‖ m), with m the mean of p and q.
  "jsd": Divergence(terms=_jsd_terms, slope=_jsd_slope, balanced=_jsd_slope),
}
