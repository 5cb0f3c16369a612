"""Who sits in which slot, on made-up arrivals and without JAX: against a circular cache of token
ids, column by column, that is written and read as the engine's is.
"""

import subprocess
import sys

import numpy as np
import pytest

from oel_jax.policy.sampling import scheduler as scheduling
from oel_jax.policy.sampling import sizes, slot_table
from oel_jax.policy.sampling.scheduler import Scheduler

JUNK = -7  # what a slot that does not draw writes


@pytest.fixture(name="small", autouse=True)
def fixture_small(monkeypatch):
  """Sizes at which a few tokens do what takes hundreds."""
  monkeypatch.setattr(sizes, "CACHE_LENGTHS", (32, 48, 64, 128, 256))
  monkeypatch.setattr(sizes, "PREFILL_LENGTHS", (6, 12, 24, 48, 96))
  monkeypatch.setattr(sizes, "PREFILL_BATCHES_CPU", (1, 4))
  monkeypatch.setattr(sizes, "LONG_LENGTH_CPU", 24)
  monkeypatch.setattr(sizes, "PREFILL_BATCHES", (1, 2, 4, 8))
  monkeypatch.setattr(sizes, "FULL_BATCH_TOKENS", 48)
  monkeypatch.setattr(sizes, "FEW_PROMPTS", 4)
  monkeypatch.setattr(sizes, "PIECE_LENGTHS", (6, 12, 24))
  monkeypatch.setattr(scheduling, "MIN_SHARED", 4)
  monkeypatch.setattr(scheduling, "MIN_SHARED_CPU", 3)
  monkeypatch.setattr(scheduling, "MIN_SHARED_TO_WAIT", 6)
  monkeypatch.setattr(sizes, "SMALL_BATCH_TOKENS", 40)
  monkeypatch.setattr(scheduling, "CHUNK", 8)


class Cache:
  """The engine's circular cache, of ids in place of keys and values."""

  def __init__(self, rows, columns):
    self.tokens, self.column = np.full((rows, columns), JUNK), 0

  def back(self, row, back, count):
    """`count` ids of a row, the first of them `back` columns before the next one to be written."""
    columns = (self.column - back + np.arange(count)) % self.tokens.shape[1]
    return self.tokens[row, columns].tolist()

  def grow(self, columns):
    old = self.tokens.shape[1]
    if columns > old:
      turned = np.roll(self.tokens, -self.column, axis=1)
      self.tokens = np.pad(turned, ((0, 0), (0, columns - old)), constant_values=JUNK)
      self.column = old

  def step(self, ids):
    self.tokens[:, self.column] = ids
    self.column = (self.column + 1) % self.tokens.shape[1]

  def put(self, row, prompt):
    self.tokens[row, (self.column - len(prompt) + np.arange(len(prompt))) % len(self.tokens.T)] = (
      prompt
    )


