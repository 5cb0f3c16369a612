"""The JSON values in a file of logs, one after another: never the whole file in memory, and what is
damaged between them told by its place.
"""

import io
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from oel_jax.conversations.schema import READS
from oel_jax.runtime import schema

SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json", ".traj")  # SWE-agent's, which are JSON
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
PAGE = {"data", "meta", "error"}  # of a list, as Langfuse and Helicone give it
MAX_RECORD = 1 << 26  # bytes of one record, above which it is not even held in memory


def values(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yields (number, JSON value) for each record of a file, from 1: the number of its line, in a
  .json file that of the value. What is no JSON is a ValueError in the value's place.

  Raises:
    OSError: the file cannot be read.
  """
  with open(file, "rb") as stream:
    if file.suffix.lower() in (".json", ".traj"):
      yield from _values(stream)
    else:
      yield from ((number, _talk(_parsed(line))) for number, line in _lines(stream))


def _parsed(line: bytes | Exception) -> Any:
  """The JSON value of a line; a record that we wrote is compared with its digest."""
  if isinstance(line, Exception):
    return line
  try:
    data = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    own = isinstance(data, dict) and data.get("schema") in READS and "digest" in data
    return schema.loads(line) if own else data
  except UnicodeDecodeError as error:
    return ValueError(f"not UTF-8 at byte {error.start}")
  except RecursionError:
    return ValueError("nested too deeply")
  except json.JSONDecodeError as error:  # whose own words count lines, of which there is one
    return ValueError(f"{error.msg}: character {error.pos + 1}")
  except ValueError as error:
    return error


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | Exception]]:
  """The lines that say something, with their numbers from 1; one beyond all bounds is an error."""
  number = 0
  while line := stream.readline(MAX_RECORD):
    number += 1
    if len(line) == MAX_RECORD and not line.endswith(b"\n"):
      while (rest := stream.readline(MAX_RECORD)) and not rest.endswith(b"\n"):
        pass
      yield number, ValueError(f"a line of more than {MAX_RECORD >> 20} MiB")
    elif line.strip():
      yield number, line


_BLANK = re.compile(r"[\s,]*")
_CHUNK = 1 << 20


def _values(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
  """The JSON values of a .json file, with their numbers from 1: an array's items, or objects that
  follow one another, on one line or on many; of a page of a list, its "data".
  """
  decoder, reader = json.JSONDecoder(), io.TextIOWrapper(stream, encoding="utf-8-sig")
  text, number, array = "", 0, None
  try:
    while True:
      start = _BLANK.match(text).end()
      if start < len(text) and array is None:
        array = text[start] == "["
        text = text[start + array :]
        continue
      if array and text[start : start + 1] == "]":
        return
      try:
        value, end = decoder.raw_decode(text, start)
      except RecursionError:
        yield number + 1, ValueError("nested too deeply; nothing behind it is read")
        return
      except ValueError as error:
        text, told = text[start:], _told(error)
        # What is cut off by the end of the chunk looks like damage, too.
        cut = isinstance(error, json.JSONDecodeError) and len(text) < MAX_RECORD
        more = reader.read(max(_CHUNK, len(text))) if cut else ""
        if more or not text:
          text += more
          if not text:
            return
          continue
        number += 1
        if array:
          yield number, ValueError(f"{told}; nothing behind it is read")
          return
        yield number, ValueError(told)
        while "\n" not in text and (text := reader.read(_CHUNK)):
          pass
        text = text.partition("\n")[2]
        continue
      text = text[end:]
      value = _talk(value)
      listed = _listed(value)
      for each in [value] if listed is None else listed:
        number += 1
        yield number, each
  except UnicodeDecodeError:
    yield number + 1, ValueError("not UTF-8; nothing behind it is read")


def _listed(value: Any) -> list[Any] | None:
  """What stands in a page of a list; None if the value is no such page."""
  page = isinstance(value, dict) and (value.get("object") == "list" or value.keys() <= PAGE)
  listed = value.get("data") if page else None
  return listed if isinstance(listed, list) else None


def _talk(value: Any) -> Any:
  """A page of a list that is one conversation, its messages and items, as a record; any other value
  as it is.
  """
  listed = _listed(value) or []
  items = all(
    isinstance(each, dict)
    and ("role" in each or str(each.get("type")).endswith(("_call", "_output", "reasoning")))
    and not each.keys() & {"messages", "conversations", "request"}
    for each in listed
  )
  one = items and any("role" in each for each in listed)
  return {"messages": _asked_first(listed)} if one else value


def _asked_first(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The items of a conversation in the order in which they were said, where they show it: OpenAI
  lists them newest first unless `order=asc` asks for the other.
  """
  ends = lambda each, what: str(each.get("type")).endswith(what)
  name = lambda each: str(each.get("call_id"))
  calls = {name(each): number for number, each in enumerate(items) if ends(each, "_call")}
  early = [
    number < calls[name(each)]
    for number, each in enumerate(items)
    if ends(each, "_output") and name(each) in calls
  ]
  roles = [each["role"] for each in items if "role" in each]
  told_last = roles[-1] in ("system", "developer") and roles[0] not in ("system", "developer")
  answered_first = (roles[0], roles[-1]) == ("assistant", "user")
  newest_first = early[0] if early else told_last or answered_first
  return items[::-1] if newest_first else items


def _told(error: ValueError) -> str:
  """What is wrong with a JSON text, without the place in it."""
  if isinstance(error, json.JSONDecodeError):
    return error.msg
  return "a whole number has more digits than Python reads"
