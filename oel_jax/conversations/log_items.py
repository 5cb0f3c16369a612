"""What an entry of a list says: a message, or an item as OpenAI's Responses API and Codex write it
(a call, its result, thinking).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from oel_jax.conversations.log_messages import Seen, first_name, joined, kind, said, words
from oel_jax.conversations.schema import Message, ToolCall

# Items of the Responses API that are no message: what OpenAI's own tools did, and references.
HOSTED = ("_call", "_call_output", "mcp_list_tools", "item_reference", "compaction")


def entry(value: Any, seen: Seen) -> list[Message]:
  """The messages of one entry of a list: a message, or an item of the Responses API."""
  if isinstance(value, dict) and "role" not in value and "from" not in value:
    messages = item(value, seen)
    if messages is not None:
      return messages
    what = value.get("type")
    if isinstance(what, str) and what.endswith(HOSTED):
      seen.append(("event", what))
      return []
  return said(value, seen)


def answers_joined(messages: list[Message]) -> Iterator[Message]:
  """The messages, an answer's thinking and calls in one message with its text.

  Items of the Responses API come one by one; where each message has its text or its calls, nothing
  changes.
  """
  before = None
  for message in messages:
    follows = before is not None and before.role == message.role == "assistant"
    if follows and not (message.content and (before.content or before.tool_calls)):
      before = joined(before, message)
    else:
      if before is not None:
        yield before
      before = message
  if before is not None:
    yield before


def item(value: dict[str, Any], seen: Seen) -> list[Message] | None:
  """The messages of an item as OpenAI's Responses API and Codex write it; None if it is none."""
  what = value.get("type")
  call = first_name(value.get("call_id"), value.get("id"))
  if what == "message" or (what is None and "role" in value):
    return said(value, seen)
  if what in ("function_call", "custom_tool_call"):
    arguments = value.get("arguments", value.get("input"))
    name = value.get("name")
    if not isinstance(name, str):
      raise ValueError(f"the name of a tool's call is {kind(name)}: it must be a text")
    return [Message("assistant", "", (ToolCall(call, name, words(arguments) or ""),))]
  if what == "local_shell_call":
    arguments = words(value.get("action")) or ""
    return [Message("assistant", "", (ToolCall(call, "local_shell", arguments),))]
  if what in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
    output = value.get("output")
    output = output.get("content") if isinstance(output, dict) else output
    result = said({"role": "tool", "content": output}, seen)[0]
    return [dataclasses.replace(result, tool_call_id=call)]
  if what == "reasoning":
    lists = [value[name] for name in ("summary", "content") if isinstance(value.get(name), list)]
    texts = [part.get("text") for each in lists for part in each if isinstance(part, dict)]
    thinking = "\n".join(text for text in texts if isinstance(text, str))
    return [Message("assistant", "", thinking=thinking)]
  return None
