"""Conversations of agents, gathered from their traces: one event a line, and of an answer's parts
each on a line of its own.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from oel_jax.conversations.log_messages import joined
from oel_jax.conversations.log_records import Record
from oel_jax.conversations.schema import Message


@dataclasses.dataclass
class _Part:
  """What an agent has said so far in one context of a session, and the tools that it was last said
  to have.
  """

  first: Record
  line: int
  messages: list[Message] = dataclasses.field(default_factory=list)
  joins: list[str] = dataclasses.field(default_factory=list)
  tools: tuple[str, ...] = ()

  def add(self, record: Record) -> None:
    """Adds a record's messages; those of one response of the model become one message."""
    self.tools = record.tools or self.tools
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

  def record(self) -> Record:
    """All of it, without answers that were broken off before they said anything."""
    said = (m for m in self.messages if m.role != "assistant" or m.content or m.tool_calls)
    name = "/".join(filter(None, (self.first.session or self.first.id, self.first.side)))
    return dataclasses.replace(self.first, messages=tuple(said), id=name, tools=self.tools)


def gathered(records: Iterable[tuple[Record, int]]) -> Iterator[tuple[Record, int]]:
  """The records of a file with those of agents gathered, each with the line that it begins on.

  What follows one another and names the same session, or none, is one conversation, each sub-agent
  one of its own; a context that begins anew is another.
  """
  session: str | None = None
  parts: dict[str, _Part] = {}
  for record, line in records:
    if record.session != session:
      yield from ((part.record(), part.line) for part in parts.values())
      session, parts = record.session, {}
    if record.session is None:
      yield record, line
      continue
    part = parts.get(record.side)
    if part is not None and record.heads:  # written again where a session is taken up again
      continue
    if part is not None and record.begins:
      yield parts.pop(record.side).record(), part.line
      record = dataclasses.replace(record, id=part.first.id, tools=record.tools or part.tools)
    parts.setdefault(record.side, _Part(record, line)).add(record)
  yield from ((part.record(), part.line) for part in parts.values())
