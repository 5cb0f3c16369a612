"""Files that others wrote and config.distill or config.evaluation names; logs of conversations are
`logs.py`'s.

They are a text, prompts in every usual form, and a check of answers. Nothing in them is changed or
left out in silence. A text is UTF-8, with or without a byte order mark; its lines end with a
newline, alone or behind a carriage return, and with nothing else. What a conversation holds beyond
roles and texts (tools, names, reasoning…) is refused by name, with file and line.
"""

import json
import pathlib
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from oel_jax.conversations.schema import READS, Message, Prompt
from oel_jax.runtime import files, named

TEXT = (".txt", ".text")
LINES = (".jsonl", ".ndjson", ".jsonlines")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")
ROLES = ("system", "user", "assistant")
# What a line may hold beside a conversation that is no part of what the model reads.
HARMLESS = {
  "schema", "id", "messages", "digest", "metadata", "model", "created", "created_at", "timestamp",
  "source", "dataset", "split", "tags", "language", "user", "store", "stream", "n", "seed",
  "temperature", "top_p", "max_tokens", "max_completion_tokens",
}  # fmt: skip


def read_text(path: str, field: str, group: str = "distill") -> str:
  """The text of the file that config.`group`.`field` names, its lines ended by newlines alone.

  Raises:
    ValueError: the field is not set or names another store; the file is compressed or not UTF-8.
    OSError: there is no such file.
  """
  if not path:
    raise ValueError(f"config.{group}.{field} is not set: it must be the path of a file")
  file = files.given(path, f"config.{group}.{field}")
  if file.suffix.lower() in COMPRESSED:
    raise ValueError(
      f"config.{group}.{field} is {path!r}, which is compressed: it must be unpacked"
    )
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    told = f"config.{group}.{field}: {path} is not a text in UTF-8 ({error})"
    raise ValueError(told) from error
  return text.replace("\r\n", "\n")


def read_prompts(path: str, field: str, group: str = "distill") -> list[Prompt]:
  """The prompts in the file that config.`group`.`field` names, in its order, every one of them.

  A conversation is an object with `messages` as OpenAI writes them (system, user and assistant, the
  last one the user's), and with an `id` if it likes. Empty lines are none.

  Args:
    path: what the file holds goes by its suffix, in any case. .txt: one user message a line;
      .jsonl, .ndjson or .jsonlines: one conversation a line; .json: an array of conversations, or
      one a line.
    field: for errors, and for the ids of prompts that have none.
    group: of the configuration, for errors.

  Raises:
    ValueError: the field is not set; the file has another suffix or holds no prompts; or it holds
      what is no conversation or would be lost: names file and line, or the place in the array.
    OSError: there is no such file.
  """
  text, suffix = read_text(path, field, group), pathlib.Path(path).suffix.lower()
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
      f"config.{group}.{field} is {path!r}: the name must end in {' or '.join(TEXT)} (one user "
      f"message a line), {', '.join(LINES)} (one conversation a line) or .json (an array of them)"
    )
  if not found:
    raise ValueError(f"config.{group}.{field}: {path} holds no prompts")
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
    except named.FAILURES as error:
      reason = f"{type(error).__name__}: {error}"
      raise ValueError(f"{told}: it fails for the answer {shown} ({reason})") from error
    if not isinstance(result, (bool, np.bool_)):
      raise ValueError(
        f"{told}: for the answer {shown} it returns {reprlib.repr(result)}: "
        "it must be True or False"
      )
    return bool(result)

  return checked
