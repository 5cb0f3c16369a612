"""The embedded policy's worlds: word for word the real Frozen Lake, and boards that tell nothing of
what their symbols do.
"""

import collections
import functools
import itertools
import random
import string

import pytest

from oel_jax.environments import Game, GameSpec, textarena_game
from oel_jax.pocket import worlds
from oel_jax.pocket.worlds import MAX_TURNS, World, WorldGame, random_world

MOVES = ("[up]", "[down]", "[left]", "[right]")
STEP = {"[up]": (-1, 0), "[down]": (1, 0), "[left]": (0, -1), "[right]": (0, 1)}


def lake(seed: int, max_turns: int, **args):
  """A real game and the same board as a World whose goal is G and whose trap is H."""
  make = functools.partial(textarena_game, "FrozenLake-v0-raw", args)
  spec = GameSpec("FrozenLake-v0-raw", make, "P", max_turns=max_turns)
  game = Game(spec, seed)
  state = game._environment._env.state.game_state  # the only place where the board is not text
  rows = tuple(tuple(row) for row in state["grid"])
  return game, World(rows, tuple(state["player_pos"]), "G", "H", tuple(state["goal_pos"]))


def play_both(game, twin: WorldGame, moves) -> str:
  assert twin.observation == game.observation
  for move in moves:
    real, ours = game.play(move), twin.play(move)
    assert ours == real
    if real.done:
      return real.ended
  return ""


def test_random_play_is_word_for_word_the_real_game():
  """Observations, outcomes, rewards and ends of 600 games; every way to end is among them."""
  ends = collections.Counter()
  for seed in range(600):
    rng = random.Random(f"moves {seed}")
    size = 3 + seed % 3
    args = {"size": size, "num_holes": rng.randint(1, size), "randomize_start_goal": seed % 2 == 1}
    limit = rng.choice((1, 2, 5, 8, 60))
    game, world = lake(seed, limit, **args)
    clumsy = rng.choice((0.0, 0.1, 0.4))
    moves = (
      rng.choice(("", "dance", "[north]")) if rng.random() < clumsy else rng.choice(MOVES)
      for _ in itertools.count()
    )
    ended = play_both(game, WorldGame(world, max_turns=limit), moves)
    ends[ended] += 1
  assert set(ends) == {"passed", "lost", "invalid", "turn_limit"}, ends


def _toward(world: World, cell, symbol: str) -> list[str]:
  """Moves along a shortest path to the nearest such symbol, by breadth-first search; the goal is
  not crossed on the way to a hole.
  """
  queue, seen = collections.deque([(cell, [])]), {cell}
  while queue:
    (r, c), path = queue.popleft()
    for move, (dr, dc) in STEP.items():
      other = (r + dr, c + dc)
      if other in seen or not (0 <= other[0] < world.size and 0 <= other[1] < world.size):
        continue
      seen.add(other)
      if world.symbol(other) == symbol:
        return [*path, move]
      if world.symbol(other) == " ":
        queue.append((other, [*path, move]))
  return []


def test_wins_falls_and_single_bumps_are_word_for_word_the_real_game():
  ends = collections.Counter()
  for seed in range(150):
    args = {"size": 3 + seed % 3, "num_holes": 2, "randomize_start_goal": seed % 2 == 1}
    for symbol, bumps in (("G", 0), ("H", 0), ("G", 1), ("H", 1), ("G", 2)):
      game, world = lake(seed, 100, **args)
      path = _toward(world, world.start, symbol)
      if not path:
        continue
      bump = "[up]" if world.start[0] == 0 else "[down]"  # forgiven once, if a good move follows
      ends[bumps, play_both(game, WorldGame(world, max_turns=100), [bump] * bumps + path)] += 1
  assert set(ends) == {(0, "passed"), (0, "lost"), (1, "passed"), (1, "lost"), (2, "invalid")}


def test_a_bump_is_forgiven_again_after_a_good_move():
  game, world = lake(1, 100, size=4, num_holes=1)
  free = "[right]" if world.symbol((0, 1)) == " " else "[down]"
  back = {"[right]": "[left]", "[down]": "[up]"}[free]
  assert play_both(game, WorldGame(world, max_turns=100), ["[up]", free, back] * 4) == ""


