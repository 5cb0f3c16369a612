"""TextArena's own Sokoban and Frozen Lake on chosen boards: those that their turn limit suffices
for, of which half, by a hash, come with odd seeds alone, as held-out games have them.

    config.deployment.environment = "oel_jax.pocket.boards.chosen:sokoban"
"""

import hashlib
from collections.abc import Callable

from oel_jax.environments import Step, textarena_game
from oel_jax.pocket import worlds
from oel_jax.pocket.boards import plans, rooms
from oel_jax.runtime.seeds import derive

MAX_DRAWS = 1000  # boards of which one must fit


class Chosen:
  """A TextArena game, an `environments.api.Environment`: of the boards that the seed draws one
  after another, the first that fits.

  Args:
    game, arguments: as `environments.textarena.TextArena` takes them.
    fits: is given a first observation and whether the game is a held-out one.
  """

  def __init__(self, game: str, arguments: dict, fits: Callable[[str, bool], bool]):
    self._name, self._arguments, self._fits = game, arguments, fits

  def reset(self, seed: int) -> str:
    """As an environment's. RuntimeError if none of MAX_DRAWS boards fits."""
    for attempt in range(MAX_DRAWS):
      self._game = textarena_game(self._name, self._arguments)
      observation = self._game.reset(derive(seed, "board", attempt))
      if self._fits(observation, bool(seed & 1)):
        return observation
    raise RuntimeError(
      f"{self._name}, seed {seed}: none of {MAX_DRAWS} boards of {self._arguments} fits: ask for "
      "fewer holes, or for solutions of other lengths"
    )

  def step(self, action: str) -> Step:
    return self._game.step(action)


def sokoban(min_moves: int = 2, max_moves: int = rooms.MAX_MOVES) -> Chosen:
  """Sokoban, 6 × 6 with one box, in rooms that show their target and whose shortest solution has so
  many moves.
  """

  def fits(observation: str, held: bool) -> bool:
    view = plans.view(observation)
    room = rooms.read(view)
    if view.find(room.target) is None or rooms.held_out(room) != held:
      return False
    needed = rooms.moves(room)
    return needed is not None and min_moves <= needed <= max_moves

  arguments = {"dim_room": (rooms.SIZE, rooms.SIZE), "num_boxes": 1}
  return Chosen("Sokoban-v0-raw", arguments, fits)


def lake(size: int = 4, num_holes: int = 3, max_moves: int = worlds.MAX_TURNS) -> Chosen:
  """Frozen Lake from corner to corner, on boards that can be won in so many moves."""

  def fits(observation: str, held: bool) -> bool:
    board = read_lake(observation)
    return lake_moves(board) <= max_moves and held_out(board) == held

  return Chosen("FrozenLake-v0-raw", {"size": size, "num_holes": num_holes}, fits)


def read_lake(observation: str) -> worlds.World:
  """The board of a Frozen Lake's first observation.

  Raises:
    ValueError: it shows no player or no goal.
  """
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in observation.split("\n")
    if line.startswith("|")
  ]
  cells = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)}
  starts, goals = ([cell for cell in cells if cells[cell] == symbol] for symbol in "PG")
  if len(starts) != 1 or len(goals) != 1:
    raise ValueError(f"not the first board of a Frozen Lake: {observation!r}")
  bare = tuple(tuple(" " if symbol in ("", "P") else symbol for symbol in row) for row in rows)
  return worlds.World(bare, starts[0], "G", "H", goals[0])


def lake_moves(world: worlds.World) -> int:
  """Moves of the shortest safe way; more than any board has cells if there is none."""
  away = worlds.distances(world, _cells(world, world.goal), {world.trap})
  return away.get(world.start, world.size**2)


def held_out(world: worlds.World) -> bool:
  """Whether the board is one of the half that nothing is learned from: by a hash of where start,
  goals and traps are, whatever their letters.
  """
  layout = world.size, world.start, _cells(world, world.goal), _cells(world, world.trap)
  return bool(hashlib.sha256(f"lake {layout}".encode()).digest()[0] & 1)


def _cells(world: worlds.World, symbol: str) -> list[worlds.Cell]:
  size = range(world.size)
  return [(r, c) for r in size for c in size if world.symbol((r, c)) == symbol]
