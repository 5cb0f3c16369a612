"""Prompts for training as a grain source: in an order of the seed's, sharded by process.

A source is whatever has a length and is read by number, and that is all that grain asks of one: a
`jsonl.JsonLines` of prompts, a list, or a range, whose items are the prompts' numbers.
"""

from collections.abc import Sequence
from typing import Any

import grain

from oel_jax.runtime.seeds import derive


def batches(
  source: Any,
  batch_size: int,
  *,
  seed: int,
  round: int,
  process_index: int = 0,
  process_count: int = 1,
  groups: Sequence[Sequence[int]] | None = None,
) -> grain.IterDataset:
  """Batches without end of what the source holds, shuffled anew in each pass.

  The order derives from seed and round alone. Draw n goes to process n modulo `process_count`, so
  that what the processes get at a step is together the batch of a run of one process.

  Args:
    source: has `__len__` and `__getitem__`.
    batch_size: of all processes together.
    seed: config.seed.
    round: from 1.
    process_index: this process, from 0.
    process_count: of all processes.
    groups: numbers of items that count together as one: a pass has one item of each group, the next
      pass the group's next one, from one that is drawn by lot. None: each item counts alone.

  Returns:
    {"prompt": items of the source, "draw": their places in the endless order, from 0}, lists of
    batch_size / process_count. The iterator's state is one small dict, whatever the source's size.

  Raises:
    ValueError: the source is empty; there is no such process; or `batch_size` does not divide by
      `process_count`.
  """
  if not len(source):
    raise ValueError("there are 0 prompts to draw from: there must be at least 1")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index is {process_index}: it must be from 0 to {process_count - 1}")
  if batch_size % process_count:
    raise ValueError(
      f"the batch of {batch_size} prompts does not divide by {process_count} processes: it must be "
      "a multiple"
    )
  count = len(source if groups is None else groups)

  def item(number: int, draw: int) -> int:
    """The item that draw `draw` has of a group."""
    if groups is None:
      return number
    first = derive(seed, round, "turn", number)
    return groups[number][(first + draw // count) % len(groups[number])]

  order = (
    grain.MapDataset.range(count)
    .seed(derive(seed, round, "prefixes"))  # as the draw was named from the first: orders stay
    .shuffle()
    .repeat()
    .map_with_index(
      lambda draw, number: {"prompt": item(int(number), int(draw)), "draw": int(draw)}
    )
  )
  if process_count > 1:
    order = order[process_index::process_count]
  # Read once it is known whose it is: a process reads no line of another's.
  read = order.map(lambda drawn: drawn | {"prompt": source[drawn["prompt"]]})
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return read.to_iter_dataset(options).batch(batch_size // process_count, batch_fn=_collect)


def _collect(drawn: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
  return {name: [each[name] for each in drawn] for name in ("prompt", "draw")}
