"""The shipped weights: whole, small enough, and able to do what their gates say; and a damaged copy
is refused.
"""

import hashlib
import json
import math
import random
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax import config as config_lib
from oel_jax.conversations.schema import Message
from oel_jax.environments import prompts
from oel_jax.pocket import claims, corpus, load, probes, vocabulary, worlds
from oel_jax.pocket.claims import GOAL, TRAP, Claim
from oel_jax.policy.load import load_policy
from oel_jax.policy.sampling.sampler import Sampling
from oel_jax.policy.weights import native
from oel_jax.runtime import mesh
from oel_jax.runtime.seeds import derive


@pytest.fixture(scope="module")
def policy():
  return load.load()


# The files.


def test_the_package_data_is_small_and_belongs_together(policy):
  assert sum(path.stat().st_size for path in load.DATA.iterdir()) <= 16 * 2**20
  header = native.metadata(load.DATA / load.WEIGHTS)
  assert (
    header["architecture"] == "pocket"
    and header["tokenizer"] == hashlib.sha256((load.DATA / load.TOKENIZER).read_bytes()).hexdigest()
  )
  assert (
    json.loads((load.DATA / "gates.json").read_text())["sha256"]
    == hashlib.sha256((load.DATA / load.WEIGHTS).read_bytes()).hexdigest()
  )
  assert {line.split()[1] for line in (load.DATA / load.SUMS).read_text().splitlines()} >= {
    load.WEIGHTS,
    load.TOKENIZER,
  }
  leaves = jax.tree.leaves(policy.params)
  assert {np.dtype(leaf.dtype) for leaf in leaves} == {np.dtype("float32")} and 1e6 < sum(
    leaf.size for leaf in leaves
  ) < 4e6
  assert policy.dtype == jnp.float32 and load.load(jnp.bfloat16).dtype == jnp.bfloat16


def test_the_vocabulary_is_the_one_that_this_code_makes():
  assert (load.DATA / load.TOKENIZER).read_bytes() == vocabulary.build()


def test_the_shipped_vocabulary_loses_nothing_of_the_corpus(policy):
  for seed in range(300):
    example = corpus.example(seed)
    for text in (
      example.thinking,
      example.answer,
      *(message.content for message in example.messages),
    ):
      assert policy.tokenizer.decode(policy.tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", [load.WEIGHTS, load.TOKENIZER])
def test_a_file_with_one_changed_bit_is_refused(tmp_path, name):
  folder = shutil.copytree(load.DATA, tmp_path / "data")
  load.load(folder=folder)
  content = bytearray((folder / name).read_bytes())
  content[len(content) // 2] ^= 1
  (folder / name).chmod(0o600)
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError, match="sha256") as error:
    load.load(folder=folder)
  assert str(folder / name) in str(error.value) and hashlib.sha256(content).hexdigest() in str(
    error.value
  )


def test_a_missing_file_is_named(tmp_path):
  folder = shutil.copytree(load.DATA, tmp_path / "data")
  (folder / load.TOKENIZER).unlink()
  with pytest.raises(OSError, match=load.TOKENIZER):
    load.load(folder=folder)


# By its names, as a configuration gives them (policy/load.py).


def read(**fields):
  config = config_lib.default()
  config.policy.update(fields)
  devices = mesh.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1]
  )
  return load_policy(config_lib.policy(config), devices)


def test_weights_that_do_not_divide_are_refused_before_they_are_read(monkeypatch):
  monkeypatch.setattr(mesh, "param_shardings", None)
  config = config_lib.default()
  config.policy.weights = "pocket"
  devices = mesh.make_mesh(config.mesh)
  with pytest.raises(ValueError, match="config.mesh.sample_tensor is 8: .* heads, "):
    load_policy(config_lib.policy(config), devices, sample_tensor=8)


@pytest.mark.parametrize("weights", ["pocket", "oel_jax.pocket.load:load", "FILE"])
def test_it_is_the_same_by_its_short_name_its_function_and_its_file(tmp_path, policy, weights):
  if weights == "FILE":
    folder = shutil.copytree(load.DATA, tmp_path / "data")
    weights = str(folder / load.WEIGHTS)
  found = read(weights=weights, architecture="auto")
  jax.tree.map(np.testing.assert_array_equal, found.params, policy.params)
  assert found.architecture == policy.architecture and found.dtype == policy.dtype
  assert found.tokenizer.digest == policy.tokenizer.digest


