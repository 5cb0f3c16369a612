"""Packed rows: whole examples, weight on responses only, and the mix and lengths that the corpus
draws. And a run, cut off and whole.
"""

import importlib.util
import itertools
import json
import pathlib
import pickle
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax.conversations.schema import Message
from oel_jax.environments.prompts import first_message
from oel_jax.pocket import corpus, load, pretrain, probes, vocabulary, worlds
from oel_jax.pocket.worlds import WorldGame, random_world
from oel_jax.policy import architecture, transformer
from oel_jax.policy.tokenizers import SentencePieceTokenizer
from oel_jax.policy.weights import native
from oel_jax.runtime import finite, signals
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive

LENGTH, DECISIVE = 768, 4
MODEL = vocabulary.build()
NAMES = ("tokens", "targets", "weight", "tokens_segment_ids", "tokens_positions")


def config(**changes):
  return ml_collections.ConfigDict(
    dict(curriculum="lake", seed=3, length=LENGTH, decisive=DECISIVE, rows=8, workers=0) | changes
  )


def batches(count: int, **changes):
  return list(itertools.islice(iter(pretrain.dataset(config(**changes), MODEL)), count))


def test_examples_are_next_token_pairs_with_weight_on_the_response_only():
  tokenizer = SentencePieceTokenizer(MODEL)
  places = [f"({r}, {c})" for r in range(5) for c in range(5)]
  words = ["unknown", *worlds.LETTERS, *worlds.ACTIONS, *places, *(f" {place}" for place in places)]
  assert all(len(tokenizer.encode(word)) == 1 for word in words)
  decisive = {tokenizer.encode(word)[0] for word in words}
  examples = pretrain.Examples("lake", 3, DECISIVE, MODEL)
  for i in range(200):
    pairs, example = examples.map(i), corpus.example(derive(3, "corpus", i))
    prompt, response = (
      tokenizer.chat(example.messages),
      tokenizer.response(example.thinking, example.answer),
    )
    assert (
      [*pairs["tokens"].tolist(), pairs["targets"][-1]]
      == prompt + response
      == [pairs["tokens"][0], *pairs["targets"].tolist()]
    )
    assert not pairs["weight"][: len(prompt) - 1].any()
    assert pairs["weight"][len(prompt) - 1 :].tolist() == [
      DECISIVE if i in decisive else 1 for i in response
    ]
    assert tokenizer.split_response(response) == (example.thinking, example.answer)


def test_examples_are_reproducible_survive_a_process_and_differ():
  examples = pretrain.Examples("lake", 3, DECISIVE, MODEL)
  first = examples.map(7)
  again = pickle.loads(pickle.dumps(examples)).map(7)  # as grain hands it to a worker
  for name, array in first.items():
    np.testing.assert_array_equal(again[name], array)
  assert first["tokens"].tolist() != examples.map(8)["tokens"].tolist()
  assert (
    first["tokens"].tolist()
    != pretrain.Examples("lake", 4, DECISIVE, MODEL).map(7)["tokens"].tolist()
  )


def test_rows_hold_whole_examples_each_once():
  examples = pretrain.Examples("lake", 3, DECISIVE, MODEL)
  wanted = {tuple(pairs["tokens"].tolist()) for pairs in map(examples.map, range(400))}
  found = []
  for batch in batches(3):
    assert all(batch[name].shape == (8, LENGTH) and batch[name].dtype == np.int32 for name in NAMES)
    for tokens, weight, segments, positions in zip(
      *(batch[name] for name in ("tokens", "weight", "tokens_segment_ids", "tokens_positions"))
    ):
      assert not weight[segments == 0].any()
      for segment in range(1, segments.max() + 1):
        at = np.flatnonzero(segments == segment)
        assert positions[at].tolist() == list(range(len(at))) and at.tolist() == list(
          range(at[0], at[0] + len(at))
        )
        found.append(tuple(tokens[at].tolist()))
  assert set(found) <= wanted
  long = [ids for ids in found if len(ids) > 20]  # short tasks repeat by chance
  assert len(set(long)) == len(long) > 50


