"""What the host knows of the slots: which tokens of each one's cache can still be read.

The cache is circular. Every step of decoding writes its next column, in all slots at once, so a
slot's tokens are the columns last written while the slot drew. Below, S = 12 columns, laid out so
that the newest is on the right; `>` is the column that the next step overwrites, the oldest:

                          oldest ................ newest
    slot 0, draws        >  .  a  a  a  a  a  a  a  a  a  a     count 10, behind 0
    slot 1, has ended    >  .  b  b  b  b  b  b  -  -  -  -     count  6, behind 4
    slot 2, has ended    >  c  c  -  -  -  -  -  -  -  -  -     count  5, behind 9: overwritten

While others draw, a slot that does not falls `behind`. Its first token stands `count + behind`
columns back, so all of it can be read while count + behind <= S; beyond that its beginning is gone,
and a beginning is all that a prompt can take over: then it counts as empty.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass
class SlotTable:
  """R slots over S columns.

  Attributes:
    tokens: [R, S] int32, what each slot's cache was given last, its first token first; -1 fills.
    count: [R] int32, how many tokens that is.
    behind: [R] int32, columns that were written since by others' steps; 0 for slots that draw.
    device: [R], where the slot is.
    text: [R] int32, the text that stands before the slot's tokens, -1 for none: what is behind
      another text cannot be taken over.
  """

  tokens: Int[np.ndarray, "R S"]
  count: Int[np.ndarray, "R"]
  behind: Int[np.ndarray, "R"]
  device: Int[np.ndarray, "R"]
  text: Int[np.ndarray, "R"]

  @classmethod
  def empty(cls, devices: int, slots: int, columns: int) -> "SlotTable":
    """So many slots on each device, one device's after the other's."""
    rows = devices * slots
    return cls(
      np.full((rows, columns), -1, np.int32),
      np.zeros((rows,), np.int32),
      np.zeros((rows,), np.int32),
      np.repeat(np.arange(devices), slots),
      np.full((rows,), -1, np.int32),
    )

  @property
  def rows(self) -> int:
    return self.tokens.shape[0]

  @property
  def columns(self) -> int:
    return self.tokens.shape[1]

  def readable(self) -> Int[np.ndarray, "R"]:
    """How many tokens of each slot can be read: all or none."""
    return np.where(self.count + self.behind <= self.columns, self.count, 0)

  def shared(
    self, prompt: Int[np.ndarray, "T"], min_shared: int, text: int = -1
  ) -> Int[np.ndarray, "R"]:
    """How many tokens a prompt behind a text can take over from each slot; fewer than `min_shared`
    are none.
    """
    readable = np.where(self.text == text, self.readable(), 0)
    return np.minimum(common_prefix(self.tokens, prompt, min_shared), readable)

  def insert(self, row: int, prompt: Sequence[int], text: int = -1) -> None:
    """A prompt takes the slot; its last token stands in the column written last."""
    self.tokens[row], self.text[row] = -1, text
    self.tokens[row, : len(prompt)] = prompt
    self.count[row], self.behind[row] = len(prompt), 0

  def append(self, row: int, tokens: Sequence[int]) -> None:
    """The slot holds these tokens, too, behind those that it held."""
    held = self.count[row]
    self.tokens[row, held : held + len(tokens)] = tokens
    self.count[row] += len(tokens)

  def grow(self, columns: int) -> None:
    """More columns. What was overwritten stays so, although it would fit now."""
    self.count[self.count + self.behind > self.columns] = 0
    more = ((0, 0), (0, columns - self.columns))
    self.tokens = np.pad(self.tokens, more, constant_values=-1)

  def pick(self, rows: Int[np.ndarray, "r"]) -> None:
    """These slots alone, in this order."""
    self.tokens, self.count = self.tokens[rows], self.count[rows]
    self.behind, self.device = self.behind[rows], self.device[rows]
    self.text = self.text[rows]


def common_prefix(
  rows: Int[np.ndarray, "R S"], prompt: Int[np.ndarray, "T"], min_shared: int
) -> Int[np.ndarray, "R"]:
  """How many tokens each row has in common with the beginning of a prompt, at most all but the
  prompt's last: one is left to read, for the logits behind it. Fewer than `min_shared` count as 0.
  """
  limit = min(rows.shape[1], len(prompt) - 1)
  # Mostly there is none: whole rows of a few thousand slots take a host milliseconds a prompt.
  if limit < min_shared or not (rows[:, :min_shared] == prompt[:min_shared]).all(1).any():
    return np.zeros((len(rows),), int)
  same = rows[:, :limit] == prompt[:limit]
  count = np.where(same.all(1), limit, same.argmin(1))
  return np.where(count < min_shared, 0, count)
