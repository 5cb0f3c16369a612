"""What one process tells another, and comes back equal. Real processes: test_distributed.py."""

import array
import json
import pathlib
import types

import numpy as np
import pytest

from oel_jax.consolidation.id_lists import IdLists
from oel_jax.consolidation.task import Task
from oel_jax.environments import Episode
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import together


def told(value):
  """As it arrives."""
  return together.decode(json.loads(json.dumps(together.encode(value))))


@pytest.mark.parametrize(
  "value",
  [
    None,
    [1, 2.5, True, "text", None, -0.1, float("inf")],
    ((1, 2), [(3,), []]),
    {"deep": {"tuple": (1, {"a": ()})}, "class": "no class", "shared": 1},
    range(2, 9, 3),
    pathlib.Path("/runs/1"),
    Sampling(0.7, 0.8, 20),
    [Episode("r1-deploy-00000", 4, 2**32 - 1, "- Avoid H.\n“ü”")],
    Task(((3, 4), (5,)), ((7, 8, 9), ()), (1, 0), (range(2), range(2, 4)), 0, 1, ("a", "b")),
    IdLists(array.array("i", [3, 4, 2**31 - 1]), array.array("q", [2, 2, 3])),
  ],
  ids=lambda value: type(value).__name__,
)
def test_what_is_told_arrives_as_it_was(value):
  found = told(value)
  assert found == value and type(found) is type(value)
  assert repr(found) == repr(value)


def test_what_all_have_travels_by_its_name(monkeypatch):
  weights = [{"w": np.ones(3)}, {"w": np.zeros(3)}]
  policy = types.SimpleNamespace(params=weights[1])
  policy.replace = lambda params: ("another with", params)
  base = types.SimpleNamespace(params=weights[0], replace=policy.replace)
  monkeypatch.setattr(together._state, "shared", {"policy": base, "trained": weights[1]})
  assert told(base) is base and told(weights[1]) is weights[1]
  assert told([policy]) == [("another with", weights[1])]
  assert together.encode(weights[1]) == {"shared": "trained"}


def test_a_number_of_numpy_is_a_number_and_a_function_is_none_elsewhere():
  assert told([np.int32(5), np.uint32(2**32 - 1), print]) == [5, 2**32 - 1, None]


def test_what_cannot_travel_is_told():
  with pytest.raises(TypeError, match="^ndarray is nothing that one process can tell another$"):
    together.encode({"a": [np.ones(2)]})


def test_of_trained_weights_the_last_two_are_held(monkeypatch):
  monkeypatch.setattr(together.distributed, "count", lambda: 2)
  monkeypatch.setattr(together._state, "shared", {})
  for number in (1, 2, 1, 3):
    together.share(f"{together.WEIGHTS} {number}", {})
  together.share("base", {})
  assert list(together._state.shared) == ["weights 1", "weights 3", "base"]
  together.share("base", None)
  assert list(together._state.shared) == ["weights 1", "weights 3"]


def test_in_one_process_the_mark_changes_nothing():
  assert together.everywhere(divmod)(7, 2) == (3, 1)
  with together.leading(run=object()):
    assert not together.leads() and together._state.shared == {}
