"""The samples of one step: responses drawn by the student (on-policy) or by the teacher
(off-policy), laid out in rows and put on the devices.

Which shapes the arrays have follows from the round's prompts and texts and from the configuration,
hardly from the responses: the step is compiled once, and a run that is gone on with compiles the
same one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import draws, id_lists, micro_batches
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.consolidation.task import Task
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.attention import TILE
from oel_jax.policy.sampling.sampler import Policy, Sampling
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime import target
from oel_jax.runtime.seeds import derive

# What attention to a packed row may cost beside the layer's products, in floating point operations:
# up to there rows grow beyond their longest sample, so that samples fill them.
ATTENTION_SHARE = 1 / 32
# Tokens of the texts that a packed row may be given, for one of its own. More texts a row make
# fewer rows, and the teacher compares each token with all of them. Two of 2,048 beside 1,632.
TEXTS_SHARE = 2.6
# Micro-batches of a packed batch whose responses are all as long as they may be. In the last one
# that holds anything, half of the rows are padding by chance; each costs as much as 256 tokens more
# (reading the weights, and adding up gradients).
MICRO_BATCHES = 8
MICRO_BATCH_COST = 256
MULTIPLE = 32  # of a row's length


class Drawn(NamedTuple):
  """Samples of a step, in the order of its prompts.

  Attributes:
    prompts: ids of each, without knowledge.
    texts: which knowledge of the task each is given.
    responses: sampled ids.
    logprobs: of these ids, float32, as `sampler.generate` gives them; () if not asked for.
    longest: tokens of the longest response that was sampled with these.
  """

  prompts: list[Sequence[int]]
  texts: list[int]
  responses: list[list[int]]
  logprobs: Sequence[Any]
  longest: int

  def tokens(self) -> list[int]:
    """Of each sample, prompt and response."""
    pairs = zip(self.prompts, self.responses, strict=True)
    return [len(prompt) + len(response) for prompt, response in pairs]

  def only(self, chosen: Sequence[int]) -> "Drawn":
    """The samples of these numbers, in this order."""
    lists = [[x[i] for i in chosen] if len(x) else x for x in self[:-1]]
    return Drawn(*lists, self.longest)


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
  the responses' ids. Arguments as those of `draw`.
  """
  drawn = draw(task, student, teacher, chosen, numbers, config, limit, stage)
  return assemble(task, student, drawn, config, limit), drawn.responses


def draw(
  task: Task,
  student: Policy,
  teacher: Policy,
  chosen: Sequence[int],
  numbers: Sequence[int],
  config: Any,
  limit: int,
  stage: str,
  *,
  logprobs: bool = False,
) -> Drawn:
  """Draws a knowledge text and a response for each chosen prompt; with `logprobs`, also what the
  student's own responses had.

  `config` is config.consolidation; its `data` says who samples: the student from the prompt, or the
  teacher from knowledge and prompt.
  """
  prompts = [task.prompts[i] for i in chosen]
  lots = [derive(task.seed, task.round, stage, "knowledge", int(n)) for n in numbers]
  texts = [task.given[i][lot % len(task.given[i])] for i, lot in zip(chosen, lots, strict=True)]
  seeds = [derive(task.seed, task.round, stage, int(n)) for n in numbers]
  how, scores = dict(sampling=Sampling(temperature=config.temperature), max_new_tokens=limit), ()
  if config.data == "student" and logprobs:
    responses, scores = student.sample(prompts, seeds, logprobs=True, **how)
  elif config.data == "student":
    responses = student.sample(prompts, seeds, **how)
  else:
    informed = [task.informed(*pair) for pair in zip(prompts, texts, strict=True)]
    responses = teacher.sample(informed, seeds, **how)
  responses = [list(response) for response in responses]
  return Drawn(prompts, texts, responses, scores, max(map(len, responses)))


def usable(drawn: Drawn, limit: int, eos_ids: Sequence[int] | None) -> tuple[Drawn, bool]:
  """The samples whose responses the limit did not cut, all of them if `eos_ids` is None, and True;
  if all were cut, one of them, and False: none of its tokens is to count.
  """
  if eos_ids is None:
    return drawn, True
  left = draws.whole(drawn.responses, limit, eos_ids)
  return drawn.only(left or [0]), bool(left)


def assemble(
  task: Task, policy: Policy, drawn: Drawn, config: Any, limit: int, *, counts: bool = True
) -> batch_lib.Batch:
  """The samples laid out in rows; of the policy only shapes and padding id are read. `counts` says
  whether their tokens count.
  """
  how = _layout(task, policy, drawn, config, limit)
  pad_id = policy.tokenizer.pad_id
  made = batch_lib.assemble(drawn.prompts, drawn.texts, drawn.responses, pad_id=pad_id, **how)
  if not counts:
    made.mask[:] = False
  return made


def rows_of(task: Task, policy: Policy, drawn: Drawn, config: Any, limit: int) -> list[list[int]]:
  """Which samples stand in each row of `assemble`, in order."""
  how = _layout(task, policy, drawn, config, limit)
  return batch_lib.rows_of(drawn.prompts, drawn.texts, drawn.responses, **how)


