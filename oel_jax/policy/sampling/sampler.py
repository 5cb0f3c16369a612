"""Sampling: prompts in, responses out, through a fixed number of slots that are refilled as
sequences end.

Each sequence draws from its own random stream, keyed by its seed and by the position in the
response, so its tokens do not depend on what shares the slots (up to the rounding of a matrix
product's shape). Who shares them follows from the prompts and the tokens drawn, never from a clock:
the same call gives the same bits on one machine. On a CPU the prompts are shared out among its
cores, each with slots of its own: the small products of a token keep little more than one of them
busy.

A long beginning is not read again while a slot still holds it: the turns of a game before, or a
text that others begin with, too.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import engine, kv_cache
from oel_jax.policy.sampling.token_sampling import NOT_FINITE, Sampling
from oel_jax.runtime.finite import NotFiniteError

# A few shapes, so that little is compiled
BATCHES = (
  1,
  4,
  8,
  16,
  32,
  64,
  128,
  256,
  512,
)
# Prompts that enter together; more than half of a batch is filled, unless it is one of FEW.
ENTRIES = (
  1,
  4,
  32,
  256,
)
FEW = 1024  # tokens, padding included, that make a batch small
BATCH_TOKENS = (
  65536  # prompt tokens that are prefilled at once, padding and what is not read again included
)
LENGTHS = (
  96,
  256,
  512,
  640,
  768,
  896,
  1024,
  1280,
  1536,
  2048,
  3072,
  4096,
  6144,
  8192,
  12288,
  16384,
)
TURN = (
  40  # goes before them for replies on a CPU, which are short: there, padding is not for nothing
)
RINGS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
# A device's, of the keys and values of the first prompts and their responses; longer replies make
# it more.
CACHE_BYTES = 16 << 30
SLOTS = 256  # a device at most, if it is not said how many there are
SLOTS_CPU = 32  # the same; there, a token takes twice as long with twice as many
FEWER = (8, 16)  # slots on a CPU when no more are left of SLOTS_CPU or more
PROMPTS_CORE = 8  # at least, of each core of a CPU that has prompts of its own
SHARED = 48  # tokens in common that are worth taking from a slot
SHARED_CPU = 24  # the same; there, the slots are looked at for every prompt anyway
WORTH_WAITING = 128  # tokens in common that are worth waiting for until they stand in a slot
CHUNK = 64  # tokens a row between two looks at who has ended
CHUNK_REPLIES = 4  # the same while replies are made up

# Given the number of a prompt and the ids drawn for it: a further prompt and its seed, or None.
Reply = Callable[[int, list[int]], tuple[Sequence[int], int] | None]


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model that can be talked to: architecture, parameters and tokenizer.

  Attributes:
    architecture: its shapes.
    params: as `transformer.init` makes them (layers stacked).
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
        f"the tokenizer has {self.tokenizer.vocabulary} pieces but the weights only "
        f"{self.architecture.vocabulary}: "
        "they do not belong together"
      )

  def sample(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    reply: Reply | None = None,
  ) -> list[list[int]]:
    """`generate` with this policy's own parts."""
    return generate(
      self.params,
      self.architecture,
      prompts,
      seeds,
      sampling=sampling,
      max_new_tokens=max_new_tokens,
      eos_ids=self.tokenizer.eos_ids,
      pad_id=self.tokenizer.pad_id,
      dtype=self.dtype,
      reply=reply,
    )

  def replace(self, params: Any) -> "Policy":
    """The same policy with other parameters."""
    return dataclasses.replace(self, params=params)


