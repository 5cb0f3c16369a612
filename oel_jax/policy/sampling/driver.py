"""One call of `generate` under way: what the scheduler decides, done by the engine's programs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from oel_jax.policy.sampling import engine, slot_state
from oel_jax.policy.sampling import scheduler as scheduling
from oel_jax.policy.sampling.beginnings import Beginnings
from oel_jax.policy.sampling.scheduler import Draw, Entry, Scheduler
from oel_jax.policy.sampling.token_sampling import NOT_FINITE
from oel_jax.runtime.finite import NotFiniteError


class Requests(NamedTuple):
  """What is asked for besides the prompts, one a prompt.

  Attributes:
    seeds: [n] uint32.
    limits: [n] int32, most ids of the response.
    eos_ids: [n, E] int32, ids any of which ends the response; -1 fills.
  """

  seeds: np.ndarray
  limits: np.ndarray
  eos_ids: np.ndarray


def requests_of(
  prompts: Sequence[Sequence[int]], seeds: Any, limits: Any, ends: Any, vocabulary: int
) -> Requests:
  """Checks what `sampler.generate` was given, and makes it arrays; the weights have `vocabulary`
  rows.
  """
  n = len(prompts)
  one = lambda value: isinstance(value, (int, np.integer))
  limits = [limits] * n if one(limits) else limits
  ends = [ends] * n if all(map(one, ends)) else ends
  for name, given in (("seeds", seeds), ("limits", limits), ("lists of end ids", ends)):
    if len(given) != n:
      raise ValueError(f"generate got {n} prompts but {len(given)} {name}: one a prompt")
  for i, prompt in enumerate(prompts):
    check_prompt(prompt, i, vocabulary)
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
  return Requests(np.array(seeds, np.uint32), np.asarray(limits, np.int32), padded)


def check_prompt(prompt: Sequence[int], index: int, vocabulary: int) -> None:
  """Raises ValueError if a prompt is empty, or holds an id that the weights have no row for."""
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


class Driver:
  """Takes the prompts of one scheduler through the engine.

  Attributes:
    scheduler: decides; `responses` there are the ids drawn.
    scores: the log-probabilities of each prompt's ids, if they are asked for.
  """

  def __init__(
    self,
    weights: Any,
    slots: slot_state.Slots,
    scheduler: Scheduler,
    requests: Requests,
    how: dict[str, Any],
    *,
    programs: Any,
    beginnings: Beginnings,
    indices: Sequence[int],
    pad_id: int,
    reply: Callable[[int, list[int]], tuple[Sequence[int], int] | None] | None,
  ):
    """`weights`, `slots` and `how` are the engine's, `programs` itself or `on_cpu`,
    `beginnings` the texts before the scheduler's prompts. `indices`: the caller's numbers of these,
    for errors; `reply` is given the scheduler's.
    """
    self.scheduler, self.requests = scheduler, requests
    self.scores: list[list[float]] = [[] for _ in scheduler.prompts]
    self._weights, self._slots, self._how = weights, slots, how
    self._programs = programs
    self._beginnings, self._indices = beginnings, indices
    self._pad_id, self._reply = pad_id, reply
    self._columns = scheduler.table.columns

  def advance(self) -> None:
    """One round: seats those who wait, draws, asks for replies meanwhile, and lets go who has
    ended.
    """
    entries = [(entry, self._insert(entry)) for entry in self.scheduler.next_entries()]
    rows = self.scheduler.shrink()
    if rows is not None:
      self._slots = slot_state.resize(self._slots, rows, attn_impl=self._how["attn_impl"])
    draw = self.scheduler.next_draw()
    drawn = self._decode(draw) if draw else None
    # Nothing has been waited for so far: the device draws while replies are made up.
    for i in self.scheduler.finished():
      self._follow(i)
    if drawn is None:
      return
    firsts, drawn, active = jax.device_get(([f for _, f in entries], drawn, self._slots.active))
    for (entry, _), first in zip(entries, firsts, strict=True):
      prompts = [i for i, whole in zip(entry.prompts, entry.whole, strict=True) if whole]
      own = [array[entry.places[entry.whole], None] for array in first]
      self._keep(prompts, own)
      self.scheduler.entered(prompts, own[0][:, 0])
    seated = self.scheduler.seated
    self._keep(list(seated.values()), [array[list(seated)] for array in drawn])
    self.scheduler.drawn(drawn[0], active)

  def _insert(self, entry: Entry) -> tuple[jax.Array, ...]:
    """Starts the prefill of a batch. Returns its first ids, as `engine.prefill_insert` does."""
    self._grow(entry.columns)
    scheduler = self.scheduler
    slots = scheduler.table.rows // scheduler.devices  # of a device, which counts its own
    # Which of the entry's prompts stands where in the batch; the first one fills it.
    order = np.zeros((scheduler.devices * entry.batch,), np.int32)
    order[entry.places] = np.arange(len(entry.prompts))
    length, parts = entry.length, zip(entry.prompts, entry.shared, strict=True)
    tokens, lengths = pad_right(
      [scheduler.prompts[i][begin : begin + length] for i, begin in parts],
      len(entry.prompts),
      length,
      self._pad_id,
    )
    # A row beyond all slots is written nowhere: what fills the batch goes there.
    rows = np.full(order.shape, scheduler.table.rows, np.int32)
    rows[entry.places] = entry.rows % slots
    seeds, limits, eos_ids = (array[entry.prompts] for array in self.requests)
    # After one id, which nobody looks at, those end that are not read whole: they go on waiting.
    requests = seeds, np.where(entry.whole, limits, 1).astype(np.int32), eos_ids
    requests = tuple(array[order] for array in requests)
    shared = None
    if entry.looks:
      shared = engine.Shared(
        *(array[order] for array in (entry.sources % slots, entry.back, entry.shared))
      )
    texts = {}
    if self._beginnings.texts:
      texts = dict(text_R=np.int32([scheduler.texts[i] for i in entry.prompts])[order])
    self._slots, first = self._programs.prefill_insert(
      self._weights,
      self._slots,
      tokens[order],
      lengths[order],
      rows,
      requests,
      shared,
      **texts,
      **self._how,
    )
    return first

  def _decode(self, draw: Draw) -> tuple[jax.Array, ...]:
    """Starts the device on the next ids. Returns them as `engine.decode` does."""
    self._grow(draw.columns)
    self._slots, drawn = self._programs.decode(
      self._weights, self._slots, draw.steps, draw.min_active, chunk=scheduling.CHUNK, **self._how
    )
    return drawn

  def _grow(self, columns: int) -> None:
    if columns > self._columns:
      self._slots = slot_state.resize(
        self._slots, columns=columns, attn_impl=self._how["attn_impl"]
      )
      self._columns = columns

  def _follow(self, i: int) -> None:
    """Asks what follows a response; if something does, the prompt goes on with it."""
    following = self._reply(i, self.scheduler.responses[i])
    if following is None:
      return
    prompt, self.requests.seeds[i] = following
    self.scores[i] = []
    text, rest = self._beginnings.split(prompt)
    self.scheduler.follow(i, rest, text)

  def _keep(self, numbers: Sequence[int], drawn: Sequence[np.ndarray]) -> None:
    """Checks what was drawn for these prompts, ids [n, steps] with -1 where nothing, and keeps the
    log-probabilities that may come with them.

    Raises:
      NotFiniteError: logits were not finite.
    """
    ids = drawn[0]
    broken = np.flatnonzero((ids == NOT_FINITE).any(1))
    if len(broken):
      i, before = numbers[broken[0]], (ids[broken[0]] >= 0).sum()
      more = f", and those of {len(broken) - 1} more prompts" if len(broken) > 1 else ""
      dtype = self._weights["norm"]["scale"].dtype
      length = self._beginnings.length(self.scheduler.texts[i]) + len(self.scheduler.prompts[i])
      raise NotFiniteError(
        f"sampling has stopped: the logits of the prompt at index {self._indices[i]} "
        f"({length} tokens) are not finite after "
        f"{len(self.scheduler.responses[i]) + before} tokens of its response{more}: the weights, "
        f"or what {dtype} makes of them, are no numbers to draw from",
        prompts=[self._indices[numbers[place]] for place in broken],
      )
    for scores in drawn[1:]:
      for i, row, own in zip(numbers, scores, ids, strict=True):
        self.scores[i].extend(row[own >= 0].tolist())


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
