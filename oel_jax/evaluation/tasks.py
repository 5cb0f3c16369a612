"""What a policy is measured on beside its games: tasks that a configuration names, whose results
show what training lost.

A task is a function (policy, count, *, seed) -> Count: it puts `count` examples, drawn from `seed`
alone, to `policy`, an `Examinee`, and counts the right answers. It is known by the function's name.
"""

import dataclasses
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.schema import Message
from oel_jax.evaluation import statistics
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import named


@dataclasses.dataclass(frozen=True)
class Count:
  """`hits` out of `of`, whole numbers; `categories` says the same of the parts that make up the
  whole, if any.
  """

  hits: int
  of: int
  categories: Mapping[str, "Count"] = dataclasses.field(default_factory=dict)

  @property
  def rate(self) -> float:
    return self.hits / self.of if self.of else float("nan")


@dataclasses.dataclass(frozen=True)
class Examinee:
  """The policy that a task measures, and how the run's evaluation has it answer.

  Attributes:
    policy: has `tokenizer` and `sample`, which a task may use as they are.
    sampling: of config.evaluation.
    max_new_tokens: config.deployment.max_response_tokens, thinking included.
    thinking: config.policy.thinking.
  """

  policy: Any
  sampling: Sampling
  max_new_tokens: int
  thinking: bool

  @property
  def tokenizer(self) -> Any:
    return self.policy.tokenizer

  def sample(self, *args: Any, **how: Any) -> list[list[int]]:
    """As `sampler.Policy.sample`."""
    return self.policy.sample(*args, **how)

  def answers(
    self,
    prompts: Sequence[Sequence[Message]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int | None = None,
  ) -> list[str]:
    """Returns what is answered to each prompt, without the thinking.

    Args:
      prompts: what was said before each answer.
      seeds: one a prompt, uint32.
      max_new_tokens: of an answer, thinking included; None: as many as the run's.
    """
    encoded = [prompt_lib.ids(self.tokenizer, one, thinking=self.thinking) for one in prompts]
    limit = max_new_tokens or self.max_new_tokens
    sampled = self.sample(encoded, seeds, sampling=self.sampling, max_new_tokens=limit)
    return [self.tokenizer.split_response(ids, thinking=self.thinking)[1] for ids in sampled]


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
  policy: Examinee,
  count: int,
  *,
  seed: int,
  advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
  """Returns each task's share with its interval, and those of its "categories" if it has such, on
  `count` examples that are the same in every round; {} if count is 0. `advance` is told of examples
  done.

  Raises:
    ValueError: a task returns something else than a Count, or one that is no share, or its
      categories do not add up to it, or it exits; whatever else a task raises is its own.
  """
  measured = {}
  for name, task in tasks.items() if count else ():
    try:
      found = task(policy, count, seed=seed)
    except SystemExit as error:  # which would end the run unsaid
      reason = named.explained(error)
      raise ValueError(f"config.evaluation.tasks: {name} fails ({reason})") from error
    if not isinstance(found, Count):
      raise ValueError(
        f"config.evaluation.tasks: {name} returns {reprlib.repr(found)}: it must be a "
        "oel_jax.evaluation.tasks.Count"
      )
    measured[name] = _share(name, found)
    parts = {part: _share(f"{name}, {part}", one) for part, one in found.categories.items()}
    for field in ("hits", "of") if parts else ():
      total, right = sum(part[field] for part in parts.values()), getattr(found, field)
      if total != right:
        raise ValueError(
          f"config.evaluation.tasks: {name} returns categories with {total} {field} in all: it "
          f"must be {right}, as its Count says"
        )
    measured[name] |= {"categories": parts} if parts else {}
    advance(count)
  return measured


def _share(name: str, found: Count) -> dict[str, Any]:
  """`statistics.count`; ValueError where the numbers are none that can be counted."""
  try:
    hits, of = operator.index(found.hits), operator.index(found.of)
  except TypeError:
    hits, of = -1, 0
  if not 0 <= hits <= of:
    raise ValueError(
      f"config.evaluation.tasks: {name} returns {found.hits!r} hits of {found.of!r}: they must be "
      "whole numbers, from 0 hits to all"
    )
  return statistics.count(hits, of)
