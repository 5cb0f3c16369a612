"""What is to stay: how the round's first weights go on from a prompt that has knowledge in it
(config.consolidation.anchor).

Beside the loss on prompts without knowledge stands

    anchor · mean over tokens of KL(π_θ(·|e', x, y<t) ‖ π_teacher(·|e', x, y<t))

of some of the step's samples, with the same knowledge e' before both sides. The loss alone has
nothing against weights that no longer read what stands in their prompts: the next round's teacher
is one of them. e' is the round's own knowledge, or what config.consolidation.anchor_edit makes of
it: knowledge that says something else shows whether it is read at all.
"""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import id_lists, samples
from oel_jax.consolidation.task import Task
from oel_jax.policy.sampling.sampler import Policy


@dataclasses.dataclass(frozen=True)
class Anchor:
  """What lays out the samples that are kept, in a round's steps.

  Attributes:
    config: config.consolidation.
    task: its knowledge is e'; prompts and places as in the round's own task.
    policy: of the round.
    limit: most tokens of a response.
    mesh: devices.
    micro_tokens: most tokens of a micro-batch of the step.
    max_samples: most samples that are kept in a step.
    longest: tokens of the longest prompt with knowledge.
  """

  config: Any
  task: Task
  policy: Policy
  limit: int
  mesh: Mesh
  micro_tokens: int
  max_samples: int
  longest: int

  def __call__(self, drawn: samples.Drawn) -> tuple[batch_lib.Batch, int]:
    """The first of a step's samples, whose order is a draw's, with knowledge in their prompts and
    on the devices; and how many tokens they have.
    """
    count = anchored(self.config, len(drawn.prompts))
    part = drawn.only(range(count))
    prompts = [self.task.informed(*pair) for pair in zip(part.prompts, part.texts, strict=True)]
    shape = samples.row_shape(
      self.policy.architecture,
      [range(self.longest)],
      [()],
      limit=self.limit,
      longest=drawn.longest,
      pack=self.config.pack,
    )
    made = batch_lib.assemble(
      prompts,
      [0] * count,
      part.responses,
      pad_id=self.policy.tokenizer.pad_id,
      pack=self.config.pack,
      **shape._asdict(),
    )
    placed = samples.place(made, self.mesh, self.max_samples, self.micro_tokens)
    return placed, sum(map(len, prompts)) + sum(map(len, part.responses))


def prepare(
  config: Any,
  task: Task,
  policy: Policy,
  limit: int,
  mesh: Mesh,
  micro_tokens: int,
  max_samples: int,
) -> Anchor | None:
  """What lays out the samples that are kept of a round's steps, which have at most `max_samples`;
  None if none are.
  """
  if not config.anchor:
    return None
  kept = anchored(config, max_samples)
  return Anchor(config, task, policy, limit, mesh, micro_tokens, kept, _longest(task))


def anchored(config: Any, count: int) -> int:
  """How many of so many samples are kept."""
  return math.ceil(config.anchor_share * count)


def _longest(task: Task) -> int:
  """Tokens of the longest prompt with the longest knowledge that it may be given."""
  size = lambda text: len(task.knowledge[text]) - task.skip[text]
  known = {texts: max(map(size, texts)) for texts in set(task.given)}
  sizes = id_lists.sizes(task.prompts)
  return max(int(own) + known[texts] for own, texts in zip(sizes, task.given, strict=True))
