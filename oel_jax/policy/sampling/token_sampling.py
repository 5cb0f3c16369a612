"""How a token is drawn from logits: filters in the order and with the ties of `transformers`, then
one draw a row from its own stream.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NUCLEUS = 64  # so many of the likeliest usually hold top_p of the mass
GROUP = 64  # most neighbours that are looked at together for the top k
NOT_FINITE = -2  # in place of an id: its logits are no numbers to draw from


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    temperature: the logits are divided by it.
    top_k: so many of the most likely stay; 0: all.
    top_p: then the smallest set of at least this mass.
    min_p: then those at least this share as likely as the likeliest.
  """

  temperature: float
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0

  def __post_init__(self):
    for name, ok, right in (
      ("temperature", self.temperature > 0, "above 0"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("top_k", self.top_k >= 0, "0 (off) or more"),
      ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
    ):
      if not ok:
        raise ValueError(f"Sampling.{name} is {getattr(self, name)}: it must be {right}")


def sample_token(
  logits_BxV: Float[Array, "B V"],
  keys_B: Array,
  sampling: Sampling,
  active_B: Bool[Array, "B"] | None = None,
) -> Int[Array, "B"]:
  """Draws one id a row: logits / temperature, top-k, top-p, min-p, then softmax. Rows that are not
  active get any id. A row with NaN or +inf among its logits, or nothing but -inf, gets NOT_FINITE;
  -inf beside finite ones is a mask.

  First a group of neighbours is drawn by its mass, then an id in it: two random numbers a row
  instead of one an id (`jax.random.categorical`), which took a CPU a seventh of a step of a small
  model. A probability is right to about 2^-23 of its group's, and that to about 2^-23 of all.
  """
  logits = filter_logits(logits_BxV, sampling, active_B)
  width = math.isqrt(logits.shape[1] - 1) + 1
  groups = _groups(logits, width)
  top, random = logits.max(-1)[:, None], jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
  mass = jnp.exp(groups - top[..., None]).sum(-1)
  group = _first_above(mass, random[:, :1])
  chosen = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
  token = group * width + _first_above(
    jnp.exp(chosen - chosen.max(-1, keepdims=True)), random[:, 1:]
  )
  # No filter takes NaN or +inf away, and either makes a mass NaN, as nothing but -inf does: so the
  # few masses tell of the whole row, without another pass over the vocabulary. The maximum does
  # not: XLA's on a CPU passes over NaN.
  return jnp.where(jnp.isfinite(mass).all(-1), token, NOT_FINITE)


def _first_above(mass_BxN: Float[Array, "B N"], share_Bx1: Float[Array, "B 1"]) -> Int[Array, "B"]:
  """The first place up to which there is more than this share, below 1, of a row's mass; it has
  some of its own.

  All sums are taken in the same order, zeros for what is not in them: so they never fall, and where
  nothing is added they are equal. A mass too small for a share of it to be less counts as none.
  """
  mass_BxN = jnp.where(mass_BxN < jnp.finfo(jnp.float32).tiny, 0, mass_BxN)
  there = jnp.tril(jnp.ones((mass_BxN.shape[1],) * 2, bool))
  sums = jnp.where(there, mass_BxN[:, None], 0).sum(-1)
  return (sums <= share_Bx1 * sums[:, -1:]).sum(-1, dtype=jnp.int32)


def filter_logits(
  logits: Float[Array, "B V"], sampling: Sampling, active_B: Bool[Array, "B"] | None = None
) -> Float[Array, "B V"]:
  """The float32 logits of the distribution that is sampled from: -inf outside the support. Rows
  that are not active may keep too much.
  """
  logits = logits.astype(jnp.float32) / sampling.temperature
  if sampling.top_p < 1:
    logits = _filter_by_mass(
      logits, sampling, jnp.ones(logits.shape[:-1], bool) if active_B is None else active_B
    )
  elif 0 < sampling.top_k < logits.shape[-1]:
    logits = jnp.where(logits < top_k(logits, sampling.top_k)[0][..., -1:], -jnp.inf, logits)
  if sampling.min_p > 0:
    p = jax.nn.softmax(logits, axis=-1)
    logits = jnp.where(p < sampling.min_p * p.max(-1, keepdims=True), -jnp.inf, logits)
  return logits


def _filter_by_mass(logits, sampling, active):
  """Top-k and top-p. The likeliest few decide, unless in an active row ids tie at the border or
  many are needed: only then whole rows are sorted.
  """
  V = logits.shape[-1]
  cut = 0 < sampling.top_k < V
  k = sampling.top_k if cut else min(NUCLEUS, V)
  top = top_k(logits, k)[0]
  p = jnp.exp(top - jax.nn.logsumexp(top if cut else logits, axis=-1, keepdims=True))
  # A token goes if it and all less likely ones together hold at most 1 - top_p.
  kept = (jnp.cumsum(p, axis=-1) - p < sampling.top_p).sum(-1, keepdims=True)
  last = jnp.take_along_axis(top, kept - 1, axis=-1)
  alone = (logits >= last).sum(-1, keepdims=True) == kept
  enough = (logits >= top[..., -1:]).sum(-1, keepdims=True) == k if cut else (kept < k) | (k == V)
  sure, quick = alone & enough | ~active[..., None], jnp.where(logits < last, -jnp.inf, logits)
  return jax.lax.cond(
    sure.all(),
    lambda: quick,
    lambda: jnp.where(sure, quick, _sort_and_filter(logits, top, sampling, cut)),
  )


def _sort_and_filter(logits, top, sampling, cut):
  logits = jnp.where(logits < top[..., -1:], -jnp.inf, logits) if cut else logits
  # Ascending, as transformers does, which decides who goes of those that tie.
  order = jnp.argsort(logits, axis=-1)
  ascending = jnp.take_along_axis(logits, order, axis=-1)
  gone = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampling.top_p
  gone = gone.at[..., -1].set(False)
  gone = jnp.put_along_axis(jnp.zeros_like(gone), order, gone, axis=-1, inplace=False)
  return jnp.where(gone, -jnp.inf, logits)


def top_k(
  x_CxV: Float[Array, "C V"], k: int, maxima_CxG: Float[Array, "C G"] | None = None
) -> tuple[Float[Array, "C k"], Int[Array, "C k"]]:
  """`jax.lax.top_k`, with ties to the lower id, without sorting whole rows on a GPU: that takes
  longer than the loss or a token itself.

  The k groups of neighbours with the largest maxima hold the k largest numbers: for a number in
  another group, each of these k has one that is larger, or as large and of a lower id. `maxima_CxG`
  are those of `group_maxima`, if they are known. Returns the numbers, the largest first, and their
  ids, int32.
  """
  C, V = x_CxV.shape
  width = group_width(V, k)
  if width < 2:
    return jax.lax.top_k(x_CxV, k)
  maxima = group_maxima(x_CxV, k) if maxima_CxG is None else maxima_CxG
  best = jnp.sort(jax.lax.top_k(maxima, k)[1], axis=-1)  # in order, so that ids still rise
  top, at = top_k(
    jnp.take_along_axis(_groups(x_CxV, width), best[..., None], axis=1).reshape(C, k * width), k
  )
  return top, jnp.take_along_axis(best, at // width, axis=-1) * width + at % width


def group_width(V: int, k: int) -> int:
  """How many neighbours `top_k` takes together; below 2, none."""
  return min(GROUP, V // (8 * k))


def group_maxima(x_CxV: Float[Array, "C V"], k: int) -> Float[Array, "C G"]:
  """The largest number of each group of `group_width` neighbours, of which the last may be
  fewer.
  """
  return _groups(x_CxV, group_width(x_CxV.shape[1], k)).max(-1)


def _groups(x, width):
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % width)), constant_values=-jnp.inf).reshape(
    x.shape[0], -1, width
  )
