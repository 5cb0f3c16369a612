"""Files that others wrote: logs of conversations, and what config.distill names.

A log, `read_log`, is read as a stream: OpenAI's chat lines, ShareGPT's, or the trace of an agent, a
message a line. Tools' messages and calls are kept; a line that is no conversation is left out,
counted and named.

What config.distill names are a text, prompts in every usual form, and a check of answers. Nothing
in them is changed or left out in silence. A text is UTF-8, with or without a byte order mark; its
lines end with a newline, alone or behind a carriage return, and with nothing else. What a
conversation holds beyond roles and texts (tools, names, reasoning…) is refused by name, with file
and line.
"""

import itertools
import json
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from oel_jax.conversations.jsonl import MAX_DAMAGED, JsonLines
from oel_jax.conversations.schema import (
  AGENT,
  LOG,
  READS,
  Conversation,
  Message,
  Prompt,
  Source,
  ToolCall,
)
from oel_jax.runtime import files, named, schema

TEXT = (".txt", ".text")
LINES = (".jsonl", ".ndjson", ".jsonlines")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")
ROLES = ("system", "user", "assistant")
# What a log may hold beside a conversation that is no part of what the model reads.
HARMLESS = {
  "schema", "id", "messages", "digest", "metadata", "model", "created", "created_at", "timestamp",
  "source", "dataset", "split", "tags", "language", "user", "store", "stream", "n", "seed",
  "temperature", "top_p", "max_tokens", "max_completion_tokens",
}  # fmt: skip


def read_text(path: str, field: str) -> str:
  """The text of the file that config.distill.`field` names, its lines ended by newlines alone.

  Raises:
    ValueError: the field is not set or names another store; the file is compressed or not UTF-8.
    OSError: there is no such file.
  """
  if not path:
    raise ValueError(f"config.distill.{field} is not set: it must be the path of a file")
  file = files.local(path, f"config.distill.{field}")
  if file.suffix.lower() in COMPRESSED:
    raise ValueError(
      f"config.distill.{field} is {path!r}, which is compressed: it must be unpacked"
    )
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    told = f"config.distill.{field}: {path} is not a text in UTF-8 ({error})"
    raise ValueError(told) from error
  return text.replace("\r\n", "\n")


def read_prompts(path: str, field: str) -> list[Prompt]:
  """The prompts in the file that config.distill.`field` names, in its order, every one of them.

  A conversation is an object with `messages` as OpenAI writes them (system, user and assistant, the
  last one the user's), and with an `id` if it likes. Empty lines are none.

  Args:
    path: what the file holds goes by its suffix, in any case. .txt: one user message a line;
      .jsonl, .ndjson or .jsonlines: one conversation a line; .json: an array of conversations, or
      one a line.
    field: for errors, and for the ids of prompts that have none.

  Raises:
    ValueError: the field is not set; the file has another suffix or holds no prompts; or it holds
      what is no conversation or would be lost: names file and line, or the place in the array.
    OSError: there is no such file.
  """
  text, suffix = read_text(path, field), pathlib.Path(path).suffix.lower()
  name = lambda number: f"{field}-{number}"
  if suffix in TEXT:
    found = []
    for number, line in _lines(text):
      _refuse_json(line, f"{path}:{number}")
      found.append(Prompt(name(number), (Message("user", line),)))
  elif suffix in LINES or suffix == ".json":
    array = suffix == ".json" and text.lstrip().startswith("[")
    values = _items(text, path) if array else _json_lines(text, path)
    found = [_conversation(value, place, name(number)) for number, place, value in values]
  else:
    raise ValueError(
      f"config.distill.{field} is {path!r}: the name must end in {' or '.join(TEXT)} (one user "
      f"message a line), {', '.join(LINES)} (one conversation a line) or .json (an array of them)"
    )
  if not found:
    raise ValueError(f"config.distill.{field}: {path} holds no prompts")
  return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
  """The lines that say something, with their numbers from 1."""
  lines = text.split("\n")  # splitlines would end a line at U+2028, a form feed and others, too
  return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _json_lines(text: str, path: str) -> Iterable[tuple[int, str, Any]]:
  """(number, place, value) of each line."""
  for number, line in _lines(text):
    place = f"{path}:{number}"
    yield number, place, _parse(line, place)


def _items(text: str, path: str) -> Iterable[tuple[int, str, Any]]:
  """(number, place, value) of each item of an array."""
  for number, value in enumerate(_parse(text, path), start=1):
    yield number, f"{path}, item {number}", value


def _parse(text: str, place: str) -> Any:
  """The value of a JSON text. A name twice in an object is an error: one would be lost."""

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
      raise ValueError(f"an object holds {max(names, key=names.count)!r} more than once")
    return dict(pairs)

  try:
    return json.loads(text, object_pairs_hook=once)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{place}: not JSON that can be read ({error})") from error


