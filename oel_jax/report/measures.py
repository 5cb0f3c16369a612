"""Measured numbers as the records hold them, each checked once."""

import dataclasses
from typing import Any

from oel_jax.runtime import schema


@dataclasses.dataclass(frozen=True)
class Measure:
  """One measured number.

  Attributes:
    value: a share in [0, 1], or a mean in its own unit; None if `of` is 0.
    of: how many cases it rests on.
    interval: 95%, low and high; None if there is none.
    hits: of a share, how many of the cases; None of a mean.
  """

  value: float | None
  of: int
  interval: tuple[float, float] | None
  hits: int | None = None


def read_share(value: Any, where: str) -> Measure:
  """Returns a share of `evaluation.statistics.count`, checked; errors name it `where`."""
  schema.share(value, where)
  return dataclasses.replace(_measure(value, "rate"), hits=value["hits"])


def read_mean(value: Any, where: str) -> Measure:
  """Returns a mean of `evaluation.statistics.mean`, checked; errors name it `where`."""
  schema.mean(value, where)
  return _measure(value, "mean")


def read_categories(value: dict[str, Any], where: str) -> dict[str, Measure]:
  """Returns the shares in `value["categories"]` by name, checked; {} if there are none."""
  categories = value.get("categories", {})
  schema.need(isinstance(categories, dict), f"{where}.categories", categories, "an object")
  return {
    name: read_share(share, f"{where}.categories.{name}") for name, share in categories.items()
  }


def _measure(value: Any, name: str) -> Measure:
  number, interval = value[name], value.get("interval")
  return Measure(number, value["of"], tuple(interval) if interval and number is not None else None)
