"""How many slots there are, and how long their cache is: from the prompts and the memory."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from oel_jax.policy.sampling import sizes
from oel_jax.runtime import target

GROWTH = 2  # times what the first prompts need, for replies to them, where there is memory for it


class SlotRoom(NamedTuple):
  """How many slots a device has; the columns of their cache, to begin with and at the most; and
  which numbers of columns it may have.
  """

  devices: int
  slots: int
  columns: int
  max_columns: int
  cache_lengths: Sequence[int]


class Replies(NamedTuple):
  """What responses that may be replied to need: a device has room for the longest prompt with its
  text, of `whole` tokens, in each slot, if texts are not kept and the cache has `tokens`.
  """

  whole: int
  tokens: int


def slot_room(
  lengths: Sequence[int],
  limit: int,
  *,
  attn_impl: str,
  devices: int,
  tokens: int,
  slots: int | None = None,
  replies: Replies | None = None,
) -> SlotRoom:
  """The slots for prompts of these lengths and responses of up to `limit` tokens, as `generate`
  describes them; `tokens` are those that a device's cache has memory for.
  """
  cpu, each = target.backend() == "cpu", -(-len(lengths) // devices)
  counts = sizes.SLOT_COUNTS if cpu or slots else sizes.FEWER_SLOT_COUNTS
  longest = max(lengths) + limit

  fine = functools.partial(sizes.bucket, sizes=sizes.CACHE_LENGTHS)
  fitting = [sizes.MAX_SLOTS_CPU if cpu else sizes.MAX_SLOTS, tokens // fine(longest)]
  if replies:
    fitting.append(replies.tokens // fine(replies.whole + limit))
  asked = slots // devices if slots else min(fitting)
  largest = max(n for n in sizes.SLOT_COUNTS if n <= max(1, asked))
  own = min(sizes.bucket(each, counts), largest)
  if attn_impl != "triton":
    # In XLA the attention reads the whole cache: there it grows with what is filled.
    return SlotRoom(devices, own, fine(max(lengths) + 1), fine(longest), sizes.CACHE_LENGTHS)
  few = functools.partial(sizes.bucket, sizes=sizes.FEWER_CACHE_LENGTHS)
  grown = lambda n: few(GROWTH * n)
  whole = few(replies.whole + limit) if replies else 0
  for columns in (grown, few) if replies else (few,):
    most = max(columns(longest), whole)
    if own * most <= tokens:
      return SlotRoom(devices, own, most, most, sizes.FEWER_CACHE_LENGTHS)
  return SlotRoom(devices, own, fine(longest), fine(longest), sizes.CACHE_LENGTHS)