def _refuse_json(line: str, place: str) -> None:
  """Raises ValueError if a line of a text file is a conversation as JSON: no user says that."""
  if not line.lstrip().startswith("{"):
    return
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    return
  if "messages" in value:
    raise ValueError(
      f"{place}: a conversation as JSON among user messages: the file's name must end in .jsonl"
    )


def _conversation(value: Any, place: str, name: str) -> Prompt:
  if not isinstance(value, dict):
    raise ValueError(f'{place}: an object with "messages" is needed, this is {reprlib.repr(value)}')
  if value.get("schema", 1) not in READS:
    known = " and ".join(map(str, READS))
    raise ValueError(
      f'{place}: "schema" is {value["schema"]!r}: this version of oel_jax reads {known}'
    )
  _refuse_more(value, HARMLESS, place)
  given = value.get("messages")
  if not isinstance(given, list) or not given:
    shown = reprlib.repr(given)
    raise ValueError(f'{place}: "messages" is {shown}: it must be a list that is not empty')
  messages = tuple(
    _message(each, f"{place}, message {number}") for number, each in enumerate(given, start=1)
  )
  if messages[-1].role != "user":
    last = messages[-1].role
    raise ValueError(f"{place}: the last message is the {last}'s: it must be the user's")
  own = value.get("id")
  if own is not None and type(own) not in (str, int):
    raise ValueError(f'{place}: "id" is {reprlib.repr(own)}: it must be a text')
  return Prompt(name if own is None else str(own), messages)


def _message(value: Any, place: str) -> Message:
  if not isinstance(value, dict):
    needed = 'an object with "role" and "content" is needed'
    raise ValueError(f"{place}: {needed}, this is {reprlib.repr(value)}")
  role, content = value.get("role"), value.get("content")
  if role not in ROLES:
    known = ", ".join(ROLES)
    raise ValueError(f'{place}: "role" is {reprlib.repr(role)}: it must be one of {known}')
  _refuse_more(value, {"role", "content"}, place)
  part = content[0] if isinstance(content, list) and len(content) == 1 else None
  if isinstance(part, dict) and part.get("type") == "text":
    _refuse_more(part, {"type", "text"}, place)
    content = part.get("text")
  if not isinstance(content, str):
    right = "it must be a text, or a list of one text part"
    raise ValueError(f'{place}: "content" is {reprlib.repr(content)}: {right}')
  return Message(role, content)


def _refuse_more(value: dict[str, Any], known: set[str], place: str) -> None:
  """Raises ValueError for the first field that says something and is not read here."""
  for name, inner in value.items():
    if name not in known and inner not in (None, "", [], {}):
      raise ValueError(
        f'{place}: "{name}" is {reprlib.repr(inner)}, which is not read here and would be lost: '
        "take it out if the prompt does without it, or leave the conversation out"
      )


def read_check(name: str, field: str = "obeys") -> Callable[..., bool]:
  """The function that config.distill.`field` names: whether an answer, the last of what it is
  given, is as it should be.

  What it raises, and a result that is neither true nor false, become a ValueError that names it.

  Raises:
    ValueError: it is not written FILE.py:FUNCTION, or the file cannot be run or lacks the function.
    OSError: there is no such file.
  """
  field = f"config.distill.{field}"
  told = f"{field} is {name!r}"
  if not (named.is_name(name) and ".py:" in name):
    raise ValueError(f"{told}: it must be FILE.py:FUNCTION")
  check = named.function(name, field)

  def checked(*given: str) -> bool:
    shown = reprlib.repr(given[-1])
    try:
      result = check(*given)
    except Exception as error:
      reason = f"{type(error).__name__}: {error}"
      raise ValueError(f"{told}: it fails for the answer {shown} ({reason})") from error
    if not isinstance(result, (bool, np.bool_)):
      raise ValueError(
        f"{told}: for the answer {shown} it returns {reprlib.repr(result)}: "
        "it must be True or False"
      )
    return bool(result)

  return checked


# Logs.

