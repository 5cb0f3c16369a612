"""How sure a policy is of its own answers, where nothing was learned: with each round's share of
games passed it shows a collapse coming.
"""

from collections.abc import Sequence
from typing import Any

from oel_jax.conversations.schema import Conversation, cut_prompts
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.stages import divergence
from oel_jax.stages.run import Meter, Run


def measure(
  run: Run, policy: Policy, games: Sequence[Conversation], meter: Meter
) -> dict[str, Any] | None:
  """Entropy, mass of the likeliest tokens, and divergence from the run's first weights, as means
  over the tokens of the policy's own answers to the first prompts of held-out games, without
  knowledge. These prompts are the same in every round.

  At config.consolidation.temperature, samples too, and over the whole vocabulary.

  Args:
    run: the run.
    policy: what a round made, or the base.
    games: the held-out games, of which the first config.evaluation.own_answers count.
    meter: counts the answers.

  Returns:
    "prompts"; "entropy" and "kl", nats a token; "k", config.consolidation.k, and "topk_mass", the
    mass on so many tokens. None where config.evaluation.own_answers is 0 or there are no games.

  Raises:
    NotFiniteError: a divergence is not finite.
  """
  config = run.config
  asked = [cut_prompts(game)[0] for game in games[: config.evaluation.own_answers]]
  if not asked:
    return None
  task = divergence.plain_task(run, policy, asked)
  k = config.consolidation.k
  found, answers = divergence.scorer(run, task, run.base, "held-out games", k)(policy)
  meter.scored(task.prompts, answers)
  return {
    "prompts": len(asked),
    "entropy": found["student_entropy"],
    "k": k,
    "topk_mass": found["topk_mass"],
    "kl": found["kl"],
  }
