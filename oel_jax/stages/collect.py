"""Deployment elsewhere: what the deployed model's users said comes in as logs, and stands where
games stand in `deploy` (OEL section 3, with no environment).

Some users' conversations are held out: they are measured on and never learned from. Of the others,
some are what knowledge is drawn from, and the turns of some are the prompts that cross. All are
redacted before they are written.
"""

import dataclasses
import heapq
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from oel_jax import report
from oel_jax.conversations import logs, tools
from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.conversations.redact import Redactor, read_names
from oel_jax.conversations.schema import AGENT, Conversation, Message, Prompt, cut_prompts
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import leave_out
from oel_jax.runtime import files, schema
from oel_jax.runtime.counted import counted
from oel_jax.runtime.seeds import derive
from oel_jax.stages import withdrawn
from oel_jax.stages.run import DEPLOYED, HELD_OUT, LOGS, PROMPTS, USERS, Run


def collect(run: Run, number: int, policy: Policy) -> None:
  """Reads the round's logs; leaves conversations on the user side, and prompts.jsonl. What is there
  is not read again, whatever the logs hold now.

  Args:
    run: the run.
    number: of the round.
    policy: that the prompts are for: one that its template cannot render, or that is too long, is
      left out, counted and named.

  Raises:
    ValueError: more of the logs is damaged than `logs.read` takes; or no conversation, or no
      prompt, is left.
    OSError: the logs cannot be read.
  """
  path = run.round(number) / PROMPTS
  if path.exists():
    return
  folder, config = place(run.config, number), run.config
  if not pathlib.Path(folder).exists():
    report.write(run.folder)  # of the rounds before, which are done
    raise FileNotFoundError(
      f"{folder}: round {number} begins from the logs there, and there is none: deploy the weights "
      "that --stage=export writes, put there what their users said, and give the same command"
    )
  redact = redactor(config)
  counts, drawn = logs.Counts(), _drawn(config, number)
  for conversation in logs.distinct(folder, counts, near=config.logs.near, seed=config.seed):
    out = logs.held_out(conversation, config.logs.held_out, config.seed)
    for draw in drawn.values():
      if draw.held_out == out:
        draw.offer(conversation)
  if not drawn["knowledge"].kept:
    raise ValueError(
      f"{folder}: {counts.conversations} conversations, none of them to learn from: with "
      f"config.logs.held_out {config.logs.held_out} and without duplicates, at least one must be "
      "left"
    )
  offered = agents_tools(config)
  clean: dict[str, Conversation] = {}

  def redacted_once(one: Conversation) -> Conversation:
    """One that is drawn for knowledge and for prompts counts once."""
    if one.id not in clean:
      clean[one.id] = redact(_offering(offered, one))
    return clean[one.id]

  redacted = {
    name: withdrawn.left(run.folder, map(redacted_once, draw.taken()))
    for name, draw in drawn.items()
  }
  prompts = {
    name: _usable(run, number, name, policy, redacted[name]) for name in ("prompts", "held out")
  }
  if not prompts["prompts"]:
    raise ValueError(f"{folder}: no turn of its conversations can be made a prompt of this model")
  if not prompts["held out"]:
    logging.warning("%s: nobody is held out: what training does is measured on nothing", folder)
  (run.round(number) / "user").mkdir(parents=True, exist_ok=True)
  _tell(number, folder, counts, redact)
  found = {"logs": counts.as_json(), "redacted": dict(redact.counts)}
  found["prompts"] = {name: len(kept) for name, kept in prompts.items()}
  files.write_sealed(run.round(number) / LOGS, {"schema": 1, **found})
  users = {said.id: said.user for said in itertools.chain(*redacted.values()) if said.user}
  files.write_sealed(run.round(number) / USERS, {"schema": 1, "users": users})
  run.log(number, "collect", conversations=counts.conversations, prompts=len(prompts["prompts"]))
  made_from = {"logs": schema.digest([each.id for each in redacted["knowledge"]])}
  for name, records in (
    (DEPLOYED, redacted["knowledge"]),
    (HELD_OUT, prompts["held out"]),
    (PROMPTS, prompts["prompts"]),
  ):
    run.manifest(number).announce(name, made_from)
    write_jsonl(run.round(number) / name, records)
    run.manifest(number).record([name], made_from)


def _tell(number: int, folder: str, counts: logs.Counts, redact: Redactor) -> None:
  """Says what was found in the logs, what was left out, and how much was redacted."""
  sentences = counts.sentences()
  if taken := ", ".join(f"{kind} {count}" for kind, count in redact.counts.most_common()):
    sentences.append(f"taken out of what is kept: {taken}")
  for sentence in sentences:
    print(f"round {number}: {folder}: {sentence}", flush=True)