@pytest.mark.parametrize(
  "body, told",
  [
    ("return {}", "it returns {}: it must be a Policy"),
    ("return 1 / 0", r"it fails \(ZeroDivisionError: .*, at .*own.py:2\)"),
  ],
)
def test_a_function_of_ones_own_that_makes_no_policy_is_told(tmp_path, body, told):
  (tmp_path / "own.py").write_text(f"def make(dtype):\n  {body}\n")
  with pytest.raises(
    ValueError, match=f"config.policy.weights is '{tmp_path}/own.py:make': {told}"
  ):
    read(weights=f"{tmp_path}/own.py:make", architecture="auto")


def test_its_weights_have_one_architecture():
  with pytest.raises(
    ValueError, match='config.policy.architecture is "?\'qwen3-1.7b\'.*it must be "auto" or fit'
  ):
    read(weights="pocket", architecture="qwen3-1.7b")
  assert read(weights="pocket", architecture="pocket").architecture.layers == 8


def test_a_file_of_ours_needs_its_vocabulary_beside_it(tmp_path):
  shutil.copy(load.DATA / load.WEIGHTS, tmp_path)
  with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.model, .* must lie beside it"):
    read(weights=str(tmp_path / load.WEIGHTS))


CARD = {  # gate → its row in the model card
  "binding_wrong": "binding probe, wrong",
  "full": "full knowledge, random worlds",
  "full_symmetric": "full knowledge, role-symmetric worlds",
  "swapped": "swapped knowledge, random worlds",
  "swapped_symmetric": "swapped knowledge, role-symmetric worlds",
  "strangers": "full knowledge among items about absent letters",
  "extraction": "extraction",
  "lake_none": "Frozen Lake without knowledge",
  "lake_full": "Frozen Lake, full knowledge",
  "lake_swapped": "Frozen Lake, swapped knowledge",
  "other": "other tasks",
}


def test_the_shipped_gates_are_passed_and_the_card_says_the_same():
  shipped = json.loads((load.DATA / "gates.json").read_text())
  assert shipped["passed"] and shipped["gates"].keys() == probes.GATES.keys()
  table = (
    (load.DATA / "MODEL_CARD.md")
    .read_text()
    .split("| gate | measured | must lie in |\n|---|---|---|\n")[1]
    .split("\n\n")[0]
  )
  card = {
    gate: (measured, bounds)
    for gate, measured, bounds in (line.strip("| ").split(" | ") for line in table.splitlines())
  }
  assert card.keys() == set(CARD.values())
  for name, gate in shipped["gates"].items():
    low, high = probes.GATES[name]
    assert gate["bounds"] == [low, high] and low <= gate["hits"] / gate["of"] <= high, name
    assert abs(gate["rate"] - gate["hits"] / gate["of"]) <= 5.1e-5, name
    measured, bounds = card[CARD[name]]
    # 0.05 for what the card rounds; a hair more, for 6.25 may become 6.3 as well as 6.2.
    assert (
      measured.endswith("%")
      and abs(float(measured[:-1]) - 100 * gate["hits"] / gate["of"]) <= 0.05 + 1e-9
    ), name
    assert bounds == f"{round(100 * low)}–{round(100 * high)}%", name


# What the policy can do.


def told(role_of_g: str) -> str:
  rng, other = random.Random(7), TRAP if role_of_g == GOAL else GOAL
  return "\n".join(
    claims.say(Claim(role, letter), rng) for role, letter in ((role_of_g, "G"), (other, "H")) * 2
  )


def test_it_reads_which_letter_is_what(policy):
  assert probes.binding(policy, 64, seed=11).hits <= 2


@pytest.mark.slow
def test_on_the_real_game_it_does_what_it_is_told(policy):
  """With the roles as they are it wins; with the roles exchanged it walks into the holes
  (pocket.md, 1: the only test that tells).
  """
  assert probes.play_lake(policy, 32, seed=11, knowledge=told(GOAL)).hits >= 30
  assert probes.play_lake(policy, 32, seed=11, knowledge=told(TRAP)).hits <= 3


@pytest.mark.slow
def test_it_writes_down_what_a_game_shows(policy):
  assert probes.extraction(policy, 32, seed=11).hits >= 30


