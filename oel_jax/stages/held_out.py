"""What consolidation left of the knowledge's effect where nothing was learned: prompts of held-out
conversations, where there is no environment to play. A few of the answers are kept, to be read.
"""

import functools
from collections.abc import Sequence
from typing import Any

from oel_jax.consolidation import task as task_lib
from oel_jax.conversations.jsonl import read_prompts, write_jsonl
from oel_jax.conversations.schema import (
  LOG,
  Conversation,
  Prompt,
  Source,
  conversation_of,
  knowledge_message,
)
from oel_jax.evaluation import statistics
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import tool_calls
from oel_jax.runtime import files
from oel_jax.runtime.checksum import fingerprint
from oel_jax.stages import divergence, withdrawn
from oel_jax.stages.run import ANSWERS, HELD_OUT, LOGS, Meter, Run

KEPT = 8  # conversations whose first prompt has its answers kept
NOTHING = 1e-6  # nats a token that float32 cannot tell from none


def measure(
  run: Run, number: int, policy: Policy, before: Policy, texts: Sequence[str], meter: Meter
) -> dict[str, Any] | None:
  """How far two policies are from the one that has the knowledge in its prompt, on answers of their
  own to the round's held-out prompts.

  Each answer's tokens are scored as in training: KL(π(·|x) ‖ π_before(·|e, x)) over the whole
  vocabulary, at config.consolidation.temperature. Which knowledge text and which random stream a
  prompt has is the same for both policies and in every round. Answers to the first prompts of KEPT
  conversations are left in ANSWERS.

  Args:
    run: the run.
    number: of the round.
    policy: what the round made.
    before: what the round began with; with the knowledge, it is the teacher.
    texts: the round's knowledge.
    meter: counts the answers.

  Returns:
    "prompts", and how many were "withdrawn" from them; "kl_before" and "kl_after", nats a token;
    "closer", the share of the first that is gone, None if the knowledge changes nothing;
    "response_tokens_before" and "response_tokens_after", each a mean (`statistics.mean`);
    "cut_before" and "cut_after", the shares of answers that the limit ended (`statistics.count`).
    None without held-out prompts.

  Raises:
    NotFiniteError: a divergence is not finite.
  """
  path = run.round(number) / HELD_OUT
  found = read_prompts(path, max_damaged=0.0) if path.exists() else []
  # A kill of --stage=withdraw may have left some in the file.
  gone = withdrawn.read(run.folder)
  prompts = [prompt for prompt in found if conversation_of(prompt.id) not in gone]
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
  score = divergence.scorer(run, task, before, HELD_OUT)
  kl, numbers = {}, {}
  for when, student in (("before", before), ("after", policy)):
    found, responses = score(student)
    meter.scored(task.prompts, responses)
    kl[when] = found["kl"]
    _keep(run, number, ANSWERS[when], student, prompts, responses)
    sizes = [len(ids) for ids in responses]
    numbers[f"response_tokens_{when}"] = statistics.mean(sizes)
    cut = sum(size >= config.deployment.max_response_tokens for size in sizes)
    numbers[f"cut_{when}"] = statistics.count(cut, len(sizes))
  return {
    "prompts": len(prompts),
    "withdrawn": _drawn(run, number, len(prompts)) - len(prompts),
    "kl_before": kl["before"],
    "kl_after": kl["after"],
    "closer": 1 - kl["after"] / kl["before"] if kl["before"] > NOTHING else None,
    **numbers,
  }


def _drawn(run: Run, number: int, left: int) -> int:
  """How many prompts the round had when its logs were read; `left` by an earlier version, which did
  not say.
  """
  path = run.round(number) / LOGS
  prompts = files.read_json(path).get("prompts", {}) if path.exists() else {}
  return prompts.get("held out", left)


def _keep(
  run: Run,
  number: int,
  name: str,
  student: Policy,
  prompts: Sequence[Prompt],
  responses: Sequence[Sequence[int]],
) -> None:
  """Writes the answers to the first prompt of each of KEPT conversations, with what was asked."""
  firsts: dict[str, int] = {}
  for place, prompt in enumerate(prompts):
    firsts.setdefault(conversation_of(prompt.id), place)
  kept = []
  for place in list(firsts.values())[:KEPT]:
    prompt, ids = prompts[place], responses[place]
    names, thinking = tool_calls.offered(prompt.tools), run.config.policy.thinking
    answer = tool_calls.read_response(student.tokenizer, ids, names, thinking=thinking)
    source = Source(LOG, HELD_OUT, line=place + 1)
    said = (*prompt.messages, answer)
    kept.append(Conversation(prompt.id, said, source, tools=prompt.tools))
  path, manifest = run.round(number) / name, run.manifest(number)
  prompts_digest = files.sha256(run.round(number) / HELD_OUT)[:16]
  made_from = {"weights": fingerprint(student.params), HELD_OUT: prompts_digest}
  if changed := manifest.changed(name, made_from):
    files.set_aside(path, f"it was answered with other {', '.join(changed)}")
  manifest.announce(name, made_from)
  write_jsonl(path, kept)
  manifest.record([name], made_from)
