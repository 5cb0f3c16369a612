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

Texts are found among a call's first prompts: of MIN_TOKENS or more, which at least MIN_PROMPTS of
them begin with. A text is read once and kept once, and a slot holds only what stands behind it; a
reply that leaves its text stands whole in its slot. On a mesh every device keeps all texts (with
`mesh.sample_tensor` those of its own heads); of several processes each finds those of its own share
of the prompts. In bfloat16 without the Triton kernel (CPUs, TPUs, head sizes that it does not take)
nothing is shared.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from oel_jax.policy.sampling import sizes

MIN_TOKENS = 512  # of a text: a shorter one costs as much as it saves
MIN_PROMPTS = 4  # that begin with it
MIN_PROMPTS_REPLIES = 2  # the same where replies come, many of which will begin with it, too
MAX_TEXTS = 32
STEP = 128  # runs are cut where they have least in common, up to so many tokens: few cuts
MAX_DEPTH = 200  # of cuts within cuts: longer steps where that were more


@dataclasses.dataclass(frozen=True)
class Beginnings:
  """Texts that prompts begin with.

  Attributes:
    texts: token ids of each.
    places: how many texts are kept room for; those of few numbers, so that few programs are
      compiled.
  """

  texts: list[list[int]]
  places: int

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

  @property
  def tokens(self) -> int:
    """Those that all places together have room for."""
    return self.places * room(max(map(len, self.texts), default=0))


def room(longest: int) -> int:
  """P, the tokens that each text has room for if the longest has so many."""
  return sizes.bucket(longest, sizes.TEXT_LENGTHS)


class _Group(NamedTuple):
  """Prompts that begin with the same `tokens`; `first` is one of them."""

  saved: int
  first: int
  tokens: int


def find(prompts: Sequence[Sequence[int]], max_tokens: int, *, replies: bool = False) -> Beginnings:
  """The texts worth keeping once, those first that save most; there is room for all of them in
  `max_tokens`. `replies`: whether further prompts will come, in the place of these.
  """
  min_prompts = MIN_PROMPTS_REPLIES if replies else MIN_PROMPTS
  if len(prompts) < min_prompts or max(map(len, prompts)) <= MIN_TOKENS:
    return Beginnings([], 0)
  # Bytes in this order compare as the ids do, and much faster than lists.
  arrays = sorted((np.asarray(prompt, ">u4") for prompt in prompts), key=lambda a: a.tobytes())
  common = [_common(*pair) for pair in zip(arrays[:-1], arrays[1:], strict=True)]
  # The texts that save most may be more than can be kept; then fewer, shorter ones that more
  # prompts begin with may save more.
  choices = []
  for doubled in range((len(prompts) // min_prompts).bit_length()):
    choices.append(_fitting(_groups(common, min_prompts << doubled), max_tokens))
  best = max(choices, key=lambda groups: sum(group.saved for group in groups))
  texts = [arrays[group.first][: group.tokens].tolist() for group in best]
  return Beginnings(texts, _places(texts, max_tokens))


def _places(texts: Sequence[Sequence[int]], max_tokens: int) -> int:
  """Places for these texts: the next of TEXT_COUNTS, if there is room for so many."""
  if not texts:
    return 0
  more = sizes.bucket(len(texts), sizes.TEXT_COUNTS)
  return more if more * room(max(map(len, texts))) <= max_tokens else len(texts)


def _fitting(groups: list[_Group], max_tokens: int) -> list[_Group]:
  """Of the groups those that save most, as many as there is room for. A text for which all others
  get more room must be worth it.
  """
  kept, longest = [], 0
  for group in sorted(groups, key=lambda group: -group.saved):
    wider, count = max(longest, group.tokens), len(kept) + 1
    worth = group.saved + group.tokens > wider * count - longest * len(kept)
    if worth and count <= MAX_TEXTS and room(wider) * count <= max_tokens:
      kept.append(group)
      longest = wider
  return kept


def _common(first: np.ndarray, second: np.ndarray) -> int:
  """Tokens that both begin with, at most all but the last of either: one is left to be read."""
  limit = min(len(first), len(second)) - 1
  same = first[:limit] == second[:limit]
  return limit if same.all() else int(same.argmin())


def _groups(common: list[int], min_prompts: int) -> list[_Group]:
  """The groups of so many prompts that save most tokens; `common` is what each prompt, in order,
  has in common with the next one.
  """
  step = max(STEP, max(common) // MAX_DEPTH)

  def among(first: int, last: int) -> list[_Group]:
    count = last - first + 1
    if count < min_prompts:
      return []
    least = min(common[first:last])
    cuts = [i for i in range(first, last) if common[i] // step == least // step]
    edges = zip([first - 1, *cuts], [*cuts, last], strict=True)
    parts = [group for before, end in edges for group in among(before + 1, end)]
    whole = _Group((count - 1) * least, first, least)
    if least >= MIN_TOKENS and whole.saved >= sum(part.saved for part in parts):
      return [whole]
    return parts

  return among(0, len(common))