# What a speaker is called in logs: its role here.
SPEAKERS = {
  "system": "system", "developer": "system", "user": "user", "human": "user",
  "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
  "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
  "function_response": "tool",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
SESSIONS = ("sessionId", "session_id", "session", "conversation_id")


def read_log(
  path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED
) -> Iterator[Conversation]:
  """The conversations of a log, as a stream, each with file and line as its source.

  Args:
    path: a file with one JSON object a line. With "messages", a line is a conversation as OpenAI
      writes it; with "conversations", as ShareGPT does; else an agent's message, and those that
      follow one another and name the same session, or none, are one conversation. "feedback",
      "outcome", and "reward" or "score" are kept where they are given.
    max_damaged: largest share of lines that may be none of these; they are left out, counted, and
      the first of them named in the log.

  Raises:
    ValueError: more lines are damaged (`jsonl.JsonLines`), at the end.
    OSError: the file cannot be read.
  """
  lines = JsonLines(path, lambda data, line: _log_line(data, line, path), max_damaged=max_damaged)
  # A conversation stands alone; an agent's messages are gathered session by session.
  for session, group in itertools.groupby(lines, key=lambda found: found[0]):
    if session is None:
      yield from (conversation for _, conversation in group)
    else:
      first, *others = (conversation for _, conversation in group)
      said = itertools.chain(first.messages, *(other.messages for other in others))
      yield Conversation(session or first.id, tuple(said), first.source)


def _log_line(
  data: dict[str, Any], line: int, path: str | os.PathLike
) -> tuple[str | None, Conversation]:
  """(None, a conversation), or an agent's session and the part of it that stands on this line."""
  name = str(data.get("id") or f"{pathlib.Path(path).stem}-{line}")
  if "messages" not in data and "conversations" not in data:
    inner = data["message"] if isinstance(data.get("message"), dict) else data
    session = next((str(data[field]) for field in SESSIONS if data.get(field)), "")
    source = Source(AGENT, str(path), line=line)
    return session, Conversation(name, tuple(_said(inner)), source)
  given = data.get("messages", data.get("conversations"))
  if not isinstance(given, list) or not given:
    raise ValueError(f"the conversation is {reprlib.repr(given)}: it must be a list of messages")
  reward = data.get("reward", data.get("score"))
  if reward is not None and type(reward) not in (int, float):
    raise ValueError(f"the reward is {reprlib.repr(reward)}: it must be a number")
  conversation = Conversation(
    name,
    tuple(message for each in given for message in _said(each)),
    Source(LOG, str(path), line=line),
    outcome=_words(data.get("outcome")),
    reward=None if reward is None else float(reward),
    feedback=_words(data.get("feedback")),
  )
  return None, conversation


def _words(value: Any) -> str | None:
  """A text as it is, anything else as JSON."""
  return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _said(value: Any) -> list[Message]:
  """The messages of one entry: one, but for an entry with the results of several tools."""
  if not isinstance(value, dict):
    raise ValueError(f"a message is {reprlib.repr(value)}: it must be an object")
  who = value.get("role", value.get("from"))
  if not isinstance(who, str) or who not in SPEAKERS:
    known = ", ".join(SPEAKERS)
    raise ValueError(f"a message is said by {reprlib.repr(who)}: it must be one of {known}")
  role, content = SPEAKERS[who], value.get("content", value.get("value"))
  if who == "function_call":  # ShareGPT's: the call is all that the message says
    call = content if isinstance(content, str) else ""
    return [Message(role, "", (_call(schema.loads(call.encode("utf-8", "replace"))),))]
  parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
  text, thinking, calls, results = [], [], [], []
  for part in parts:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
      text.append(part["text"])
    elif kind == "thinking" and isinstance(part.get("thinking"), str):
      thinking.append(part["thinking"])
    elif kind == "tool_use":
      calls.append(_call(part))
    elif kind == "tool_result":
      said = _said({"role": "tool", "content": part.get("content")})
      results.append(
        Message("tool", said[0].content, tool_call_id=str(part.get("tool_use_id", "")))
      )
    else:
      raise ValueError(f"a part of a message is {reprlib.repr(part)}: texts and tools are read")
  made = value.get("tool_calls") or []
  if not isinstance(made, list):
    raise ValueError(f"the calls of a message are {reprlib.repr(made)}: they must be a list")
  calls += map(_call, made)
  calls += [_call(value["function_call"])] if value.get("function_call") else []
  thinking += [str(value[name]) for name in ("reasoning_content", "reasoning") if value.get(name)]
  names = {name: str(value[name]) for name in ("tool_call_id", "name") if value.get(name)}
  own = Message(role, "".join(text), tuple(calls), thinking="\n".join(thinking), **names)
  return results + ([own] if text or calls or thinking or not results else [])


def _call(value: Any) -> ToolCall:
  """A call as OpenAI writes it, as Anthropic does, or bare: {"name", "arguments"}."""
  function = value.get("function", value) if isinstance(value, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get("name"), str):
    raise ValueError(f"a tool's call is {reprlib.repr(value)}: it must name a function")
  arguments = function.get("arguments", function.get("input", {}))
  return ToolCall(str(value.get("id") or ""), function["name"], _words(arguments) or "")