def test_packing_teaches_the_lengths_that_were_drawn():
  """An example that does not fit a row's rest must come in another row: left out, the long ones
  (long lists, long games) would be rare.
  """
  packed = np.concatenate(
    [np.bincount(row)[1:] for batch in batches(30) for row in batch["tokens_segment_ids"]]
  )
  packed = packed[packed > 0]
  examples = pretrain.Examples("lake", 3, DECISIVE, MODEL)
  lengths = np.array([len(examples.map(i)["tokens"]) for i in range(5000, 8000)])
  lengths = lengths[lengths <= LENGTH]
  error = (lengths.var() / len(lengths) + packed.var() / len(packed)) ** 0.5
  assert abs(packed.mean() - lengths.mean()) < 4 * error, (
    f"packed {packed.mean():.0f} tokens an example, drawn {lengths.mean():.0f}"
  )


def test_an_example_longer_than_a_row_is_left_out():
  for batch in batches(3, length=200):
    assert batch["tokens_segment_ids"].max() >= 1 and batch["tokens_positions"].max() < 200


def test_no_prompt_is_longer_than_what_was_taught():
  """Positions beyond a training row are untrained: what is taught must reach the longest play
  prompt of the largest board.
  """
  tokenizer = SentencePieceTokenizer(MODEL)
  drawn = (random_world(random.Random(i), size=5) for i in range(999))
  game = WorldGame(
    next(world for world in drawn if world.start == (0, 0) and world.symbol((0, 1)) == " ")
  )
  messages = [first_message(game.observation, player=corpus.PLAYER, actions=corpus.ACTION_LIST)]
  for turn in range(worlds.MAX_TURNS - 1):
    action = ("[right]", "[left]")[turn % 2]
    messages += [Message("assistant", action), Message("user", game.play(action).observation)]
  assert len(tokenizer.chat(messages)) + 64 < LENGTH  # and a few items


# The run.

TINY = architecture.named("pocket-tiny")
INIT = jax.jit(lambda seed: transformer.init(TINY, jax.random.key(seed)))
LOSS = jax.jit(
  lambda params, batch: pretrain.loss(params, batch, shape=TINY, dtype="float32", attn_impl="xla")
)
SHORT = dict(
  steps=8,
  rows=2,
  length=192,
  warmup=1,
  workers=0,
  log_every=1,
  checkpoint_every=4,
  gates_every=5,
  gate_count=8,
)


