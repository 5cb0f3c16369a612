"""The shortest way to push one box onto its target, found backwards over all (player, box) pairs of
a board as a player sees it.

The player never steps onto the target. Who takes the box for the target would push it by doing so,
and might win by it; few rooms need such a step, and those are left out.
"""

import collections
import dataclasses
import functools

from oel_jax.pocket.worlds import ACTIONS, Cell

State = tuple[Cell, Cell]  # where the player stands, where the box
_OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}


@dataclasses.dataclass(frozen=True)
class View:
  """A board as it is shown.

  Attributes:
    rows: the symbols, row by row. What the corner shows is the wall: nothing else surrounds a room.
    player: the player's symbol.
  """

  rows: tuple[str, ...]
  player: str = "P"

  @property
  def wall(self) -> str:
    return self.rows[0][0]

  def find(self, symbol: str) -> Cell | None:
    """The first cell in reading order that shows the symbol."""
    for r, row in enumerate(self.rows):
      if symbol in row:
        return r, row.index(symbol)
    return None

  @property
  def at(self) -> Cell:
    """Where the player stands. ValueError if the board does not show it."""
    if (found := self.find(self.player)) is None:
      raise ValueError(f"the board {self.rows} does not show the player {self.player!r}")
    return found

  def letters(self) -> list[str]:
    """The capital letters in reading order, each once, but the player's."""
    shown = dict.fromkeys(symbol for row in self.rows for symbol in row if symbol.isupper())
    return [letter for letter in shown if letter != self.player]

  def open(self) -> frozenset[Cell]:
    """The cells that are no wall."""
    cells = ((r, c) for r, row in enumerate(self.rows) for c in range(len(row)))
    return frozenset((r, c) for r, c in cells if self.rows[r][c] != self.wall)


def view(text: str, player: str = "P") -> View:
  """The last board that a text of the game shows.

  Raises:
    ValueError: the text shows none.
  """
  _, found, after = text.rpartition("Current Board:\n\n")
  if not found:
    raise ValueError(f"there is no board in {text!r}")
  return View(tuple(line.replace(" ", "") for line in after.split("\n\n")[0].split("\n")), player)


def step(cell: Cell, action: str) -> Cell:
  """The cell that lies in this direction."""
  return cell[0] + ACTIONS[action][0], cell[1] + ACTIONS[action][1]


@functools.lru_cache(maxsize=256)
def costs(open_cells: frozenset[Cell], target: Cell) -> dict[State, int]:
  """Moves from each (player, box) to a box on the target; pairs that cannot get there are left
  out.
  """
  # Around each cell: what lies ahead of a player who came from an open cell, and that cell.
  beside = {
    cell: [
      (step(cell, action), back)
      for action, opposite in _OPPOSITE.items()
      if (back := step(cell, opposite)) in open_cells
    ]
    for cell in open_cells
  }
  found = {(cell, target): 0 for cell in open_cells if cell != target}
  queue = collections.deque(found)
  while queue:
    state = player, box = queue.popleft()
    if player == target:
      continue  # where the player may begin, but not come to
    for ahead, back in beside[player]:
      before = [(back, box)] if back != box else []
      if ahead == box:  # which a push may have brought there
        before.append((back, player))
      for other in before:
        if other not in found:
          found[other] = found[state] + 1
          queue.append(other)
  return found


def moved(
  open_cells: frozenset[Cell], state: tuple[Cell, Cell | None], action: str
) -> tuple[Cell, Cell | None] | None:
  """What a move leads to; None if a wall stops the player or the box. The box may be None,
  unknown.
  """
  player, box = state
  ahead = step(player, action)
  pushed = step(ahead, action) if ahead == box else box
  stopped = ahead not in open_cells or pushed is not None and pushed not in open_cells
  return None if stopped else (ahead, pushed)


def plan(open_cells: frozenset[Cell], state: State, target: Cell) -> list[str] | None:
  """The shortest list of moves; of several, the one whose first differing move comes first in
  `ACTIONS`. So what is left of a plan is the plan of what is left. None if there is none.
  """
  away, result = costs(open_cells, target), []
  if state not in away:
    return None
  while away[state]:
    for action in ACTIONS:
      after = moved(open_cells, state, action)
      if after and after[0] != target and away.get(after) == away[state] - 1:
        break
    result.append(action)
    state = after
  return result
