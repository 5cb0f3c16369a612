"""The policy of both games from pre-training to a round, with a tiny one that knows nothing: what
is measured, what is left behind, and on which boards.
"""

import importlib.util
import json
import pathlib
import random
import types

import jax
import pytest

from oel_jax import loop
from oel_jax.conversations.jsonl import read_conversations
from oel_jax.environments import Game, play
from oel_jax.pocket import claims, load, pretrain, worlds
from oel_jax.pocket import corpus as lake_corpus
from oel_jax.pocket.boards import chosen, corpus, plans, player, probes, rooms
from oel_jax.policy.weights import native
from oel_jax.runtime import mesh as mesh_lib

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
TAUGHT = {
  "steps": 2,
  "rows": 1,
  "length": 256,
  "warmup": 1,
  "workers": 0,
  "gates_every": 9,
  "gate_count": 1,
}
FEWER = {
  "rounds": 1,
  "deployment.episodes": 4,
  "deployment.slots": 4,
  "deployment.max_response_tokens": 8,
  "extraction.texts": 2,
  "extraction.trajectories": 2,
  "extraction.use": 2,
  "extraction.max_response_tokens": 8,
  "extraction.source": "trajectories",  # of its own it writes nothing down
  "extraction.max_knowledge_tokens": 480,
  "consolidation.steps": 1,
  "consolidation.batch_size": 4,
  "consolidation.gate_episodes": 2,
  "consolidation.log_probe": 2,
  "consolidation.on_no_gain": "warn",
  "evaluation.episodes": 4,
  "evaluation.retention": 0,
  "evaluation.accumulation": (),
  "mesh.data": 1,
}


def get_config(name: str, size: str):
  spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(size)


@pytest.fixture(name="one_device", autouse=True)
def fixture_one_device(monkeypatch):
  make = mesh_lib.make_mesh
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda asked: make(asked, jax.devices()[:1]))


# What is measured in the short test; the long one measures all.
SOME = ("push_binding_wrong", "push_full", "sokoban_none")


@pytest.fixture(scope="module", name="weights")
def fixture_weights(tmp_path_factory):
  """The folder of a pre-training of two steps."""
  config = get_config("pretrain_pocket", "boards-tiny")
  config.update_from_flattened_dict(TAUGHT)
  folder = tmp_path_factory.mktemp("weights")
  short = {"max_response_tokens": 6, "slots": 4}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probes.probes, "play", lambda *args, **how: play(*args, **how | short))
    patch.setattr(probes, "GATES", {name: probes.GATES[name] for name in SOME})
    pretrain.run(config, folder)
  return folder


def test_pretraining_leaves_weights_vocabulary_and_gates(weights):
  found = json.loads((weights / "gates.json").read_text())
  counts = {name: gate["of"] for name, gate in found["gates"].items()}
  assert counts == dict.fromkeys(SOME, 1) | {"sokoban_none": 4} and not found["passed"]
  policy = load.load(folder=weights)  # checks the sums
  assert (weights / load.TOKENIZER).read_bytes() == (load.DATA / "boards.model").read_bytes()
  assert native.metadata(weights / load.WEIGHTS)["tokenizer"] == policy.tokenizer.digest


@pytest.mark.slow
def test_every_gate_is_measured(weights):
  found = probes.measure_gates(load.load(folder=weights), 1, seed=3)
  assert found.keys() == probes.GATES.keys() and len(found) == 24
  assert all(count.of == (4 if name.endswith("_none") else 1) for name, count in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sokoban", "lake5"])
def test_a_round_is_learned_from_boards_that_no_held_out_game_has(name, weights, tmp_path):
  config = get_config("new_boards", name)
  config.update_from_flattened_dict(FEWER | {"policy.weights": str(weights / load.WEIGHTS)})
  results = loop.run(config, tmp_path / "run")
  assert [entry["round"] for entry in results["rounds"]] == [1]
  user = tmp_path / "run/round_1/user"
  sides = {False: "trajectories", True: "evaluation"}
  for held, file in sides.items():
    games = [game for path in user.glob(f"{file}*.jsonl") for game in read_conversations(path)]
    assert games
    for game in games:
      shown = game.messages[0].content
      board = rooms.read(plans.view(shown)) if name == "sokoban" else chosen.read_lake(shown)
      assert (rooms if name == "sokoban" else chosen).held_out(board) == held


# The probes, of a player that needs no weights


def oracle(policy, spec, episodes):
  """Plays as it was taught, with what an episode's knowledge says of the letters on its board."""
  return [types.SimpleNamespace(passed=_passed(spec, episode)) for episode in episodes]


def _passed(spec, episode) -> bool:
  game, rng = Game(spec, episode.map_seed), random.Random(episode.sample_seed)
  said, last, board = claims.parse_all(episode.knowledge), "", game.observation
  push = "Moves" in board
  letters = [x for x in board.split("\n\n")[1] if x.isupper() and x != "P"]
  known = claims.resolve(said, letters, claims.PUSH if push else claims.LAKE)
  rows = tuple(
    tuple(" " if cell.strip() in ("", "P") else cell.strip() for cell in line.strip("|").split("|"))
    for line in board.split("\n")
    if line.startswith("|")
  )
  world = worlds.World(rows, (0, 0), "", "", (0, 0))
  while True:
    if push:
      _, action = player.respond(rng, plans.view(board), *known, guess=corpus.PUSH_GUESS)
    else:
      lines = [line for line in board.split("\n") if line.startswith("|")]
      (at,) = [(r, line.index("P") // 6) for r, line in enumerate(lines) if "P" in line]
      how = corpus.EXPLORING
      _, action = lake_corpus.respond(rng, world, at, *known, frozenset(), last, **how)
    step, last = game.play(f"[{action}]"), action
    if step.done:
      return step.ended == "passed"
    board = step.observation if "Board" in step.observation else board


@pytest.mark.slow
def test_what_the_knowledge_says_suffices_in_every_game_that_is_a_gate(monkeypatch):
  """All gates of play, on the probes' own games: a player without an error in it passes them."""
  monkeypatch.setattr(probes.probes, "play_all", oracle)
  words = "binding", "extraction", "other"
  played = {name: b for name, b in probes.GATES.items() if not any(word in name for word in words)}
  monkeypatch.setattr(probes, "GATES", played)
  found = probes.measure_gates(None, 256, seed=5)
  rates = {name: count.rate for name, count in found.items()}
  assert all(probes.probes.passes(probes.GATES[name], count) for name, count in found.items())
  full = [name for name in rates if "_full" in name or "_strangers" in name]
  assert len(full) == 9 and {rates[name] for name in full} == {1.0}
