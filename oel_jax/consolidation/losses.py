"""How far the student is from the teacher: dense reference losses.

This file is the definition; `fused.py` computes the same numbers without ever holding [tokens,
vocabulary]. Shape letters: V is the vocabulary, `*tokens` any leading axes ([N], [B, T] or none).

All of it returns `(sum, count)`: the sum over the tokens that the mask counts, and how many there
are. Divide once, over the whole batch: a mean inside a micro-batch would weigh short responses more
than long ones.

Statistics are float32 whatever the inputs are. Positions outside the mask may hold anything, NaN
included: their logits are replaced before the first exponential, so neither the value nor a
gradient sees them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from oel_jax.consolidation.divergences import DIVERGENCES

KINDS = tuple(DIVERGENCES)
SUPPORTS = ("full", "topk", "topk_tail")
ESTIMATORS = ("k1", "k2", "k3")

# Stands in for log 0. Being finite, it makes p · log p exactly 0 (and its gradient too) where p is
# 0; -inf makes NaN.
FLOOR = -1e30

Scalar = Float32[Array, ""]


def divergence(
  student_logits: Float[Array, "*tokens V"],
  teacher_logits: Float[Array, "*tokens V"],
  mask: Shaped[Array, "*tokens"],
  *,
  kind: str = "reverse_kl",
  support: str = "full",
  k: int = 256,
  temperature: float = 0.7,
  one: tuple[int, ...] = (),
) -> tuple[Scalar, Scalar]:
  """Returns (sum over masked tokens of D(student, teacher) in nats, number of masked tokens), two
  float32 scalars.

  With p the student's and q the teacher's distribution, both softmax(logits / temperature), `kind`
  is
    'reverse_kl'  KL(p ‖ q): the method's loss (OEL, arXiv 2603.16856: the consolidation objective);
    'forward_kl'  KL(q ‖ p);
    'jsd'         ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q).
  `support` is the set of tokens the sum over the vocabulary runs on:
    'full'        the whole vocabulary: exact, the default;
    'topk_tail'   the student's k likeliest tokens, and one bucket for all others. A divergence
                  between the two coarsened distributions: at least 0, at most the exact value,
                  equal to it at k = V;
    'topk'        the student's k likeliest tokens, not renormalised, nothing for the others: what
                  the paper trained with, kept for parity. NOT a divergence: the student lowers it
                  by moving mass out of its own top k, so it can be negative, and its gradient is
                  not zero where student and teacher agree. Near harmless only while the top k hold
                  almost all of the mass.
  The set is the student's for every kind (ties go to the lower token id); k above V means all of V.

  Gradients flow to `student_logits` only. The temperature divides both sides' logits, and there is
  no T² factor: at T ≠ 1 the gradient is 1/T times that of the tempered distributions, as in the
  paper.

  Args:
    student_logits: any float dtype; cast to float32 here, as are the teacher's. -inf is allowed in
      either, on a token that no one can produce; where one side alone has it an infinite KL shows
      as a huge one.
    teacher_logits: same shape.
    mask: bool or 0-1; anything may stand in the logits where it is 0.
    kind, support, k, temperature: above; Python values, not traced ones.
    one: ids of tokens that are one outcome to both sides (`as_one`); fewer than two: none are.

  Raises:
    ValueError: an unknown `kind` or `support`, `k` below 1, `temperature` not above 0, or shapes
      that do not match.
  """
  check_options(kind, support, k, temperature)
  _check_shapes(mask, student_logits=student_logits, teacher_logits=teacher_logits)
  mask = mask.astype(bool)
  s, t = (as_one(_hide(x, mask), one, temperature) for x in (student_logits, teacher_logits))
  log_p = log_probabilities(s, temperature)
  log_q = log_probabilities(jax.lax.stop_gradient(t), temperature)
  inside = support_set(log_p, support, k)
  return _masked(token_divergence(log_p, log_q, inside, kind, support), mask)


def sampled_reverse_kl(
  student_logits: Float[Array, "*tokens V"],
  teacher_logits: Float[Array, "*tokens V"],
  tokens: Int[Array, "*tokens"],
  mask: Shaped[Array, "*tokens"],
  *,
  temperature: float = 0.7,
  estimator: str = "k1",
) -> tuple[Scalar, Scalar]:
  """Returns (sum over masked tokens of an estimate of KL(student ‖ teacher), count) from the
  sampled token alone.

  A baseline to compare the exact loss with. r = log p(y) − log q(y) at the sampled token, y ~ p:

  | estimator | value               | unbiased | expected gradient, a position by itself  |
  | 'k1'      | r                   | yes      | ∇ KL(p ‖ q), as r · ∇ log p(y)           |
  | 'k2'      | r² / 2              | no       | ∇ KL(p ‖ q), sample by sample as k1's    |
  | 'k3'      | exp(−r) − 1 + r ≥ 0 | yes      | ∇ KL(q ‖ p), the other: (1 − q/p) ∇log p |

  (Schulman's names.) Differentiating r itself would give ∇ log p(y), of mean zero: noise. So 'k1'
  has the value r and the gradient of the score-function surrogate. Nothing is clipped: a per-token
  clip can turn a gradient's sign.

  Unbiased holds for tokens drawn at this same `temperature` from this same student. Only
  `student_logits` gets a gradient. Shapes, dtypes, mask and errors are those of `divergence`;
  `tokens` may hold anything where the mask is 0.

  Raises:
    ValueError: an unknown `estimator`, `temperature` not above 0, or shapes that do not match.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f"estimator is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}")
  check_options(temperature=temperature)
  _check_shapes(mask, tokens, student_logits=student_logits, teacher_logits=teacher_logits)
  mask = mask.astype(bool)
  log_p = _at(log_probabilities(_hide(student_logits, mask), temperature), tokens, mask)
  log_q = _at(
    log_probabilities(jax.lax.stop_gradient(_hide(teacher_logits, mask)), temperature), tokens, mask
  )
  ratio = log_p - log_q
  if estimator == "k1":
    fixed = jax.lax.stop_gradient(ratio)
    # The second term is 0 in value; its gradient is r · ∇ log p(y).
    value = fixed + fixed * (log_p - jax.lax.stop_gradient(log_p))
  elif estimator == "k2":
    value = 0.5 * ratio**2
  else:
    value = jnp.expm1(-ratio) + ratio
  return _masked(value, mask)