def _layout(task, policy, drawn, config, limit) -> dict[str, Any]:
  """How `batch.assemble` is to lay the samples out."""
  shape = row_shape(
    policy.architecture,
    task.prompts,
    task.knowledge,
    limit=limit,
    longest=drawn.longest,
    pack=config.pack,
  )
  return {"pack": config.pack, **shape._asdict()}


class RowShape(NamedTuple):
  """T, R and M of `batch.Batch`."""

  length: int
  response_length: int
  texts: int


def row_shape(
  architecture: Architecture,
  prompts: Sequence[Sequence[int]],
  knowledge: Sequence[Sequence[int]],
  *,
  limit: int,
  longest: int,
  pack: bool,
) -> RowShape:
  """The shape of a batch's rows, which hold the longest prompt with its response whole.

  Args:
    architecture: says how dear attention is to a row of several samples.
    prompts, knowledge: ids, all those of the round.
    limit: most tokens of a response.
    longest: tokens of the batch's longest response. It makes one of three rooms for a response;
      where these are small beside what a packed row may hold, all three give the same shape, and on
      a CPU all packed rows have that of `limit`.
    pack: whether a row may hold several samples.
  """
  sizes = id_lists.sizes(prompts)
  longest_prompt = int(sizes.max())
  rooms = [-(-limit // 4), -(-limit // 2), limit]
  if not pack:
    room = next(room for room in rooms if longest <= room)
    return RowShape(_round_up(longest_prompt, MULTIPLE) + room, room, 1)
  # On a CPU one length: a shorter one is one more step to compile, and its rows hold fewer samples.
  # Elsewhere one of its own only for a room that makes rows a quarter shorter than `limit` does.
  cpu = target.backend() == "cpu"
  rooms = [limit] if cpu else rooms
  whole = _row_length(architecture, longest_prompt + limit)
  lengths = [_row_length(architecture, longest_prompt + room) for room in rooms]
  length, room = next(
    (length, room)
    for length, room in zip(lengths, rooms, strict=True)
    if longest <= room and (length <= 3 * whole // 4 or room == limit)
  )
  # As much of the row as of a mean prompt with its longest response.
  share = room / (room + sizes.mean())
  response_length = max(room, min(length, _round_up(int(share * length), 32)))
  known = max(1, teacher_lib.room(knowledge) if cpu else max(map(len, knowledge)))
  texts = min(len(knowledge), max(1, int(TEXTS_SHARE * length / known)))
  return RowShape(length, response_length, texts)


def _row_length(a: Architecture, longest: int) -> int:
  """Of a packed row whose longest sample has so many tokens."""
  products = a.width * a.head_size * (2 * a.heads + 2 * a.kv_heads) + 3 * a.width * a.feedforward
  affordable = int(ATTENTION_SHARE * products / (2 * a.heads * a.head_size))
  return max(_round_up(longest, MULTIPLE), _round_up(affordable, TILE))


def _round_up(length: int, multiple: int) -> int:
  return -(-length // multiple) * multiple


def micro_tokens_of(
  config: Any,
  prompts: Sequence[Sequence[int]],
  *,
  limit: int,
  samples: int,
  mesh: jax.sharding.Mesh,
) -> int:
  """Most tokens of a micro-batch on one device, for `step.make_step` and `place`:
  config.micro_tokens, or less where packed batches of `samples` would seldom fill that.
  """
  if not config.pack:
    return config.micro_tokens
  most = samples * (id_lists.sizes(prompts).mean() + limit)
  most /= mesh_lib.row_shards(mesh)
  # As many packed rows have room, whose length is such a multiple; and rounds whose prompts are a
  # little longer have the same program.
  return max(1, min(config.micro_tokens, int(most / MICRO_BATCHES) // MULTIPLE * MULTIPLE))


def place(
  batch: batch_lib.Batch, mesh: jax.sharding.Mesh, samples: int, micro_tokens: int
) -> batch_lib.Batch:
  """Puts the batch, as `padded` makes it, on the devices, rows spread over them."""
  made = padded(batch, mesh, samples, micro_tokens)
  return mesh_lib.put(made, mesh_lib.batch_sharding(mesh))


def padded(
  batch: batch_lib.Batch, mesh: jax.sharding.Mesh, samples: int, micro_tokens: int
) -> batch_lib.Batch:
  """The batch of up to `samples` with as many rows as the devices get, micro-batch by micro-batch.

  Rows are added, masked out: there are always as many as if each sample had one of its own. The
  step runs no micro-batch behind the last that holds a sample, and samples stand in the first ones.
  """
  shards = mesh_lib.row_shards(mesh)
  length = batch.tokens.shape[1]
  parts = lambda rows: micro_batches.count_of(rows, length, shards, micro_tokens)
  # Micro-batches are equal parts of the rows: a few rows more may make far fewer of them.
  cost = lambda rows: rows // shards * length + parts(rows) * MICRO_BATCH_COST
  fewest = _round_up(samples, shards)
  rows = min(range(fewest, fewest + shards * max(1, micro_tokens // length), shards), key=cost)
  made = mesh_lib.pad_batch(batch, mesh, multiple=rows)
  # Micro-batch p is rows p, p + count, …: a part of it lies on every device.
  count = parts(rows)
  spread = lambda x: x.reshape(count, rows // count, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
  return jax.tree.map(spread, made)
