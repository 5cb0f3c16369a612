"""Lists of token ids in little memory, beside plain lists."""

import random

import numpy as np
import pytest

from oel_jax.consolidation import id_lists
from oel_jax.runtime import schema

DRAWN = random.Random(0)
LISTS = [[DRAWN.randrange(2**31) for _ in range(DRAWN.randrange(1, 9))] for _ in range(20)]
PLAIN = [*LISTS[:7], [], *LISTS[7:]]


@pytest.fixture(name="held")
def fixture_held():
  held = id_lists.IdLists()
  for ids in PLAIN:
    held.add(ids)
  return held


def test_they_are_read_as_they_were_added(held):
  assert len(held) == 21 and [list(ids) for ids in held] == PLAIN
  assert held[7] == () and held[-1] == tuple(PLAIN[-1]) and type(held[3]) is tuple
  assert held[2:9:3] == tuple(map(tuple, PLAIN[2:9:3]))
  assert held[::-1] == tuple(map(tuple, PLAIN[::-1]))
  with pytest.raises(IndexError):
    held[21]


def test_an_id_takes_four_bytes(held):
  assert held.ids.itemsize * len(held.ids) == 4 * sum(map(len, PLAIN))


@pytest.mark.parametrize("plain", [PLAIN, [[5]], [[]]])
def test_sizes_and_digest_are_those_of_plain_lists(plain):
  held = id_lists.IdLists()
  for ids in plain:
    held.add(ids)
  for some in (held, plain, tuple(map(tuple, plain))):
    np.testing.assert_array_equal(id_lists.sizes(some), list(map(len, plain)))
    assert id_lists.digest(some) == schema.digest(plain)


def test_of_nothing_there_is_nothing():
  held = id_lists.IdLists()
  assert len(held) == len(id_lists.sizes(held)) == 0 and list(held) == []
  assert id_lists.digest(held) == schema.digest([])
