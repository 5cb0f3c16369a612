"""Who sits in which slot: the sampler's decisions, plain host code that never touches a device.

The life of a slot:

             next_entries               drawn: its last id            finished
    free  ----------------->  seated  --------------------->  kept  ----------->  free
                              (draws)   without replies: straight to free

A free slot still holds what it held (`slot_table`): a prompt that begins with it reads only the
rest, in that slot or in another one of the same device. A slot is kept while its response may be
replied to, so that the prompt that goes on finds there what it begins with.

One round, as the driver goes through it:

    next_entries()   which prompts are prefilled into which free slots, batch by batch
    shrink()         on a CPU: which slots to keep, when few are left
    next_draw()      how many steps to decode
    finished()       whose responses may be replied to now, while the device draws
    follow(...)        a reply: the prompt goes on
    entered(...)     each prompt's first id
    drawn(...)       the ids of the steps, and who goes on drawing

The same prompts, ids and replies give the same decisions: no clock is looked at.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from oel_jax.policy.sampling import sizes
from oel_jax.policy.sampling.slot_table import SlotTable, common_prefix

MIN_SHARED = 48  # tokens in common that are worth taking over from a slot
MIN_SHARED_CPU = 24  # the same; there, the cache is looked at for every prompt anyway
MIN_SHARE = 4  # this part of a prompt is worth a look at the cache where not every prompt takes one
MIN_SHARED_TO_WAIT = 128  # tokens in common that are worth waiting for until a slot holds them
CHUNK = 64  # steps between two looks at who has ended
CHUNK_REPLIES = 4  # the same while replies are made up
MAX_OVERTAKEN = 64  # prompts that enter while one waits, for each prompt of the call


class Entry(NamedTuple):
  """n prompts that are prefilled together; arrays are [n] int32.

  Attributes:
    prompts: their numbers.
    rows: the slot of each.
    sources, shared: the slot that holds what the prompt begins with, and how many tokens of it.
    back: how many columns before the next one the source's first token stands.
    whole: whether it is read to its end; if not, nothing is drawn for it, and it goes on waiting.
    places: where in the batch, which is all devices' parts one after the other.
    batch: rows of the batch on one device.
    length: tokens of a row of the batch.
    columns: how many the cache must have by then; it grows to them.
    looks: whether the batch looks at the cache for what prompts begin with.
  """

  prompts: list[int]
  rows: Int[np.ndarray, "n"]
  sources: Int[np.ndarray, "n"]
  shared: Int[np.ndarray, "n"]
  back: Int[np.ndarray, "n"]
  whole: Bool[np.ndarray, "n"]
  places: Int[np.ndarray, "n"]
  batch: int
  length: int
  columns: int
  looks: bool


class Draw(NamedTuple):
  """What is decoded next.

  Attributes:
    steps: ids of a row, at most.
    min_active: it stops when fewer rows than this draw.
    columns: how many the cache must have; it grows to them.
  """

  steps: int
  min_active: int
  columns: int


class _Candidate(NamedTuple):
  """A prompt that may be in the next batch.

  Attributes:
    prompt: its number.
    source: the slot with most of its beginning; the prompt enters on that slot's device.
    shared: tokens of that beginning.
    nth: of the batch's prompts on that device.
  """

  prompt: int
  source: int
  shared: int
  nth: int


class Scheduler:
  """Prompts under way: who waits, who sits where, and who has ended.

  The longest prompts enter first: those that enter together are then alike, so that little of their
  batch is padding. Prompts that go on with an earlier one enter before all others, so that its slot
  still holds what they begin with; nobody starves, as who was overtaken too often goes first.

  Attributes:
    prompts: token ids of each, behind its text.
    texts: the number of the text that stands before each prompt, in no slot; -1 for none.
    responses: ids drawn so far of each, also when it has ended.
    waiting: numbers of the prompts that have no slot; the first of them always enters next.
    seated: the prompt in each slot that draws.
    kept: the prompt in each slot that is kept until its response is replied to.
    table: what each slot holds.
  """

  def __init__(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    texts: Sequence[int] | None = None,
    slots: int,
    columns: int,
    devices: int = 1,
    cache_lengths: Sequence[int] | None = None,
    cpu: bool = False,
    replies: bool = False,
  ):
    """`prompts` wait for `devices` times `slots` slots, over `columns` that hold the longest prompt
    and one id; they may become any of `cache_lengths`, those of `sizes.CACHE_LENGTHS` if it is
    None. `cpu`: whether the device is one; `replies`: whether responses may be replied to.
    """
    self.prompts = [list(prompt) for prompt in prompts]
    self.texts = [-1] * len(prompts) if texts is None else list(texts)
    self.responses: list[list[int]] = [[] for _ in prompts]
    self.waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    self.seated: dict[int, int] = {}
    self.kept: dict[int, int] = {}
    self.table = SlotTable.empty(devices, slots, columns)
    self.devices, self.replies = devices, replies
    self._batches = sizes.Batches(slots, cpu, replies)
    self._cache_lengths = cache_lengths or sizes.CACHE_LENGTHS
    self._min_shared = MIN_SHARED_CPU if cpu else MIN_SHARED
    self._shrinks = cpu and devices == 1 and slots >= sizes.MAX_SLOTS_CPU
    # Whether to look at the cache for every prompt, also where nothing is shared: half as many
    # programs, and for a small model no loss, unless prompts are long.
    self._always_looks = replies or cpu
    self._long = sizes.LONG_LENGTH_CPU if cpu else math.inf
    self._entered = 0  # prompts so far
    self._arrived = [0] * len(prompts)  # `_entered` when each began to wait

  @property
  def done(self) -> bool:
    """Whether every response has ended and been replied to."""
    return not (self.waiting or self.seated or self.kept)

  def next_entries(self) -> list[Entry]:
    """Seats those who wait, while slots are free. An eighth of the slots is free before anyone
    enters: a prefill of few costs as much as one of more.
    """
    entries = []
    if len(self._free()) >= max(1, self.table.rows // 8):
      while self.waiting and self._free():
        entries.append(self._next_entry())
    return entries

  def shrink(self) -> Int[np.ndarray, "r"] | None:
    """On a CPU, where a token takes as long as there are slots: which to keep, when nobody waits
    and few are left; None: all.
    """
    used = [*self.seated, *self.kept]
    fewer = next((n for n in sizes.SHRUNK_SLOT_COUNTS if len(used) <= n < self.table.rows), None)
    if self.waiting or not fewer or not self._shrinks:
      return None
    rows = np.int32([*used, *self._free()][:fewer])
    self.table.pick(rows)
    now = {row: n for n, row in enumerate(rows.tolist())}
    # In the order of the slots, as who is looked at first decides who goes on first.
    self.seated = {n: self.seated[row] for row, n in now.items() if row in self.seated}
    self.kept = {n: self.kept[row] for row, n in now.items() if row in self.kept}
    largest = max(n for n in sizes.PREFILL_BATCHES_CPU if n < fewer)
    self._batches = dataclasses.replace(self._batches, slots=largest)
    return rows

  def next_draw(self) -> Draw | None:
    """How many steps to decode now; None: nobody draws."""
    if not self.seated:
      return None
    # The id drawn last is not in the cache, and of those who have just entered none is known.
    filled = max(
      len(self.prompts[i]) + max(len(self.responses[i]) - 1, 0) for i in self.seated.values()
    )
    # Each step writes a column; over a full cache it would overwrite what is still to be read.
    if filled == self.table.columns:
      self._grow(filled + 1)
    # Some of those who have just entered may have drawn their last id at that. If fewer than this
    # go on, nothing is decoded, and they leave first.
    seated = len(self.seated)
    min_active = seated - seated // 8 if self.waiting or self.replies else 1
    steps = min(CHUNK_REPLIES if self.kept else CHUNK, self.table.columns - filled)
    return Draw(steps, min_active, self.table.columns)

  def finished(self) -> list[int]:
    """The prompts whose responses may be replied to now, each once; their slots are free then."""
    numbers = list(self.kept.values())
    self.kept = {}
    return numbers

  def follow(self, i: int, prompt: Sequence[int], text: int = -1) -> None:
    """A reply: `prompt` takes the place of prompt i, and waits before all others."""
    self.prompts[i], self.texts[i], self.responses[i] = list(prompt), text, []
    self.waiting.insert(0, i)
    self._arrived[i] = self._entered

  def entered(self, prompts: Sequence[int], ids: Sequence[int]) -> None:
    """The first id of each of these prompts, which have just been read whole."""
    for i, token in zip(prompts, ids, strict=True):
      self.responses[i].append(int(token))

  def drawn(self, ids: Int[np.ndarray, "R chunk"], active: Bool[np.ndarray, "R"]) -> None:
    """What every slot has drawn, -1 where nothing, and which slots go on."""
    lengths = (ids >= 0).sum(1)
    # There were as many steps as the longest has ids; each wrote a column in every slot.
    self.table.behind += lengths.max() - lengths
    for row, i in list(self.seated.items()):
      response, before = self.responses[i], len(self.responses[i])
      response.extend(ids[row, : lengths[row]].tolist())
      # Of these, the first was drawn before; the id drawn last is not in the cache yet.
      self.table.append(row, response[before - 1 : -1])
      if not active[row]:
        del self.seated[row]
        if self.replies:
          self.kept[row] = i

  def _free(self) -> list[int]:
    used = self.seated.keys() | self.kept.keys()
    return [row for row in range(self.table.rows) if row not in used]

  def _grow(self, length: int) -> None:
    self.table.grow(sizes.bucket(length, self._cache_lengths))

  def _next_entry(self) -> Entry:
    """The next batch: chooses the prompts and their slots, and seats them."""
    self._overtaken_first()
    free = self._free()
    candidates, wanted, counts, length, looks = self._candidates(free)
    batch = sizes.batch_size(1 + max(c.nth for c in candidates), counts, length)
    entering = [c for c in candidates if c.nth < batch]
    wanted |= {c.source for c in candidates if c.nth >= batch and c.shared}
    rows = self._rows(free, entering, wanted)
    tokens = np.int32([len(self.prompts[c.prompt]) for c in entering])
    longest = int(tokens.max())
    # Room for the prompt and the first id.
    if longest >= self.table.columns:
      self._grow(longest + 1)
    sources = np.int32([c.source for c in entering])
    shared = np.int32([c.shared for c in entering])
    entry = Entry(
      prompts=[c.prompt for c in entering],
      rows=rows,
      sources=sources,
      shared=shared,
      # Before the seats are taken: the batch reads the cache as it was.
      back=(self.table.behind + self.table.count)[sources],
      whole=shared + length >= tokens,
      places=self.table.device[sources] * batch + np.int32([c.nth for c in entering]),
      batch=batch,
      length=length,
      columns=self.table.columns,
      looks=looks,
    )
    self._seat(entry)
    return entry

  def _seat(self, entry: Entry) -> None:
    gone = set()
    ends = (entry.shared + entry.length).tolist()
    for row, i, end, whole in zip(
      entry.rows.tolist(), entry.prompts, ends, entry.whole, strict=True
    ):
      self.table.insert(row, self.prompts[i][:end], self.texts[i])
      if whole:
        self.seated[row] = i
        gone.add(i)
    self.waiting = [i for i in self.waiting if i not in gone]
    self._entered += len(gone)

  def _overtaken_first(self) -> None:
    """Puts first who has waited while very many entered. Else conversations without an end, which
    always go on before others enter, would keep the others out for ever; in shorter ones, of up to
    MAX_OVERTAKEN turns, nobody is overtaken so often.
    """
    patience = MAX_OVERTAKEN * len(self.prompts)
    overdue = [i for i in self.waiting if self._entered - self._arrived[i] > patience]
    if overdue:
      overdue.sort(key=lambda i: self._arrived[i])
      self.waiting = overdue + [i for i in self.waiting if i not in set(overdue)]

  def _candidates(self, free: list[int]) -> tuple[list[_Candidate], set[int], list[int], int, bool]:
    """Who may enter together. The first who waits always does, so nobody waits for ever; it decides
    the batch's length.

    Returns:
      The candidates; slots wanted by prompts that go on waiting; the sizes that the batch may have
      on a device; its length; and whether it looks at the cache.
    """
    chosen: list[_Candidate] = []
    wanted: set[int] = set()
    room = np.bincount(self.table.device[free], minlength=self.devices)  # of each device
    beginnings = np.full((len(free), max(map(len, self.prompts))), -1, np.int32)
    beside: list[list[int]] = [[] for _ in range(self.devices)]  # those chosen for each device
    batches, counts, batch_length = self._batches, [1], 0
    for i in self.waiting[: 2 * len(free)]:
      prompt = np.asarray(self.prompts[i], np.int32)
      source, shared = self._source(prompt, self.texts[i], room)
      mates = beside[self.table.device[source]]
      alike = [n for n in mates if self.texts[chosen[n].prompt] == self.texts[i]]
      # A prompt that begins like one of these waits until that one's slot can be read: the batch
      # reads the cache as it was before any of them entered.
      worth = max(shared + MIN_SHARED_TO_WAIT, self._worth(len(prompt)))
      if alike and common_prefix(beginnings[alike], prompt, worth).any():
        continue
      if not chosen:
        columns = max(self.table.columns, sizes.bucket(len(prompt) + 1, self._cache_lengths))
        batches = self._batches.over(columns if self._always_looks or shared else 0)
        batch_length = batches.length(len(prompt) - shared)
        if not shared and batch_length >= self._long:
          batches = batches.over(0)
        counts = batches.counts(batch_length)
        room = np.minimum(room, counts[-1])
      elif not self._joins(batches, len(prompt) - shared, shared, batch_length):
        wanted |= {source} if shared else set()
        continue
      beginnings[len(chosen), : len(prompt)] = prompt
      mates.append(len(chosen))
      chosen.append(_Candidate(i, source, shared, len(mates) - 1))
      room[self.table.device[source]] -= 1
      if not room.any():
        break
    return chosen, wanted, counts, batch_length, bool(batches.columns)

  def _joins(self, batches: sizes.Batches, rest: int, shared: int, length: int) -> bool:
    """Whether a prompt, of which a slot holds `shared` tokens and `rest` are to be read, may enter
    with others in a batch of this length.
    """
    # It takes over nothing in a batch without a look; it gains nothing from pieces by one.
    if shared and not batches.columns:
      return False
    if not (self._always_looks or shared) and batches.columns and rest > length:
      return False
    return batches.fits(rest, length)

  def _source(
    self, prompt: Int[np.ndarray, "T"], text: int, room: Int[np.ndarray, "D"]
  ) -> tuple[int, int]:
    """The slot on a device with room that holds most of a prompt's beginning, or else is where most
    room is; and how many tokens it holds of it.
    """
    shared = self.table.shared(prompt, self._min_shared, text)
    there = room[self.table.device]
    # No device has more room than there are slots: what is shared decides first.
    source = int(np.where(there > 0, shared * (self.table.rows + 1) + there, -1).argmax())
    return source, int(shared[source]) if shared[source] >= self._worth(len(prompt)) else 0

  def _worth(self, prompt: int) -> int:
    """The tokens in common for which a prompt of so many looks at the cache."""
    return 0 if self._always_looks else -(-prompt // MIN_SHARE)

  def _rows(
    self, free: list[int], entering: list[_Candidate], wanted: set[int]
  ) -> Int[np.ndarray, "n"]:
    """A free slot for each, on its source's device: the source itself, where something is shared
    and nobody before has taken it; or else a slot that holds nothing; or else any, those wanted by
    prompts that still wait last.
    """
    left, rows = set(free), []
    for c in entering:
      rows.append(c.source if c.shared and c.source in left else None)
      left.discard(rows[-1])
    held = self.table.readable()
    others: list[list[int]] = [[] for _ in range(self.devices)]
    # The best last, where `pop` takes it.
    for row in sorted(left, key=lambda row: (row in wanted, held[row] > 0, row), reverse=True):
      others[self.table.device[row]].append(row)
    for n, c in enumerate(entering):
      if rows[n] is None:
        rows[n] = others[self.table.device[c.source]].pop()
    return np.int32(rows)
