"""Which prompts a tokenizer can show whole, and with knowledge: of logs, not all are such."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.schema import KNOWLEDGE, Message, Prompt, conversation_of
from oel_jax.policy.tokenizers.chat_template import CannotRender
from oel_jax.runtime.counted import counted

PROBE = Message(KNOWLEDGE, "Rule 1.")


def renderable(tokenizer: Any, prompt: Prompt, *, thinking: bool = True) -> str | None:
  """Why the tokenizer cannot make this prompt, alone and with knowledge; None if it can."""
  ids = lambda known: prompt_lib.ids(
    tokenizer, prompt.messages, known, tools=prompt.tools, thinking=thinking
  )
  system = prompt.messages[0] if prompt.messages[0].role == "system" else None
  try:
    plain = ids(None)
    skip, known = tokenizer.knowledge_prefix(
      PROBE, system=system, tools=prompt.tools, thinking=thinking
    )
    informed = ids(PROBE)
  except CannotRender as error:
    return error.reason
  if [*known, *plain[skip:]] != informed or known[:skip] != plain[:skip]:
    return (
      "the chat template changes more of the prompt than its system message when knowledge stands "
      "there"
    )
  return None


def leave_out(
  tokenizer: Any, prompts: Iterable[Prompt], *, thinking: bool = True
) -> tuple[list[Prompt], list[str]]:
  """(the prompts that the tokenizer can make, a sentence for each reason why it cannot make others,
  with their number and that of their conversations).

  What a template shows goes by roles, calls, system text and tools: the first prompt of each sort
  is tried, which takes some 50 ms, and those like it are told by it.
  """
  kept, tried, left_out = [], {}, collections.defaultdict(list)
  for prompt in prompts:
    sort = _sort(prompt)
    if sort not in tried:
      tried[sort] = renderable(tokenizer, prompt, thinking=thinking)
    if tried[sort] is None:
      kept.append(prompt)
    else:
      left_out[tried[sort]].append(prompt.id)
  return kept, [_told(reason, ids) for reason, ids in left_out.items()]


def _sort(prompt: Prompt) -> tuple[Any, ...]:
  first = prompt.messages[0]
  shape = ((said.role, bool(said.content), len(said.tool_calls)) for said in prompt.messages)
  return first if first.role == "system" else None, prompt.tools, tuple(shape)


def _told(reason: str, ids: Sequence[str]) -> str:
  of = counted(len(set(map(conversation_of, ids))), "conversations")
  are = "is" if len(ids) == 1 else "are"
  return f"{counted(len(ids), 'prompts')} of {of} {are} left out, {ids[0]} the first: {reason}"
