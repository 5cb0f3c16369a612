"""How far policies are from a teacher on answers of their own, measured as training measures it and
without any.
"""

import math
from collections.abc import Callable, Sequence

import jax

from oel_jax.consolidation import placement, samples
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.conversations.schema import Prompt
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import finite, together
from oel_jax.stages.run import Run

BATCH = 32  # prompts at a time


def plain_task(run: Run, policy: Policy, prompts: Sequence[Prompt]) -> task_lib.Task:
  """The prompts as the run shows them, without knowledge before teacher or student.

  Raises:
    ValueError: one is longer than config.policy.max_prompt_tokens.
  """
  config = run.config
  return task_lib.plain_task(
    policy.tokenizer,
    prompts,
    seed=config.seed,
    round=0,
    thinking=config.policy.thinking,
    limit=config.policy.max_prompt_tokens,
  )


def scorer(
  run: Run, task: task_lib.Task, teacher: Policy, where: str, k: int = 1
) -> Callable[[Policy], tuple[dict[str, float], list[list[int]]]]:
  """Makes score(student) -> means over the tokens y of its own answers, and the answers' ids: "kl",
  the student's KL(π_θ(·|x, y<t) ‖ π_teacher(·|e, x, y<t)), and the other statistics of
  `fused.linear_divergence`, nats a token.

  The vocabulary is whole; the temperature, of samples and divergence, is that of
  config.consolidation. Which knowledge and which random stream a prompt has is the same for every
  student. The teacher's weights are kept in the type of the computation, beside the student's.

  Args:
    run: the run.
    task: the prompts, and what the teacher reads before each.
    teacher: the policy that reads it.
    where: the prompts stand, for errors.
    k: tokens of "topk_mass".

  Raises:
    NotFiniteError: by `score`, where a divergence is not finite.
  """
  if together.leads():
    return lambda student: _score(run, task, teacher, student, where, k)
  # Answers of its own, whoever samples in training.
  config = run.config.consolidation.copy_and_resolve_references()
  config.data = "student"
  attn_impl = placement.attn_impl(config, teacher)
  prepared = placement.prepare_teacher(config, task, teacher, run.mesh, attn_impl)
  limit = run.config.deployment.max_response_tokens
  micro_tokens = samples.micro_tokens_of(
    config, task.prompts, limit=limit, samples=BATCH, mesh=run.mesh
  )
  probe = step_lib.make_probe(
    teacher.architecture,
    k=k,
    temperature=config.temperature,
    chunk=config.chunk,
    micro_tokens=micro_tokens,
    dtype=teacher.dtype,
    attn_impl=attn_impl,
    mesh=run.mesh,
  )

  def score(student: Policy) -> tuple[dict[str, float], list[list[int]]]:
    total, count, answers = {}, 0.0, []
    for start in range(0, len(task.prompts), BATCH):
      chosen = range(start, min(start + BATCH, len(task.prompts)))
      batch, responses = samples.sample_batch(
        task, student, student, chosen, chosen, config, limit, "held out"
      )
      placed = samples.place(batch, run.mesh, BATCH, micro_tokens)
      means = jax.device_get(probe(student.params, prepared, placed))
      if not math.isfinite(kl := means["kl"]):
        names = finite.listed([task.ids[i] for i in chosen])
        raise finite.NotFiniteError(
          f"{where}: the divergence from the teacher is {kl} on the prompts {names}: one of the "
          "two models gives numbers that are none there"
        )
      tokens = float(batch.mask.sum())
      count, answers = count + tokens, answers + responses
      for name, mean in means.items():
        total[name] = total.get(name, 0.0) + tokens * float(mean)
    return {name: value / count for name, value in total.items()}, answers

  return score


@together.everywhere
def _score(
  run: Run, task: task_lib.Task, teacher: Policy, student: Policy, where: str, k: int
) -> tuple[dict[str, float], list[list[int]]]:
  """In several processes: `scorer`'s score of one student."""
  return scorer(run, task, teacher, where, k)(student)
