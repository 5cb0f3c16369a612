"""What one entry of a conversation says, whoever wrote it: messages with their calls, their
thinking and tools' results.
"""

import dataclasses
import json
from typing import Any

from oel_jax.conversations.schema import Message, ToolCall

# What a speaker is called in logs: its role here.
SPEAKERS = {
  "system": "system", "developer": "system", "user": "user", "human": "user",
  "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
  "bing": "assistant", "bard": "assistant", "function_call": "assistant",
  "tool_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
  "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # speakers whose text is a call, or a list of calls
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
MESSAGE_KNOWN = {
  "role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name",
  "reasoning_content", "reasoning", "thinking", "refusal", "action", "response_tokens", "id",
  "type", "model", "stop_reason", "stop_sequence", "usage", "status", "phase", "audio",
}  # fmt: skip
# One of them a message must have, whatever it holds.
SAYS = {"content", "value", "tool_calls", "function_call", "refusal", "reasoning_content"}

Seen = list[tuple[str, str]]  # what was met on the way: (kind, its name), counted by the reader


def said(value: Any, seen: Seen) -> list[Message]:
  """The messages of one entry: one, but for an entry with the results of several tools."""
  if not isinstance(value, dict):
    raise ValueError(f"a message is {kind(value)}: it must be an object")
  who = value.get("role", value.get("from"))
  if not isinstance(who, str) or who not in SPEAKERS:
    known = ", ".join(SPEAKERS)
    shown = repr(who[:20]) if isinstance(who, str) else kind(who)
    raise ValueError(f"a message is said by {shown}: it must be one of {known}")
  if not SAYS & value.keys():
    raise ValueError(f"a message of {who} says nothing: it must have content, or calls")
  seen += (("field", f"messages.{name}") for name in value if name not in MESSAGE_KNOWN)
  role, content = SPEAKERS[who], value.get("content", value.get("value"))
  if who in CALLS:  # ShareGPT's, and ms-swift's: calls are all that the message says
    made = opened(content)
    return [Message(role, "", tuple(map(tool_call, made if isinstance(made, list) else [made])))]
  if who == "developer":
    seen.append(("form", "developer"))
  if content is None:
    seen.append(("form", "null content"))
  elif isinstance(content, list):
    seen.append(("form", "parts"))
  elif role == "tool":  # an object or a number, as some write a result
    content = words(content)
  content = content or _beside(value)
  text, thinking, calls, results = _parts(content, seen)
  made = value.get("tool_calls") or []
  if not isinstance(made, list):
    raise ValueError(f"the calls of a message are {kind(made)}: they must be a list")
  calls += map(tool_call, made)
  calls += [tool_call(value["function_call"])] if value.get("function_call") else []
  names = ("reasoning_content", "reasoning", "thinking")
  thinking += [value[name] for name in names if isinstance(value.get(name), str) and value[name]]
  names = {name: str(value[name]) for name in ("tool_call_id", "name") if value.get(name)}
  if "name" in names:
    seen.append(("form", "name"))
  own = Message(role, text, tuple(calls), thinking="\n".join(dict.fromkeys(thinking)), **names)
  return results + ([own] if text or calls or thinking or not results else [])


def _beside(value: dict[str, Any]) -> str | None:
  """What a message without content says: that it refuses, or what was spoken."""
  audio = value.get("audio")
  said = value.get("refusal"), audio.get("transcript") if isinstance(audio, dict) else None
  return next((text for text in said if isinstance(text, str)), None)


def _parts(content: Any, seen: Seen) -> tuple[str, list[str], list[ToolCall], list[Message]]:
  """What a message's content says: its text, its thinking, its calls, and tools' results.

  A part that is no text stands in the text as its type in brackets: [image_url].
  """
  if content is None or isinstance(content, str):
    return content or "", [], [], []
  if not isinstance(content, list):
    raise ValueError(f"the content of a message is {kind(content)}: texts and parts are read")
  text, thinking, calls, results = [], [], [], []
  for part in content:
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
      raise ValueError(f"a part of a message is {kind(part)}: it must be an object with a type")
    what, inner = part["type"], part.get("text", part.get(part["type"]))
    inner = inner.get("value") if isinstance(inner, dict) else inner  # the Assistants API's
    if what in TEXT_PARTS and isinstance(inner, str):
      text.append(inner)
    elif what in ("thinking", "reasoning"):
      thinking += [part[n] for n in ("thinking", "text") if isinstance(part.get(n), str)][:1]
    elif what in ("tool_use", "server_tool_use"):
      calls.append(tool_call(part))
    elif what == "tool_result":
      result = _parts(part.get("content"), seen)[0]
      results.append(Message("tool", result, tool_call_id=first_name(part.get("tool_use_id"))))
    elif what != "redacted_thinking":
      seen.append(("part", what))
      text.append(f"[{what}]")
  return "".join(text), thinking, calls, results


def tool_call(value: Any) -> ToolCall:
  """A call as OpenAI writes it, as Anthropic does, or bare: {"name", "arguments"}."""
  function = value.get("function", value.get("custom", value)) if isinstance(value, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get("name"), str):
    raise ValueError(f"a tool's call is {kind(value)}: it must be an object that names a function")
  arguments = function.get("arguments", function.get("input", {}))
  return ToolCall(first_name(value.get("id")), function["name"], words(arguments) or "")


def first_name(*given: Any) -> str:
  """The first that is a name, a text or a number that is not empty; "" if none is."""
  return next((str(each) for each in given if type(each) in (str, int) and each != ""), "")


def words(value: Any) -> str | None:
  """A text as it is, anything else as JSON."""
  return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def opened(value: Any) -> Any:
  """The value of a JSON object or list that stands in a text; anything else as it is."""
  if not isinstance(value, str) or value[:1] not in "{[" or not value:
    return value
  try:
    return json.loads(value)
  except (ValueError, RecursionError):
    return value


def joined(one: Message, other: Message) -> Message:
  """Two parts of one answer as one message."""
  texts = {
    name: "\n".join(filter(None, (getattr(one, name), getattr(other, name))))
    for name in ("content", "thinking")
  }
  return dataclasses.replace(one, tool_calls=one.tool_calls + other.tool_calls, **texts)


def kind(value: Any) -> str:
  """Names a JSON value by its kind alone."""
  if isinstance(value, dict):
    return "an empty object" if not value else "an object"
  if isinstance(value, list):
    return "an empty list" if not value else "a list"
  if value is None or isinstance(value, bool):
    return "null" if value is None else "a truth value"
  return "a text" if isinstance(value, str) else "a number"