def short_config():
  path = pathlib.Path(__file__).parents[1] / "experiments/pretrain_pocket.py"
  spec = importlib.util.spec_from_file_location("pretrain_pocket", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = module.get_config("pocket-tiny")
  made.update(SHORT)
  return made


def lines(folder, stage):
  return [
    line
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    if line["stage"] == stage
  ]


def between(missed=()):
  """Counts in the middle of each gate's bounds, those of `missed` outside; what the gates measure
  is tested with the shipped weights.
  """
  rate = lambda name: 0.5 if name in missed else sum(probes.GATES[name]) / 2
  return lambda policy, count, seed: {
    name: probes.Count(round(1000 * rate(name)), 1000) for name in probes.GATES
  }


def test_the_loss_is_the_weighted_cross_entropy_of_each_example_by_itself():
  [batch] = batches(1, rows=4, length=256)
  params = INIT(1)
  segments = batch["tokens_segment_ids"]
  examples = [
    (row, segments[row] == segment)
    for row in range(4)
    for segment in range(1, segments[row].max() + 1)
  ]
  alone = {name: np.zeros((len(examples), 256), np.int32) for name in NAMES}
  for i, (row, at) in enumerate(examples):
    for name in NAMES:
      alone[name][i, : at.sum()] = batch[name][row][at]
  hidden, _ = jax.jit(transformer.apply, static_argnums=1)(
    params,
    TINY,
    alone["tokens"],
    alone["tokens_positions"],
    np.minimum(alone["tokens_segment_ids"], 1),
  )
  logits = np.asarray(transformer.logits(hidden, transformer.head(params)), np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  chosen = np.take_along_axis(logits, alone["targets"][..., None], -1)[..., 0]
  expected = ((log_z - chosen) * alone["weight"]).sum() / alone["weight"].sum()
  assert len(examples) > 4 and set(alone["weight"].ravel()) == {0, 1, DECISIVE}
  np.testing.assert_allclose(LOSS(params, batch), expected, rtol=1e-5)


def test_a_run_cut_off_and_gone_on_with_ends_with_the_same_bits(tmp_path, monkeypatch):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  monkeypatch.setattr(probes, "measure_gates", between())
  pretrain.run(short_config(), whole)
  # As a kill leaves it after the checkpoint of step 4: lines of later steps are there, what comes
  # at the end is not.
  shutil.copytree(
    whole, cut, ignore=shutil.ignore_patterns("8", load.WEIGHTS, load.SUMS, "gates.json")
  )
  pretrain.run(short_config(), cut)
  # Not the files' own bits: safetensors writes the fields of its header in any order.
  policy, again = load.load(folder=whole), load.load(folder=cut)
  jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
  assert native.metadata(cut / load.WEIGHTS) == native.metadata(whole / load.WEIGHTS)
  kept = lambda folder: [
    (line["step"], line["loss"], line["tokens"]) for line in lines(folder, "pretrain")
  ]
  assert kept(cut) == kept(whole) and [step for step, *_ in kept(cut)] == [*range(1, 9)]
  assert [line["step"] for line in lines(cut, "gates")] == [5]

  # It has learned something.
  assert (
    policy.architecture == TINY and policy.tokenizer.digest == SentencePieceTokenizer(MODEL).digest
  )
  [batch] = batches(1, seed=4, rows=4, length=256)
  assert LOSS(policy.params, batch) < LOSS(INIT(short_config().seed), batch) - 0.3

  # Called once more it only measures.
  passed = json.loads((whole / "gates.json").read_text())
  assert passed["passed"] and passed["gates"].keys() == probes.GATES.keys()
  assert passed["gates"]["lake_none"] == {
    "hits": 150,
    "of": 1000,
    "rate": 0.15,
    "bounds": [0.05, 0.25],
  }
  monkeypatch.setattr(probes, "measure_gates", between(missed=("swapped",)))
  assert (
    not pretrain.run(short_config(), whole)["passed"]
    and not json.loads((whole / "gates.json").read_text())["passed"]
  )
  jax.tree.map(np.testing.assert_array_equal, load.load(folder=whole).params, policy.params)


class _Batches:
  """The numbers from 1, as a dataset's iterator gives batches; at batch `kill` SIGTERM comes."""

  def __init__(self, kill=0):
    self.count, self.kill = 0, kill

  def __iter__(self):
    return self

  def __next__(self):
    self.count += 1
    if self.count == self.kill:
      signal.raise_signal(signal.SIGTERM)
    return {"tokens_segment_ids": np.ones((2, 3), np.int32), "number": np.float32(self.count)}

  def close(self):
    pass

  def get_state(self):
    return {"count": self.count}

  def set_state(self, state):
    self.count = state["count"]


@pytest.fixture(name="pretraining")
def fixture_pretraining(tmp_path, monkeypatch):
  """Runs the training loop on `_Batches`, with a loss that compiles at once: that of batch `broken`
  is NaN.
  """

  def run(kill=0, broken=0):
    monkeypatch.setattr(pretrain, "dataset", lambda config, model_file: _Batches(kill))
    wrong = lambda number: jnp.where(number == broken, jnp.nan, 1.0)
    loss = lambda params, batch, **how: (
      jnp.sum(params["norm"]["scale"] ** 2) * wrong(batch["number"])
    )
    monkeypatch.setattr(pretrain, "loss", loss)
    config = ml_collections.ConfigDict(
      dict(
        seed=0,
        steps=6,
        learning_rate=1e-3,
        warmup=2,
        attention="xla",
        log_every=4,
        gates_every=9,
        checkpoint_every=2,
        gate_count=4,
        curriculum="lake",
      )
    )
    shape = architecture.named("pocket-tiny")
    with Metrics(tmp_path) as metrics, Checkpoints(tmp_path / "checkpoints") as checkpoints:
      return pretrain.train(config, shape, MODEL, metrics, checkpoints)

  return run


def test_a_loss_that_is_not_finite_ends_pretraining_at_that_step(pretraining, tmp_path):
  told = (
    r"step 3 of pre-training: gradient_norm is nan; loss is nan; parameter_norm is nan\. "
    r".*step 2 in "
  )
  for _ in range(2):
    with pytest.raises(finite.NotFiniteError, match=told):
      pretraining(broken=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3] and lines[0]["not_finite"]["loss"] == "nan"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
  pretraining()


def test_sigterm_saves_the_step_of_pretraining(pretraining, tmp_path):
  with pytest.raises(signals.Terminated, match="step 3 of 6 is saved in .*checkpoints") as raised:
    pretraining(kill=3)
  assert raised.value.code == 143
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
  params, tokens = pretraining()
  shutil.rmtree(tmp_path / "checkpoints")
  whole, expected = pretraining()
  assert tokens == expected == 36
  jax.tree.map(np.testing.assert_array_equal, params, whole)
