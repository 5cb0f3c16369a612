"""The samples of one step: responses drawn by the student (on-policy) or by the teacher
(off-policy), laid out in rows and put on the devices.
"""

from collections.abc import Sequence
from typing import Any

import jax

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation.task import Task
from oel_jax.policy.sampling.sampler import Policy, Sampling
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.seeds import derive


def sample_batch(
  task: Task,
  student: Policy,
  teacher: Policy,
  chosen: Sequence[int],
  numbers: Sequence[int],
  config: Any,
  limit: int,
  stage: str,
) -> tuple[batch_lib.Batch, list[list[int]]]:
  """Draws a knowledge text and a response for each chosen prompt; returns the batch, packed, and
  the responses' ids.

  `config` is config.consolidation; its `data` says who samples: the student from the prompt, or the
  teacher from knowledge and prompt.
  """
  prompts = [task.prompts[i] for i in chosen]
  lots = [derive(task.seed, task.round, stage, "knowledge", int(n)) for n in numbers]
  texts = [task.given[i][lot % len(task.given[i])] for i, lot in zip(chosen, lots, strict=True)]
  seeds = [derive(task.seed, task.round, stage, int(n)) for n in numbers]
  sampling = Sampling(temperature=config.temperature)
  if config.data == "student":
    responses = student.sample(prompts, seeds, sampling=sampling, max_new_tokens=limit)
  else:
    pairs = zip(texts, prompts, strict=True)
    informed = [task.knowledge[text] + prompt[task.skip[text] :] for text, prompt in pairs]
    responses = teacher.sample(informed, seeds, sampling=sampling, max_new_tokens=limit)
  # Few shapes: the room for prompts is that of the longest in the round, and responses have one of
  # three.
  rows = next(
    room for room in (-(-limit // 4), -(-limit // 2), limit) if max(map(len, responses)) <= room
  )
  length, known = _round_up(max(map(len, task.prompts))) + rows, max(map(len, task.knowledge))
  # Several texts a row where they are short: together no longer than the row, since each of its
  # tokens is compared with all of them.
  together = min(len(task.knowledge), max(1, length // max(1, known))) if config.pack else 1
  made = batch_lib.assemble(
    prompts,
    texts,
    responses,
    pad_id=student.tokenizer.pad_id,
    length=length,
    texts=together,
    pack=config.pack,
    response_length=min(length, 2 * rows) if config.pack else rows,
  )
  return made, [list(response) for response in responses]


def _round_up(length: int, multiple: int = 32) -> int:
  return -(-length // multiple) * multiple


def place(batch: batch_lib.Batch, mesh: jax.sharding.Mesh, samples: int) -> batch_lib.Batch:
  """Puts the batch on the devices, rows spread over them.

  Rows are added, masked out: devices come out even, and few shapes are compiled, each for half a
  minute on a CPU. Packed samples need a little more than half as many rows in most batches.
  """
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  rooms = [-(-samples * eighths // (8 * shards)) * shards for eighths in (2, 5, 8)]
  padded = mesh_lib.pad_batch(
    batch, mesh, multiple=next(room for room in rooms if len(batch.mask) <= room)
  )
  return mesh_lib.put(padded, mesh_lib.batch_sharding(mesh))
