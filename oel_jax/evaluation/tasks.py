"""What a policy is measured on beside its games: tasks that a configuration names, whose results
show what training lost.

A task is a function (policy, count, *, seed) -> Count: it puts `count` examples, drawn from `seed`
alone, to `policy.tokenizer` and `policy.sample`, and counts the right answers. It is known by the
function's name.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oel_jax.evaluation import statistics
from oel_jax.runtime import named


@dataclasses.dataclass(frozen=True)
class Count:
  """`hits` out of `of`."""

  hits: int
  of: int

  @property
  def rate(self) -> float:
    return self.hits / self.of if self.of else float("nan")


Task = Callable[..., Count]


def read_tasks(names: Sequence[str]) -> dict[str, Task]:
  """Returns the tasks of config.evaluation.tasks by their short names, what follows the colon.

  Raises:
    ValueError: one cannot be imported (`runtime.named`), or two have the same name.
    OSError: a file is missing.
  """
  found = {}
  for text in names:
    short = text.rpartition(":")[2]
    if short in found:
      raise ValueError(
        f"config.evaluation.tasks is {tuple(names)}: two tasks are named {short}: results are told "
        "apart by that name"
      )
    found[short] = named.function(text, "config.evaluation.tasks")
  return found


def measure(
  tasks: Mapping[str, Task],
  policy: Any,
  count: int,
  *,
  seed: int,
  advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
  """Returns each task's share with its interval, on `count` examples that are the same in every
  round; {} if count is 0. `advance` is told of examples done.

  Raises:
    ValueError: a task returns something else than a Count; whatever a task raises is its own.
  """
  measured = {}
  for name, task in tasks.items() if count else ():
    found = task(policy, count, seed=seed)
    if not isinstance(found, Count):
      raise ValueError(
        f"config.evaluation.tasks: {name} returns {reprlib.repr(found)}: it must be a "
        "oel_jax.evaluation.tasks.Count"
      )
    measured[name] = statistics.count(found.hits, found.of)
    advance(count)
  return measured
