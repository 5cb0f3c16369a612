"""What consolidation left of the knowledge's effect where nothing was learned: prompts of held-out
conversations, where there is no environment to play.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from oel_jax.consolidation import placement, samples
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.conversations.jsonl import read_prompts
from oel_jax.conversations.schema import knowledge_message
from oel_jax.evaluation import statistics
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import finite
from oel_jax.stages.run import HELD_OUT, Run

BATCH = 32  # prompts at a time
NOTHING = 1e-6  # nats a token that float32 cannot tell from none


def measure(
  run: Run, number: int, policy: Policy, before: Policy, texts: Sequence[str]
) -> dict[str, Any] | None:
  """How far two policies are from the one that has the knowledge in its prompt, on answers of their
  own to the round's held-out prompts.

  Each answer's tokens are scored as in training: KL(π(·|x) ‖ π_before(·|e, x)) over the whole
  vocabulary, at config.consolidation.temperature. Which knowledge text and which random stream a
  prompt has is the same for both policies and in every round.

  Args:
    run: the run.
    number: of the round.
    policy: what the round made.
    before: what the round began with; with the knowledge, it is the teacher.
    texts: the round's knowledge.

  Returns:
    "prompts"; "kl_before" and "kl_after", nats a token; "closer", the share of the first that is
    gone, None if the knowledge changes nothing; "response_tokens_before" and
    "response_tokens_after", each a mean (`statistics.mean`). None without held-out prompts.

  Raises:
    NotFiniteError: a divergence is not finite.
  """
  path = run.round(number) / HELD_OUT
  prompts = read_prompts(path, max_damaged=0.0) if path.exists() else []
  if not prompts or not texts:
    return None
  config = run.config
  task = task_lib.make_task(
    before.tokenizer,
    prompts,
    texts,
    seed=config.seed,
    round=0,
    thinking=config.policy.thinking,
    limit=config.policy.max_prompt_tokens,
    message=functools.partial(knowledge_message, wording=config.extraction.wording),
  )
  attn_impl = placement.attn_impl(config.consolidation, before)
  teacher = placement.prepare_teacher(config.consolidation, task, before, run.mesh, attn_impl)
  probe = step_lib.make_probe(
    before.architecture,
    k=1,
    temperature=config.consolidation.temperature,
    chunk=config.consolidation.chunk,
    dtype=before.dtype,
    attn_impl=attn_impl,
    mesh=run.mesh,
  )
  scored = functools.partial(_scored, run, task, teacher, probe, before)
  kl_before, sizes_before = scored(before)
  kl_after, sizes_after = scored(policy)
  return {
    "prompts": len(prompts),
    "kl_before": kl_before,
    "kl_after": kl_after,
    "closer": 1 - kl_after / kl_before if kl_before > NOTHING else None,
    "response_tokens_before": statistics.mean(sizes_before),
    "response_tokens_after": statistics.mean(sizes_after),
  }


def _scored(
  run: Run,
  task: task_lib.Task,
  teacher: teacher_lib.Teacher,
  probe: Callable[..., Any],
  before: Policy,
  student: Policy,
) -> tuple[float, list[int]]:
  """The student's mean divergence a token, and the lengths of its answers."""
  config, total, count, sizes = run.config.consolidation, 0.0, 0.0, []
  for start in range(0, len(task.prompts), BATCH):
    chosen = range(start, min(start + BATCH, len(task.prompts)))
    limit = run.config.deployment.max_response_tokens
    batch, lengths = samples.sample_batch(
      task, student, before, chosen, chosen, config, limit, "held out"
    )
    placed = samples.place(batch, run.mesh, BATCH)
    kl = float(jax.device_get(probe(student.params, teacher, placed))["kl"])
    if not math.isfinite(kl):
      names = finite.listed([task.ids[i] for i in chosen])
      raise finite.NotFiniteError(
        f"{HELD_OUT}: the divergence from the teacher is {kl} on the prompts {names}: one of the "
        "two models gives numbers that are none there"
      )
    tokens = float(batch.mask.sum())
    total, count, sizes = total + tokens * kl, count + tokens, sizes + lengths
  return total / count, sizes
