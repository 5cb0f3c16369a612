"""What one entry of a conversation says, whoever wrote it: messages with their calls, their
thinking and tools' results.
"""

import dataclasses
import json
import re
from typing import Any

from oel_jax.conversations.schema import Message, ToolCall

# What a speaker is called in logs: its role here.
SPEAKERS = {
  "system": "system", "developer": "system", "user": "user", "human": "user",
  "assistant": "assistant", "ai": "assistant", "gpt": "assistant", "chatgpt": "assistant",
  "model": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
  "tool_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
  "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # speakers whose text is a call, or a list of calls
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
CALL_PARTS = ("tool_use", "server_tool_use", "mcp_tool_use", "tool-call", "tool_call")
RESULT_PARTS = ("tool-result", "tool_call_response")  # and what ends in "tool_result"
GEMINI = {
  "functionCall": "tool_call", "function_call": "tool_call",
  "functionResponse": "tool_result", "function_response": "tool_result",
  **{n: n for n in ("inlineData", "fileData", "executableCode", "codeExecutionResult")},
}  # fmt: skip
SILENT_PARTS = ("redacted_thinking", "step-start")
LANGCHAIN = ("human", "ai", "AIMessageChunk", "system", "tool", "function")
MESSAGE_KNOWN = {
  "role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name",
  "reasoning_content", "reasoning", "thinking", "refusal", "action", "response_tokens", "id",
  "type", "model", "stop_reason", "stop_sequence", "usage", "status", "phase", "audio", "parts",
  "toolInvocations", "additional_kwargs", "response_metadata", "invalid_tool_calls",
  "usage_metadata", "annotations", "finish_reason", "createdAt", "example", "artifact",
  "feedback", "annotation",
}  # fmt: skip
# One of them a message must have, whatever it holds.
SAYS = {
  "content", "value", "parts", "tool_calls", "function_call", "refusal", "reasoning_content",
}  # fmt: skip
THINK, END_THINK = "<think>", "</think>"
FOLDED = re.compile(
  r'<details type="(reasoning|tool_calls|code_interpreter)"[^>]*>'
  r"(?:\s*<summary>.*?</summary>)?(.*?)</details>\s*",
  re.DOTALL,
)

Seen = list[tuple[str, str]]  # what was met on the way: (kind, its name), counted by the reader


def said(value: Any, seen: Seen) -> list[Message]:
  """The messages of one entry: one, but for an entry with the results of tools."""
  if not isinstance(value, dict):
    raise ValueError(f"a message is {kind(value)}: it must be an object")
  value = with_role(value)
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
  if isinstance(value.get("parts"), list):  # which say more than a text beside them
    content = value["parts"]
  if content is None:
    seen.append(("form", "null content"))
  elif isinstance(content, list):
    seen.append(("form", "parts"))
  elif role == "tool":  # an object or a number, as some write a result
    content = words(content)
  made = value.get("tool_calls") or []
  if not isinstance(made, list):
    raise ValueError(f"the calls of a message are {kind(made)}: they must be a list")
  calls = list(map(tool_call, made))
  calls += [tool_call(value["function_call"])] if value.get("function_call") else []
  thoughts = ("reasoning_content", "reasoning", "thinking")
  names = {name: str(value[name]) for name in ("tool_call_id", "name") if value.get(name)}
  if "name" in names:
    seen.append(("form", "name"))
  first, *rest = _steps(content or _beside(value), role, seen)
  # LangChain's lists of parts hold the calls, too.
  first.calls += (call for call in calls if not call.id or call not in first.calls)
  first.thinking += [value[n] for n in thoughts if isinstance(value.get(n), str)]
  found = []
  for step in (first, *rest):
    text = step.text
    if role == "assistant":
      thinking, text = _without_thinking(text)
      step.thinking.append(thinking)
    thinking = "\n".join(dict.fromkeys(filter(None, step.thinking)))
    own = Message(role, text, tuple(step.calls), thinking=thinking, **names)
    owns = [own] if text or step.calls or thinking or not step.results else []
    found += owns + step.results if role == "assistant" else step.results + owns
  return found


def with_role(value: dict[str, Any]) -> dict[str, Any]:
  """A message of LangChain's or Gemini's by its role; others as they are."""
  if "role" in value or "from" in value:
    return value
  if is_langchain(value):
    inner = next((value[n] for n in ("kwargs", "data") if isinstance(value.get(n), dict)), value)
    what = inner.get("type", value.get("type"))
    return inner | {"role": "ai" if what == "AIMessageChunk" else what}
  return value | {"role": "user"} if isinstance(value.get("parts"), list) else value


def is_langchain(value: dict[str, Any]) -> bool:
  """Whether an object is a message of LangChain's, plain or in one of its two wrappers: its type
  stands for a role.
  """
  inner = next((value[n] for n in ("kwargs", "data") if isinstance(value.get(n), dict)), value)
  return "content" in inner and inner.get("type", value.get("type")) in LANGCHAIN


def _without_thinking(text: str) -> tuple[str, str]:
  """The thinking that an answer's text begins with, and the answer: many servers leave it there,
  some without the mark that opens it, which then stood in the prompt. Open WebUI folds it away, and
  the calls of tools with it, which nobody said.
  """
  folded = FOLDED.findall(text)
  if folded:
    thinking = [inner.strip() for what, inner in folded if what == "reasoning"]
    return "\n".join(thinking), FOLDED.sub("", text).strip()
  before, close, after = text.partition(END_THINK)
  opened, begins = before.lstrip(), before.lstrip().startswith(THINK)
  if not begins and (not close or THINK in before):
    return "", text
  return opened.removeprefix(THINK).strip(), after.strip()


def _beside(value: dict[str, Any]) -> str | None:
  """What a message without content says: that it refuses, or what was spoken."""
  audio = value.get("audio")
  said = value.get("refusal"), audio.get("transcript") if isinstance(audio, dict) else None
  return next((text for text in said if isinstance(text, str)), None)


@dataclasses.dataclass
class _Step:
  """What a message says before the results of its calls, and these."""

  text: str = ""
  thinking: list[str] = dataclasses.field(default_factory=list)
  calls: list[ToolCall] = dataclasses.field(default_factory=list)
  results: list[Message] = dataclasses.field(default_factory=list)


def _steps(content: Any, role: str, seen: Seen) -> list[_Step]:
  """What a message's content says, at least one step; more where an assistant goes on after results
  that stand in its own message.

  A part that is no text stands in the text as its type in brackets: [image_url].
  """
  if content is None or isinstance(content, str):
    return [_Step(content or "")]
  if not isinstance(content, list):
    raise ValueError(f"the content of a message is {kind(content)}: texts and parts are read")
  steps = [_Step()]
  for part in content:
    part = _with_type(part)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
      raise ValueError(f"a part of a message is {kind(part)}: it must be an object with a type")
    what, said = part["type"], _text_of(part)
    if what in CALL_PARTS:
      steps[-1].calls.append(tool_call(part))
    elif what in RESULT_PARTS or what.endswith("tool_result"):
      steps[-1].results.append(_result(part, seen))
    elif what == "dynamic-tool" or what.startswith("tool-"):  # the AI SDK's: call and result
      inner = part.get("toolInvocation")
      inner = inner if isinstance(inner, dict) else {"toolName": what.removeprefix("tool-")} | part
      steps[-1].calls.append(tool_call(inner))
      if any(inner.get(name) is not None for name in ("output", "result", "errorText")):
        steps[-1].results.append(_result(inner, seen))
    elif what not in SILENT_PARTS:
      if role == "assistant" and steps[-1].results:
        steps.append(_Step())
      if what in ("thinking", "reasoning"):
        steps[-1].thinking.append(said or "")
      elif what in TEXT_PARTS and said is not None:
        steps[-1].text += said
      else:
        seen.append(("part", what))
        steps[-1].text += f"[{what}]"
  return steps


def _with_type(part: Any) -> Any:
  """A text, or a part of Gemini's, which is named by what it holds, with a type; others as they
  are.
  """
  if isinstance(part, str):
    return {"type": "text", "text": part}
  if not isinstance(part, dict) or "type" in part:
    return part
  for name, what in GEMINI.items():
    if isinstance(part.get(name), dict):
      return part[name] | {"type": what}
  return part | {"type": "thinking" if part.get("thought") else "text"} if "text" in part else part


def _text_of(part: dict[str, Any]) -> str | None:
  """The text of a part: under "text" or its type, as the Assistants API's in an object, or as
  OpenTelemetry's under "content".
  """
  for name in (part["type"], "text", "content"):
    inner = part.get(name)
    inner = inner.get("value") if isinstance(inner, dict) else inner
    if isinstance(inner, str):
      return inner
  return None


def _result(part: dict[str, Any], seen: Seen) -> Message:
  """A tool's message, of a part that holds a result."""
  names = ("content", "output", "result", "response", "errorText")
  given = next((part[name] for name in names if part.get(name) is not None), None)
  if isinstance(given, dict) and given.keys() == {"type", "value"}:  # the AI SDK's
    given = given["value"]
  parts = isinstance(given, list) and all(
    isinstance(p, str) or isinstance(p, dict) and "type" in p for p in given
  )
  text = "".join(step.text for step in _steps(given, "tool", seen)) if parts else words(given)
  ids = (part.get(name) for name in ("tool_use_id", "toolCallId", "id"))
  return Message(
    "tool", text or "", tool_call_id=first_name(*ids), name=first_name(part.get("name"))
  )


def tool_call(value: Any) -> ToolCall:
  """A call as OpenAI writes it, as Anthropic, LangChain or the AI SDK does, or bare: {"name",
  "arguments"}.
  """
  function = value.get("function", value.get("custom", value)) if isinstance(value, dict) else None
  name = function.get("name", function.get("toolName")) if isinstance(function, dict) else None
  if not isinstance(name, str):
    raise ValueError(f"a tool's call is {kind(value)}: it must be an object that names a function")
  arguments = next((function[n] for n in ("arguments", "input", "args") if n in function), {})
  id = first_name(value.get("id"), value.get("toolCallId"))
  return ToolCall(id, name, words(arguments) or "")


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
