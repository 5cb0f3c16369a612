"""Sampling: prompts in, responses out, through a fixed number of slots that are refilled as sequences end.

Each sequence draws from its own random stream, keyed by its seed and by the position in the response, so its tokens do not depend on
what shares the slots (up to the rounding of a matrix product's shape). Who shares them follows from the prompts and the tokens drawn,
never from a clock: the same call gives the same bits on one machine.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.policy import decode, ring
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import Sampling

BATCHES = (1, 4, 8, 16, 32, 64, 128, 256, 512)  # a few shapes, so that little is compiled (traps, 20)
BATCH_TOKENS = 65536  # prompt tokens that are prefilled at once, padding included
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
RINGS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
CACHE_BYTES = 16 << 30  # of the slots' keys and values, if it is not said how many slots there are; nor are there more than
SLOTS = 256
SHARED = 4096  # prompt tokens that need not be read again, so that a beginning is worth a program of its own
CHUNK = 64  # tokens a row between two looks at who has ended


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model that can be talked to: architecture, parameters and tokenizer.

  Attributes:
    architecture: its shapes.
    params: as `model.init` makes them (layers stacked).
    tokenizer: its text side.
    dtype: of the activations.
  """

  architecture: Architecture
  params: Any
  tokenizer: Any
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.tokenizer.vocabulary > self.architecture.vocabulary:
      raise ValueError(
          f"the tokenizer has {self.tokenizer.vocabulary} pieces but the weights only {self.architecture.vocabulary}: "
          "they do not belong together"
      )

  def sample(
      self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, sampling: Sampling, max_new_tokens: int
  ) -> list[list[int]]:
    """`generate` with this policy's own parts."""
    return generate(
        self.params, self.architecture, prompts, seeds, sampling=sampling, max_new_tokens=max_new_tokens,
        eos_ids=self.tokenizer.eos_ids, pad_id=self.tokenizer.pad_id, dtype=self.dtype,
    )  # fmt: skip

  def replace(self, params: Any) -> "Policy":
    """The same policy with other parameters."""
    return dataclasses.replace(self, params=params)


