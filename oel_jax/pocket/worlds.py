"""Procedural grid worlds that look, letter for letter, as TextArena renders Frozen Lake, with the
symbols' roles drawn anew.

In each world one capital letter is the goal, one is the trap, and others may lie about that do
nothing. The layout tells nothing of the roles: three layouts in five look alike under an exchange
of the two, and of the others as many have a lone goal in the corner among traps as have a lone trap
there among goals. Whoever knows must have been told.
"""

import collections
import dataclasses
import random
import string
import sys
from collections.abc import Callable
from typing import Any

from oel_jax.environments.api import Step

LETTERS = tuple(letter for letter in string.ascii_uppercase if letter != "P")  # P is the player
ACTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SIZES = (3, 4, 5)
MAX_TURNS = 8  # enough from corner to corner of the largest board

Cell = tuple[int, int]
# As the game and the thinking name them.
PLACES = tuple(f"({r}, {c})" for r in range(max(SIZES)) for c in range(max(SIZES)))


@dataclasses.dataclass(frozen=True)
class World:
  """A board and what its symbols do.

  Attributes:
    rows: size × size symbols, " " for nothing; the player's start holds " ".
    start: row and column.
    goal, trap: the letters that win and lose.
    exit: the goal cell that progress is measured by.
  """

  rows: tuple[tuple[str, ...], ...]
  start: Cell
  goal: str
  trap: str
  exit: Cell

  @property
  def size(self) -> int:
    return len(self.rows)

  def symbol(self, cell: Cell) -> str:
    return self.rows[cell[0]][cell[1]]

  def letters(self) -> list[str]:
    """The letters on the board in reading order, each once."""
    return list(dict.fromkeys(symbol for row in self.rows for symbol in row if symbol != " "))


def neighbours(cell: Cell, size: int) -> dict[str, Cell]:
  """The cells one move away, by action; moves into the wall are left out."""
  moved = {name: (cell[0] + dr, cell[1] + dc) for name, (dr, dc) in ACTIONS.items()}
  return {name: (r, c) for name, (r, c) in moved.items() if 0 <= r < size and 0 <= c < size}


def distances(world: World, targets: list[Cell], avoid: set[str]) -> dict[Cell, int]:
  """Moves from each cell to the nearest target without stepping on the symbols to avoid (targets
  excepted).
  """
  found = {cell: 0 for cell in targets}
  queue = collections.deque(targets)
  while queue:
    cell = queue.popleft()
    for other in neighbours(cell, world.size).values():
      if other not in found and world.symbol(other) not in avoid:
        found[other] = found[cell] + 1
        queue.append(other)
  return found


def random_world(
  rng: random.Random, *, layout: str | None = None, size: int | None = None
) -> World:
  """Draws a world that can be won within `MAX_TURNS` moves.

  Args:
    rng: all that is drawn comes from here.
    layout: "symmetric" (one goal, one trap, anywhere), "corner_goal" (as Frozen Lake: the goal in
      the corner, several traps) or "corner_trap" (the reverse); drawn 3 : 1 : 1 if None.
    size: 3, 4 or 5; drawn if None.
  """
  layout = layout or rng.choices(("symmetric", "corner_goal", "corner_trap"), (3, 1, 1))[0]
  while True:
    world = _draw(rng, layout, size or rng.choice(SIZES))
    goals = [
      (r, c)
      for r in range(world.size)
      for c in range(world.size)
      if world.symbol((r, c)) == world.goal
    ]
    if distances(world, goals, {world.trap}).get(world.start, MAX_TURNS + 1) <= MAX_TURNS:
      return world


def _draw(rng: random.Random, layout: str, size: int) -> World:
  goal, trap, *decoys = rng.sample(LETTERS, 4)
  start, corner = (0, 0), (size - 1, size - 1)
  if rng.random() < 0.3:
    start = rng.choice([(0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1)])
    corner = (size - 1 - start[0], size - 1 - start[1])
  cells = [(r, c) for r in range(size) for c in range(size) if (r, c) != start]
  board: dict[Cell, str] = {}
  if layout == "symmetric":
    several = 1 + (rng.random() < 0.2)
    for symbol in (goal, trap):
      for cell in rng.sample([cell for cell in cells if cell not in board], several):
        board[cell] = symbol
  else:
    single, many = (goal, trap) if layout == "corner_goal" else (trap, goal)
    board[corner] = single
    for cell in rng.sample([cell for cell in cells if cell != corner], rng.randint(1, size - 1)):
      board[cell] = many
  for decoy in decoys[: rng.choices((0, 1, 2), (3, 2, 1))[0]]:
    free = [cell for cell in cells if cell not in board]
    for cell in rng.sample(free, min(len(free), rng.choice((1, 1, 2)))):
      board[cell] = decoy
  rows = tuple(tuple(board.get((r, c), " ") for c in range(size)) for r in range(size))
  exit_cell = next(cell for cell in cells if board.get(cell) == goal)
  return World(rows, start, goal, trap, exit_cell)


