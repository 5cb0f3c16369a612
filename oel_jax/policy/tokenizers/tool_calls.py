"""Calls of tools in what a policy wrote, by the conventions of the models that are read here.

Qwen2.5, Qwen3 and Hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once a call,
behind what else is said. Llama 3.1 and 3.2: an answer that is `{"name": …, "parameters": {…}}` and
nothing else, behind `<|python_tag|>` or not, several with semicolons between. Qwen2.5-Coder, asked
for marks, writes the bare object, in a fence or not.
"""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from oel_jax.conversations.schema import Message, ToolCall

OPEN, CLOSE, PYTHON = MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>")
# An answer that is a block of code and nothing else.
FENCED = re.compile(r"\s*```(?:json)?\n(.*)\n```\s*", re.DOTALL)
# The last call may go without its end, where the response ends in its place.
MARKED = re.compile(f"{re.escape(OPEN)}(.*?)(?:{re.escape(CLOSE)}|$)", re.DOTALL)


def read_response(
  tokenizer: Any, ids: Sequence[int], names: Collection[str], *, thinking: bool
) -> Message:
  """Sampled ids as an assistant's message, its calls parsed where `names`, those of the tools that
  were offered, is not empty.
  """
  if not names:
    thought, answer = tokenizer.split_response(ids, thinking=thinking)
    return Message("assistant", answer, thinking=thought, response_tokens=len(ids))
  thought, answer = tokenizer.split_response(ids, thinking=thinking, tools=True)
  content, calls = parse(answer, names)
  return Message("assistant", content, calls, thinking=thought, response_tokens=len(ids))


def offered(tools: Sequence[str]) -> tuple[str, ...]:
  """The names of the functions among definitions of tools, as `schema.Prompt` has them."""
  functions = [json.loads(tool).get("function") for tool in tools]
  names = [function.get("name") for function in functions if isinstance(function, dict)]
  return tuple(name for name in names if isinstance(name, str))


def parse(answer: str, names: Collection[str] = ()) -> tuple[str, tuple[ToolCall, ...]]:
  """(what is said beside the calls, the calls) of an answer; (the answer, none) where a call is
  broken or cut off.

  Args:
    answer: with its marks, as `split_response(…, tools=True)` leaves them.
    names: of the tools that were offered. A marked call may name any; an answer that is JSON
      without a mark is one only of these: it may be what a user asked for.
  """
  if OPEN in answer:
    content = MARKED.sub("", answer).strip()
    calls = [_call(_json(body)) for body in MARKED.findall(answer)]
  else:
    content = ""
    fenced = FENCED.fullmatch(answer)
    bare = fenced[1] if fenced else answer.strip().removeprefix(PYTHON)
    calls = [_call(value) for value in _in_turn(bare)]
    if any(call is None or call.name not in names for call in calls):
      calls = []
  if not calls or None in calls:
    return answer, ()
  return content, tuple(calls)


def _in_turn(text: str) -> list[Any]:
  """The JSON values that a text is made of, semicolons between them; none if it is not."""
  values, rest = [], text.strip()
  while rest:
    try:
      value, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
      return []
    values.append(value)
    rest = rest[end:].lstrip()
    if rest and not rest.startswith(";"):
      return []
    rest = rest.removeprefix(";").lstrip()
  return values


def _json(text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None


def _call(value: Any) -> ToolCall | None:
  """The call that an object is; None if it is none. Arguments may be an object or its JSON text."""
  if not isinstance(value, dict) or not isinstance(value.get("name"), str):
    return None
  given = value.get("arguments", value.get("parameters"))
  if isinstance(given, str):
    given = _json(given)
  if not isinstance(given, dict):
    return None
  return ToolCall("", value["name"], json.dumps(given, ensure_ascii=False))
