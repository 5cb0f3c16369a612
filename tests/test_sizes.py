"""How large the sampler's programs are, and how many slots there are, by what the prompts need."""

import types

import pytest

from oel_jax.policy.sampling import kv_cache, sizes, slot_room
from oel_jax.policy.sampling.sizes import Batches


@pytest.mark.parametrize(
  "size,expected", [(1, 96), (96, 96), (97, 256), (16384, 16384), (16385, 32768), (40000, 49152)]
)
def test_buckets(size, expected):
  assert sizes.bucket(size, sizes.PREFILL_LENGTHS) == expected


def test_every_cache_is_whole_blocks_and_all_lengths_rise():
  for lengths in (sizes.CACHE_LENGTHS, sizes.FEWER_CACHE_LENGTHS):
    assert all(size % kv_cache.BLOCK == 0 for size in lengths)
  for name, given in vars(sizes).items():
    if isinstance(given, tuple):
      assert list(given) == sorted(set(given)), name
  assert set(sizes.FEWER_SLOT_COUNTS) <= set(sizes.SLOT_COUNTS)


def test_a_batch_is_more_than_half_full_unless_it_is_small(monkeypatch):
  monkeypatch.setattr(sizes, "SMALL_BATCH_TOKENS", 40)
  size = lambda *how: sizes.batch_size(*how)
  assert size(5, [1, 4, 8], 100) == 8 and size(4, [1, 4, 8], 100) == 4
  assert size(3, [1, 4, 8], 100) == 4 and size(2, [1, 4, 8], 100) == 1
  assert size(2, [1, 4, 8], 10) == 4 and size(1, [1, 4, 8], 5) == 8
  assert size(9, [1, 4, 8], 100) == 8
  assert size(1, [8], 1000) == 8 == size(9, [8], 1000) == size(3, [8, 64], 100)


@pytest.mark.parametrize("columns", [512, 2048, 8192, 32768])
def test_pieces_of_two_lengths_and_those_that_a_longer_cache_is_worth(columns):
  pieces = Batches(64, cpu=False, replies=True).over(columns)
  for rest in (1, 96, 97, 256, 257, 1000, 5000, 20000):
    read, steps = [], rest
    while steps > 0:
      read.append(pieces.length(steps))
      steps -= read[-1]
    assert set(read) <= set(sizes.PIECE_LENGTHS) and read == sorted(read, reverse=True)
    assert sum(read) - rest < 256 and max(read) <= max(256, columns // sizes.PIECE_SHARE)
    for length in read:
      (count,) = pieces.counts(length)
      assert count * (columns + length) <= sizes.MAX_BATCH_TOKENS or count == 1


def test_without_a_look_at_the_cache_a_prompt_enters_whole_in_a_full_batch():
  whole = Batches(256, cpu=False, replies=False)
  for rest in (1, 90, 200, 600, 3000, 20000):
    length = whole.length(rest)
    counts = whole.counts(length)
    assert length >= rest and counts[-1] * length <= max(sizes.MAX_BATCH_TOKENS, length)
    assert counts[-1] * length >= sizes.FULL_BATCH_TOKENS
  # Or a few, where the full one would be mostly padding.
  assert [whole.counts(n) for n in (96, 256, 512, 1024, 4096)] == [[8, 64], [8, 16], [8], [4], [1]]
  assert Batches(4, cpu=False, replies=False).counts(96) == [4]


def test_a_cpu_has_more_sizes_and_reads_prompts_whole():
  games = Batches(32, cpu=True, replies=True).over(256)
  assert [games.length(rest) for rest in (1, 40, 41, 300)] == [40, 40, 96, 512]
  assert games.counts(96) == [1, 4, 32] and games.counts(16384) == [1]
  assert games.fits(50, 96) and not games.fits(30, 96) and not games.fits(97, 96)


# Slots


@pytest.fixture(name="gpu")
def fixture_gpu(monkeypatch):
  other = types.SimpleNamespace(backend=lambda: "gpu")
  monkeypatch.setattr(slot_room, "target", other)


def room(lengths, limit, tokens=10**6, **how):
  found = slot_room.slot_room(lengths, limit, attn_impl="triton", devices=1, tokens=tokens, **how)
  return found.slots, found.columns


def test_a_gpu_has_few_counts_of_slots_and_lengths_of_caches(gpu):
  assert room([100] * 33, 96) == (64, 512) == room([300] * 20, 96)
  assert room([100] * 300, 96) == (256, 512) and room([1000] * 2, 96) == (4, 2048)
  # So many as are asked for.
  assert room([100] * 33, 96, slots=32) == (32, 512)


def test_replies_have_room_to_grow_where_no_slot_is_lost_by_it(gpu):
  replies = slot_room.Replies(whole=300, tokens=10**6)
  assert room([300] * 64, 96) == (64, 512)
  assert room([300] * 64, 96, replies=replies) == (64, 2048)
  # A text that may have to stand in a slot.
  assert room([100] * 64, 96, replies=replies) == (64, 512)
  assert room([100] * 64, 96, replies=replies._replace(whole=900)) == (64, 2048)
  # Memory for 64 slots of 512, not of 2,048.
  assert room([300] * 64, 96, 64 * 512, replies=replies._replace(tokens=64 * 512)) == (64, 512)


def test_a_cache_is_no_longer_than_it_must_be_where_slots_would_be_lost(gpu):
  assert room([900] * 64, 100, 64 * 1024) == (64, 1024)
  assert room([900] * 64, 100, 64 * 2048) == (64, 2048)
  assert room([900] * 64, 100, 63 * 1024) == (32, 1024) and room([900] * 64, 100, 0) == (1, 1024)
  # Also where it is said how many there are.
  assert (
    room([900] * 64, 100, 64 * 1024, slots=64)
    == (64, 1024)
    == room([900] * 64, 100, slots=64, tokens=9)
  )


def test_where_attention_reads_the_whole_cache_it_is_as_short_as_it_can_be(gpu):
  found = slot_room.slot_room([100] * 64, 400, attn_impl="xla", devices=2, tokens=10**6)
  assert found == (2, 64, 128, 512, sizes.CACHE_LENGTHS)
