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

from oel_jax.policy import decode
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import Sampling

BATCHES = (1, 4, 8, 16, 32, 64, 128, 256, 512)  # a few shapes, so that little is compiled (traps, 20)
BATCH_TOKENS = 65536  # prompt tokens that are prefilled at once, padding included
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
RINGS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
CACHE_BYTES = 16 << 30  # of the slots' keys and values, if it is not said how many slots there are; nor are there more than
SLOTS = 256
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
  limits = [limits] * n if isinstance(limits, int) else limits
  ends = [ends] * n if all(isinstance(end, int) for end in ends) else ends
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

  The longest prompts enter first: those that enter together are then alike, so that little of their batch is padding, and the ring need
  not grow for later ones.
  """

  def __init__(self, params, architecture, prompts, requests, sampling, pad_id, dtype, slots, logprobs):
    self.prompts, self.requests, self.pad_id = prompts, requests, pad_id
    self.how = dict(architecture=architecture, sampling=sampling, logprobs=logprobs)
    self.waiting = collections.deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    self.seated: dict[int, int] = {}  # the prompt in each slot that is taken
    self.ids: list[list[int]] = [[] for _ in prompts]
    self.scores: list[list[float]] = [[] for _ in prompts]
    self.weights = decode.prepare(params, architecture=architecture, dtype=dtype)
    longest = len(prompts[self.waiting[0]])
    token_bytes = 2 * architecture.layers * architecture.kv_heads * architecture.head_size * jnp.dtype(dtype).itemsize
    whole = bucket(longest + int(requests[1].max()), RINGS)
    most = slots or min(max(1, CACHE_BYTES // (whole * token_bytes)), SLOTS)
    self.rows = min(bucket(len(prompts), BATCHES), max(b for b in BATCHES if b <= most))
    self.path = "triton" if jax.default_backend() == "gpu" and len(jax.tree.leaves(self.weights)[0].devices()) == 1 else "xla"
    # In XLA the attention reads the whole ring: there it grows with what is filled.
    self.size = whole if self.path == "triton" else bucket(longest + 1, RINGS)
    self.slots = decode.empty(architecture=architecture, rows=self.rows, size=self.size, ends=requests[2].shape[1], dtype=dtype)

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
    length = bucket(len(self.prompts[self.waiting[0]]), LENGTHS)
    free = [row for row in range(self.rows) if row not in self.seated]
    taken = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting), max(1, BATCH_TOKENS // length)))]
    batch = min(bucket(len(taken), BATCHES), self.rows)
    tokens, lengths = pad_right([self.prompts[i] for i in taken], batch, length, self.pad_id)
    rows = np.full((batch,), self.rows, np.int32)
    rows[: len(taken)] = free[: len(taken)]
    requests = tuple(np.resize(array[taken], (batch, *array.shape[1:])) for array in self.requests)
    self.slots, first = decode.enter(self.weights, self.slots, tokens, lengths, rows, requests, **self.how)
    self.seated |= dict(zip(free, taken, strict=False))
    return taken, first

  def _keep(self, numbers, drawn) -> None:
    """Adds what was drawn for each of these prompts; -1 is nothing."""
    for kept, rows in zip((self.ids, self.scores), drawn, strict=False):
      for i, row, ids in zip(numbers, rows, drawn[0], strict=True):
        kept[i].extend(row[ids >= 0].tolist())


def pad_right(sequences: Sequence[Sequence[int]], rows: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 tokens [rows, length], padded on the right, and int32 lengths [rows]; rows beyond the sequences have length 1."""
  tokens = np.full((rows, length), pad_id, np.int32)
  lengths = np.ones((rows,), np.int32)
  for i, sequence in enumerate(sequences):
    tokens[i, : len(sequence)] = sequence
    lengths[i] = len(sequence)
  return tokens, lengths