class Game:
  """Takes a scheduler through whole workloads and checks each of its decisions.

  `lengths(i, turn)` says how many ids a response has, `reply(i, turn)` what is said to one: an
  array of ids to go on with, a list that is a new prompt, or None. `entries` are all that have
  entered, `ended` how many responses of each prompt have ended. Prompts that begin anew stand
  behind no text.
  """

  def __init__(self, prompts, lengths, reply=None, seed=0, slots=4, **how):
    self.rng = np.random.default_rng(seed)
    columns = sizes.bucket(max(map(len, prompts)) + 1, sizes.CACHE_LENGTHS)
    how = dict(replies=reply is not None) | how
    self.scheduler = Scheduler(prompts, slots=slots, columns=columns, **how)
    self.cache = Cache(self.scheduler.table.rows, columns)
    self.lengths, self.reply = lengths, reply
    self.said = {}  # the ids of each seated prompt
    self.behind = np.full(self.scheduler.table.rows, -1)  # the text that each slot was read behind
    self.turns, self.ended = [0] * len(prompts), [0] * len(prompts)
    self.entries, self.asked = [], list(map(list, prompts))

  def play(self, rounds=10_000):
    for _ in range(rounds):
      if self.scheduler.done:
        break
      self.round()
    return self

  def round(self):
    s = self.scheduler
    taken = [*s.seated, *s.kept]
    entries = s.next_entries()
    taken += [row for entry in entries for row in entry.rows[entry.whole].tolist()]
    assert len(set(taken)) == len(taken) == len(s.seated) + len(s.kept)
    firsts = [(entry, self.insert(entry)) for entry in entries]
    rows = s.shrink()
    if rows is not None:
      self.cache.tokens, self.behind = self.cache.tokens[rows], self.behind[rows]
    draw = s.next_draw()
    drawn = self.decode(draw) if draw else None
    for i in s.finished():
      more = self.reply(i, self.turns[i])
      self.turns[i] += 1
      if more is not None:
        anew = isinstance(more, list)
        following = more if anew else self.asked[i] + s.responses[i] + list(more)
        s.follow(i, following, -1 if anew else s.texts[i])
        self.asked[i] = list(s.prompts[i])
    if drawn is None:
      assert not firsts
      return
    for _, whole in firsts:
      s.entered(whole, [self.said[i][0] for i in whole])
    ids, active = drawn
    seated = dict(s.seated)
    s.drawn(ids, active)
    for row, i in seated.items():
      assert s.responses[i] == self.said[i]
      self.ended[i] += not active[row]
    self.believes_what_is_so()

  def believes_what_is_so(self):
    """What the scheduler believes can be read of each slot is there, and those who draw fit."""
    table, s = self.scheduler.table, self.scheduler
    for row, count in enumerate(table.readable().tolist()):
      back = int(table.count[row] + table.behind[row])
      assert self.cache.back(row, back, count) == table.tokens[row, :count].tolist()
    for row, i in s.seated.items():
      assert table.behind[row] == 0
      assert table.tokens[row, : table.count[row]].tolist() == (s.prompts[i] + s.responses[i])[:-1]
    assert not set(s.seated) & set(s.kept) and len(set(s.seated.values())) == len(s.seated)

  def insert(self, entry):
    s, table = self.scheduler, self.scheduler.table
    slots = table.rows // s.devices
    # Each is read on the device of its slot, in a place of its own there.
    assert (entry.rows // slots == entry.places // entry.batch).all()
    assert (entry.rows // slots == entry.sources // slots).all()
    assert len(set(entry.places.tolist())) == len(entry.prompts) and entry.batch <= slots
    assert entry.looks or not entry.shared.any()
    self.cache.grow(entry.columns)
    before = Cache(*self.cache.tokens.shape)
    before.tokens, before.column = self.cache.tokens.copy(), self.cache.column
    behind = self.behind.copy()
    given = entry.prompts, entry.rows, entry.sources, entry.shared, entry.back, entry.whole
    for i, row, source, shared, back, whole in zip(*given, strict=True):
      prompt = s.prompts[i]
      assert shared < len(prompt) < entry.columns == len(self.cache.tokens.T)
      assert whole == (len(prompt) - shared <= entry.length)
      assert before.back(source, back, shared) == prompt[:shared]
      assert not shared or behind[source] == s.texts[i]
      self.behind[row] = s.texts[i]
      self.cache.put(row, prompt[: shared + entry.length])
      if whole:
        self.said[i] = [int(self.rng.integers(100))]
    self.entries.append(entry)
    return [i for i, whole in zip(entry.prompts, entry.whole, strict=True) if whole]

  def decode(self, draw):
    s = self.scheduler
    self.cache.grow(draw.columns)
    rows = s.table.rows
    ids, active = np.full((rows, scheduling.CHUNK), -1), np.zeros(rows, bool)
    for row, i in s.seated.items():
      active[row] = len(self.said[i]) < self.lengths(i, self.turns[i])
    step = 0
    assert 0 < draw.steps <= scheduling.CHUNK and draw.min_active >= 1
    while step < draw.steps and active.sum() >= draw.min_active:
      written = np.full(rows, JUNK)
      for row, i in s.seated.items():
        if active[row]:
          filled = s.prompts[i] + self.said[i][:-1]
          # The query sees all that came before, nothing of which was overwritten.
          assert len(filled) < draw.columns
          assert self.cache.back(row, len(filled), len(filled)) == filled
          written[row] = self.said[i][-1]
      self.cache.step(written)
      for row, i in s.seated.items():
        if active[row]:
          ids[row, step] = self.rng.integers(100)
          self.said[i].append(int(ids[row, step]))
          active[row] = len(self.said[i]) < self.lengths(i, self.turns[i])
      step += 1
    return ids, active


def random_prompts(rng, count, longest=40):
  """Some of which begin alike."""
  texts = [rng.integers(0, 100, int(n)).tolist() for n in rng.integers(3, 30, 3)]
  alike = rng.random()
  return [
    (texts[rng.integers(3)] if rng.random() < alike else [])
    + rng.integers(0, 100, int(rng.integers(1, longest))).tolist()
    for _ in range(count)
  ]


def test_it_needs_no_jax():
  code = "import sys, oel_jax.policy.sampling.scheduler; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("seed", range(40))
def test_every_prompt_ends_once_and_the_cache_holds_what_is_believed(seed, monkeypatch):
  rng = np.random.default_rng(seed)
  count, slots = int(rng.integers(1, 40)), int(rng.choice([1, 2, 4, 8, 16]))
  how = dict(devices=int(rng.choice([1, 1, 2, 4])), cpu=bool(rng.integers(2)))
  prompts, turns = random_prompts(rng, count), rng.integers(0, 4, count)
  lengths = rng.integers(1, 30, (count, 5))
  if seed % 2:
    how["texts"] = rng.integers(-1, 2, count)
  if rng.random() < 0.3:
    monkeypatch.setattr(sizes, "MAX_BATCH_TOKENS", 150)
  if rng.random() < 0.5:
    monkeypatch.setattr(sizes, "MAX_SLOTS_CPU", 10)

  def reply(i, turn):
    if turn >= turns[i]:
      return None
    more = rng.integers(0, 100, int(rng.integers(1, 8)))
    return more if rng.random() < 0.8 else more.tolist()  # goes on, or begins anew

  talks = rng.random() < 0.6
  game = Game(
    prompts,
    lambda i, turn: lengths[i, turn],
    reply if talks else None,
    seed,
    slots,
    **how,
  ).play()
  assert game.scheduler.done
  assert game.ended == [1 + turns[i] * talks for i in range(count)]
  entered = [i for entry in game.entries for i in np.compress(entry.whole, entry.prompts)]
  assert np.bincount(entered, minlength=count).tolist() == game.ended
  assert [len(ids) for ids in game.scheduler.responses] == [
    lengths[i, turns[i] * talks] for i in range(count)
  ]


# Admit


def admitted(prompts, reply=None, **how):
  return Game(prompts, lambda i, turn: 3, reply, **how).play().entries


def distinct(*lengths):
  """Prompts that have nothing in common."""
  return [[n] * length for n, length in enumerate(lengths)]


def test_the_longest_enter_first_with_those_of_their_length():
  entries = admitted(distinct(10, 40, 11, 42, 9, 41, 3), cpu=True)
  # Batches of at most half padding: 42 and 41 and 40 tokens in rows of 48; then rows of 12.
  assert [(e.prompts, e.batch, e.length) for e in entries[:2]] == [([3, 5, 1], 4, 48), ([2], 1, 12)]
  assert sorted(i for e in entries for i in e.prompts) == list(range(7))


def test_a_long_prompt_is_read_in_pieces_one_behind_the_other():
  entries = admitted(distinct(40, 20, 3), lambda i, turn: None)
  assert [(e.length, dict(zip(e.prompts, e.shared.tolist()))) for e in entries] == [
    (12, {0: 0, 1: 0, 2: 0}),
    (12, {0: 12, 1: 12}),
    (12, {0: 24}),
    (6, {0: 36}),
  ]
  assert [e.whole.tolist() for e in entries] == [
    [False, False, True],
    [False, True],
    [False],
    [True],
  ]
  assert {e.batch for e in entries} == {4}


def test_without_replies_a_prompt_looks_at_the_cache_for_a_quarter_of_it_or_more():
  text = list(range(16))
  prompts = [text + [50] * 8, text + [51] * 20, text[:5] + [52] * 35, [53] * 3]
  entries = admitted(prompts, slots=8)
  seen = {}
  for entry in entries:
    for i, n, whole in zip(entry.prompts, entry.shared.tolist(), entry.whole, strict=True):
      seen.setdefault(i, []).append((n, bool(whole), entry.length))
  # The longest first. To the second five tokens of 36 are not worth a look; to the third 16 of 24
  # are, and the last one fills its batch.
  assert seen == {2: [(0, True, 48)], 1: [(0, True, 48)], 0: [(16, True, 12)], 3: [(0, True, 12)]}


def test_nobody_enters_before_an_eighth_of_the_slots_is_free():
  scheduler = Scheduler(distinct(*[5] * 40), slots=16, columns=32)
  seated = sum(len(entry.prompts) for entry in scheduler.next_entries())
  assert seated == 16 and not scheduler.next_entries()
  row = next(iter(scheduler.seated))
  del scheduler.seated[row]
  assert not scheduler.next_entries()
  del scheduler.seated[next(iter(scheduler.seated))]
  assert len(scheduler.next_entries()[0].prompts) in (1, 2) and len(scheduler.seated) == 16


def test_prompts_are_spread_over_devices():
  scheduler = Scheduler(distinct(*[5] * 10), slots=4, columns=32, devices=3)
  entries = scheduler.next_entries()
  devices = np.concatenate([entry.rows // 4 for entry in entries])
  assert sorted(np.bincount(devices, minlength=3).tolist()) == [3, 3, 4]


# Reuse and evict


def test_a_beginning_is_taken_over_once_a_slot_holds_it():
  text = list(range(20))
  prompts = [text + [50] * 5, text + [51] * 4, [60] * 24, [61] * 23]
  entries = admitted(prompts, cpu=True)
  # The second one waits while the first is read, then reads the rest, from the other one's slot.
  assert [e.prompts for e in entries] == [[0, 2, 3], [1]]
  assert entries[1].shared.tolist() == [20] and entries[1].sources[0] == entries[0].rows[0]
  assert entries[1].rows[0] not in entries[0].rows  # which still draws


def test_on_a_cpu_a_long_batch_looks_at_the_cache_only_for_who_begins_there():
  text = list(range(30))
  prompts = [text + [50] * 8, text + [51] * 4, text + [52] * 30, [60] * 36, [61] * 10]
  entries = admitted(prompts, cpu=True, slots=8)
  # Who begins as the longest does waits for it, and has few tokens to read then.
  assert [(e.prompts, e.shared.tolist(), e.length, e.looks) for e in entries] == [
    ([2], [0], 96, False),
    ([0, 1, 4], [30, 30, 0], 12, True),
    ([3], [0], 48, False),
  ]
  (other,) = admitted(prompts[:1], devices=1)
  assert not other.looks  # elsewhere, without replies, only for what is shared
  assert all(e.looks for e in admitted(distinct(60, 9), lambda i, turn: None))


def test_of_a_beginning_one_token_is_left_to_read():
  rows = np.int32([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9], [7] * 6])
  found = slot_table.common_prefix(rows, np.int32([1, 2, 3, 4, 5, 6]), 2)
  assert found.tolist() == [5, 3, 0]
  assert slot_table.common_prefix(rows, np.int32([1, 2, 3, 4, 5, 6]), 4).tolist() == [5, 0, 0]
  assert slot_table.common_prefix(rows, np.int32([1, 2]), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_common_prefixes_are_those_counted_one_by_one(seed):
  rng = np.random.default_rng(seed)
  rows, prompt = rng.integers(0, 2, (200, 9)), rng.integers(0, 2, rng.integers(1, 14))
  least = int(rng.integers(1, 4))

  def count(row):
    n = 0
    while n < min(len(row), len(prompt) - 1) and row[n] == prompt[n]:
      n += 1
    return n if n >= least else 0

  assert slot_table.common_prefix(rows, prompt, least).tolist() == list(map(count, rows))


def test_what_others_overwrote_is_not_taken_over_and_does_not_come_back():
  table = slot_table.SlotTable.empty(1, 2, 12)
  table.insert(0, [1, 2, 3, 4, 5, 6])
  table.insert(1, [7])
  prompt = np.int32([1, 2, 3, 4, 5, 6, 7])
  table.behind[0] = 6
  assert table.shared(prompt, 2).tolist() == [6, 0]
  table.behind[0] = 7  # 13 columns of 12
  assert table.shared(prompt, 2).tolist() == [0, 0] and table.readable().tolist() == [0, 1]
  table.grow(24)
  assert table.shared(prompt, 2).tolist() == [0, 0] and table.readable().tolist() == [0, 1]


def test_a_new_prompt_evicts_what_nobody_wants():
  """Slots 0 to 2 hold something, slot 3 nothing; slot 1 is what a prompt begins with that waits."""
  scheduler = Scheduler([[1] * 9], slots=4, columns=32)
  for row, token in ((0, 10), (1, 11), (2, 12)):
    scheduler.table.insert(row, [token] * 8)
  new = lambda n: [scheduling._Candidate(k, 0, 0, k) for k in range(n)]
  assert scheduler._rows([0, 1, 2, 3], new(1), {1}).tolist() == [3]
  assert scheduler._rows([0, 1, 2, 3], new(3), {1}).tolist() == [3, 0, 2]
  assert scheduler._rows([0, 1, 2, 3], new(4), {1}).tolist() == [3, 0, 2, 1]
  # Two that go on from slot 1: the first one takes it, the second one another.
  both = [scheduling._Candidate(k, 1, 6, k) for k in range(2)]
  assert scheduler._rows([0, 1, 2, 3], both, set()).tolist() == [1, 3]


@pytest.mark.parametrize("slots", [1, 4, 8])
def test_a_conversation_reads_only_what_is_new(slots):
  prompts = distinct(*range(8, 16))
  more = lambda i, turn: np.int32([90, i]) if turn < 3 else None
  game = Game(prompts, lambda i, turn: 5, more, slots=slots).play()
  # The prompt before and the answer, but for its last id, stand in the cache.
  shared = {}
  for entry in game.entries:
    for i, n, whole in zip(entry.prompts, entry.shared.tolist(), entry.whole, strict=True):
      if whole:
        shared.setdefault(i, []).append(n)
  assert all(turns[0] in (0, sizes.PIECE_LENGTHS[1]) for turns in shared.values())
  assert {i: [0, *turns[1:]] for i, turns in shared.items()} == {
    i: [0] + [len(prompt) + 7 * turn - 3 for turn in (1, 2, 3)] for i, prompt in enumerate(prompts)
  }


# Fairness


@pytest.mark.parametrize("seed", range(10))
def test_the_first_who_waits_is_in_the_next_batch(seed):
  """So who waits as the n-th enters with the n-th batch at the latest, whatever others share."""
  rng = np.random.default_rng(seed)
  text = rng.integers(0, 100, 30).tolist()
  prompts = [text + random_prompts(rng, 1, 12)[0] for _ in range(60)]
  prompts += [[200] * int(n) for n in rng.integers(1, 70, 6)]
  game = Game(prompts, lambda i, turn: 1 + i % 7, slots=int(rng.choice([1, 4, 8])), cpu=True)
  places = {i: n for n, i in enumerate(game.scheduler.waiting)}
  game.play()
  for n, entry in enumerate(game.entries):
    assert all(n <= places[i] for i in entry.prompts)
  assert game.scheduler.done


def endless(slots):
  """Two conversations that never end, and five prompts that nobody replies to."""
  prompts = distinct(20, 19, 9, 8, 7, 6, 5)
  new = lambda i, turn: [i] * (20 - i) if i < 2 else None
  return Game(prompts, lambda i, turn: 2, new, slots=slots)


@pytest.mark.parametrize("slots", [1, 2])
def test_conversations_without_an_end_keep_nobody_out(monkeypatch, slots):
  monkeypatch.setattr(scheduling, "MAX_OVERTAKEN", 10)
  game = endless(slots)
  while not all(game.ended[2:]):
    game.round()
    assert sum(game.ended) <= 7 * (10 + 3)
  assert game.ended[2:] == [1] * 5
  assert sum(game.ended[:2]) > 10  # and these go on in between
  # Were nobody let in for having been overtaken, nobody would be.
  monkeypatch.setattr(scheduling, "MAX_OVERTAKEN", 10**9)
  game = endless(slots).play(1000)
  assert not any(game.ended[2:]) and sum(game.ended) >= 500


def test_shorter_conversations_always_go_on_first(monkeypatch):
  """Of no more turns than MAX_OVERTAKEN: no slot is given away between two turns."""
  monkeypatch.setattr(scheduling, "MAX_OVERTAKEN", 10)
  game = Game(distinct(9, 8, 7, 6), lambda i, t: 1, lambda i, t: [i] if t < 9 else None, slots=1)
  entered = [i for entry in game.play().entries for i in entry.prompts]
  assert entered == [i for i in range(4) for _ in range(10)]
