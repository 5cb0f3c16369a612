"""Procedural push worlds that look, letter for letter, as TextArena renders Sokoban, with the
symbols' roles drawn anew.

In each room one capital letter is the box and one the target; others may lie about that do nothing.
The marks of wall, floor and a box in its place are drawn, too, and so is the player's own letter,
which alone the prompt tells. Three rooms in five can be won with box and target exchanged as well:
there the layout tells nothing of the roles.
"""

import dataclasses
import hashlib
import random
import string

from oel_jax.environments.api import Step
from oel_jax.pocket import worlds
from oel_jax.pocket.boards import plans
from oel_jax.pocket.worlds import ACTIONS, Cell

SIZE = 6
MARKS = ("#", "_", "√", "%", "=", "+")  # the game's own three come first
LETTERS = tuple(string.ascii_uppercase)
MAX_MOVES = 8  # of a solution
MAX_TURNS = 10
_INNER = [(r, c) for r in range(1, SIZE - 1) for c in range(1, SIZE - 1)]


@dataclasses.dataclass(frozen=True)
class Room:
  """A room and what its symbols do.

  Attributes:
    rows: SIZE × SIZE symbols without player and box.
    start, box_at: where the player and the box begin.
    box, target: letters.
    player: the player's symbol.
    wall, floor, done: marks; `done` is the box on its target.
  """

  rows: tuple[str, ...]
  start: Cell
  box_at: Cell
  box: str
  target: str
  player: str = "P"
  wall: str = "#"
  floor: str = "_"
  done: str = "√"

  @property
  def open(self) -> frozenset[Cell]:
    return plans.View(self.rows).open()

  @property
  def target_at(self) -> Cell:
    return plans.View(self.rows).find(self.target)

  def letters(self) -> list[str]:
    """The letters whose role is to be found out: box, target and those that do nothing."""
    return sorted({self.box, *plans.View(self.rows, self.player).letters()})


def render(room: Room, player: Cell, box: Cell) -> str:
  """The board as Sokoban draws it: the player hides what is below."""
  lines = []
  for r, row in enumerate(room.rows):
    shown = list(row)
    if r == box[0]:
      shown[box[1]] = room.done if box == room.target_at else room.box
    if r == player[0]:
      shown[player[1]] = room.player
    lines.append(" ".join(shown) + "\n")
  return "".join(lines)


def read(view: plans.View) -> Room:
  """The room of TextArena's first board. A target that is not shown lies under the player.

  Raises:
    ValueError: the board shows no box.
  """
  if (box_at := view.find("X")) is None:
    raise ValueError(f"the board {view.rows} shows no box X")
  under = {box_at: "_", view.at: "_" if view.find("O") else "O"}
  rows = tuple(
    "".join(under.get((r, c), symbol) for c, symbol in enumerate(row))
    for r, row in enumerate(view.rows)
  )
  return Room(rows, view.at, box_at, "X", "O", view.player, view.wall)


def moves(room: Room) -> int | None:
  """The length of the shortest solution (`plans.plan`); None if there is none."""
  found = plans.plan(room.open, (room.start, room.box_at), room.target_at)
  return None if found is None else len(found)


def held_out(room: Room) -> bool:
  """Whether the room is one of the half that nothing is learned from: by a hash of where walls and
  target are, so that all starts in one room fall on one side.
  """
  return _held_out(room.open, room.target_at)


def _held_out(open_cells: frozenset[Cell], target: Cell) -> bool:
  return bool(hashlib.sha256(f"room {sorted(open_cells)} {target}".encode()).digest()[0] & 1)


def random_room(
  rng: random.Random,
  *,
  symmetric: bool | None = None,
  held: bool = False,
  player: str | None = None,
) -> Room:
  """Draws a room that can be won within `MAX_MOVES` moves.

  Args:
    rng: all that is drawn comes from here.
    symmetric: whether it must be one that can be won with box and target exchanged, too; then the
      two are exchanged in every other room. None: in three of five.
    held: whether the room is one that is held out.
    player: its symbol; drawn if None.
  """
  required = rng.random() < 0.6 if symmetric is None else symmetric
  while True:
    cells = _grown(rng, rng.randint(6, len(_INNER)))
    open_cells = frozenset(cells)
    ours = [cell for cell in cells if _held_out(open_cells, cell) == held]
    for target in ours:
      starts = _starts(open_cells, target)
      if required:
        starts = _either_way(rng, open_cells, target, [pair for pair in starts if pair[1] in ours])
      if starts:
        start, box = rng.choice(starts)
        if required and rng.random() < 0.5:
          target, box = box, target
        return _furnished(rng, cells, start, box, target, player)