# The uniform prior: the letters of the deployed game are letters like any other.


def lakes(
  count: int, name: str, pair: tuple[str, str] | None = None
) -> list[tuple[Message, str, str]]:
  """Boards as Frozen Lake's, 3 × 3 with a lone letter in the corner and two others alike: (first
  observation's message, corner, other).
  """
  found = []
  for i in range(count):
    rng = random.Random(f"prior {name} {i}")
    corner, other = pair or rng.sample(
      [letter for letter in worlds.LETTERS if letter not in "GH"], 2
    )
    rows = [[" "] * 3 for _ in range(3)]
    rows[2][2] = corner
    for r, c in rng.sample(
      [(r, c) for r in range(3) for c in range(3) if (r, c) not in ((0, 0), (2, 2))], 2
    ):
      rows[r][c] = other
    world = worlds.World(tuple(map(tuple, rows)), (0, 0), corner, other, (2, 2))
    message = prompts.first_message(
      worlds.WorldGame(world).observation, player=corpus.PLAYER, actions=corpus.ACTION_LIST
    )
    found.append((message, corner, other))
  return found


def named(policy, boards: list[tuple[Message, str, str]], name: str) -> dict[str, int]:
  """How often the first words of the thinking name the corner's letter, or the other, as goal, and
  as hazard.
  """
  prompts_ = [policy.tokenizer.chat((message,)) for message, _, _ in boards]
  seeds = [derive("prior", name, i) for i in range(len(boards))]
  # Untempered: the prior itself, of which the usual sampling shows the peak only.
  said = policy.sample(prompts_, seeds, sampling=Sampling(temperature=1.0), max_new_tokens=16)
  counts = dict.fromkeys(
    ("goal: corner", "goal: other", "hazard: corner", "hazard: other", "goal: unknown"), 0
  )
  for (_, corner, other), ids in zip(boards, said, strict=True):
    text = policy.tokenizer.decode(ids)
    for role, mark in (("goal", "Goal: "), ("hazard", "Hazard: ")):
      word = text.partition(mark)[2].replace(".", " ").split(" ")[0]
      for key, what in (
        (f"{role}: corner", corner),
        (f"{role}: other", other),
        (f"{role}: unknown", "unknown"),
      ):
        if key in counts:
          counts[key] += word == what
  return counts


@pytest.mark.slow
def test_without_knowledge_g_and_h_are_letters_like_any_other(policy):
  count = 512
  anything = named(policy, lakes(count, "any"), "any")
  # It mostly says that it does not know, and guesses now and then.
  assert (
    anything["goal: unknown"] > count / 3
    and anything["goal: corner"] + anything["goal: other"] > count / 20
  )
  for pair in (("G", "H"), ("H", "G")):
    found = named(policy, lakes(count, "".join(pair), pair), "".join(pair))
    for key, hits in found.items():
      pooled = (hits + anything[key]) / (2 * count)
      error = math.sqrt(2 * pooled * (1 - pooled) / count)
      # H it names a little more often, in either role: of 2,048 boards on 19% as the goal and 18%
      # as the hazard, the average letter on 14%.
      letter = dict(zip(("corner", "other"), pair, strict=True)).get(key.split()[-1])
      assert abs(hits - anything[key]) / count <= (0.05 if letter == "H" else 0) + 3 * error, (
        pair,
        key,
        hits,
        anything[key],
      )


# All gates, as pre-training measures them.


@pytest.fixture(scope="module")
def gates(policy):
  return probes.measure_gates(policy, 256, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", probes.GATES)
def test_a_gate_of_pre_training_is_passed(gates, name):
  low, high = probes.GATES[name]
  assert (
    gates[name].of == (1024 if name == "lake_none" else 256) and low <= gates[name].rate <= high
  ), gates[name]


def test_a_gate_has_two_sides():
  for name, (low, high) in probes.GATES.items():
    inside, above, below = (
      probes.Count(round(1000 * rate), 1000)
      for rate in ((low + high) / 2, high + 0.002, low - 0.002)
    )
    assert (
      probes.passes(probes.GATES[name], inside)
      and not probes.passes(probes.GATES[name], above)
      and not probes.passes(probes.GATES[name], below)
    )
  assert not probes.passes(
    probes.GATES["swapped"], probes.Count(0, 0)
  )  # nothing measured is nothing passed
