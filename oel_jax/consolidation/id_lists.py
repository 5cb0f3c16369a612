"""Token ids of many prompts in little memory: a round may have 100,000 of them, in each process."""

import array
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class IdLists(Sequence):
  """Token ids of many prompts, each read as a tuple: four bytes an id, where tuples take 36.

  Attributes:
    ids: of all prompts, one after another.
    ends: one a prompt, where it ends in `ids`.
  """

  ids: array.array = dataclasses.field(default_factory=lambda: array.array("i"))
  ends: array.array = dataclasses.field(default_factory=lambda: array.array("q"))

  def add(self, ids: Iterable[int]) -> None:
    """Appends a prompt."""
    self.ids.extend(ids)
    self.ends.append(len(self.ids))

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: Any) -> tuple[Any, ...]:
    """The ids of the prompt of this number; of a slice, a tuple of them."""
    places = range(len(self))[index]
    if isinstance(places, range):
      return tuple(self[place] for place in places)
    return tuple(self.ids[self.ends[places - 1] if places else 0 : self.ends[places]])


def sizes(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "N"]:
  """How many ids each prompt has."""
  if isinstance(prompts, IdLists):
    return np.diff(np.array(prompts.ends, np.int64), prepend=0)
  return np.array([len(prompt) for prompt in prompts], np.int64)


def digest(prompts: Sequence[Sequence[int]]) -> str:
  """`schema.digest` of the prompts' ids, one prompt after another."""
  found = hashlib.sha256(b"[")
  for place, prompt in enumerate(prompts):
    found.update(b"," * (place > 0) + json.dumps(prompt, separators=(",", ":")).encode())
  found.update(b"]")
  return found.hexdigest()[:16]