def _starts(open_cells: frozenset[Cell], target: Cell) -> list[plans.State]:
  """Where player and box may begin, in one order whatever the hashes: not on the target, which
  nobody would see then.
  """
  found = plans.costs(open_cells, target)
  return sorted(
    state for state, cost in found.items() if 1 <= cost <= MAX_MOVES and state[0] != target
  )


def _either_way(
  rng: random.Random, open_cells: frozenset[Cell], target: Cell, starts: list[plans.State]
) -> list[plans.State]:
  """Of the starts with one of the boxes, those that remain when it is exchanged with the target."""
  if not starts:
    return []
  box = rng.choice(starts)[1]
  back = set(_starts(open_cells, box))
  return [pair for pair in starts if pair[1] == box and (pair[0], target) in back]


def _furnished(
  rng: random.Random,
  cells: list[Cell],
  start: Cell,
  box_at: Cell,
  target_at: Cell,
  player: str | None,
) -> Room:
  """The room with its symbols drawn, and up to two letters that do nothing."""
  player = player or ("P" if rng.random() < 0.5 else rng.choice(LETTERS))
  box, target, *decoys = rng.sample([letter for letter in LETTERS if letter != player], 4)
  wall, floor, done = MARKS[:3] if rng.random() < 0.5 else rng.sample(MARKS, 3)
  board = dict.fromkeys(cells, floor) | {target_at: target}
  rest = [cell for cell in cells if cell not in (start, box_at, target_at)]
  decoys = decoys[: min(len(rest), rng.choices((0, 1, 2), (3, 2, 1))[0])]
  board |= zip(rng.sample(rest, len(decoys)), decoys, strict=True)
  rows = tuple("".join(board.get((r, c), wall) for c in range(SIZE)) for r in range(SIZE))
  return Room(rows, start, box_at, box, target, player, wall, floor, done)


def _grown(rng: random.Random, count: int) -> list[Cell]:
  """A connected floor of so many cells: from one cell on, a random one beside it at a time."""
  cells, edge = [], [rng.choice(_INNER)]
  while len(cells) < count:
    cell = edge.pop(rng.randrange(len(edge)))
    if cell not in cells:
      cells.append(cell)
      edge += _BESIDE[cell]
  return cells


_BESIDE = {
  cell: [other for name in ACTIONS if (other := plans.step(cell, name)) in _INNER]
  for cell in _INNER
}


class RoomGame:
  """One game in a room, with the same face and the same words as `environments.api.Game` of
  Sokoban.
  """

  def __init__(self, room: Room, max_turns: int = MAX_TURNS):
    self.room, self.player, self.box = room, room.start, room.box_at
    self._max_turns, self._turns, self._errors, self._done = max_turns, 0, 0, False
    self.observation = self._board()

  def play(self, answer_action: str) -> Step:
    """`answer_action` is "[up]", "[down]", "[left]" or "[right]"; anything else is an invalid move.
    RuntimeError after the end.
    """
    if self._done:
      raise RuntimeError("the game is over, there is no move left to make")
    taken = self._move(answer_action[1:-1] if answer_action in _BRACKETED else "")
    self._turns += 1
    self._done = taken.done or self._turns == self._max_turns
    return worlds.stopped(taken, self._turns) if self._done else taken

  def _move(self, name: str) -> Step:
    if not name:
      return self._invalid(
        "The submitted move does not follow the correct format. "
        "Use [up], [down], [left], [right] or [w], [a], [s], [d]."
      )
    after = plans.moved(self.room.open, (self.player, self.box), name)
    if after is None:
      return self._invalid("You cannot move into a wall!")
    pushed = "pushed a box while" if after[1] != self.box else ""
    (self.player, self.box), self._errors = after, 0
    text = f"You {pushed} moved [{name}].\n{self._board()}"
    if self.box != self.room.target_at:
      return Step(text)
    solved = f"{text}\nCongratulations! You have solved the Sokoban puzzle!"
    return Step(text, True, 1.0, solved, "passed")

  def _board(self) -> str:
    board = render(self.room, self.player, self.box)
    return f"Current Board:\n\n{board}\nAvailable Moves: {', '.join(ACTIONS)}"

  def _invalid(self, reason: str) -> Step:
    self._errors += 1
    if self._errors > 1:
      return Step("", True, 0.0, f"Invalid Move: {reason}", "invalid")
    words = "Please resubmit a valid move and remember to follow the game rules to avoid penalties."
    return Step(f"You attempted an invalid move. Reason: {reason} {words}")


_BRACKETED = {f"[{name}]" for name in ACTIONS}
