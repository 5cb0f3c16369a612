"""What a round's steps draw from, as token ids: prompts, and the knowledge that may stand before
each (OEL section 3, consolidation).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import logging

from oel_jax.consolidation.id_lists import IdLists
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

  prompts: Sequence[tuple[int, ...]]
  knowledge: tuple[tuple[int, ...], ...]
  skip: tuple[int, ...]
  given: tuple[range, ...]
  seed: int
  round: int
  ids: tuple[str, ...]

  def informed(self, prompt: tuple[int, ...], entry: int) -> tuple[int, ...]:
    """The ids of a prompt with one of the `knowledge` in it."""
    return (*self.knowledge[entry], *prompt[self.skip[entry] :])


def make_task(
  tokenizer: Any,
  prompts: Iterable[Prompt],
  texts: Sequence[str],
  *,
  seed: int,
  round: int,
  thinking: bool,
  limit: int,
  message: Callable[[str], Message] = knowledge_message,
) -> Task:
  """Turns prompts, which are taken one at a time, and knowledge texts into ids; `message` makes the
  knowledge message of a text.

  Raises:
    ValueError: there is none of either; a prompt with its knowledge is over `limit`
      (config.policy.max_prompt_tokens); or the chat template does not leave the prompt otherwise
      unchanged when there is knowledge.
  """
  encode = functools.partial(prompt_lib.ids, tokenizer, thinking=thinking)
  known = _Known(tokenizer, [message(text) for text in texts], thinking)
  encoded, names, given = IdLists(), [], []
  longest, seen = (0, 0, 0, ""), set()
  for prompt in prompts:
    ids, entries = tuple(encode(prompt.messages, tools=prompt.tools)), known.entries(prompt)
    encoded.add(ids)
    names.append(prompt.id)
    given.append(entries)
    size = max((known.size(entry) for entry in entries), default=0)
    if len(ids) + size > longest[0]:
      longest = len(ids) + size, len(ids), size, prompt.id
    # The template goes by roles, calls and tools: the first prompt of each sequence of them is
    # looked at with every text, which takes long, others with one.
    sort = _sort(prompt)
    for text, entry in list(enumerate(entries))[: 1 if sort in seen else None]:
      whole = encode(prompt.messages, known.messages[text], tools=prompt.tools)
      _check_template(prompt, ids, tuple(whole), *known.found[entry])
    seen.add(sort)
  if not names or not texts:
    raise ValueError(
      f"consolidation got {len(names)} prompts and {len(texts)} knowledge texts: it needs at "
      "least one of each"
    )
  whole_size, own_size, known_size, name = longest
  if whole_size > limit:
    raise ValueError(
      f"config.policy.max_prompt_tokens is {limit}, but prompt {name} has "
      f"{own_size} tokens and the longest knowledge {known_size}: raise it, or shorten prompts "
      "or knowledge (which a run of rounds limits by extraction.max_knowledge_tokens)"
    )
  known.tell_if_many()
  skips, knowledge = (tuple(part) for part in zip(*known.found, strict=True))
  return Task(encoded, knowledge, skips, tuple(given), seed, round, tuple(names))


class _Known:
  """What the teacher reads before prompts, one a text and beginning of prompts.

  Attributes:
    messages: of the knowledge, one a text.
    found: (skip, ids) of each, as `Task` has them.
  """

  def __init__(self, tokenizer: Any, messages: Sequence[Message], thinking: bool):
    self.messages, self.found = messages, []
    self._tokenizer, self._thinking = tokenizer, thinking
    self._first: dict[Any, int] = {}  # beginning → its first place in `found`

  def entries(self, prompt: Prompt) -> range:
    """Where the prompt's own stand in `found`, one a text."""
    system, tools = own = _beginning(prompt)
    if own not in self._first:
      self._first[own] = len(self.found)
      how = dict(system=system, tools=tools, thinking=self._thinking)
      for message in self.messages:
        skip, ids = self._tokenizer.knowledge_prefix(message, **how)
        self.found.append((skip, tuple(ids)))
    return range(self._first[own], self._first[own] + len(self.messages))

  def size(self, entry: int) -> int:
    """Tokens that knowledge adds to a prompt."""
    skip, ids = self.found[entry]
    return len(ids) - skip

  def tell_if_many(self) -> None:
    if len(self._first) > MANY_BEGINNINGS:
      logging.warning(
        "consolidation: the prompts have %d different system texts and lists of tools: with %d "
        "knowledge texts, %d beginnings of up to %d tokens are kept for the teacher",
        len(self._first),
        len(self.messages),
        len(self.found),
        max(len(ids) for _, ids in self.found),
      )


def _sort(prompt: Prompt) -> tuple[Any, ...]:
  """What a chat template goes by."""
  roles = tuple(message.role for message in prompt.messages)
  return roles, tuple(len(message.tool_calls) for message in prompt.messages), prompt.tools


def _check_template(
  prompt: Prompt, ids: tuple[int, ...], whole: tuple[int, ...], skip: int, known: tuple[int, ...]
) -> None:
  """Raises ValueError if the prompt with knowledge, `whole`, is not the prompt with it put in."""
  if whole != (*known, *ids[skip:]) or known[:skip] != ids[:skip]:
    roles = ", ".join(message.role for message in prompt.messages)
    raise ValueError(
      f"prompt {prompt.id}, of the roles {roles}: the chat template changes the "
      "prompt when knowledge stands in its system message: teacher and student would differ "
      "in more than the knowledge"
    )


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
