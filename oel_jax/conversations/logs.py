"""Logs of conversations, a file or a folder of them: read as a stream in one order, everything that
is wrong with them counted and told, nothing of the rest lost.

What a record says is `log_records.py`'s, which of them say the same is `duplicates.py`'s. A stage
that begins from logs needs three calls:

  counts = logs.Counts()
  for conversation in logs.distinct(path, counts, near=0.8):
    held = logs.held_out(conversation, share=0.1, seed=config.seed)
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from oel_jax.conversations import duplicates, log_files, log_records, log_sessions
from oel_jax.conversations.jsonl import MAX_DAMAGED, MAX_NAMED
from oel_jax.conversations.log_files import COMPRESSED, SUFFIXES
from oel_jax.conversations.log_records import Record
from oel_jax.conversations.schema import AGENT, LOG, Conversation, Message, Source
from oel_jax.runtime import files
from oel_jax.runtime.counted import counted

MAX_MESSAGE = 1_000_000  # characters of one message, above which no model reads it
MAX_NAMES = 1000  # of fields, events and parts that are told apart
SHOWN = 8  # names of a kind that a sentence tells
OPENING = 32  # characters of what a user says first that tell one conversation from another


@dataclasses.dataclass
class Counts:
  """What was found in logs; `sentences` tells it, a line for each kind.

  Attributes:
    files, records, conversations: that were read; a record is a line, or an item of an array.
    damaged: records that are no JSON, no conversation and no event; `places` names the first.
    unanswered: conversations without a message of the assistant: nothing can be learned from them.
    too_long: conversations that end before a message of more than `max_message` characters.
    half_pairs: conversations with half a surrogate pair, which stands as U+FFFD now.
    without_call: conversations in which a tool answers what nobody called; they are kept.
    same, continued, near: conversations left out, as `duplicates.py` tells them apart.
    other_files: left alone, by their suffix.
    seen: events, fields that are not read, parts that are no text, and forms, by (kind, name).
  """

  files: int = 0
  records: int = 0
  conversations: int = 0
  damaged: int = 0
  unanswered: int = 0
  too_long: int = 0
  half_pairs: int = 0
  without_call: int = 0
  same: int = 0
  continued: int = 0
  near: int = 0
  places: list[str] = dataclasses.field(default_factory=list)
  other_files: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  seen: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def as_json(self) -> dict[str, Any]:
    """The counts as a JSON object, those of kinds by "kind: name"."""
    plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    seen = {f"{kind}: {name}": count for (kind, name), count in sorted(self.seen.items())}
    return plain | {"other_files": dict(self.other_files), "seen": seen}

  def sentences(self) -> list[str]:
    """What a user should know, none for what did not occur."""
    read = counted(self.conversations, "conversations")
    told = [
      f"read {read} from {counted(self.records, 'records')} of {counted(self.files, 'files')}"
    ]
    for count, sentence in (
      (self.damaged, "records are damaged and were left out"),
      (self.unanswered, "conversations have no answer of the assistant's and were left out"),
      (self.too_long, "conversations end before a message that is too long"),
      (self.half_pairs, "conversations hold half a surrogate pair, which stands as U+FFFD now"),
      (self.without_call, "conversations hold a tool's result that no call asked for"),
      (self.same, "conversations say the same as another and were left out"),
      (self.continued, "conversations are the beginning of another and were left out"),
      (self.near, "conversations nearly say the same as an earlier one and were left out"),
    ):
      if count:
        told.append(counted(count, sentence))
    for kind, sentence in (
      ("event", "records are events and no messages"),
      ("field", "fields are not read; they stay in the log, at the file and line of the source"),
      ("part", "parts of messages are no text and stand as their type in brackets"),
    ):
      met = collections.Counter({n: count for (k, n), count in self.seen.items() if k == kind})
      if met:
        told.append(f"{counted(met.total(), sentence)}: {_shown(met)}")
    if self.other_files:
      told.append(
        f"{counted(self.other_files.total(), 'files were left alone')}: "
        f"{_shown(self.other_files)}; what is compressed must be unpacked, and the names of logs "
        f"end in {', '.join(SUFFIXES)}"
      )
    return told


def _shown(met: collections.Counter) -> str:
  most = ", ".join(f"{name} {count}" for name, count in met.most_common(SHOWN))
  return most + (", …" if len(met) > SHOWN else "")


def distinct(
  path: str | os.PathLike,
  counts: Counts,
  *,
  near: float = duplicates.NEAR,
  seed: int = 0,
  **how: Any,
) -> Iterator[Conversation]:
  """The conversations of logs without duplicates, as a stream; the logs are read twice.

  Args:
    path, how: as for `read`.
    counts: gets all that was found, once the stream has ended; it is told in the log then.
    near: the share of five-word sequences in common from which two are near-duplicates; above 1,
      none are.
    seed: of the hashes that find them.

  Raises:
    ValueError: as `read`, before the first conversation; or the logs changed between the passes.
    OSError: as `read`.
  """
  sketches = duplicates.Sketches(seed)
  for conversation in read(path, Counts(), **how):
    sketches.add(conversation)
  reasons = sketches.reasons(near)
  for number, conversation in enumerate(read(path, counts, **how)):
    if not sketches.holds(number, conversation):
      raise ValueError(f"{path} changed while it was read: nothing may write to it meanwhile")
    reason = reasons[number]
    if reason == duplicates.KEPT:
      yield conversation
    else:
      name = duplicates.NAMES[reason]
      setattr(counts, name, getattr(counts, name) + 1)
  for place in counts.places:
    logging.warning("skipped a damaged record: %s", place)
  for sentence in counts.sentences():
    logging.info("%s: %s", path, sentence)


def held_out(conversation: Conversation, share: float, seed: int) -> bool:
  """Whether a conversation belongs to the held-out ones.

  It goes by a hash of the seed and the user: all that one user said is on one side, and stays there
  when files are added. Where the user is unknown, it goes by what was said first by the user, so
  that a question that many ask, and a conversation that goes on, is on one side, too.

  Args:
    share: of the users, or of the beginnings, from 0 to 1.
    seed: config.seed.
  """
  key = ("user", conversation.user) if conversation.user else ("said", _opening(conversation))
  name = json.dumps([seed, *key], ensure_ascii=False).encode("utf-8", "replace")
  place = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
  return place < share * 2**64


def _opening(conversation: Conversation) -> str:
  """What the user says first, up to the message that makes it `OPENING` characters."""
  said = ""
  for message in conversation.messages:
    if log_sessions.is_prompt(message) and len(said) < OPENING:
      said += f"{message.content}\n"
  return said


# Reading.


def read(
  path: str | os.PathLike,
  counts: Counts,
  *,
  max_damaged: float = MAX_DAMAGED,
  max_message: int = MAX_MESSAGE,
) -> Iterator[Conversation]:
  """The conversations of logs, as a stream: files in the order of their names, records in theirs.

  Ids are the records' own, or of the file and line; one that came before gets file and line added.
  In memory stand one record or a file's open sessions of agents, and a number for each id.

  Args:
    path: a file, or a folder of them, with all its folders.
    counts: gets what was found.
    max_damaged: largest share of records that may be damaged.
    max_message: characters of the longest message; a conversation ends before a longer one.

  Raises:
    ValueError: there is no conversation in the logs, or more records are damaged, at the end; or
      a file alone is compressed.
    OSError: there is no such file or folder, or a file cannot be read.
  """
  path = files.local(path, "config.logs.path")
  ids: set[int] = set()
  for file, name in _files(path, counts):
    counts.files += 1
    for record, line in log_sessions.gathered(_records(file, counts)):
      conversation = _conversation(record, file, name, line, counts, max_message)
      if conversation is None:
        continue
      number = hash_of(conversation.id)
      if number in ids:
        again = f"{conversation.id}#{name}:{line}"
        conversation = dataclasses.replace(conversation, id=again)
        number = hash_of(again)
      ids.add(number)
      counts.conversations += 1
      yield conversation
  _check(path, counts, max_damaged)


def hash_of(text: str) -> int:
  """64 bits that name a text."""
  digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
  return int.from_bytes(digest, "big")


def _check(path: pathlib.Path, counts: Counts, max_damaged: float) -> None:
  """Raises ValueError if the logs are not worth going on with."""
  if counts.damaged > max_damaged * counts.records:
    raise ValueError(
      f"{path}: {counts.damaged} of {counts.records} records are damaged, more than "
      f"{max_damaged:.0%} of them; the first is {counts.places[0]}. Repair or remove them"
    )
  if not counts.conversations:
    why = "; ".join(counts.sentences()[1:]) or f"its {counts.files} files have no record"
    raise ValueError(f"{path} holds no conversation that can be used: {why}")


def _files(path: pathlib.Path, counts: Counts) -> Iterator[tuple[pathlib.Path, str]]:
  """The files of logs with their names below `path`, in order; the others are counted."""
  if not path.is_dir():
    if path.suffix.lower() in COMPRESSED:
      raise ValueError(f"{path} is compressed: it must be unpacked")
    yield path, path.name  # which says so if there is none
    return
  found = False
  for folder, folders, names in os.walk(path, onerror=_raise):
    folders.sort()
    links = sum(pathlib.Path(folder, name).is_symlink() for name in folders)
    if links:  # they may lead in a circle
      counts.other_files["links to folders"] += links
    for name in sorted(names):
      file = pathlib.Path(folder, name)
      # Claude Code describes each sub-agent beside what it said.
      if file.suffix.lower() in SUFFIXES and not name.endswith(".meta.json") and file.is_file():
        found = True
        yield file, file.relative_to(path).as_posix()
      else:
        counts.other_files["".join(file.suffixes[-2:]) or "no suffix"] += 1
  if not found:
    held = f"; it holds {_shown(counts.other_files)}" if counts.other_files else " and is empty"
    raise ValueError(f"{path} holds no file whose name ends in {', '.join(SUFFIXES)}{held}")


def _raise(error: OSError) -> None:
  raise error


def _records(file: pathlib.Path, counts: Counts) -> Iterator[tuple[Record, int]]:
  """What the records of a file say, with their numbers from 1; events are left out."""
  for number, value in log_files.values(file):
    counts.records += 1
    seen: log_records.Seen = []
    try:
      if isinstance(value, ValueError):
        raise value
      record = log_records.read(value, seen)
    except ValueError as error:
      counts.damaged += 1
      if len(counts.places) < MAX_NAMED:
        counts.places.append(f"{file}:{number}: {error}")
      continue
    counts.seen.update(_plain(each, counts) for each in seen)
    if record is not None:
      yield record, number


def _plain(met: tuple[str, str], counts: Counts) -> tuple[str, str]:
  """What was met by its name, if it is one: where a name should stand may be anything, and more of
  them than memory holds.
  """
  known = met in counts.seen or len(counts.seen) < MAX_NAMES
  return met if known and _NAME.fullmatch(met[1]) else (met[0], "other")


_NAME = re.compile(r"[A-Za-z_][\w. -]{0,39}")


def _conversation(
  record: Record, file: pathlib.Path, name: str, line: int, counts: Counts, max_message: int
) -> Conversation | None:
  """The conversation of a record; None if there is nothing to learn from it."""
  messages = record.messages
  long = next((n for n, each in enumerate(messages) if _size(each) > max_message), None)
  if long is not None:
    counts.too_long += 1
    messages = messages[:long]
  whole = tuple(map(_whole_pairs, messages))
  counts.half_pairs += whole != messages
  if not any(message.role == "assistant" for message in whole):
    counts.unanswered += 1
    return None
  counts.without_call += not _asked_for(whole)
  stem = pathlib.PurePosixPath(name).with_suffix("").as_posix()
  return Conversation(
    record.id or f"{stem}-{line}",
    whole,
    Source(LOG if record.session is None else AGENT, str(file), line=line),
    outcome=record.outcome,
    reward=record.reward,
    feedback=record.feedback,
    user=record.user,
    tools=record.tools,
  )


def _size(message: Message) -> int:
  calls = sum(len(call.arguments) for call in message.tool_calls)
  return len(message.content) + len(message.thinking) + calls


def _whole_pairs(message: Message) -> Message:
  """The message with U+FFFD for each half of a surrogate pair, which UTF-8 cannot hold."""
  try:
    for text in (message.content, message.thinking, message.name):
      text.encode()
    for call in message.tool_calls:
      call.arguments.encode()
    return message
  except UnicodeEncodeError:
    calls = tuple(
      dataclasses.replace(call, arguments=_HALF.sub("\ufffd", call.arguments))
      for call in message.tool_calls
    )
    texts = {n: _HALF.sub("\ufffd", getattr(message, n)) for n in ("content", "thinking", "name")}
    return dataclasses.replace(message, tool_calls=calls, **texts)


_HALF = re.compile("[\ud800-\udfff]")


def _asked_for(messages: Iterable[Message]) -> bool:
  """Whether each tool's result answers a call: of its id, or of one that is not yet answered."""
  ids, calls = set(), 0
  for message in messages:
    ids |= {call.id for call in message.tool_calls}
    calls += len(message.tool_calls) - (message.role == "tool")
    if calls < 0 or (message.tool_call_id and message.tool_call_id not in ids):
      return False
  return True