def test_the_last_turn_may_still_win():
  game, world = lake(4, 4, size=3, num_holes=1)
  path = _toward(world, world.start, "G")
  assert len(path) == 4 and play_both(game, WorldGame(world, max_turns=4), path) == "passed"


def test_only_the_four_actions_in_brackets_are_moves():
  """TextArena takes "up" for no move; so must the twin, or the policy would be taught a form that
  loses.
  """
  for action in ("up", "[up", "up]", "[[up]]", "[w]"):
    assert (
      "Invalid action format" in WorldGame(random_world(random.Random(0))).play(action).observation
    )


def test_a_finished_game_takes_no_more_moves():
  world = World(((" ", "A"), ("B", " ")), (0, 0), "A", "B", (0, 1))
  game = WorldGame(world)
  assert game.play("[right]").ended == "passed"
  with pytest.raises(RuntimeError, match="over"):
    game.play("[left]")


def test_reward_of_a_fall_is_the_share_of_the_way():
  world = World(
    ((" ", "A", " ", "Z"), (" ",) * 4, (" ",) * 4, (" ", " ", "A", "G")), (0, 0), "G", "A", (3, 3)
  )
  step = WorldGame(world).play("[right]")
  assert (step.ended, step.reward) == ("lost", 1 / 6) and "completed 17% of" in step.outcome
  game = WorldGame(world)
  for move in ("[down]",) * 3 + ("[right]",):
    game.play(move)
  assert game.play("[right]").reward == pytest.approx(5 / 6)


# How worlds are drawn


def shortest(world: World) -> int | None:
  """Moves to the nearest goal cell without a trap, by a search that knows nothing of the module's
  own.
  """
  queue, seen = collections.deque([(world.start, 0)]), {world.start}
  while queue:
    (r, c), moves = queue.popleft()
    if world.rows[r][c] == world.goal:
      return moves
    for dr, dc in STEP.values():
      other = (r + dr, c + dc)
      inside = 0 <= other[0] < len(world.rows) and 0 <= other[1] < len(world.rows)
      if inside and other not in seen and world.rows[other[0]][other[1]] != world.trap:
        seen.add(other)
        queue.append((other, moves + 1))
  return None


def drawn(count: int, **options) -> list[World]:
  rng = random.Random(str(options))
  return [random_world(rng, **options) for _ in range(count)]


def count_of(world: World, letter: str) -> int:
  return sum(row.count(letter) for row in world.rows)


def layout_of(world: World) -> str:
  goals, traps = count_of(world, world.goal), count_of(world, world.trap)
  return "symmetric" if goals == traps else "corner_goal" if goals < traps else "corner_trap"


def test_every_world_is_well_formed_and_can_be_won_in_time():
  for world in drawn(3000):
    assert world.size in (3, 4, 5) and all(len(row) == world.size for row in world.rows)
    assert (
      world.symbol(world.start) == " "
      and world.start[0] in (0, world.size - 1)
      and world.start[1] in (0, world.size - 1)
    )
    assert (
      {world.goal, world.trap} <= set(world.letters())
      and world.goal != world.trap
      and world.symbol(world.exit) == world.goal
    )
    assert (
      "P" not in world.letters()
      and set(world.letters()) <= set(string.ascii_uppercase)
      and 2 <= len(world.letters()) <= 4
    )
    moves = shortest(world)
    assert moves is not None and 1 <= moves <= MAX_TURNS


def test_size_and_layout_are_as_asked():
  for size in (3, 4, 5):
    assert {world.size for world in drawn(50, size=size)} == {size}
  for world in drawn(300, layout="symmetric"):
    assert count_of(world, world.goal) == count_of(world, world.trap) in (1, 2)
  for layout, single, many in (("corner_goal", "goal", "trap"), ("corner_trap", "trap", "goal")):
    for world in drawn(300, layout=layout):
      corner = tuple(world.size - 1 - x for x in world.start)
      assert (
        world.symbol(corner) == getattr(world, single)
        and count_of(world, getattr(world, single)) == 1
      )
      assert 1 <= count_of(world, getattr(world, many)) < world.size


