"""Files of conversations and prompts: one JSON object a line, each with its schema version and a
digest of itself; nothing is pickled.

A file is read as a stream and never held whole: a pass yields record after record and notes where
each begins, so that the same records can then be read by number.
"""

import array
import json
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from absl import logging

from oel_jax.conversations.schema import (
  SCHEMA,
  Conversation,
  Prompt,
  conversation_from_json,
  prompt_from_json,
  to_json,
)
from oel_jax.runtime import schema
from oel_jax.runtime.files import explained, write_chunks

MAX_DAMAGED = 0.05  # share of unreadable lines above which a file is refused
MAX_NAMED = 20  # damaged lines that are named in the log, of those that are counted

Record = Conversation | Prompt | Mapping[str, Any]
R = TypeVar("R")


class JsonLines(Generic[R]):
  """The records of a file, in file order: a stream for whoever iterates, found by number for
  whoever asks for one. Empty lines are none.

  A line that carries a digest is damaged if it is not what the digest was made of, a line without
  one if it is not what `parse` reads. Damaged lines are left out, counted, and the first of them
  logged with file and line number.

  In memory stand 16 bytes a record once a pass has ended, and one record at a time before.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    parse: Callable[[dict[str, Any], int], R],
    *,
    max_damaged: float = MAX_DAMAGED,
  ):
    """Opens nothing yet.

    Args:
      path: file of `write_jsonl` or `append_jsonl`.
      parse: makes a record of a line's object and the line's number, from 1; raises ValueError
        where it is none.
      max_damaged: largest share of damaged lines that is accepted.
    """
    self.path, self.damaged = pathlib.Path(path), 0
    self._parse, self._max_damaged = parse, max_damaged
    self._places = None  # where each good line begins, and its number from 1; once all are known

  def __iter__(self) -> Iterator[R]:
    """Yields each record as it is read. A whole pass leaves `damaged`, the count of damaged lines.

    Raises:
      ValueError: at the end: more lines are damaged than `max_damaged` allows; names the file, the
        first bad line and the count.
      OSError: the file cannot be read.
    """
    begins, numbers = array.array("Q"), array.array("Q")
    damaged, first, begin = 0, None, 0
    with open(self.path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          try:
            record = self._record(line, number)
          except ValueError as error:
            damaged, first = damaged + 1, first or (number, str(error))
            if damaged <= MAX_NAMED:
              logging.warning("%s:%d: skipped a damaged line: %s", self.path, number, error)
          else:
            begins.append(begin)
            numbers.append(number)
            yield record
        begin += len(line)
    total = len(begins) + damaged
    if damaged > self._max_damaged * total:
      number, error = first
      raise ValueError(
        f"{self.path}: {damaged} of {total} lines are damaged, more than "
        f"{self._max_damaged:.0%} of them; the first is line {number}: {error}. "
        "Repair or remove these lines"
      )
    if damaged:
      logging.warning("%s: skipped %d damaged lines of %d", self.path, damaged, total)
    self.damaged, self._places = damaged, (begins, numbers)

  def __len__(self) -> int:
    """The number of records; reads the file once if no pass has ended yet. Raises as a pass."""
    return len(self._index()[0])

  def __getitem__(self, index: int) -> R:
    """The record of this number, from 0. Raises as a pass; and ValueError if the line is no longer
    what it was.
    """
    begins, numbers = self._index()
    begin, number = begins[index], numbers[index]
    with open(self.path, "rb") as file:
      file.seek(begin)
      line = file.readline()
    try:
      return self._record(line, number)
    except ValueError as error:
      raise ValueError(f"{self.path}:{number}: changed since it was first read: {error}") from error

  def _index(self) -> tuple[array.array, array.array]:
    if self._places is None:
      for _ in self:
        pass
    return self._places

  def _record(self, line: bytes, number: int) -> R:
    data = schema.loads(line)
    if not isinstance(data, dict):
      raise ValueError(f"a JSON object is needed, this is {reprlib.repr(data)}")
    return self._parse(data, number)


def conversations(
  path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED
) -> JsonLines[Conversation]:
  """The conversations of a file, as a stream and by number."""
  return JsonLines(path, lambda data, _: conversation_from_json(data), max_damaged=max_damaged)


def prompts(path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED) -> JsonLines[Prompt]:
  """The prompts of a file, as a stream and by number."""
  return JsonLines(path, lambda data, _: prompt_from_json(data), max_damaged=max_damaged)


def read_conversations(
  path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED
) -> list[Conversation]:
  """All conversations of a file at once, in file order; arguments and errors as in `JsonLines`."""
  # list() of the file itself would ask for its length first, and so read it twice.
  return list(iter(conversations(path, max_damaged=max_damaged)))


def read_prompts(path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED) -> list[Prompt]:
  """All prompts of a file at once, in file order; arguments and errors as in `JsonLines`."""
  return list(iter(prompts(path, max_damaged=max_damaged)))


def write_jsonl(path: str | os.PathLike, records: Iterable[Record]) -> None:
  """Writes a file whole, under a temporary name that is then renamed: `path` is the old file or the
  new one, also after a crash.

  Args:
    path: its folder is made if it does not exist.
    records: conversations, prompts or plain dictionaries of JSON values; one line each, with the
      schema version in front and a digest of the line at its end. Taken one at a time.

  Raises:
    OSError: among others on a full disk, in words that name the file and what to do; what stood at
      `path` before still does.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_chunks(path, map(to_line, records))


def append_jsonl(path: str | os.PathLike, record: Record) -> None:
  """Adds one line and syncs it to the disk, so that a crash loses at most the line being written.

  If the file ends in half a line (a crash during an earlier append), the new line begins on a line
  of its own.

  Raises:
    OSError: among others on a full disk, in words that name the file and what to do; the lines
      written before stay.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  line = to_line(record)
  try:
    with open(path, "a+b") as file:
      if file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
          line = b"\n" + line
      file.write(line)
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise explained(error, path) from error


def to_line(record: Record) -> bytes:
  """The record's line in UTF-8, newline included."""
  data = record if isinstance(record, Mapping) else to_json(record)
  text = json.dumps(schema.sealed({"schema": SCHEMA, **data}), ensure_ascii=False, allow_nan=False)
  # A policy may sample half a surrogate pair, which UTF-8 cannot hold: one "?" rather than a lost
  # conversation.
  return text.encode("utf-8", "replace") + b"\n"
