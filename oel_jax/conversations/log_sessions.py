"""Conversations of agents, gathered from their traces: one event a line, and of an answer's parts
each on a line of its own.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from oel_jax.conversations.log_messages import joined
from oel_jax.conversations.log_records import Record
from oel_jax.conversations.schema import Message

# What Codex tells the model in the user's name, much the same in each session.
TOLD = ("<environment_context>", "<user_instructions>", "# AGENTS.md instructions")
MAX_OPEN = 256  # sessions of a file that are held in memory, as a server's lines come mixed


@dataclasses.dataclass
class _Part:
  """What an agent has said so far in one context of a session, the tools that it was last said to
  have, and what was said of it.
  """

  first: Record
  line: int
  messages: list[Message] = dataclasses.field(default_factory=list)
  joins: list[str] = dataclasses.field(default_factory=list)
  tools: tuple[str, ...] = ()
  places: dict[str, int] = dataclasses.field(default_factory=dict)
  user: str | None = None
  feedback: tuple[str, ...] = ()

  def add(self, record: Record) -> None:
    """Adds a record's messages; those of one response of the model become one message."""
    self.tools = record.tools or self.tools
    self.user = self.user or record.user
    self.feedback += (record.feedback,) if record.feedback else ()
    if record.follows:  # what it follows may be an event
      self.places.setdefault(record.follows, len(self.messages))
    for message in record.messages:
      place = len(self.messages) - 1
      # A tool may answer the first call of a response before the second call is written down.
      while record.joins not in ("", "*") and place >= 0 and self.messages[place].role == "tool":
        place -= 1
      same = record.joins and place >= 0 and self.joins[place] == record.joins
      if same and message.role == "assistant":
        self.messages[place] = joined(self.messages[place], message)
      else:
        self.messages.append(message)
        self.joins.append(record.joins)
    if record.name:
      self.places[record.name] = len(self.messages)

  def taken_back(self, record: Record) -> int | None:
    """How many messages stay where a record takes the rest back; None if it does not."""
    if record.takes_back:
      prompts = [number for number, message in enumerate(self.messages) if is_prompt(message)]
      return prompts[-min(record.takes_back, len(prompts))] if prompts else None
    stay = self.places.get(record.follows, len(self.messages))
    return stay if any(map(is_prompt, self.messages[stay:])) else None

  def until(self, count: int, line: int) -> "_Part":
    """The part with its first messages alone, to go on from there."""
    places = {name: place for name, place in self.places.items() if place <= count}
    said, joins = self.messages[:count], self.joins[:count]
    return dataclasses.replace(self, line=line, messages=said, joins=joins, places=places)

  def record(self) -> Record:
    """All of it, without answers that were broken off before they said anything."""
    said = (m for m in self.messages if m.role != "assistant" or m.content or m.tool_calls)
    name = "/".join(filter(None, (self.first.session or self.first.id, self.first.side)))
    return dataclasses.replace(
      self.first,
      messages=tuple(said),
      id=name,
      tools=self.tools,
      user=self.user,
      feedback="\n".join(dict.fromkeys(self.feedback)) or None,
    )


def is_prompt(message: Message) -> bool:
  """Whether it is what a user said, not what a program told the model in the user's name."""
  return message.role == "user" and not message.content.startswith(TOLD)


def gathered(records: Iterable[tuple[Record, int]]) -> Iterator[tuple[Record, int]]:
  """The records of a file with those of agents gathered, each with the line that it begins on.

  What names the same session is one conversation, and so is what follows one another and names
  none; each sub-agent has one of its own, and a context that begins anew is another. Where a user
  takes something back, it is one conversation up to there and another without what was taken back.
  A session has ended when `MAX_OPEN` others have spoken since.
  """
  open_: dict[str, dict[str, _Part]] = {}  # by session, the one that spoke last at the end
  for record, line in records:
    if record.session != "":
      yield from _ended(open_.pop("", {}))
    if record.session is None:
      yield record, line
      continue
    parts = open_[record.session] = open_.pop(record.session, {})
    if len(open_) > MAX_OPEN:
      yield from _ended(open_.pop(next(iter(open_))))
    part = parts.get(record.side)
    if part is not None and record.heads:  # written again where a session is taken up again
      continue
    stay = part.taken_back(record) if part is not None and not record.begins else None
    if part is not None and record.begins:
      yield parts.pop(record.side).record(), part.line
      known = {"user": record.user or part.user, "tools": record.tools or part.tools}
      record = dataclasses.replace(record, id=part.first.id, **known)
    elif stay is not None:
      yield part.record(), part.line
      parts[record.side] = part.until(stay, line)
    parts.setdefault(record.side, _Part(record, line)).add(record)
  for parts in open_.values():
    yield from _ended(parts)


def _ended(parts: dict[str, _Part]) -> Iterator[tuple[Record, int]]:
  return ((part.record(), part.line) for part in parts.values())
