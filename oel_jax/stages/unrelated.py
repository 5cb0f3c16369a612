"""How far training has moved the model where it had nothing to learn: on prompts that have nothing
to do with what was deployed.
"""

from typing import Any

from oel_jax.conversations.importers import read_prompts
from oel_jax.conversations.schema import Prompt
from oel_jax.evaluation import statistics
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.stages import divergence
from oel_jax.stages.run import Meter, Run

FIELD = "config.evaluation.unrelated"


def prompts(config: Any) -> list[Prompt]:
  """Returns the prompts in config.evaluation.unrelated; [] if it names no file.

  Raises:
    ValueError: it holds something else (`importers.read_prompts`).
    OSError: it is missing.
  """
  path = config.evaluation.unrelated
  return read_prompts(path, "unrelated", group="evaluation") if path else []


def measure(run: Run, policy: Policy, meter: Meter) -> dict[str, Any] | None:
  """KL(π(·|x, y<t) ‖ π_base(·|x, y<t)), over the whole vocabulary and on answers y of the policy's
  own: on-policy and in the direction of the loss, here from the weights that the run began with
  and with no knowledge in either prompt.

  At config.consolidation.temperature, samples too. The base's weights are there all the time
  (`Run.base`), and while this is measured once more in the type of the computation.

  Args:
    run: the run.
    policy: what a round made; of the base itself, the divergence is 0 but for rounding.
    meter: counts the answers.

  Returns:
    "prompts"; "kl", nats a token of the answers; "response_tokens", of an answer
    (`statistics.mean`). None if config.evaluation.unrelated names no file.

  Raises:
    ValueError: the file is not as it should be, or a prompt in it too long.
    OSError: it is missing.
    NotFiniteError: a divergence is not finite.
  """
  asked = prompts(run.config)
  if not asked:
    return None
  task = divergence.plain_task(run, policy, asked)
  found, answers = divergence.scorer(run, task, run.base, FIELD)(policy)
  meter.scored(task.prompts, answers)
  sizes = [len(ids) for ids in answers]
  return {"prompts": len(asked), "kl": found["kl"], "response_tokens": statistics.mean(sizes)}