def redactor(config: Any) -> Redactor:
  """What config.logs says must not cross.

  Raises:
    ValueError: the function that it names is not there.
    OSError: the file of names cannot be read.
  """
  names = read_names(config.logs.redact_names) if config.logs.redact_names else ()
  return Redactor(names, config.logs.redact_hook)


def agents_tools(config: Any) -> tuple[str, ...]:
  """The definitions in the file that config.logs.tools names; () if it names none.

  Raises:
    ValueError: it holds none.
    OSError: it cannot be read.
  """
  return tools.read(config.logs.tools) if config.logs.tools else ()


def _offering(offered: tuple[str, ...], conversation: Conversation) -> Conversation:
  """An agent's session that names no tools with those of config.logs.tools."""
  named = conversation.tools or conversation.source.kind != AGENT
  return conversation if named else dataclasses.replace(conversation, tools=offered)


def people(config: Any) -> tuple[str, ...]:
  """The names of config.logs.people, as `schema.by_policy` takes them, and as redaction leaves them
  where it changes them: what is extracted from is redacted.

  Raises:
    ValueError, OSError: as `redactor`.
  """
  names = [name.strip() for name in config.logs.people.split(",") if name.strip()]
  redact = redactor(config) if names else None
  changed = [redact(Message("assistant", "", name=name)).name for name in names]
  return tuple(dict.fromkeys(names + changed))


def place(config: Any, number: int) -> str:
  """Where the round's logs are: "{round}" in config.logs.path stands for its number."""
  return config.logs.path.replace("{round}", str(number))


@dataclasses.dataclass
class _Draw:
  """`size` conversations of a stream, drawn by lot: those with the lowest lots. A lot hangs on the
  conversation alone, so more logs change little of what is drawn.

  Attributes:
    size: conversations to draw.
    held_out: whether from those held out.
    lot: names the lots, with a conversation's id.
    kept: (minus the lot, minus the place in the stream, the conversation), a heap.
  """

  size: int
  held_out: bool
  lot: tuple[Any, ...]
  kept: list[tuple[int, int, Conversation]] = dataclasses.field(default_factory=list)
  seen: int = 0

  def offer(self, conversation: Conversation) -> None:
    """Takes part in the draw."""
    self.seen += 1
    entry = -derive(*self.lot, conversation.id), -self.seen, conversation
    if len(self.kept) < self.size:
      heapq.heappush(self.kept, entry)
    else:
      heapq.heappushpop(self.kept, entry)

  def taken(self) -> Iterator[Conversation]:
    """What was drawn, in the order of the stream; the draw lets go of each."""
    self.kept.sort(key=lambda entry: entry[1])
    while self.kept:
      yield self.kept.pop()[2]


def _drawn(config: Any, number: int) -> dict[str, _Draw]:
  """The three draws of a round; held-out conversations are the same in each, if the logs are."""
  lot = (config.seed, number, "logs")
  return {
    "knowledge": _Draw(config.extraction.trajectories, False, (*lot, "knowledge")),
    "prompts": _Draw(config.deployment.episodes, False, (*lot, "prompts")),
    "held out": _Draw(config.evaluation.episodes, True, (config.seed, "logs", "held out")),
  }


def _usable(
  run: Run, number: int, name: str, policy: Policy, conversations: Iterable[Conversation]
) -> list[Prompt]:
  """The prompts of the conversations drawn as `name` that the model can be given, knowledge before
  them.
  """
  thinking, fit, long = run.config.policy.thinking, [], []
  room = run.config.policy.max_prompt_tokens - run.config.extraction.max_knowledge_tokens
  cut = [prompt for conversation in conversations for prompt in cut_prompts(conversation)]
  rendered, told = leave_out(policy.tokenizer, cut, thinking=thinking)
  for prompt in rendered:
    how = dict(tools=prompt.tools, thinking=thinking)
    size = len(prompt_lib.ids(policy.tokenizer, prompt.messages, **how))
    (fit if size <= room else long).append(prompt)
  if long:
    told.append(
      f"{counted(len(long), 'prompts are left out')}, {long[0].id} the first: more than {room} "
      "tokens, config.policy.max_prompt_tokens less extraction.max_knowledge_tokens"
    )
  for sentence in told:
    logging.warning("round %d, %s: %s", number, name, sentence)
  return fit
