"""What a step tells of its batch besides the loss: sums over response tokens, which add up over
micro-batches and are divided once.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from oel_jax.consolidation import batch as batch_lib

# The exact KL of response tokens from the first to the last place named, counted from 0: knowledge
# tends to act on the first ones.
BUCKETS = {
  "kl_0_15": (0, 15),
  "kl_16_63": (16, 63),
  "kl_64_255": (64, 255),
  "kl_256": (256, 2**31 - 1),
}

Sums = dict[str, Float32[Array, "2"]]


def zeros(kind: str, support: str) -> Sums:
  """{name: (sum, count)} of no tokens, for what `add_up` gives with this loss."""
  names = [] if kind == "imitation" else ["kl", "student_entropy", "teacher_entropy", *BUCKETS]
  names += ["topk_mass"] * (kind != "imitation" and support != "full")
  return {name: jnp.zeros(2, jnp.float32) for name in names}


def add_up(found: dict[str, Float[Array, "S R"]], batch: batch_lib.Batch) -> Sums:
  """{name: (sum, count)} of the statistics of `fused.linear_divergence`, of all response tokens and
  of those in each bucket.
  """
  masks = dict.fromkeys(found, batch.mask)
  if found:
    masks |= {
      name: batch.mask & (batch.offsets >= first) & (batch.offsets <= last)
      for name, (first, last) in BUCKETS.items()
    }
  total = lambda name, mask: jnp.stack(
    [jnp.where(mask, found[name if name in found else "kl"], 0).sum(), mask.sum(dtype=jnp.float32)]
  )
  return {name: total(name, mask) for name, mask in masks.items()}


def means(sums: Sums) -> dict[str, Float32[Array, ""]]:
  """Means a token; 0 where there is none, as in a bucket beyond every response."""
  return {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}