def chi_square(counts, expected) -> float:
  return sum((count - expected) ** 2 / expected for count in counts)


def test_letters_and_their_roles_are_uniform():
  """25 letters, 24 degrees of freedom: the 99.99th percentile of chi-square is 61."""
  all_worlds = drawn(10_000)
  goals, traps = (
    collections.Counter(getattr(world, role) for world in all_worlds) for role in ("goal", "trap")
  )
  for counts in (goals, traps):
    assert len(counts) == 25 and chi_square(counts.values(), 400) < 61
  present = collections.Counter(letter for world in all_worlds for letter in world.letters())
  # Not quite independent, but tighter for it.
  assert chi_square(present.values(), sum(present.values()) / 25) < 61


def test_layouts_are_three_to_one_to_one():
  """The two corner layouts must come as often as each other: a lone symbol in the corner is as
  often the goal as it is the trap.
  """
  count = 30_000
  rng = random.Random(5)
  lone = collections.Counter()
  for _ in range(count):
    world = random_world(rng)
    corner = tuple(world.size - 1 - x for x in world.start)
    if layout_of(world) != "symmetric":
      assert world.symbol(corner) == (
        world.goal if layout_of(world) == "corner_goal" else world.trap
      )
    lone[layout_of(world)] += 1
  asymmetric = lone["corner_goal"] + lone["corner_trap"]
  assert abs(lone["corner_goal"] - lone["corner_trap"]) < 3 * asymmetric**0.5, lone


def test_what_the_board_shows_does_not_tell_goal_from_trap():
  """Guesses from what a board shows (count, corner, nearness, order) are right half the time, to 3
  standard errors.
  """
  rules = {
    "fewer": lambda world, x, y: count_of(world, x) - count_of(world, y),
    "in the corner": lambda world, x, y: (corner_of(world) == y) - (corner_of(world) == x),
    "nearer": lambda world, x, y: nearness(world, x) - nearness(world, y),
    "first": lambda world, x, y: world.letters().index(x) - world.letters().index(y),
    "alphabet": lambda world, x, y: ord(x) - ord(y),
    "beside the start": lambda world, x, y: (nearness(world, x) == 1) - (nearness(world, y) == 1),
  }
  corner_of = lambda world: world.symbol(tuple(world.size - 1 - x for x in world.start))
  cells = lambda world, x: [
    (r, c) for r, row in enumerate(world.rows) for c, symbol in enumerate(row) if symbol == x
  ]
  nearness = lambda world, x: min(
    abs(r - world.start[0]) + abs(c - world.start[1]) for r, c in cells(world, x)
  )
  tally = {name: [0, 0] for name in rules}
  for world in drawn(20_000):
    for name, rule in rules.items():
      sign = rule(world, world.goal, world.trap)
      if sign:
        tally[name][sign < 0] += 1
  wrong = {
    name: (a, b)
    for name, (a, b) in tally.items()
    if abs(a - b) > 3 * (a + b) ** 0.5 or a + b < 1000
  }
  assert not wrong, wrong


def test_the_same_seed_gives_the_same_world():
  assert (
    random_world(random.Random(3))
    == random_world(random.Random(3))
    != random_world(random.Random(4))
  )


def test_neighbours_and_distances_on_a_hand_made_board():
  world = World((("B", " ", "A"), ("B", "B", " "), (" ", " ", " ")), (2, 0), "A", "B", (0, 2))
  assert worlds.neighbours((0, 0), 3) == {"down": (1, 0), "right": (0, 1)}
  assert worlds.neighbours((1, 1), 3) == {
    "up": (0, 1),
    "down": (2, 1),
    "left": (1, 0),
    "right": (1, 2),
  }
  assert worlds.distances(world, [(0, 2)], {"B"}) == {
    (0, 2): 0,
    (0, 1): 1,
    (1, 2): 1,
    (2, 2): 2,
    (2, 1): 3,
    (2, 0): 4,
  }
  # A target may be one of those to avoid.
  assert worlds.distances(world, [(0, 0)], {"B"})[(0, 1)] == 1