def imitation(
  student_logits: Float[Array, "*tokens V"],
  tokens: Int[Array, "*tokens"],
  mask: Shaped[Array, "*tokens"],
) -> tuple[Scalar, Scalar]:
  """Returns (sum over masked tokens of −log p(token) in nats, count): the off-policy baseline's
  cross-entropy.

  The student is trained to say what the teacher said (the "off-policy" rows of OPCD, arXiv
  2602.12275). Always at temperature 1. float32 scalars; `tokens` and `student_logits` may hold
  anything where the mask is 0.

  Raises:
    ValueError: shapes that do not match.
  """
  _check_shapes(mask, tokens, student_logits=student_logits)
  mask = mask.astype(bool)
  return _masked(-_at(log_probabilities(_hide(student_logits, mask), 1.0), tokens, mask), mask)


# ---- The pieces that the fused path shares.


def check_options(
  kind: str = "reverse_kl", support: str = "full", k: int = 256, temperature: float = 1.0
) -> None:
  """Raises a ValueError that names the first option out of range, its value, and what would be
  right.
  """
  if kind not in DIVERGENCES:
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(DIVERGENCES)}")
  if support not in SUPPORTS:
    raise ValueError(f"support is {support!r}; it must be one of {', '.join(SUPPORTS)}")
  if not k >= 1:
    raise ValueError(f"k is {k!r}; it must be at least 1, the number of tokens kept")
  if not 0 < temperature < float("inf"):
    raise ValueError(f"temperature is {temperature!r}; it must be a finite number above 0")


