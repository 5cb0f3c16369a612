"""Push worlds: word for word the real Sokoban, plans that a search of another kind confirms, and
rooms of which the symmetric ones tell nothing of what their symbols do.
"""

import collections
import functools
import itertools
import random

import pytest

from oel_jax.environments import Game, GameSpec, textarena_game
from oel_jax.pocket.boards import plans, player, rooms
from oel_jax.pocket.boards.rooms import Room, RoomGame, random_room

STEP = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
MOVES = [f"[{name}]" for name in STEP]


def sokoban(seed: int, max_turns: int):
  """A real game and the same room as a Room of TextArena's symbols."""
  make = functools.partial(
    textarena_game, "Sokoban-v0-raw", {"dim_room": (6, 6), "num_boxes": 1, "max_turns": 100}
  )
  game = Game(GameSpec("Sokoban-v0-raw", make, "P", max_turns=max_turns), seed)
  return game, rooms.read(plans.view(game.observation))


def play_both(game, twin: RoomGame, moves) -> str:
  assert twin.observation == game.observation
  for move in moves:
    real, ours = game.play(move), twin.play(move)
    assert ours == real
    if real.done:
      return real.ended
  return ""


def test_random_play_is_word_for_word_the_real_game():
  """Observations, outcomes, rewards and ends of 70 games; every way to end is among them."""
  ends = collections.Counter()
  for seed in range(70):
    rng = random.Random(f"moves {seed}")
    limit = rng.choice((1, 2, 5, 10, 60))
    game, room = sokoban(seed, limit)
    clumsy = rng.choice((0.0, 0.1, 0.4))
    moves = (
      rng.choice(("", "dance", "[north]")) if rng.random() < clumsy else rng.choice(MOVES)
      for _ in itertools.count()
    )
    ends[play_both(game, RoomGame(room, max_turns=limit), moves)] += 1
  assert set(ends) == {"passed", "invalid", "turn_limit"}, ends


def test_solutions_and_bumps_are_word_for_word_the_real_game():
  ends = collections.Counter()
  for seed in range(60):
    for bumps in (0, 1, 2):
      game, room = sokoban(seed, 100)
      found = plans.plan(room.open, (room.start, room.box_at), room.target_at)
      if found is None:  # a room that needs a step onto the target
        continue
      wall = next((m for m in MOVES if plans.step(room.start, m[1:-1]) not in room.open), None)
      if bumps and wall is None:
        continue
      moves = [wall] * bumps + [f"[{name}]" for name in found]
      ends[bumps, play_both(game, RoomGame(room, max_turns=100), moves)] += 1
  assert set(ends) == {(0, "passed"), (1, "passed"), (2, "invalid")}, ends


def test_a_finished_game_takes_no_more_moves():
  room = Room(
    ("######", "#__A_#", "######", "######", "######", "######"), (1, 1), (1, 2), "B", "A"
  )
  game = RoomGame(room)
  assert game.play("[right]").ended == "passed"
  with pytest.raises(RuntimeError, match="over"):
    game.play("[left]")


def test_the_box_in_its_place_and_the_player_on_the_target_are_shown_as_the_game_shows_them():
  room = Room(
    ("######", "#P_A_#", "#____#", "######", "######", "######"), (1, 1), (1, 2), "B", "A"
  )
  assert rooms.render(room, (1, 1), (1, 2)).split("\n")[1] == "# P B A _ #"
  assert (
    rooms.render(room, (1, 2), (1, 3)).split("\n")[1] == "# P P √ _ #"
  )  # its "P" is the floor's
  assert rooms.render(room, (1, 3), (2, 3)).split("\n")[1] == "# P _ P _ #"


# Plans


def forward(room_open, state, target) -> int | None:
  """Moves of the shortest solution without a step onto the target, by relaxing every pair until
  nothing changes: slow, and nothing of the module's.
  """
  best, changed = {state: 0}, True
  while changed:
    changed = False
    for (at, box), count in list(best.items()):
      if box == target:
        continue
      for dr, dc in STEP.values():
        ahead, beyond = (at[0] + dr, at[1] + dc), (at[0] + 2 * dr, at[1] + 2 * dc)
        after = beyond if ahead == box else box
        if ahead not in room_open or after not in room_open or ahead == target:
          continue
        if count + 1 < best.get((ahead, after), 99):
          best[ahead, after], changed = count + 1, True
  return min((count for (_, box), count in best.items() if box == target), default=None)


def drawn(count: int, **options) -> list[Room]:
  rng = random.Random(str(options))
  return [random_room(rng, **options) for _ in range(count)]


def test_plans_are_the_shortest_by_a_search_forward():
  rng = random.Random(1)
  for room in drawn(40):
    for _ in range(5):
      at, box, target = rng.sample(sorted(room.open), 3)
      found = plans.plan(room.open, (at, box), target)
      assert (None if found is None else len(found)) == forward(room.open, (at, box), target)
      state = at, box
      for place, action in enumerate(found or ()):
        assert plans.plan(room.open, state, target) == found[place:]
        state = plans.moved(room.open, state, action)
        assert state[0] != target
      assert found is None or state[1] == target


