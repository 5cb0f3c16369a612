"""Consolidation, the server side: knowledge/ and prompts.jsonl in, checkpoints out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import trainer
from oel_jax.conversations import jsonl
from oel_jax.conversations.schema import knowledge_message
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import mirror, named, together
from oel_jax.runtime.checksum import fingerprint
from oel_jax.stages.run import CHECKPOINTS, Run


def consolidate(run: Run, number: int, policy: Policy, texts: Sequence[str]) -> Any:
  """Trains the knowledge into the weights; returns the new parameters. From the round's folder it
  reads prompts.jsonl alone.
  """
  config = run.consolidation(number)
  task, kept = _make_task(run, number, policy, list(texts), "task"), None
  if edit := named.edit(config.anchor_edit, "config.consolidation.anchor_edit"):
    kept = _make_task(run, number, policy, [edit(text) for text in texts], "kept task")
  with run.stage(number, "consolidate", policy, config.steps) as (meter, advance):
    checkpoints = run.round(number) / CHECKPOINTS
    advance = mirror.with_checkpoints(run.config.mirror, run.folder, checkpoints, advance)
    params, cost = _train(run, number, policy, task, kept, advance)
    meter.tokens, meter.flops = int(cost["tokens"]), cost["flops"]
    meter.trained = int(cost["trained"])
  note_trained(run, number, params)
  return params


@together.everywhere
def _make_task(
  run: Run, number: int, policy: Policy, texts: Sequence[str], name: str
) -> task_lib.Task:
  """What the round's steps draw from, with these texts; each process reads it, for it may be large,
  and has it under this name.
  """
  task = task_lib.make_task(
    policy.tokenizer,
    jsonl.prompts(run.prompts(number), max_damaged=0.0),
    texts,
    seed=run.config.seed,
    round=number,
    thinking=run.config.policy.thinking,
    limit=run.config.policy.max_prompt_tokens,
    message=functools.partial(knowledge_message, wording=run.config.extraction.wording),
  )
  together.share(name, task)
  return task


@together.everywhere
def _train(
  run: Run,
  number: int,
  policy: Policy,
  task: task_lib.Task,
  kept: task_lib.Task | None,
  advance: Callable[..., None] | None,
) -> tuple[Any, dict[str, float]]:
  """`trainer.consolidate`; `advance` is None in all processes but the first."""
  params, cost = trainer.consolidate(
    run.consolidation(number),
    task,
    policy,
    limit=run.config.deployment.max_response_tokens,
    directory=run.round(number) / CHECKPOINTS,
    mesh=run.mesh,
    metrics=run.metrics,
    kept=kept,
    advance=advance or (lambda n, note="": None),
    base=run.base,
  )
  together.share(f"{together.WEIGHTS} {number}", params)
  return params, cost


def note_trained(run: Run, number: int, params: Any) -> None:
  """Enters steps and weights of the finished training into the manifest, after a look at what stood
  there.
  """
  now = {"steps": str(run.consolidation(number).steps), "weights": fingerprint(params)}
  before = run.manifest(number).made_from(CHECKPOINTS)
  if before and before["steps"] == now["steps"] and before["weights"] != now["weights"]:
    logging.warning(
      "round %d: trained again, to other weights than before (%s, now %s)",
      number,
      before["weights"],
      now["weights"],
    )
  run.manifest(number).announce(CHECKPOINTS, now)