def bucket(size: int, sizes: Sequence[int]) -> int:
  """The smallest of `sizes` that holds `size`; beyond the largest, the next multiple of it."""
  return next((s for s in sizes if s >= size), -(-size // sizes[-1]) * sizes[-1])


def generate(
  params: Any,
  architecture: Architecture,
  prompts: Sequence[Sequence[int]],
  seeds: Sequence[int],
  *,
  sampling: Sampling,
  max_new_tokens: int | Sequence[int],
  eos_ids: Sequence[int] | Sequence[Sequence[int]],
  pad_id: int,
  dtype: Any = jnp.float32,
  slots: int | None = None,
  logprobs: bool = False,
  reply: Reply | None = None,
) -> Any:
  """Samples one response a prompt.

  Args:
    params: stacked parameters.
    architecture: their shapes.
    prompts: token ids, one non-empty list a sequence.
    seeds: uint32, one a sequence.
    sampling: temperature above 0, top_p in (0, 1], top_k >= 0, min_p in [0, 1].
    max_new_tokens: limit of a response, at least 1, or one a prompt; a response that reaches it has
      no end-of-sequence id.
    eos_ids: ids any of which ends a response, or one such list a prompt; the id is kept.
    pad_id: fills what is not there.
    dtype: of the activations.
    slots: most sequences side by side, rounded down to one of BATCHES; None: as many as fit into
      CACHE_BYTES, at most SLOTS, or SLOTS_CPU of each core of a CPU. Where replies become much
      longer than the first prompts, fewer must be asked for: the slots stay as many. On a mesh of
      one process all this holds for each device's share of them, which is one slot at least.
    logprobs: whether to return the log-probabilities of the ids, too: under the model as it is,
      without temperature and filters.
    reply: called as each response ends, with the prompt's index and the ids; may return a prompt to
      go on with and its seed, which takes that index's place. It runs while the device draws for
      others, on a CPU in one of several threads, never in two at a time. A prompt that repeats the
      one before and goes on is cheap.

  Returns:
    The ids sampled (last), in the order of the prompts; with `logprobs` a pair, the second one
    float32 array a prompt.

  Raises:
    ValueError: an empty prompt, an id that the weights have no row for, a limit or slots below 1,
      or not one seed, limit or list a prompt; a reply's prompt is checked when it comes.
    NotFiniteError: NaN or +inf is among a prompt's logits, and nothing is drawn from them. It names
      the prompt's index and how many tokens its response had.
  """
  if slots is not None and slots < 1:
    raise ValueError(f"generate got slots {slots}: it must be at least 1, or None")
  requests = _requests(architecture, prompts, seeds, max_new_tokens, eos_ids)
  if not prompts:
    return ([], []) if logprobs else []
  placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
  mesh = (
    placed.mesh if isinstance(placed, jax.sharding.NamedSharding) and placed.mesh.size > 1 else None
  )
  weights = engine.prepare(params, architecture=architecture, dtype=dtype, mesh=mesh)
  how = dict(
    architecture=architecture,
    sampling=sampling,
    logprobs=logprobs,
    path=kv_cache.path(architecture, dtype),
    mesh=mesh,
  )
  parts = min(_cores(mesh), len(prompts) // PROMPTS_CORE, slots or len(prompts)) or 1
  by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  lock, stopped = threading.Lock(), threading.Event()
  ids, scores = [[] for _ in prompts], [[] for _ in prompts]

  def work(own: list[int]) -> None:
    def answer(k: int, drawn: list[int]) -> tuple[Sequence[int], int] | None:
      with lock:
        following = reply(own[k], drawn)
      if following is not None:
        _check(following[0], own[k], architecture.vocabulary)
      return following

    run = _Run(
      weights,
      [prompts[i] for i in own],
      [array[own] for array in requests],
      how,
      indices=own,
      pad_id=pad_id,
      dtype=dtype,
      slots=slots and slots // parts,
      cache_bytes=CACHE_BYTES // parts,
      reply=reply and answer,
    )
    while not stopped.is_set() and (run.waiting or run.seated or run.ended):
      run.advance()
    for k, i in enumerate(own):
      ids[i], scores[i] = run.ids[k], np.float32(run.scores[k])

  _side_by_side(work, [by_length[part::parts] for part in range(parts)], stopped)
  return (ids, scores) if logprobs else ids


def _cores(mesh: Any) -> int:
  """How many may share out the prompts: the cores of a CPU that this process may use; other devices
  are busy with one batch.
  """
  if mesh is not None or jax.default_backend() != "cpu":
    return 1
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _side_by_side(
  work: Callable[[Any], None], parts: Sequence[Any], stopped: threading.Event
) -> None:
  """Works on all parts, each in a thread of its own if there are several; if one fails, or this
  thread is interrupted, the others stop.
  """
  if len(parts) == 1:
    return work(parts[0])
  with futures.ThreadPoolExecutor(len(parts)) as pool:
    working = [pool.submit(work, part) for part in parts]
    try:
      futures.wait(working, return_when=futures.FIRST_EXCEPTION)
    finally:
      stopped.set()
  for one in working:
    one.result()


def _requests(
  architecture, prompts, seeds, limits, ends
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Seeds [n], limits [n] and end ids [n, E], -1 where a list is shorter; checks what `generate`
  was given.
  """
  n = len(prompts)
  one = lambda value: isinstance(value, (int, np.integer))
  limits = [limits] * n if one(limits) else limits
  ends = [ends] * n if all(map(one, ends)) else ends
  for name, given in (("seeds", seeds), ("limits", limits), ("lists of end ids", ends)):
    if len(given) != n:
      raise ValueError(f"generate got {n} prompts but {len(given)} {name}: one a prompt")
  for i, prompt in enumerate(prompts):
    _check(prompt, i, architecture.vocabulary)
    if limits[i] < 1:
      raise ValueError(
        f"generate got max_new_tokens {limits[i]} for the prompt at index {i}: it must be at least "
        "1"
      )
  # At least one column: XLA (JAX 0.11.2) crashes where an array of no elements is spread over
  # several GPUs.
  padded = np.full((n, max([1, *map(len, ends)])), -1, np.int32)
  for row, ids in zip(padded, ends, strict=True):
    row[: len(ids)] = ids
  return np.array(seeds, np.uint32), np.asarray(limits, np.int32), padded


def _check(prompt: Sequence[int], index: int, vocabulary: int) -> None:
  if not prompt:
    raise ValueError(
      f"generate got an empty prompt at index {index}: a prompt has at least one token"
    )
  if not 0 <= min(prompt) <= max(prompt) < vocabulary:
    wrong = next(token for token in prompt if not 0 <= token < vocabulary)
    raise ValueError(
      f"generate got the id {wrong} in the prompt at index {index}: ids are at least 0 and below "
      f"{vocabulary}"
    )


class _Entry(NamedTuple):
  """Prompts that enter together; arrays are int32, one number a prompt.

  Attributes:
    prompts: their numbers.
    rows: the slot of each.
    source, shared: the slot that holds what the prompt begins with, and how many tokens of it.
    at: the place in the batch in which the rest is read.
    shape: what of that batch a device gets, prompts and tokens.
  """

  prompts: list[int]
  rows: np.ndarray
  source: np.ndarray
  shared: np.ndarray
  at: np.ndarray
  shape: tuple[int, int]


class _Run:
  """Prompts of one call of `generate` under way: the slots, who sits in them, who waits, and who
  has ended.

  The longest prompts enter first: those that enter together are then alike, so that little of their
  batch is padding. Prompts that go on with an earlier one enter before all others, so that its slot
  still holds what they begin with.

  Slot r holds the `count[r]` tokens `held[r, :count[r]]`, in the columns of the ring that end
  `age[r]` before the one to be written next; `age` is 0 for the slots that draw. Overwritten is
  what does not fit any more: count + age > size.

  On a mesh slot r is on device home[r], and a prompt is read where its slot is: it takes a
  beginning only from slots there.
  """

  def __init__(
    self, weights, prompts, requests, how, *, indices, pad_id, dtype, slots, cache_bytes, reply
  ):
    self.weights, self.prompts, self.requests, self.how = (
      weights,
      list(map(list, prompts)),
      requests,
      how,
    )
    self.indices, self.pad_id, self.reply = indices, pad_id, reply
    self.waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    self.seated: dict[int, int] = {}  # the prompt in each slot that is taken
    self.ended: dict[
      int, int
    ] = {}  # the prompt in each slot that is kept until its response is replied to
    self.ids: list[list[int]] = [[] for _ in prompts]
    self.scores: list[list[float]] = [[] for _ in prompts]
    longest, architecture, mesh = max(map(len, prompts)), how["architecture"], how["mesh"]
    token_bytes = (
      2
      * architecture.layers
      * architecture.kv_heads
      * architecture.head_size
      * jnp.dtype(dtype).itemsize
    )
    whole = bucket(longest + int(requests[1].max()), RINGS)
    self.devices, self.cpu = (
      mesh.size if engine.row_axes(mesh) else 1,
      jax.default_backend() == "cpu",
    )
    most = (
      slots // self.devices
      if slots
      else min(cache_bytes // (whole * token_bytes), SLOTS_CPU if self.cpu else SLOTS)
    )
    own = min(
      bucket(-(-len(prompts) // self.devices), BATCHES),
      max(b for b in BATCHES if b <= max(1, most)),
    )
    self.rows, self.home = self.devices * own, np.repeat(np.arange(self.devices), own)
    self.entries = [*(size for size in ENTRIES if size < own), own]
    self.shrinks = self.cpu and self.devices == 1 and self.rows >= SLOTS_CPU
    # Whether to look at the slots for every prompt, also where nothing is held: half as many
    # programs, and for a small model no loss.
    self.always = reply is not None or self.cpu
    self.lengths = (TURN, *LENGTHS) if reply is not None and self.cpu else LENGTHS
    # In XLA the attention reads the whole ring: there it grows with what is filled.
    self.size = whole if how["path"] == "triton" else bucket(longest + 1, RINGS)
    self.slots = engine.empty(
      architecture=architecture,
      rows=self.rows,
      size=self.size,
      ends=requests[2].shape[1],
      dtype=dtype,
      path=how["path"],
      mesh=mesh,
    )
    self.held = np.full((self.rows, self.size), -1, np.int32)
    self.count, self.age = np.zeros((2, self.rows), np.int32)

  def advance(self) -> None:
    """Seats those who wait, draws up to CHUNK tokens a row, asks for replies meanwhile, and lets go
    who has ended.
    """
    firsts = []
    # An eighth of the slots is free before others enter: a prefill of few costs as much as one of
    # more.
    if len(self._free()) >= max(1, self.rows // 8):
      while self.waiting and self._free():
        firsts.append(self._enter())
    self._shrink()
    drawn = self._draw() if self.seated else None
    for i in self.ended.values():
      self._go_on(i)
    self.ended = {}
    if drawn is None:
      return
    firsts, drawn, active = jax.device_get((firsts, drawn, self.slots.active))
    for entry, first in firsts:
      self._keep(entry.prompts, [array[entry.at, None] for array in first])
    rows, numbers = list(self.seated), list(self.seated.values())
    self._keep(numbers, [array[rows] for array in drawn])
    lengths = (drawn[0] >= 0).sum(1)
    self.age += lengths.max() - lengths
    for row, i in zip(rows, numbers, strict=True):
      tokens = [*self.prompts[i], *self.ids[i]][:-1]  # the id drawn last is not in the ring yet
      self.held[row, self.count[row] : len(tokens)] = tokens[self.count[row] :]
      self.count[row] = len(tokens)
      if not active[row]:
        del self.seated[row]
        if self.reply:
          self.ended[row] = i

  def _draw(self):
    """Starts the device on the next tokens. Returns the ids to come, as `engine.decode` does."""
    filled = max(len(self.prompts[i]) + max(len(self.ids[i]) - 1, 0) for i in self.seated.values())
    if filled == self.size:
      self._grow(filled + 1)
    # Those whose first id was their last count as seated here; if that leaves fewer than `least`,
    # nothing is drawn, and they leave.
    least = len(self.seated) - len(self.seated) // 8 if self.waiting or self.reply else 1
    steps = min(CHUNK_REPLIES if self.ended else CHUNK, self.size - filled)
    self.slots, drawn = engine.decode(
      self.weights, self.slots, steps, least, chunk=CHUNK, **self.how
    )
    return drawn

  def _grow(self, length: int) -> None:
    size = bucket(length, RINGS)
    self.slots = engine.grow(self.slots, size=size, path=self.how["path"])
    self.count[self.count + self.age > self.size] = 0
    self.held = np.pad(self.held, ((0, 0), (0, size - self.size)), constant_values=-1)
    self.size = size

  def _shrink(self) -> None:
    """On a CPU, where a token takes as long as there are rows: lets go of most slots when nobody
    waits and few are left.
    """
    kept = [*self.seated, *self.ended]
    fewer = next((size for size in FEWER if len(kept) <= size < self.rows), None)
    if self.waiting or not fewer or not self.shrinks:
      return
    rows = np.int32([*kept, *self._free()][:fewer])
    self.slots = engine.pick(self.slots, rows)
    self.held, self.count, self.age, self.home = (
      array[rows] for array in (self.held, self.count, self.age, self.home)
    )
    self.seated, self.ended = (
      {n: of[row] for n, row in enumerate(rows.tolist()) if row in of}
      for of in (self.seated, self.ended)
    )
    self.rows, self.entries = fewer, [size for size in self.entries if size < fewer]

  def _go_on(self, i: int) -> None:
    """Asks what follows a response; if something does, it waits before all others."""
    following = self.reply(i, self.ids[i])
    if following is None:
      return
    prompt, self.requests[0][i] = following
    self.prompts[i], self.ids[i], self.scores[i] = list(prompt), [], []
    self.waiting.insert(0, i)

  def _free(self) -> list[int]:
    return [row for row in range(self.rows) if row not in self.seated and row not in self.ended]

  def _enter(self) -> tuple[_Entry, tuple[jax.Array, ...]]:
    """Prefills the next prompts into free slots. Returns who they are, and what was drawn for their
    batch.
    """
    entry = self._next(self._free())
    taken, rows, source, shared, at, (batch, length) = entry
    longest = max(len(self.prompts[i]) for i in taken)
    if longest >= self.size:
      self._grow(longest + 1)
    # The first one fills the batch.
    own, order = (
      self.rows // self.devices,
      np.zeros((self.devices * batch,), np.int32),
    )
    order[at] = np.arange(len(taken))
    tokens, lengths = pad_right(
      [self.prompts[i][n:] for i, n in zip(taken, shared, strict=True)],
      len(taken),
      length,
      self.pad_id,
    )
    places = np.full(order.shape, self.rows, np.int32)
    places[at] = rows % own
    requests = tuple(array[taken][order] for array in self.requests)
    begin = engine.Shared(
      *(array[order] for array in (source % own, (self.age + self.count)[source], shared))
    )
    begin = begin if self.always or shared.any() else None
    self.slots, first = engine.enter(
      self.weights, self.slots, tokens[order], lengths[order], places, requests, begin, **self.how
    )
    gone = set(taken)
    self.waiting = [i for i in self.waiting if i not in gone]
    for row, i in zip(rows.tolist(), taken, strict=True):
      self.held[row] = -1
      self.held[row, : len(self.prompts[i])] = self.prompts[i]
      self.count[row], self.age[row] = len(self.prompts[i]), 0
      self.seated[row] = i
    return entry, first

  def _places(
    self, free: list[int], source: np.ndarray, shared: np.ndarray, wanted: set[int]
  ) -> np.ndarray:
    """A free slot on the same device for each: the one that holds its beginning, or else one that
    holds nothing, or else any, those wanted by prompts that still wait last.
    """
    left, rows = set(free), []
    for row, count in zip(source.tolist(), shared.tolist(), strict=True):
      rows.append(row if count and row in left else None)
      left.discard(rows[-1])
    held, others = self._held(), [[] for _ in range(self.devices)]
    for row in sorted(left, key=lambda row: (row in wanted, held[row] > 0, row), reverse=True):
      others[self.home[row]].append(row)
    return np.int32(
      [
        others[home].pop() if row is None else row
        for row, home in zip(rows, self.home[source], strict=True)
      ]
    )

  def _held(self) -> np.ndarray:
    """How many tokens of each slot can be read."""
    return np.where(self.count + self.age <= self.size, self.count, 0)

  def _next(self, free: list[int]) -> _Entry:
    """Who enters next, all with about as much to read.

    A prompt that begins like one of these waits until that one's slot can be read.
    """
    taken, source, shared, nth, wanted, sizes, length = [], [], [], [], set(), self.entries, 0
    room = np.bincount(self.home[free], minlength=self.devices)  # prompts that a device can take
    others, held = np.full((len(free), max(map(len, self.prompts))), -1, np.int32), self._held()
    for i in self.waiting[: 2 * len(free)]:
      prompt = np.asarray(self.prompts[i], np.int32)
      alike = np.minimum(_alike(self.held, prompt, SHARED_CPU if self.cpu else SHARED), held)
      # Where most of it stands, and then where most room is.
      row = int(
        np.where(room[self.home] > 0, alike * (self.rows + 1) + room[self.home], -1).argmax()
      )
      home, count = self.home[row], int(alike[row])
      beside = np.flatnonzero(self.home[source] == home) if taken else []
      if len(beside) and _alike(others[beside], prompt, count + WORTH_WAITING).any():
        continue
      reads = bucket(len(prompt) - count, self.lengths)
      if taken and not reads <= length <= 2 * reads:
        wanted |= {row} if count else set()
        continue
      if not taken:
        length, size = reads, max(self.size, bucket(len(prompt) + 1, RINGS))
        looked = size if self.always or held.any() else 0
        sizes = [n for n in self.entries if n * (looked + length) <= BATCH_TOKENS] or self.entries[
          :1
        ]
        room = np.minimum(room, sizes[-1])
      others[len(taken), : len(prompt)] = prompt
      taken.append(i)
      source.append(row)
      shared.append(count)
      nth.append(len(beside))
      room[home] -= 1
      if not room.any():
        break
    n = max(nth) + 1
    batch = max(
      [size for size in sizes if n <= size and (size < 2 * n or size * length <= FEW)]
      or [size for size in sizes if size <= n]
    )
    those = np.flatnonzero(np.array(nth) < batch)
    wanted |= {source[k] for k in range(len(taken)) if nth[k] >= batch and shared[k]}
    source, shared = np.int32(source)[those], np.int32(shared)[those]
    rows = self._places(free, source, shared, wanted)
    return _Entry(
      [taken[k] for k in those],
      rows,
      source,
      shared,
      self.home[source] * batch + np.array(nth)[those],
      (batch, length),
    )

  def _keep(self, numbers, drawn) -> None:
    """Adds what was drawn for each of these prompts; -1 is nothing.

    Raises:
      NotFiniteError: logits were not finite.
    """
    broken = np.flatnonzero((drawn[0] == NOT_FINITE).any(1))
    if len(broken):
      i, row = numbers[broken[0]], drawn[0][broken[0]]
      more = f", and those of {len(broken) - 1} more prompts" if len(broken) > 1 else ""
      raise NotFiniteError(
        "sampling has stopped: the logits of the prompt at index "
        f"{self.indices[i]} ({len(self.prompts[i])} tokens) are not finite after "
        f"{len(self.ids[i]) + (row >= 0).sum()} tokens of its response{more}: the weights, or "
        f"what {self.weights['norm']['scale'].dtype} makes of them, are no numbers to draw from",
        prompts=[self.indices[numbers[place]] for place in broken],
      )
    for kept, rows in zip((self.ids, self.scores), drawn, strict=False):
      for i, row, ids in zip(numbers, rows, drawn[0], strict=True):
        kept[i].extend(row[ids >= 0].tolist())


def _alike(rows: np.ndarray, prompt: np.ndarray, least: int) -> np.ndarray:
  """How many tokens each row [n, length] begins with in common with a prompt, of which one more is
  left to read; fewer than `least` count as 0.
  """
  most = min(rows.shape[1], len(prompt) - 1)
  # Mostly there is none: whole rows of a few thousand slots take a host milliseconds a prompt.
  if most < least or not (rows[:, :least] == prompt[:least]).all(1).any():
    return np.zeros((len(rows),), int)
  same = rows[:, :most] == prompt[:most]
  count = np.where(same.all(1), most, same.argmin(1))
  return np.where(count < least, 0, count)


def pad_right(
  sequences: Sequence[Sequence[int]], rows: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 tokens [rows, length], padded on the right, and int32 lengths [rows]; rows beyond
  the sequences have length 1.
  """
  tokens = np.full((rows, length), pad_id, np.int32)
  lengths = np.ones((rows,), np.int32)
  for i, sequence in enumerate(sequences):
    tokens[i, : len(sequence)] = sequence
    lengths[i] = len(sequence)
  return tokens, lengths
