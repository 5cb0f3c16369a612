"""Rates and means with their 95% intervals, as they stand in evaluation.json."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

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


def paired(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> dict[str, Any]:
  """The mean difference between two ways to play the same games, with two 95% intervals.

  A game is the unit, however many turns it has; seeds count alike, however many games they have.

  Args:
    first, second: an array [games] a seed, what the game shows under the one and the other way; the
      same games in the same order.

  Returns:
    "difference", first less second; "games", [low, high] if these trained models played other
    games (normal, games within each seed); "seeds", [low, high] if other seeds were trained
    (Student's t over the seeds' mean differences). An interval is None where there are not two of
    its units.

  Raises:
    ValueError: no seeds, not the same number of them, or not the same number of games in one.
  """
  if not first or len(first) != len(second):
    raise ValueError(f"{len(first)} and {len(second)} seeds: there must be as many of both")
  for place, (one, other) in enumerate(zip(first, second)):
    if np.shape(one) != np.shape(other) or np.ndim(one) != 1 or not len(one):
      raise ValueError(
        f"seed number {place + 1} has games of the shapes {np.shape(one)} and {np.shape(other)}: "
        "both must be [games], at least one, the same games in the same order"
      )
  differences = [np.subtract(*pair, dtype=np.float64) for pair in zip(first, second, strict=True)]
  means = np.array([each.mean() for each in differences])
  middle, of = float(means.mean()), len(means)
  found = {"difference": middle, "games": None, "seeds": None}
  if all(len(each) > 1 for each in differences):
    error = math.sqrt(sum(each.var(ddof=1) / len(each) for each in differences)) / of
    found["games"] = [middle - Z * error, middle + Z * error]
  if of > 1:
    half = student_t(of - 1) * float(means.std(ddof=1)) / math.sqrt(of)
    found["seeds"] = [middle - half, middle + half]
  return found


def student_t(freedom: int) -> float:
  """The 97.5% point of Student's t with so many degrees of freedom, at least 1."""
  low, high = 0.0, math.pi / 2
  for _ in range(60):  # bisection of the angle, whose sine and cosine the distribution is made of
    middle = (low + high) / 2
    low, high = (middle, high) if _inside(middle, freedom) < 0.95 else (low, middle)
  return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
  """P(|T| < sqrt(freedom) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
  sine, cosine = math.sin(angle), math.cos(angle)
  odd = freedom % 2
  term, total = (cosine, 0.0) if odd else (1.0, 0.0)
  for power in range(1 + odd, freedom, 2):
    total += term
    term *= cosine * cosine * power / (power + 1)
  return 2 / math.pi * (angle + sine * total) if odd else sine * total