def log_probabilities(
  logits: Float[Array, "*tokens V"], temperature: float
) -> Float32[Array, "*tokens V"]:
  """Returns log softmax(logits / temperature) in float32, with no entry below about FLOOR /
  temperature.
  """
  # Cast before the division and the sum: in bfloat16 a log-probability near −9 is off by 0.03.
  return jax.nn.log_softmax(jnp.maximum(logits.astype(jnp.float32), FLOOR) / temperature, axis=-1)


def as_one(
  logits: Float[Array, "*tokens V"], ids: tuple[int, ...], temperature: float
) -> Float[Array, "*tokens V"]:
  """Returns logits, float32, under which the first of these tokens has the probability of all of
  them at this temperature and the others none; as they are, if there are not two.
  """
  if len(ids) < 2:
    return logits
  logits, ids = jnp.maximum(logits.astype(jnp.float32), FLOOR), jnp.array(ids)
  whole = temperature * jax.nn.logsumexp(logits[..., ids] / temperature, axis=-1)
  return logits.at[..., ids].set(FLOOR).at[..., ids[0]].set(whole)


def support_set(
  log_p: Float32[Array, "*tokens V"], support: str, k: int
) -> Bool[Array, "*tokens V"] | None:
  """Returns which tokens `support` keeps: the k largest of `log_p`, or None for all of them."""
  if support == "full":
    return None
  _, kept = jax.lax.top_k(jax.lax.stop_gradient(log_p), min(k, log_p.shape[-1]))
  return jnp.put_along_axis(jnp.zeros(log_p.shape, bool), kept, True, axis=-1, inplace=False)


def token_divergence(
  log_p: Float32[Array, "*tokens V"],
  log_q: Float32[Array, "*tokens V"],
  inside: Bool[Array, "*tokens V"] | None,
  kind: str,
  support: str,
) -> Float32[Array, "*tokens"]:
  """Returns the divergence at each token; `inside` is `support_set(log_p, support, k)`."""
  terms = DIVERGENCES[kind].terms
  if inside is None:
    return terms(log_p, log_q).sum(-1)
  value = jnp.where(inside, terms(log_p, log_q), 0).sum(-1)
  if support == "topk_tail":
    value += terms(log_outside(log_p, inside), log_outside(log_q, inside))
  return value


def log_outside(
  log_p: Float32[Array, "*tokens V"], inside: Bool[Array, "*tokens V"]
) -> Float32[Array, "*tokens"]:
  """Returns log(1 − Σ_inside p), or about FLOOR where `inside` is everything.

  Summed over the tokens outside rather than by subtraction: 1 − Σp has no digits left in float32
  once the mass inside is 1 − 1e-9, and its logarithm no finite gradient once it is 1.
  """
  return jax.nn.logsumexp(jnp.where(inside, FLOOR, log_p), axis=-1)


def _hide(logits: Array, mask: Array) -> Array:
  # Replaced, not multiplied: 0 × NaN is NaN, in the value and again in the gradient.
  return jnp.where(mask[..., None], logits, 0)


def _masked(value: Array, mask: Array) -> tuple[Scalar, Scalar]:
  return jnp.where(mask, value, 0).sum(), mask.sum(dtype=jnp.float32)


def _at(log_p: Array, tokens: Array, mask: Array) -> Array:
  # Padding is often −1 or −100, which would index from the end.
  return jnp.take_along_axis(log_p, jnp.where(mask, tokens, 0)[..., None], axis=-1)[..., 0]


def _check_shapes(mask: Array, tokens: Array | None = None, **logits: Array) -> None:
  (first, shape), *others = [(name, value.shape) for name, value in logits.items()]
  for name, other in others:
    if other != shape:
      raise ValueError(f"{name} has shape {other}; it must be that of {first}, {shape}")
  for name, value in (("mask", mask), ("tokens", tokens)):
    if value is not None and value.shape != shape[:-1]:
      raise ValueError(
        f"{name} has shape {value.shape}; it must be {shape[:-1]}, {first} without its vocabulary "
        "axis"
      )
