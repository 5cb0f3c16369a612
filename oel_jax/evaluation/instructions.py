"""Instruction following: what a model must not lose while it learns something else.

    --config.evaluation.tasks='("oel_jax.evaluation.instructions:instructions",)' \\
        --config.evaluation.retention=256

Every instruction is checked by a program, strictly (`instruction_checks`); nothing judges whether
what was said is good. Prompts and checks are our own; the idea of checkable instructions is that of
IFEval (arXiv 2311.07911).
"""

import dataclasses
import random
from collections import Counter

from oel_jax.conversations.schema import Message
from oel_jax.evaluation.instruction_kinds import KINDS, Check
from oel_jax.evaluation.tasks import Count, Examinee
from oel_jax.runtime.seeds import derive

LIMIT = 256  # tokens of an answer that suffice for each of them, where the run allows fewer


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A prompt, of a kind in KINDS, and whether an answer does what it says."""

  kind: str
  prompt: str
  check: Check


def draw(count: int, seed: int) -> list[Instruction]:
  """Returns the first `count` instructions of a seed; kinds take turns."""
  kinds, found = tuple(KINDS), []
  for i in range(count):
    kind = kinds[i % len(kinds)]
    found.append(Instruction(kind, *KINDS[kind](random.Random(f"instruction {seed} {i}"))))
  return found


def instructions(policy: Examinee, count: int, *, seed: int) -> Count:
  """Instructions that are followed, and of each kind; a task of config.evaluation.tasks.

  Answers are sampled as the run's evaluation samples them, and may have LIMIT tokens where its
  responses may only have fewer.
  """
  asked = draw(count, seed)
  answers = policy.answers(
    [(Message("user", one.prompt),) for one in asked],
    [derive(seed, "instruction", i) for i in range(count)],
    max_new_tokens=max(LIMIT, policy.max_new_tokens),
  )
  followed = [one.check(answer) for one, answer in zip(asked, answers, strict=True)]
  of = Counter(one.kind for one in asked)
  hits = Counter(one.kind for one, right in zip(asked, followed, strict=True) if right)
  return Count(sum(followed), count, {kind: Count(hits[kind], of[kind]) for kind in of})
