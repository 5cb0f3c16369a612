"""What the steps of a round draw from: which prompts each takes, and whose samples they are.

Samples are new at every step, as the paper's are, or drawn once: a prompt then keeps its response
and its knowledge text wherever it comes up again in the round.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import grain

from oel_jax.consolidation.task import Task
from oel_jax.conversations import dataset
from oel_jax.conversations.schema import conversation_of
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import finite


def batches(task: Task, config: Any) -> grain.IterDataset:
  """Batches of {"prompt", "draw"}: numbers of the task's prompts, and each one's place in the
  endless order, lists of the same length.

  The order derives from the task's seed and round (`dataset.batches`); the ids are in the task, so
  no file is read. `config` is config.consolidation: batch_size prompts at a time, with `balance`
  each game's as often as any other's; or all those of games_per_step games.
  """
  how = dict(seed=task.seed, round=task.round)
  if not config.games_per_step:
    how["groups"] = games_of(task) if config.balance else None
    return dataset.batches(range(len(task.prompts)), config.batch_size, **how)
  games = games_of(task)
  longest = max(map(len, games))

  def prompts_of(drawn: dict[str, list[int]]) -> dict[str, list[int]]:
    pairs = zip(drawn["prompt"], drawn["draw"], strict=True)
    found = [(n, draw * longest + i) for game, draw in pairs for i, n in enumerate(games[game])]
    return {"prompt": [n for n, _ in found], "draw": [draw for _, draw in found]}

  return dataset.batches(range(len(games)), config.games_per_step, **how).map(prompts_of)


def games_of(task: Task) -> list[list[int]]:
  """The numbers of each game's prompts, in order: those whose ids name the same conversation
  (`conversations.schema.Prompt`).
  """
  whose = lambda n: conversation_of(task.ids[n])
  return [list(numbers) for _, numbers in itertools.groupby(range(len(task.ids)), whose)]


def max_samples(task: Task, config: Any) -> int:
  """The most samples that a step may have."""
  if not config.games_per_step:
    return config.batch_size
  return config.games_per_step * max(map(len, games_of(task)))


@dataclasses.dataclass(frozen=True)
class Once:
  """A policy whose every response is sampled once and kept, by prompt and seed."""

  policy: Policy
  kept: dict[tuple[tuple[int, ...], int], list[int]] = dataclasses.field(default_factory=dict)

  @property
  def architecture(self) -> Any:
    return self.policy.architecture

  @property
  def tokenizer(self) -> Any:
    return self.policy.tokenizer

  def sample(
    self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **how: Any
  ) -> list[list[int]]:
    """As `Policy.sample`, always with the same `how`."""
    asked = [(tuple(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    new = list(dict.fromkeys(one for one in asked if one not in self.kept))
    if new:
      try:
        drawn = self.policy.sample([ids for ids, _ in new], [seed for _, seed in new], **how)
      except finite.NotFiniteError as error:  # which counts those that it was given
        bad = [i for i, one in enumerate(asked) if one in {new[n] for n in error.prompts}]
        raise finite.NotFiniteError(str(error), bad) from error
      self.kept.update(zip(new, map(list, drawn), strict=True))
    return [self.kept[one] for one in asked]


@dataclasses.dataclass(frozen=True)
class Samplers:
  """Whose samples the steps of a round take (config.consolidation.renewed and teacher).

  Attributes:
    teacher: a frozen one's weights.
    once: what samples each prompt once; None: the present student does, at every step.
    live: whether the teacher is the present student, with knowledge.
  """

  teacher: Policy
  once: Once | None
  live: bool

  def __call__(
    self, student: Policy, drawn: dict[str, Sequence[int]]
  ) -> tuple[Any, Any, Sequence[int]]:
    """Who samples as student and who as teacher, and the numbers that name the draws."""
    if self.once:
      return self.once, self.once, drawn["prompt"]
    return student, student if self.live else self.teacher, drawn["draw"]


def samplers(config: Any, policy: Policy, first: Policy) -> Samplers:
  """As config.consolidation asks for; `policy` has the round's first weights, `first` the run's."""
  teacher = first if config.teacher == "first" else policy
  round_of = teacher if config.data == "teacher" else policy
  once = {"step": None, "round": round_of, "never": first}[config.renewed]
  return Samplers(teacher, Once(once) if once else None, config.teacher == "live")


def whole(responses: Sequence[Sequence[int]], limit: int, eos_ids: Sequence[int]) -> list[int]:
  """The numbers of the responses that came to their own end before `limit` tokens cut them."""
  return [i for i, ids in enumerate(responses) if len(ids) < limit or ids[-1] in eos_ids]
