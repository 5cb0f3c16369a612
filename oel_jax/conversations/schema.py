"""What crosses between the stages: messages, turns, trajectories and prefixes, with their JSONL
files.

A trajectory never leaves the user side of a run directory. What crosses to the server side are
prefixes (the prompt of one turn, as chat messages) and knowledge texts. Every line of a file
carries its schema version and a digest of itself; nothing is pickled.
"""

import dataclasses
import json
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging

from oel_jax.runtime import schema
from oel_jax.runtime.files import explained, write_text

SCHEMA = 1
MAX_DAMAGED = 0.05  # share of unreadable lines above which a file is refused
ENDED = ("passed", "lost", "invalid", "turn_limit")
KNOWLEDGE = "knowledge"  # the role of a message that holds knowledge


@dataclasses.dataclass(frozen=True)
class Message:
  """One chat message.

  Attributes:
    role: "system", "user" or "assistant"; or KNOWLEDGE, which only the first message may have:
      nobody said it, and where it stands in a prompt is for `policy/tokenizers/` to say.
    content: an assistant's is what stands after its thinking.
  """

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Turn:
  """One exchange: what the user side said, what the policy answered.

  Attributes:
    observation: content of the user message.
    thinking: text before the answer; never shown again in later prompts.
    answer: text after the thinking; what later prompts show as the assistant's message.
    action: the action taken from the answer, "" if it holds none.
    response_tokens: sampled tokens, thinking and end-of-sequence included.
  """

  observation: str
  thinking: str
  answer: str
  action: str
  response_tokens: int


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """One finished episode.

  Attributes:
    id: unique in its file, e.g. "r1-deploy-00017".
    game: registered name of the game.
    seed: seed of the game's map.
    turns: in order.
    outcome: what the game said last; the turn limit is said in our words.
    reward: the game's own, 1.0 for a win.
    passed: reward >= config.deployment.passed_reward, by the game's own end.
    ended: one of ENDED.
  """

  id: str
  game: str
  seed: int
  turns: tuple[Turn, ...]
  outcome: str
  reward: float
  passed: bool
  ended: str


@dataclasses.dataclass(frozen=True)
class Prefix:
  """The prompt of one turn: `messages` ends with a user message. `id` names trajectory and turn,
  e.g. "r1-prefix-00017-2".
  """

  id: str
  messages: tuple[Message, ...]


Record = Trajectory | Prefix | Mapping[str, Any]


# a knowledge text with nothing in it: `knowledge_message` of it is the wrapper alone (the control
# of that name)
EMPTY = " "


def knowledge_message(knowledge: str) -> Message:
  """The message that gives a conversation knowledge; nothing else of its prompt changes."""
  return Message(KNOWLEDGE, f"Experience from earlier games:\n{knowledge}")


def messages(turns: Iterable[Turn]) -> tuple[Message, ...]:
  """The conversation that these turns make, thinking left out."""
  result: list[Message] = []
  for turn in turns:
    result += [Message("user", turn.observation), Message("assistant", turn.answer)]
  return tuple(result)


def prefixes(trajectory: Trajectory) -> list[Prefix]:
  """The prompts of all turns of a trajectory (OEL section 3: D is cut from deployed
  trajectories).
  """
  return [
    Prefix(
      f"{trajectory.id}-{t}",
      messages(trajectory.turns[:t]) + (Message("user", trajectory.turns[t].observation),),
    )
    for t in range(len(trajectory.turns))
  ]


def transcript(trajectory: Trajectory) -> str:
  """The episode as plain text for the extractor: observations, answers without thinking, and how it
  ended.
  """
  parts = [f"{turn.observation}\nAnswer: {turn.answer}" for turn in trajectory.turns]
  return "\n".join(parts) + f"\nEnd of game:\n{trajectory.outcome}"


