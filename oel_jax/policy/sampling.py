"""How a token is drawn from logits: filters in the order and with the ties of `transformers`, then one draw a row from its own stream."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def sample_token(logits_BxV: Float[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, "B"]:
  """Draws one id a row: logits / temperature, top-k, top-p, min-p, then softmax."""
  return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BxV, sampling)).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """The float32 logits of the distribution that is sampled from: -inf outside the support."""
  logits = logits.astype(jnp.float32) / sampling.temperature
  V = logits.shape[-1]
  if 0 < sampling.top_k < V:
    kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampling.top_p < 1:
    # Ascending, as transformers does: a token goes if it and all less likely ones together hold at most 1 - top_p.
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    gone = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampling.top_p
    gone = gone.at[..., -1].set(False)
    gone = jnp.put_along_axis(jnp.zeros_like(gone), order, gone, axis=-1, inplace=False)
    logits = jnp.where(gone, -jnp.inf, logits)
  if sampling.min_p > 0:
    p = jax.nn.softmax(logits, axis=-1)
    logits = jnp.where(p < sampling.min_p * p.max(-1, keepdims=True), -jnp.inf, logits)
  return logits