def test_a_view_reads_the_last_board_and_refuses_a_text_without_one():
  game = RoomGame(drawn(1)[0])
  text = f"{game.observation}\n{game.play(MOVES[0]).observation}"
  symbol = game.room.player
  assert plans.view(text, symbol).at == game.player
  with pytest.raises(ValueError, match="there is no board in 'You"):
    plans.view("You attempted an invalid move.")
  with pytest.raises(ValueError, match="does not show the player 'k'"):
    plans.view(text, "k").at


# How rooms are drawn


def test_every_room_is_well_formed_and_can_be_won_in_time():
  for room in drawn(400):
    assert len(room.rows) == 6 and all(len(row) == 6 for row in room.rows)
    edge = room.rows[0] + room.rows[5] + "".join(row[0] + row[5] for row in room.rows)
    assert set(edge) == {room.wall}
    symbols = [room.box, room.target, room.player, room.wall, room.floor, room.done]
    assert len(set(symbols)) == 6 and "".join(room.rows).count(room.target) == 1
    assert room.box not in "".join(room.rows) and room.box_at not in (room.start, room.target_at)
    assert not rooms.held_out(room)
    assert 1 <= forward(room.open, (room.start, room.box_at), room.target_at) <= rooms.MAX_MOVES
  assert all(map(rooms.held_out, drawn(50, held=True)))


def test_symmetric_rooms_can_be_won_with_box_and_target_exchanged():
  for room in drawn(80, symmetric=True):
    assert forward(room.open, (room.start, room.target_at), room.box_at) <= rooms.MAX_MOVES


def test_what_a_symmetric_room_shows_does_not_tell_the_box_from_the_target():
  """Guesses from what a room shows are right half the time, to 3.5 standard errors."""
  near = lambda room, cell: abs(cell[0] - room.start[0]) + abs(cell[1] - room.start[1])
  free = lambda room, cell: sum(plans.step(cell, name) in room.open for name in STEP)
  rules = {
    "nearer": lambda room: near(room, room.box_at) - near(room, room.target_at),
    "freer": lambda room: free(room, room.box_at) - free(room, room.target_at),
    "first": lambda room: 1 if room.box_at > room.target_at else -1,
    "alphabet": lambda room: ord(room.box) - ord(room.target),
  }
  tally = {name: [0, 0] for name in rules}
  for room in drawn(1000, symmetric=True):
    for name, rule in rules.items():
      if sign := rule(room):
        tally[name][sign < 0] += 1
  wrong = {
    name: (a, b)
    for name, (a, b) in tally.items()
    if abs(a - b) > 3.5 * (a + b) ** 0.5 or a + b < 100
  }
  assert not wrong, wrong


def test_most_rooms_have_the_games_own_marks_and_player_and_any_letter_any_role():
  some = drawn(800)
  own = sum((room.wall, room.floor, room.done) == rooms.MARKS[:3] for room in some)
  assert 340 < own < 480 and 340 < sum(room.player == "P" for room in some) < 480
  for role in ("box", "target", "player"):
    assert {getattr(room, role) for room in some} == set(rooms.LETTERS)


def test_the_same_seed_gives_the_same_room():
  first = random_room(random.Random(3))
  assert first == random_room(random.Random(3)) != random_room(random.Random(4))


# The taught player


def played(room: Room, target: str, box: str, seed: int = 0, guess: float = 0.0) -> str:
  game, rng, text = RoomGame(room), random.Random(seed), ""
  text = game.observation
  while True:
    _, action = player.respond(rng, plans.view(text, room.player), target, box, guess=guess)
    found = game.play(f"[{action}]")
    if found.done:
      return found.ended
    text = found.observation if "Board" in found.observation else text


def test_whoever_knows_wins_every_room_and_whoever_has_it_backwards_hardly_any():
  some = drawn(150) + drawn(150, symmetric=True)
  assert {played(room, room.target, room.box) for room in some} == {"passed"}
  won = sum(played(room, room.box, room.target) == "passed" for room in some)
  assert won <= 0.02 * len(some), won


def test_a_thought_by_hand():
  rows = ("######", "#O___#", "#_X__#", "#__P_#", "######", "######")
  thought, action = player.respond(random.Random(0), plans.View(rows), "O", "X", guess=0.0)
  assert action == "up" and thought == (
    "Goal: O at (1, 1). Box: X at (2, 2). I am at (3, 3). "
    "X goes (2, 1) (1, 1). I go (2, 3). Next: up."
  )
  thought, _ = player.respond(random.Random(0), plans.View(rows), "", "", {"O"}, guess=0.0)
  assert thought.startswith(
    "Goal: unknown. Box: unknown. Nobody told me what X does. It may be what to push, or it may be "
    "where to push it, or it may do nothing. I am at (3, 3). Not down. Next: "
  )
  hidden = ("######", "#____#", "#XP__#", "######", "######", "######")
  thought, action = player.respond(random.Random(0), plans.View(hidden), "O", "X", guess=0.0)
  assert thought.startswith("Goal: O at (2, 2). Box: X at (2, 1). I am at (2, 2).")