def write_jsonl(path: str | os.PathLike, records: Iterable[Record]) -> None:
  """Writes a file whole, under a temporary name that is then renamed: `path` is the old file or the
  new one, also after a crash.

  Args:
    path: its folder is made if it does not exist.
    records: trajectories, prefixes or plain dictionaries of JSON values; one line each, with the
      schema version in front and a digest of the line at its end.

  Raises:
    OSError: among others on a full disk, in words that name the file and what to do; what stood at
      `path` before still does.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, "".join(map(_line, records)))


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
  line = _line(record).encode("utf-8")
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


def read_trajectories(
  path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED
) -> list[Trajectory]:
  """Reads trajectories in file order. Damaged lines are skipped and logged with file and line
  number.

  A line that carries a digest is damaged if it is not what the digest was made of, a line without
  one if it is no trajectory.

  Args:
    path: file of `write_jsonl` or `append_jsonl`.
    max_damaged: largest share of damaged lines that is accepted.

  Raises:
    ValueError: more lines are damaged; names the file, the first bad line and the count.
    OSError: the file cannot be read.
  """
  return _read(path, _trajectory, max_damaged)


def read_prefixes(path: str | os.PathLike, *, max_damaged: float = MAX_DAMAGED) -> list[Prefix]:
  """Reads prefixes in file order; arguments, logging and errors as in `read_trajectories`."""
  return _read(path, _prefix, max_damaged)


def _line(record: Record) -> str:
  if isinstance(record, Trajectory):
    fields = {
      field.name: getattr(record, field.name)
      for field in dataclasses.fields(record)
      if field.name != "turns"
    }
    record = fields | {
      "messages": [message for turn in record.turns for message in _turn_to_json(turn)]
    }
  elif isinstance(record, Prefix):
    record = dataclasses.asdict(record)
  # A policy may sample half a surrogate pair, which UTF-8 cannot hold: one "?" rather than a lost
  # episode.
  text = json.dumps(
    schema.sealed({"schema": SCHEMA, **record}), ensure_ascii=False, allow_nan=False
  )
  return text.encode("utf-8", "replace").decode("utf-8") + "\n"


def _turn_to_json(turn: Turn) -> list[dict[str, Any]]:
  return [
    {"role": "user", "content": turn.observation},
    {
      "role": "assistant",
      "content": turn.answer,
      "thinking": turn.thinking,
      "action": turn.action,
      "response_tokens": turn.response_tokens,
    },
  ]


def _read(
  path: str | os.PathLike, parse: Callable[[dict[str, Any]], Any], max_damaged: float
) -> list:
  result, damaged = [], []
  for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      data = schema.loads(line)
      if not isinstance(data, dict):
        raise ValueError(f"a JSON object is needed, this is {reprlib.repr(data)}")
      if _field(data, "schema", int) != SCHEMA:
        raise ValueError(f"schema version {data['schema']}, this version of oel_jax reads {SCHEMA}")
      result.append(parse(data))
    except ValueError as error:
      damaged.append((number, error))
  total = len(result) + len(damaged)
  if len(damaged) > max_damaged * total:
    number, error = damaged[0]
    raise ValueError(
      f"{path}: {len(damaged)} of {total} lines are damaged, more than {max_damaged:.0%} of them; "
      f"the first is line {number}: {error}. "
      "Repair or remove these lines"
    )
  for number, error in damaged:
    logging.warning("%s:%d: skipped a damaged line: %s", path, number, error)
  if damaged:
    logging.warning("%s: skipped %d damaged lines of %d", path, len(damaged), total)
  return result


def _field(data: Any, name: str, *types: type) -> Any:
  """A field of exactly one of these types: true is no int here."""
  if not isinstance(data, dict) or name not in data:
    raise ValueError(f"field {name!r} is missing")
  if type(data[name]) not in types:
    raise ValueError(
      f"field {name!r} is {reprlib.repr(data[name])}: it must be of type "
      f"{' or '.join(kind.__name__ for kind in types)}"
    )
  return data[name]


def _trajectory(data: dict[str, Any]) -> Trajectory:
  lines = _field(data, "messages", list)
  roles = [_field(line, "role", str) for line in lines]
  if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
    raise ValueError(
      f"the roles of a trajectory's messages are {reprlib.repr(roles)}: they must be user and "
      "assistant in turn"
    )
  turns = tuple(
    Turn(
      observation=_field(user, "content", str),
      thinking=_field(assistant, "thinking", str),
      answer=_field(assistant, "content", str),
      action=_field(assistant, "action", str),
      response_tokens=_field(assistant, "response_tokens", int),
    )
    for user, assistant in zip(lines[::2], lines[1::2])
  )
  for number, turn in enumerate(turns):
    if turn.response_tokens < 0:
      raise ValueError(
        f"field 'response_tokens' of turn {number} is {turn.response_tokens}: it must be 0 or more"
      )
  if _field(data, "ended", str) not in ENDED:
    raise ValueError(
      f"field 'ended' is {data['ended']!r}: it must be one of {', '.join(map(repr, ENDED))}"
    )
  return Trajectory(
    id=_field(data, "id", str),
    game=_field(data, "game", str),
    seed=_field(data, "seed", int),
    turns=turns,
    outcome=_field(data, "outcome", str),
    reward=float(_field(data, "reward", float, int)),
    passed=_field(data, "passed", bool),
    ended=data["ended"],
  )


def _prefix(data: dict[str, Any]) -> Prefix:
  result = Prefix(
    _field(data, "id", str),
    tuple(
      Message(_field(line, "role", str), _field(line, "content", str))
      for line in _field(data, "messages", list)
    ),
  )
  for message in result.messages:
    if message.role not in ("system", "user", "assistant"):
      raise ValueError(
        f"a message's role is {message.role!r}: it must be 'system', 'user' or 'assistant'"
      )
  if not result.messages or result.messages[-1].role != "user":
    raise ValueError("the last message of a prefix must be the user's")
  return result
