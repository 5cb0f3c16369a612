"""Which prompts begin with the same long text, found from the prompts alone: host code without JAX.

Prompts in order have their longest common beginnings beside each other. A run of prompts that have
much in common is one group, whose text is what all of them begin with; it is cut in two where the
groups that come out save more tokens:

    prompts in order    in common with the next one
    h A A A A A x       6
    h A A A A A y y     6    one text of 6 tokens saves 2 x 6
    h A A A A A z       1
    h B B B B x         5    one of 5 saves 5; all five prompts behind "h" would save 4 x 1
    h B B B B y
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_TOKENS = 512  # of a text: a shorter one costs as much as it saves
MIN_PROMPTS = 4  # that begin with it
MAX_TEXTS = 32
STEP = 128  # runs are cut where they have least in common, up to so many tokens: few cuts


@dataclasses.dataclass(frozen=True)
class Beginnings:
  """Texts that prompts begin with.

  Attributes:
    texts: token ids of each.
  """

  texts: list[list[int]]

  def split(self, prompt: Sequence[int]) -> tuple[int, list[int]]:
    """The number of the longest text that the prompt begins with, and what stands behind it, which
    is at least one token; -1 and the whole prompt if there is none.
    """
    prompt = list(prompt)
    starts = lambda text: (
      len(text) < len(prompt) and prompt[len(text) - 1] == text[-1] and prompt[: len(text)] == text
    )
    number = max(
      (n for n, text in enumerate(self.texts) if starts(text)),
      key=lambda n: len(self.texts[n]),
      default=-1,
    )
    return number, prompt[self.length(number) :]

  def length(self, number: int) -> int:
    """The tokens of a text; 0 for -1."""
    return len(self.texts[number]) if number >= 0 else 0


class _Group(NamedTuple):
  """Prompts that begin with the same `tokens`; `first` is one of them."""

  saved: int
  first: int
  tokens: int


def find(prompts: Sequence[Sequence[int]], max_tokens: int) -> Beginnings:
  """The texts worth keeping once, those first that save most; as many times the longest of them are
  at most `max_tokens`.
  """
  if len(prompts) < MIN_PROMPTS or max(map(len, prompts)) <= MIN_TOKENS:
    return Beginnings([])
  # Bytes in this order compare as the ids do, and much faster than lists.
  arrays = sorted((np.asarray(prompt, ">u4") for prompt in prompts), key=lambda a: a.tobytes())
  common = [_common(*pair) for pair in zip(arrays[:-1], arrays[1:], strict=True)]
  texts, longest = [], 0
  for group in sorted(_groups(common, 0, len(common)), key=lambda group: -group.saved):
    wider = max(longest, group.tokens)
    if len(texts) < MAX_TEXTS and wider * (len(texts) + 1) <= max_tokens:
      texts.append(arrays[group.first][: group.tokens].tolist())
      longest = wider
  return Beginnings(texts)


def _common(first: np.ndarray, second: np.ndarray) -> int:
  """Tokens that both begin with, at most all but the last of either: one is left to be read."""
  limit = min(len(first), len(second)) - 1
  same = first[:limit] == second[:limit]
  return limit if same.all() else int(same.argmin())


def _groups(common: list[int], first: int, last: int) -> list[_Group]:
  """The groups among the prompts `first` to `last`, in order, that save most tokens."""
  count = last - first + 1
  if count < MIN_PROMPTS:
    return []
  least = min(common[first:last])
  cuts = [i for i in range(first, last) if common[i] // STEP == least // STEP]
  edges = zip([first - 1, *cuts], [*cuts, last], strict=True)
  parts = [group for before, end in edges for group in _groups(common, before + 1, end)]
  whole = _Group((count - 1) * least, first, least)
  if least >= MIN_TOKENS and whole.saved >= sum(part.saved for part in parts):
    return [whole]
  return parts