def bucket(size: int, sizes: Sequence[int]) -> int:
  """The smallest of `sizes` that holds `size`; beyond the largest, the next multiple of it."""
  return next((s for s in sizes if s >= size), -(-size // sizes[-1]) * sizes[-1])


def generate(
    params: Any, architecture: Architecture, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, sampling: Sampling,
    max_new_tokens: int | Sequence[int], eos_ids: Sequence[int] | Sequence[Sequence[int]], pad_id: int, dtype: Any = jnp.float32,
    slots: int | None = None, logprobs: bool = False,
) -> Any:  # fmt: skip
  """Samples one response a prompt.

  Args:
    params: stacked parameters.
    architecture: their shapes.
    prompts: token ids, one non-empty list a sequence.
    seeds: uint32, one a sequence.
    sampling: temperature above 0, top_p in (0, 1], top_k >= 0, min_p in [0, 1].
    max_new_tokens: limit of a response, at least 1, or one a prompt; a response that reaches it has no end-of-sequence id.
    eos_ids: ids any of which ends a response, or one such list a prompt; the id is kept.
    pad_id: fills what is not there.
    dtype: of the activations.
    slots: most sequences side by side; None: as many as fit into CACHE_BYTES, at most SLOTS.
    logprobs: whether to return the log-probabilities of the ids, too: under the model as it is, without temperature and filters.

  Returns:
    The sampled ids, in the order of the prompts; with `logprobs` a pair, the second one float32 array a prompt.

  Raises:
    ValueError: an empty prompt, an id that the weights have no row for, a limit below 1, or not one seed, limit or list a prompt.
  """
  requests = _requests(architecture, prompts, seeds, max_new_tokens, eos_ids)
  if not prompts:
    return ([], []) if logprobs else []
  run = _Run(params, architecture, prompts, requests, sampling, pad_id, dtype, slots, logprobs)
  while run.waiting or run.seated:
    run.advance()
  return (run.ids, [np.float32(scores) for scores in run.scores]) if logprobs else run.ids


def _requests(architecture, prompts, seeds, limits, ends) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Seeds [n], limits [n] and end ids [n, E], -1 where a list is shorter; checks what `generate` was given."""
  n = len(prompts)
  one = lambda value: isinstance(value, (int, np.integer))
  limits = [limits] * n if one(limits) else limits
  ends = [ends] * n if all(map(one, ends)) else ends
  for name, given in (("seeds", seeds), ("limits", limits), ("lists of end ids", ends)):
    if len(given) != n:
      raise ValueError(f"generate got {n} prompts but {len(given)} {name}: one a prompt")
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"generate got an empty prompt at index {i}: a prompt has at least one token")
    if not 0 <= min(prompt) <= max(prompt) < architecture.vocabulary:
      wrong = next(token for token in prompt if not 0 <= token < architecture.vocabulary)
      raise ValueError(f"generate got the id {wrong} in the prompt at index {i}: ids are at least 0 and below {architecture.vocabulary}")
    if limits[i] < 1:
      raise ValueError(f"generate got max_new_tokens {limits[i]} for the prompt at index {i}: it must be at least 1")
  padded = np.full((n, max(map(len, ends), default=0)), -1, np.int32)
  for row, ids in zip(padded, ends, strict=True):
    row[: len(ids)] = ids
  return np.asarray(seeds, np.uint32), np.asarray(limits, np.int32), padded


class _Run:
  """One call of `generate` under way: the slots, who sits in them and who waits.

  The prompts with most to read enter first: those that enter together are then alike, so that little of their batch is padding.
  """

  def __init__(self, params, architecture, prompts, requests, sampling, pad_id, dtype, slots, logprobs):
    self.prompts, self.requests, self.pad_id = prompts, requests, pad_id
    self.how = dict(architecture=architecture, sampling=sampling, logprobs=logprobs)
    beginnings, self.source, self.shared = _beginnings(prompts)
    self.waiting = collections.deque(sorted(range(len(prompts)), key=lambda i: self.shared[i] - len(prompts[i])))
    self.seated: dict[int, int] = {}  # the prompt in each slot that is taken
    self.ids: list[list[int]] = [[] for _ in prompts]
    self.scores: list[list[float]] = [[] for _ in prompts]
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = placed.mesh if isinstance(placed, jax.sharding.NamedSharding) and placed.mesh.size > 1 else None
    self.weights = decode.prepare(params, architecture=architecture, dtype=dtype, mesh=mesh)
    longest = max(map(len, prompts))
    token_bytes = 2 * architecture.layers * architecture.kv_heads * architecture.head_size * jnp.dtype(dtype).itemsize
    whole = bucket(longest + int(requests[1].max()), RINGS)
    most = slots or min(max(1, CACHE_BYTES // (whole * token_bytes)), SLOTS)
    self.rows = min(bucket(len(prompts), BATCHES), max(b for b in BATCHES if b <= most))
    self.path = ring.path(architecture, dtype) if mesh is None else "xla"
    # In XLA the attention reads the whole ring: there it grows with what is filled.
    self.size = whole if self.path == "triton" else bucket(longest + 1, RINGS)
    self.known, self.room = None, 0
    if beginnings:
      self.room = bucket(max(map(len, beginnings)), LENGTHS)
      tokens, _ = pad_right(beginnings, bucket(len(beginnings), BATCHES), self.room, pad_id)
      self.known = decode.read(self.weights, tokens, architecture=architecture)
    self.slots = decode.empty(architecture=architecture, rows=self.rows, size=self.size, ends=requests[2].shape[1], dtype=dtype, mesh=mesh)

  def advance(self) -> None:
    """Seats those who wait, draws up to CHUNK tokens a row, and lets go who has ended."""
    firsts = []
    # An eighth of the slots is free before others enter: a prefill of few costs as much as one of more.
    least = self.rows - self.rows // 8
    if len(self.seated) < least:
      while self.waiting and len(self.seated) < self.rows:
        firsts.append(self._enter())
    filled = max(len(self.prompts[i]) + max(len(self.ids[i]) - 1, 0) for i in self.seated.values())
    if filled == self.size:
      self.size = bucket(filled + 1, RINGS)
      self.slots = decode.grow(self.slots, size=self.size)
    steps = min(CHUNK, self.size - filled)
    least = least if self.waiting else 1
    self.slots, drawn = decode.decode(self.weights, self.slots, steps, least, chunk=CHUNK, path=self.path, **self.how)
    firsts, drawn, active = jax.device_get((firsts, drawn, self.slots.active))
    for taken, first in firsts:
      self._keep(taken, [array[: len(taken), None] for array in first])
    self._keep(self.seated.values(), [array[list(self.seated)] for array in drawn])
    self.seated = {row: i for row, i in self.seated.items() if active[row]}

  def _enter(self):
    """Prefills the next prompts into free slots. Returns their numbers, and what was drawn for them."""
    first = self.waiting[0]
    length = bucket(len(self.prompts[first]) - self.shared[first], LENGTHS)
    free = [row for row in range(self.rows) if row not in self.seated]
    most = max((rows for rows in BATCHES if rows * (self.room + length) <= BATCH_TOKENS), default=1)
    taken = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting), most))]
    batch = min(bucket(len(taken), BATCHES), self.rows)
    tokens, lengths = pad_right([self.prompts[i][self.shared[i] :] for i in taken], batch, length, self.pad_id)
    rows = np.full((batch,), self.rows, np.int32)
    rows[: len(taken)] = free[: len(taken)]
    fill = lambda array: np.resize(array[taken], (batch, *array.shape[1:]))
    requests = tuple(map(fill, self.requests))
    known = (self.known, fill(self.source), fill(self.shared))
    self.slots, first = decode.enter(self.weights, self.slots, tokens, lengths, rows, requests, *known, **self.how)
    self.seated |= dict(zip(free, taken, strict=False))
    return taken, first

  def _keep(self, numbers, drawn) -> None:
    """Adds what was drawn for each of these prompts; -1 is nothing."""
    for kept, rows in zip((self.ids, self.scores), drawn, strict=False):
      for i, row, ids in zip(numbers, rows, drawn[0], strict=True):
        kept[i].extend(row[ids >= 0].tolist())


def _beginnings(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], np.ndarray, np.ndarray]:
  """Beginnings that several prompts share; for each prompt, which one [n] and how many tokens of it [n], 0 for none.

  In alphabetical order, prompts that begin alike stand together. A stretch of them is one group, or is cut where neighbours have least in
  common, whichever saves more.
  """
  order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
  alike = [_alike(prompts[a], prompts[b]) for a, b in zip(order, order[1:])]

  def groups(start: int, stop: int) -> tuple[int, list[tuple[int, int, int]]]:
    if stop - start < 2:
      return 0, []
    least = min(alike[start : stop - 1])
    whole = (stop - start - 1) * least
    cuts = [start, *(i + 1 for i in range(start, stop - 1) if alike[i] == least), stop]
    parts = [groups(a, b) for a, b in zip(cuts, cuts[1:])]
    saved = sum(part for part, _ in parts)
    return (whole, [(start, stop, least)]) if whole >= saved else (saved, [group for _, found in parts for group in found])

  source, shared = np.zeros((len(prompts),), np.int32), np.zeros((len(prompts),), np.int32)
  saved, found = groups(0, len(order))
  if saved < SHARED:
    return [], source, shared
  for number, (start, stop, length) in enumerate(found):
    source[order[start:stop]], shared[order[start:stop]] = number, length
  return [prompts[order[start]][:length] for start, _, length in found], source, shared


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
  """How many tokens two prompts begin with in common, so that each has at least one more."""
  most = min(len(first), len(second)) - 1
  return next((i for i in range(most) if first[i] != second[i]), most)


def pad_right(sequences: Sequence[Sequence[int]], rows: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 tokens [rows, length], padded on the right, and int32 lengths [rows]; rows beyond the sequences have length 1."""
  tokens = np.full((rows, length), pad_id, np.int32)
  lengths = np.ones((rows,), np.int32)
  for i, sequence in enumerate(sequences):
    tokens[i, : len(sequence)] = sequence
    lengths[i] = len(sequence)
  return tokens, lengths
