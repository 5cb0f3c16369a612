"""Rates and means with their 95% intervals, as they stand in evaluation.json."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959963984540054  # the normal distribution's 97.5% point


def count(hits: int, of: int) -> dict[str, Any]:
  """A rate with its Wilson score interval; 0 of 0 has neither: None."""
  if of == 0:
    return {"rate": None, "hits": 0, "of": 0, "interval": None}
  p, z2 = hits / of, Z * Z
  middle = (p + z2 / (2 * of)) / (1 + z2 / of)
  half = Z / (1 + z2 / of) * math.sqrt(p * (1 - p) / of + z2 / (4 * of * of))
  return {
    "rate": p,
    "hits": hits,
    "of": of,
    "interval": [max(0.0, middle - half), min(1.0, middle + half)],
  }


def mean(values: Sequence[float]) -> dict[str, Any]:
  """A mean with its normal interval, which fewer than two values do not have: None; nor has nothing
  a mean.
  """
  of = len(values)
  if of < 2:
    return {"mean": float(values[0]) if of else None, "of": of, "interval": None}
  middle = sum(values) / of
  error = math.sqrt(sum((value - middle) ** 2 for value in values) / (of - 1) / of)
  return {"mean": middle, "of": of, "interval": [middle - Z * error, middle + Z * error]}


def recovered(after: float, base: float, in_context: float) -> float | None:
  """(after − base) / (in context − base): the share of the knowledge's gain that the weights now
  hold; None where there is no gain.
  """
  return (after - base) / (in_context - base) if in_context > base else None


def fewer(hits: int, of: int, other_hits: int, other_of: int) -> float:
  """Fisher's exact test, one-sided: how likely so few hits of these, or fewer, are if both groups
  have the same rate (the hypergeometric distribution given all hits together); 1.0 of nothing.
  """
  hits_of_both, of_both = hits + other_hits, of + other_of
  ways = sum(
    math.comb(of, k) * math.comb(other_of, hits_of_both - k)
    for k in range(max(0, hits_of_both - other_of), hits + 1)
  )
  return ways / math.comb(of_both, hits_of_both)
