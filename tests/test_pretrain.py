"""Packed rows: whole examples, weight on responses only, and the mix and lengths that the corpus draws."""

import pickle
import random
import string

import ml_collections
import numpy as np

from oel_jax.deployment.prompts import first_message
from oel_jax.pocket import corpus, pretrain, vocabulary, worlds
from oel_jax.pocket.worlds import WorldGame, random_world
from oel_jax.policy.tokenizer import SentencePieceTokenizer
from oel_jax.runtime.seeds import derive
from oel_jax.trajectory import Message


LENGTH, DECISIVE = 640, 4
MODEL = vocabulary.build()


def rows_of(count: int, length: int = LENGTH, seed: int = 3):
  rows = pretrain.Rows(seed, length, DECISIVE, MODEL)
  return [rows.map(i) for i in range(count)]


def test_rows_hold_whole_examples_with_weight_on_their_responses_only():
  tokenizer = SentencePieceTokenizer(MODEL)
  places = [f"({r}, {c})" for r in range(5) for c in range(5)]
  words = ["unknown", *worlds.LETTERS, *worlds.ACTIONS, *places, *(f" {place}" for place in places)]
  assert all(len(tokenizer.encode(word)) == 1 for word in words)
  decisive = {tokenizer.encode(word)[0] for word in words}
  for i, row in enumerate(rows_of(60)):
    assert all(array.shape == (LENGTH,) and array.dtype == np.int32 for array in row.values())
    expected = (corpus.example(derive(3, "corpus", i, j)) for j in range(100))
    end = 0
    for segment in range(1, row["segments"].max() + 1):
      at = np.flatnonzero(row["segments"] == segment)
      np.testing.assert_array_equal(at, np.arange(end, end + len(at)))  # one after another, without a gap
      end += len(at)
      np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
      ids = [*row["tokens"][at].tolist(), int(row["targets"][at[-1]])]
      assert row["targets"][at[:-1]].tolist() == ids[1:-1]
      for example in expected:  # an example that is longer than a row is left out
        prompt, response = tokenizer.chat(example.messages), tokenizer.response(example.thinking, example.answer)
        if len(prompt) + len(response) - 1 <= LENGTH:
          break
      assert ids == prompt + response
      weights = row["weight"][at]
      assert not weights[: len(prompt) - 1].any()
      assert weights[len(prompt) - 1 :].tolist() == [DECISIVE if i in decisive else 1 for i in response]
      assert tokenizer.split_response(response) == (example.thinking, example.answer)
    assert end > 0
    for name in ("tokens", "targets", "weight", "segments", "positions"):
      assert not row[name][end:].any()


def test_rows_are_reproducible_survive_a_process_and_differ():
  rows = pretrain.Rows(3, LENGTH, DECISIVE, MODEL)
  first = rows.map(7)
  again = pickle.loads(pickle.dumps(rows)).map(7)  # as grain hands it to a worker
  for name, array in first.items():
    np.testing.assert_array_equal(again[name], array)
  assert not np.array_equal(first["tokens"], rows.map(8)["tokens"])
  assert not np.array_equal(first["tokens"], pretrain.Rows(4, LENGTH, DECISIVE, MODEL).map(7)["tokens"])


def test_segments_count_from_one_also_after_an_example_that_is_too_long():
  tokenizer = SentencePieceTokenizer(MODEL)
  found = False
  for i, row in enumerate(rows_of(60, length=200)):
    first = corpus.example(derive(3, "corpus", i, 0))
    found |= len(tokenizer.chat(first.messages)) > 200
    assert row["segments"].min() == 0 or row["segments"].min() == 1
    assert set(row["segments"][row["segments"] > 0].tolist()) == set(range(1, row["segments"].max() + 1))
  assert found


def test_packing_teaches_the_mix_and_the_lengths_that_were_drawn():
  """An example that does not fit a row's rest must come in another row: left out, the long ones (long lists, long games) would be rare."""
  tokenizer = SentencePieceTokenizer(MODEL)
  drawn = [corpus.example(derive("plain", i)) for i in range(3000)]
  lengths = np.array([len(tokenizer.chat(e.messages)) + len(tokenizer.response(e.thinking, e.answer)) - 1 for e in drawn])
  lengths = lengths[lengths <= LENGTH]
  packed = np.concatenate([np.bincount(row["segments"])[1:] for row in rows_of(700)])
  packed = packed[packed > 0]
  error = (lengths.var() / len(lengths) + packed.var() / len(packed)) ** 0.5
  assert abs(packed.mean() - lengths.mean()) < 4 * error, f"packed {packed.mean():.0f} tokens an example, drawn {lengths.mean():.0f}"


def test_dataset_batches_rows():
  config = ml_collections.ConfigDict(dict(seed=3, length=LENGTH, decisive=DECISIVE, rows=4, workers=0))
  batch = next(iter(pretrain.dataset(config, MODEL)))
  names = ("tokens", "targets", "weight", "segments", "positions")
  assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(names, (4, LENGTH))
  for i, row in enumerate(rows_of(4)):
    np.testing.assert_array_equal(batch["tokens"][i], row["tokens"])


def test_no_prompt_is_longer_than_what_was_taught():
  """Positions beyond a training row are untrained: what is taught must reach the longest play prompt of the largest board."""
  tokenizer = SentencePieceTokenizer(MODEL)
  drawn = (random_world(random.Random(i), size=5) for i in range(999))
  game = WorldGame(next(world for world in drawn if world.start == (0, 0) and world.symbol((0, 1)) == " "))
  messages = [first_message(game.observation, player=corpus.PLAYER, actions=corpus.ACTION_LIST)]
  for turn in range(worlds.MAX_TURNS - 1):
    action = ("[right]", "[left]")[turn % 2]
    messages += [Message("assistant", action), Message("user", game.play(action).observation)]
  assert len(tokenizer.chat(messages)) + 64 < LENGTH  # and a few items
