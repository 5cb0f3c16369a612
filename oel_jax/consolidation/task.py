"""What a round's steps draw from, as token ids: prompts, and the knowledge that may stand before
each (OEL section 3, consolidation).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.schema import Message, Prompt, knowledge_message

# Beginnings of prompts, system text and tools, above which it is told: each is read with each text.
MANY_BEGINNINGS = 16


@dataclasses.dataclass(frozen=True)
class Task:
  """Everything a step draws from, as token ids.

  Attributes:
    prompts: one a prompt of the round.
    knowledge: what the teacher reads before a prompt, one a text and beginning of prompts, which is
      their system text and tools: knowledge stands behind the system text.
    skip: one a knowledge: so many ids at its beginning are the prompt's, too; after it, the teacher
      reads prompt[skip:].
    given: one a prompt: which knowledge it may be given, one a text.
    seed: of the run; with the round it names every draw.
    round: counted from 1.
    ids: the prompts' own names; errors name them.
  """

  prompts: tuple[tuple[int, ...], ...]
  knowledge: tuple[tuple[int, ...], ...]
  skip: tuple[int, ...]
  given: tuple[range, ...]
  seed: int
  round: int
  ids: tuple[str, ...]


def make_task(
  tokenizer: Any,
  prompts: Sequence[Prompt],
  texts: Sequence[str],
  *,
  seed: int,
  round: int,
  thinking: bool,
  limit: int,
  message: Callable[[str], Message] = knowledge_message,
) -> Task:
  """Turns prompts and knowledge texts into ids; `message` makes the knowledge message of a text.

  Raises:
    ValueError: there is none of either; a prompt with its knowledge is over `limit`
      (config.policy.max_prompt_tokens); or the chat template does not leave the prompt otherwise
      unchanged when there is knowledge.
  """
  if not prompts or not texts:
    raise ValueError(
      f"consolidation got {len(prompts)} prompts and {len(texts)} knowledge texts: it needs at "
      "least one of each"
    )
  encode = functools.partial(prompt_lib.ids, tokenizer, thinking=thinking)
  encoded = tuple(tuple(encode(prompt.messages, tools=prompt.tools)) for prompt in prompts)
  own = [_beginning(prompt) for prompt in prompts]
  beginnings = {beginning: i for i, beginning in enumerate(dict.fromkeys(own))}
  found = [
    tokenizer.knowledge_prefix(message(text), system=system, tools=tools, thinking=thinking)
    for system, tools in beginnings
    for text in texts
  ]
  first = [beginnings[beginning] * len(texts) for beginning in own]
  given = tuple(range(entry, entry + len(texts)) for entry in first)
  sizes = [max(len(found[entry][1]) - found[entry][0] for entry in entries) for entries in given]
  longest = max(range(len(encoded)), key=lambda i: len(encoded[i]) + sizes[i])
  own_size, known_size = len(encoded[longest]), sizes[longest]
  if own_size + known_size > limit:
    raise ValueError(
      f"config.policy.max_prompt_tokens is {limit}, but prompt {prompts[longest].id} has "
      f"{own_size} tokens and the longest knowledge {known_size}: raise it, or shorten prompts "
      "or knowledge (which a run of rounds limits by extraction.max_knowledge_tokens)"
    )
  seen = set()
  for prompt, ids, entries in zip(prompts, encoded, given, strict=True):
    # The template goes by roles, calls and tools: the first prompt of each sequence of them is
    # looked at with every text, which takes long, others with one.
    roles = tuple(message.role for message in prompt.messages)
    shape = (roles, tuple(len(message.tool_calls) for message in prompt.messages), prompt.tools)
    for text, entry in list(zip(texts, entries, strict=True))[: 1 if shape in seen else None]:
      skip, known = found[entry]
      whole = encode(prompt.messages, message(text), tools=prompt.tools)
      if tuple(whole) != (*known, *ids[skip:]) or tuple(known[:skip]) != ids[:skip]:
        raise ValueError(
          f"prompt {prompt.id}, of the roles {', '.join(roles)}: the chat template changes the "
          "prompt when knowledge stands in its system message: teacher and student would differ "
          "in more than the knowledge"
        )
    seen.add(shape)
  if len(beginnings) > MANY_BEGINNINGS:
    logging.warning(
      "consolidation: the prompts have %d different system texts and lists of tools: with %d "
      "knowledge texts, %d beginnings of up to %d tokens are kept for the teacher",
      len(beginnings),
      len(texts),
      len(found),
      max(len(known) for _, known in found),
    )
  knowledge = tuple(tuple(known) for _, known in found)
  skips, ids = tuple(skip for skip, _ in found), tuple(prompt.id for prompt in prompts)
  return Task(encoded, knowledge, skips, given, seed, round, ids)


def plain_task(
  tokenizer: Any,
  prompts: Sequence[Prompt],
  *,
  seed: int,
  round: int,
  thinking: bool,
  limit: int,
) -> Task:
  """Returns the task in which the teacher reads nothing before any prompt; arguments as
  `make_task`'s.

  Raises:
    ValueError: a prompt is over `limit`.
  """
  encode = functools.partial(prompt_lib.ids, tokenizer, thinking=thinking)
  encoded = tuple(tuple(encode(prompt.messages, tools=prompt.tools)) for prompt in prompts)
  for prompt, ids in zip(prompts, encoded, strict=True):
    if len(ids) > limit:
      raise ValueError(
        f"config.policy.max_prompt_tokens is {limit}, but prompt {prompt.id} has {len(ids)} "
        "tokens: raise it, or shorten the prompt"
      )
  given, names = (range(1),) * len(encoded), tuple(prompt.id for prompt in prompts)
  return Task(encoded, ((),), (0,), given, seed, round, names)


def _beginning(prompt: Prompt) -> tuple[Message | None, tuple[str, ...]]:
  """What a prompt's knowledge prefix goes by: its own system message, or none, and its tools."""
  first = prompt.messages[0]
  return first if first.role == "system" else None, prompt.tools
