"""The order of training's prompts: as before, shared out to processes, with a small state."""

import json

import grain
import numpy as np
import pytest

from oel_jax.conversations import dataset, jsonl
from oel_jax.conversations.schema import Message, Prompt, prompt_from_json
from oel_jax.runtime.seeds import derive


def earlier(count, batch_size, seed, round):
  """The iterator of the versions before this one, whose states lie in checkpoints."""
  order = (
    grain.MapDataset.range(count).seed(derive(seed, round, "prefixes")).shuffle().repeat()
  ).map_with_index(lambda draw, prompt: {"prompt": np.int64(prompt), "draw": np.int64(draw)})
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(order.to_iter_dataset(options).batch(batch_size))


@pytest.mark.parametrize("count, batch_size", [(7, 4), (5, 5), (3, 8)])
def test_order_and_state_are_those_of_earlier_versions(count, batch_size):
  before = earlier(count, batch_size, 3, 2)
  now = iter(dataset.batches(range(count), batch_size, seed=3, round=2))
  for _ in range(6):
    expected, found = next(before), next(now)
    assert {name: value.tolist() for name, value in expected.items()} == found
    assert before.get_state() == now.get_state()
  resumed = iter(dataset.batches(range(count), batch_size, seed=3, round=2))
  resumed.set_state(before.get_state())
  assert next(resumed) == next(now)
  others = [
    iter(dataset.batches(range(count), 8, seed=s, round=r)) for s, r in ((3, 2), (4, 2), (3, 3))
  ]
  orders = [[next(other)["prompt"] for _ in range(3)] for other in others]
  assert orders[0] not in orders[1:] and orders[1] != orders[2]


def test_each_conversation_counts_alike_and_each_of_its_turns():
  groups = [[0, 1, 2], [3], [4, 5]]  # the numbers of their turns
  batches = iter(dataset.batches(range(6), 3, seed=3, round=2, groups=groups))
  passes = [next(batches) for _ in range(12)]
  assert [n for batch in passes for n in batch["draw"]] == list(range(36))
  drawn = [batch["prompt"] for batch in passes]
  own = [[next(n for n in one if n in group) for one in drawn] for group in groups]
  assert all(len(set(one) & set(group)) == 1 for one in drawn for group in groups)
  # Each turn as often as the conversation's others: 12 draws are 4, 12 and 6 of each.
  assert [[turns.count(n) for n in group] for turns, group in zip(own, groups)] == [
    [4, 4, 4],
    [12],
    [6, 6],
  ]
  first = [iter(dataset.batches(range(6), 3, seed=s, round=2, groups=groups)) for s in range(9)]
  assert {next(n for n in next(one)["prompt"] if n < 3) for one in first} == {0, 1, 2}
  again = iter(dataset.batches(range(6), 3, seed=3, round=2, groups=groups))
  assert [next(again) for _ in range(12)] == passes


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_get_together_what_one_gets_alone(processes):
  alone = iter(dataset.batches(range(11), 6, seed=0, round=1))
  shares = [
    iter(dataset.batches(range(11), 6, seed=0, round=1, process_index=i, process_count=processes))
    for i in range(processes)
  ]
  for step in range(5):
    whole, parts = next(alone), [next(share) for share in shares]
    assert [len(part["draw"]) for part in parts] == [6 // processes] * processes
    pairs = [pair for part in parts for pair in zip(part["draw"], part["prompt"], strict=True)]
    assert sorted(pairs) == list(zip(whole["draw"], whole["prompt"], strict=True))
    assert sorted(draw for draw, _ in pairs) == list(range(6 * step, 6 * step + 6))


def test_the_state_is_small_whatever_there_is_to_draw_from():
  sizes = {}
  for count in (100, 100_000):
    batches = iter(dataset.batches(range(count), 8, seed=0, round=1, process_count=2))
    for _ in range(25):
      next(batches)
    sizes[count] = len(json.dumps(batches.get_state()))
  assert sizes[100] == sizes[100_000] < 100


def test_prompts_are_read_from_a_file_by_number_and_only_by_whose_they_are(tmp_path):
  prompts = [Prompt(f"p{i}", (Message("user", f"{i}?"),)) for i in range(9)]
  jsonl.write_jsonl(tmp_path / "prompts.jsonl", prompts)
  read = []

  class Source(jsonl.JsonLines):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  source = Source(tmp_path / "prompts.jsonl", lambda data, _: prompt_from_json(data))
  numbers = iter(dataset.batches(range(9), 4, seed=5, round=1, process_index=1, process_count=2))
  found = iter(dataset.batches(source, 4, seed=5, round=1, process_index=1, process_count=2))
  for _ in range(5):
    expected, batch = next(numbers), next(found)
    assert batch["prompt"] == [prompts[i] for i in expected["prompt"]]
    assert read[-2:] == expected["prompt"]
  assert len(read) == 10


def test_what_cannot_be_shared_out_is_refused():
  with pytest.raises(ValueError, match="there are 0 prompts to draw from"):
    dataset.batches([], 4, seed=0, round=1)
  with pytest.raises(ValueError, match="process_index is 2: it must be from 0 to 1"):
    dataset.batches(range(3), 4, seed=0, round=1, process_index=2, process_count=2)
  with pytest.raises(ValueError, match="the batch of 5 prompts does not divide by 2 processes"):
    dataset.batches(range(3), 5, seed=0, round=1, process_count=2)
