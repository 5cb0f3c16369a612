"""What the policy of both games can do, measured: the gates of its pre-training and the retention
tests of every round, as `pocket.probes` has them, on boards that are held out.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

from oel_jax.environments import GameSpec
from oel_jax.evaluation.tasks import Count
from oel_jax.pocket import claims as claims_lib
from oel_jax.pocket import corpus as corpus_lib
from oel_jax.pocket import probes, worlds
from oel_jax.pocket.boards import chosen, corpus, rooms
from oel_jax.pocket.claims import BOX, GOAL, LAKE, PUSH, TARGET, TRAP, Claim

# TextArena's games: what each is made by, moves, and the letters of its two roles.
GAMES = {
  "sokoban": (chosen.sokoban, rooms.MAX_TURNS, {TARGET: "O", BOX: "X"}),
  "lake4": (functools.partial(chosen.lake, 4, 3), worlds.MAX_TURNS, {GOAL: "G", TRAP: "H"}),
  "lake5": (functools.partial(chosen.lake, 5, 4), worlds.MAX_TURNS, {GOAL: "G", TRAP: "H"}),
}


def spec_of(game: str) -> GameSpec:
  """How a game of GAMES is played."""
  make, max_turns, _ = GAMES[game]
  return dataclasses.replace(probes.LAKE, name=game, make=make, max_turns=max_turns)


def room_of(seed: int, symmetric: bool | None = None) -> rooms.Room:
  """The probe room of this seed, one of those that are held out. The player is P, for one prompt
  is that of all games.
  """
  rng = random.Random(f"probe {seed}")
  return rooms.random_room(rng, symmetric=symmetric, held=True, player="P")


def lake_of(seed: int, layout: str | None = None) -> worlds.World:
  """The probe lake of this seed, one of those that are held out."""
  return corpus.lake(random.Random(f"probe {seed}"), layout=layout, held=True)


def play_rooms(
  policy: Any,
  count: int,
  *,
  seed: int,
  symmetric: bool | None = None,
  knowledge: str = "full",
) -> Count:
  """Games passed in push worlds, with knowledge as in `pocket.probes.play_worlds`."""
  draw = functools.partial(room_of, symmetric=symmetric)
  spec = dataclasses.replace(
    probes.LAKE,
    name="room",
    make=lambda: worlds.Worlds(draw, rooms.RoomGame),
    max_turns=rooms.MAX_TURNS,
  )

  def tell(map_seed: int, rng: random.Random, strangers: bool) -> str:
    room = draw(map_seed)
    truth = {TARGET: room.target, BOX: room.box}
    elsewhere = [letter for letter in worlds.LETTERS if letter not in room.letters()]
    return probes.full_text(truth, rng, elsewhere if strangers else ())

  return probes.play_drawn(policy, count, spec, tell, seed=seed, knowledge=knowledge)


def play_lakes(
  policy: Any, count: int, *, seed: int, layout: str | None = None, knowledge: str = "full"
) -> Count:
  """Games passed in Frozen Lakes with other letters, with knowledge as in
  `pocket.probes.play_worlds`.
  """
  draw = functools.partial(lake_of, layout=layout)
  spec = dataclasses.replace(
    probes.LAKE, name="lake", make=lambda: worlds.Worlds(draw), max_turns=worlds.MAX_TURNS
  )
  tell = lambda map_seed, rng, strangers: probes.full_list(draw(map_seed), rng, strangers)
  return probes.play_drawn(policy, count, spec, tell, seed=seed, knowledge=knowledge)


def play_real(policy: Any, count: int, *, seed: int, game: str, knowledge: str) -> Count:
  """Games passed in TextArena's own game on held-out boards, with knowledge "full", "swapped" or
  "none".
  """
  truth = GAMES[game][2]
  told, rng = [Claim(role, letter) for role, letter in truth.items()] * 2, random.Random(seed)
  text = "\n".join(claims_lib.say(claim, rng) for claim in told)
  text = {"full": text, "swapped": claims_lib.swap_roles(text), "none": ""}[knowledge]
  return probes.play_lake(policy, count, seed=seed, knowledge=text, spec=spec_of(game), held=True)


def binding(policy: Any, count: int, *, seed: int, push: bool) -> Count:
  """Wrong answers to the question which symbol has a role, given a list that names both roles."""
  prompts, answers = [], []
  for i in range(count):
    rng = random.Random(f"binding {seed} {i}")
    if push:
      room = room_of(i + seed)
      truth = {TARGET: room.target, BOX: room.box}
    else:
      world = lake_of(i + seed)
      truth = {GOAL: world.goal, TRAP: world.trap}
    role = rng.choice(PUSH if push else LAKE)
    answers.append(corpus.answer(truth[role]))
    text = probes.full_text(truth, rng)
    prompts.append((corpus_lib.knowledge_message(text), corpus.ask_message(role)))
  return probes.wrong_answers(policy, prompts, answers, seed)


def push_extraction(policy: Any, count: int, *, seed: int) -> Count:
  """Games in push worlds of which what they reveal is written down, and nothing false."""
  games = []
  for i in range(count):
    rng = random.Random(f"extraction {seed} {i}")
    room = rooms.random_room(rng, held=True)
    game, facts = corpus.episode(rng, room)
    games.append((game, facts, corpus.item_list(rng, room) if rng.random() < 0.7 else [], rng))
  return probes.written_right(policy, games, PUSH, seed=seed)


def lake_extraction(policy: Any, count: int, *, seed: int) -> Count:
  """The same of Frozen Lakes."""
  return probes.extraction(policy, count, seed=seed)


def _probes() -> Iterator[tuple[str, tuple[float, float], Callable[..., Count]]]:
  """The gates: a name, the rates it must lie between, and what measures it."""
  knowing, misled, nothing = (0.98, 1.0), (0.0, 0.05), (0.05, 0.25)
  as_told = {"full": knowing, "swapped": misled}
  yield "push_binding_wrong", (0.0, 0.01), functools.partial(binding, push=True)
  yield "lake_binding_wrong", (0.0, 0.01), functools.partial(binding, push=False)
  yield "push_extraction", knowing, push_extraction
  yield "lake_extraction", knowing, lake_extraction
  for told, bounds in (as_told | {"strangers": knowing}).items():
    yield f"push_{told}", bounds, functools.partial(play_rooms, knowledge=told)
    yield f"lake_{told}", bounds, functools.partial(play_lakes, knowledge=told)
  for told, bounds in as_told.items():
    rooms_alike = functools.partial(play_rooms, symmetric=True, knowledge=told)
    lakes_alike = functools.partial(play_lakes, layout="symmetric", knowledge=told)
    yield f"push_{told}_symmetric", bounds, rooms_alike
    yield f"lake_{told}_symmetric", bounds, lakes_alike
  for game in GAMES:
    for told, bounds in (as_told | {"none": nothing}).items():
      yield f"{game}_{told}", bounds, functools.partial(play_real, game=game, knowledge=told)
  yield "other", (0.97, 1.0), probes.other_tasks


GATES = {name: bounds for name, bounds, _ in _probes()}


def measure_gates(policy: Any, count: int, *, seed: int) -> dict[str, Count]:
  """Every gate's probe, `count` examples each; of those whose lower bound lies within the noise of
  so few games, four times as many.
  """
  return {
    name: measure(policy, 4 * count if name.endswith("_none") else count, seed=seed)
    for name, _, measure in _probes()
    if name in GATES
  }