def render(world: World, player: Cell) -> str:
  """The board as Frozen Lake draws it: cells five wide, "P/X" where the player stands on the goal
  X.
  """
  line = "+" + "+".join(["-----"] * world.size) + "+"
  lines = [line]
  for r, row in enumerate(world.rows):
    shown = list(row)
    if r == player[0]:
      shown[player[1]] = f"P/{world.goal}" if world.symbol(player) == world.goal else "P"
    lines += ["|" + "|".join(f" {symbol:^3} " for symbol in shown) + "|", line]
  return "\n".join(lines)


class Worlds:
  """Worlds as an `environments.api.Environment`: the one that `draw` makes of the seed. `game`
  makes a game of what is drawn, as `WorldGame` does, which is the default.
  """

  def __init__(self, draw: Callable[[int], Any], game: Callable[..., Any] | None = None):
    self._draw, self._make = draw, game or WorldGame

  def reset(self, seed: int) -> str:
    self._game = self._make(self._draw(seed), max_turns=sys.maxsize)  # the limit is the spec's
    return self._game.observation

  def step(self, action: str) -> Step:
    return self._game.play(f"[{action}]")


def stopped(step: Step, turns: int) -> Step:
  """The last step of a game as `environments.api.Game` tells it: itself if the game ended by its
  own word, else the end that the limit of turns makes.
  """
  if step.done:
    return step
  outcome = f"{step.observation}\nThe game was stopped after {turns} turns."
  return Step(step.observation, True, 0.0, outcome, "turn_limit")


class WorldGame:
  """One game in a world, with the same face and the same words as `environments.api.Game` of
  Frozen Lake.
  """

  def __init__(self, world: World, max_turns: int = MAX_TURNS):
    self.world, self.player = world, world.start
    self._max_turns, self._turns, self._errors, self._done = max_turns, 0, 0, False
    self.observation = self._board()

  def play(self, answer_action: str) -> Step:
    """`answer_action` is "[up]", "[down]", "[left]" or "[right]"; anything else is an invalid move.
    RuntimeError after the end.
    """
    if self._done:
      raise RuntimeError("the game is over, there is no move left to make")
    step = self._move(
      answer_action[1:-1] if answer_action.startswith("[") and answer_action.endswith("]") else ""
    )
    self._turns += 1
    self._done = step.done or self._turns == self._max_turns
    return stopped(step, self._turns) if self._done else step

  def _move(self, name: str) -> Step:
    if name not in ACTIONS:
      return self._invalid(
        "Invalid action format. Use [up], [down], [left], [right] or [w], [a], [s], [d]."
      )
    target = neighbours(self.player, self.world.size).get(name)
    if target is None:
      return self._invalid(f"You tried to move {name} but hit a wall!")
    self.player, self._errors = target, 0
    text = f"You moved {name} to position ({target[0]}, {target[1]}).\n{self._board()}"
    symbol = self.world.symbol(target)
    if symbol == self.world.goal:
      return Step(text, True, 1.0, f"{text}\nCongratulations! You reached the goal!", "passed")
    if symbol == self.world.trap:
      share = round(self._progress() * 100)
      words = f"You fell into a hole! Game over. You completed {share}% of the journey to the goal."
      return Step(text, True, self._progress(), f"{text}\n{words}", "lost")
    return Step(text, False)

  def _board(self) -> str:
    return (
      f"Current Board:\n\n{render(self.world, self.player)}\n\n"
      "Available Actions: [up], [down], [left], [right], [w], [a], [s], [d]"
    )

  def _invalid(self, reason: str) -> Step:
    self._errors += 1
    if self._errors > 1:
      return Step(
        self._board(), True, self._progress(), f"{self._board()}\nInvalid Move: {reason}", "invalid"
      )
    words = "Please resubmit a valid move and remember to follow the game rules to avoid penalties."
    return Step(f"You attempted an invalid move. Reason: {reason} {words}\n{self._board()}", False)

  def _progress(self) -> float:
    (r, c), (r0, c0), (r1, c1) = self.player, self.world.start, self.world.exit
    if self.player == self.world.start:
      return 0.0
    return max(min((abs(r - r0) + abs(c - c0)) / (abs(r1 - r0) + abs(c1 - c0)), 0.95), 0.1)
