"""TextArena's own games on chosen boards: whoever knows wins them all within the turn limit,
whoever has it backwards none, and no board of an even seed comes with an odd one.
"""

import random

import pytest

from oel_jax.environments import Game, GameSpec
from oel_jax.pocket import corpus, worlds
from oel_jax.pocket.boards import chosen, plans, player, rooms

GUESS = 0.3


def spec(name: str) -> GameSpec:
  make, limit = {
    "sokoban": (chosen.sokoban, rooms.MAX_TURNS),
    "lake4": (lambda: chosen.lake(4, 3), worlds.MAX_TURNS),
    "lake5": (lambda: chosen.lake(5, 4), worlds.MAX_TURNS),
  }[name]
  return GameSpec(name, make, "P", max_turns=limit)


def won_sokoban(game: Game, told, rng: random.Random) -> bool:
  text = game.observation
  while True:
    _, action = player.respond(rng, plans.view(text), *told, guess=GUESS)
    found = game.play(f"[{action}]")
    if found.done:
      return found.ended == "passed"
    text = found.observation if "Board" in found.observation else text


def won_lake(game: Game, told, rng: random.Random) -> bool:
  world = chosen.read_lake(game.observation)
  at = world.start
  while True:
    _, action = corpus.respond(rng, world, at, *told)
    found = game.play(f"[{action}]")
    if found.done:
      return found.ended == "passed"
    at = worlds.neighbours(at, world.size)[action]


KNOWN = {"sokoban": ("O", "X"), "lake4": ("G", "H"), "lake5": ("G", "H")}


@pytest.mark.parametrize("name", KNOWN)
def test_knowing_both_roles_wins_every_game_and_having_them_backwards_none(name):
  won = won_sokoban if name == "sokoban" else won_lake
  for told, expected in ((KNOWN[name], True), (KNOWN[name][::-1], False)):
    results = {won(Game(spec(name), seed), told, random.Random(seed)) for seed in range(60)}
    assert results == {expected}


def text_of(name: str, seed: int) -> str:
  return Game(spec(name), seed).observation


@pytest.mark.parametrize("name", KNOWN)
def test_no_board_of_a_held_out_game_is_one_of_the_others(name):
  """Boards told apart by their text, so not by the hash that divides them."""
  learned, held = ({text_of(name, 2 * i + odd) for i in range(70)} for odd in (0, 1))
  assert len(learned) > 30 < len(held) and not learned & held
  if name == "sokoban":  # nor is there a room in both whose player or box starts elsewhere
    bare = lambda texts: {
      (room.open, room.target_at) for room in map(rooms.read, map(plans.view, texts))
    }
    assert not bare(learned) & bare(held)


def test_a_lake_is_read_as_it_is_shown():
  world = chosen.read_lake(text_of("lake5", 4))
  assert worlds.render(world, world.start) in text_of("lake5", 4)
  assert chosen.lake_moves(world) == 8
  walled = worlds.World(((" ", "H"), ("H", "G")), (0, 0), "G", "H", (1, 1))
  assert (
    chosen.lake_moves(walled)
    == 4
    > chosen.lake_moves(worlds.World(((" ", " "), ("H", "G")), (0, 0), "G", "H", (1, 1)))
  )
  with pytest.raises(ValueError, match="not the first board of a Frozen Lake"):
    chosen.read_lake("Current Board:\n\n| P | G | G |")


def test_boards_that_cannot_be_found_are_an_error(monkeypatch):
  monkeypatch.setattr(chosen, "MAX_DRAWS", 20)
  with pytest.raises(RuntimeError, match="seed 3: none of 20 boards .* fits: ask for fewer holes"):
    chosen.lake(4, 3, max_moves=2).reset(3)
