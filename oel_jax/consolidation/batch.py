"""From prompts, knowledge and sampled ids to the arrays of a step.

Tokens are placed as they were sampled, never decoded and encoded again. Student and teacher read
the same rows: a teacher's token has the knowledge before it as keys and values that were computed
once (`teacher.prepare`), so it stands in no row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Batch(NamedTuple):
  """S rows of T tokens and R response tokens. A row holds one sample or more, one behind the other,
  then padding; M texts at most.

  Attributes:
    tokens: [S, T] int32.
    positions: [S, T] int32, of each token in its own sample.
    segments: [S, T] int32, 1, 2… for the row's samples, 0 for padding.
    texts: [S, M] int32, the knowledge that the row's samples are given.
    slots: [S, T] int32, which of those M a token's sample is given.
    at: [S, R] int32, the position in the row whose next token is the response token.
    response: [S, R] int32, the sampled ids.
    offsets: [S, R] int32, of each in its own response, from 0.
    mask: [S, R] bool, which of the R count: every response token, the end-of-sequence id too.
    target: [S, R, D], the teacher's last hidden states at those positions, where they were computed
      before (`streamed.ahead`).
  """

  tokens: Array
  positions: Array
  segments: Array
  texts: Array
  slots: Array
  at: Array
  response: Array
  offsets: Array
  mask: Array
  target: Array | None = None


def assemble(
  prompts: Sequence[Sequence[int]],
  knowledge: Sequence[int],
  responses: Sequence[Sequence[int]],
  *,
  pad_id: int,
  length: int,
  response_length: int,
  texts: int = 1,
  pack: bool = True,
) -> Batch:
  """Lays samples out as NumPy arrays, in as few rows as first-fit rules find; the same samples
  give the same rows.

  Args:
    prompts: ids of the prompts without knowledge, not empty.
    knowledge: which knowledge text each is given.
    responses: sampled ids, not empty.
    pad_id: fills the rest; its value changes nothing.
    length, response_length: T and R.
    texts: M, most texts a row.
    pack: whether a row may hold several samples.

  Raises:
    ValueError: a sample does not fit; names the sample and the lengths. Nothing is ever cut off.
  """
  for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    if not prompt or not response:
      raise ValueError(
        f"sample {i} has {len(prompt)} prompt and {len(response)} response tokens: both need at "
        "least one"
      )
    for name, size, room in (
      ("sequence", len(prompt) + len(response), length),
      ("response", len(response), response_length),
    ):
      if size > room:
        raise ValueError(f"sample {i}: the {name} has {size} tokens, the batch has room for {room}")
  sizes = _sizes(prompts, responses)
  room = dict(length=length, response_length=response_length, texts=texts, pack=pack)
  rows = rows_of(prompts, knowledge, responses, **room)
  tokens, answers = (np.full((len(rows), n), pad_id, np.int32) for n in (length, response_length))
  positions, segments, slots = (np.zeros_like(tokens) for _ in range(3))
  (at, offsets), mask = (np.zeros_like(answers) for _ in range(2)), np.zeros(answers.shape, bool)
  given = np.zeros((len(rows), texts), np.int32)
  for s, row in enumerate(rows):
    used = list(dict.fromkeys(knowledge[i] for i in row))
    given[s, : len(used)] = used
    begin = counted = 0
    for segment, i in enumerate(row, start=1):
      size, answer = sizes[i]
      here, there = slice(begin, begin + size), slice(counted, counted + answer)
      tokens[s, here], positions[s, here], segments[s, here] = (
        [*prompts[i], *responses[i]],
        range(size),
        segment,
      )
      slots[s, here] = used.index(knowledge[i])
      answers[s, there], mask[s, there], offsets[s, there] = responses[i], True, np.arange(answer)
      at[s, there] = offsets[s, there] + begin + size - answer - 1
      begin, counted = begin + size, counted + answer
  return Batch(tokens, positions, segments, given, slots, at, answers, offsets, mask)


def rows_of(
  prompts: Sequence[Sequence[int]],
  knowledge: Sequence[int],
  responses: Sequence[Sequence[int]],
  *,
  length: int,
  response_length: int,
  texts: int = 1,
  pack: bool = True,
) -> list[list[int]]:
  """Which samples stand in each row of `assemble`, in order; arguments as there."""
  sizes = _sizes(prompts, responses)
  if not pack:
    return [[i] for i in range(len(sizes))]
  return _fit(sizes, knowledge, (length, response_length), texts)


def _sizes(prompts, responses) -> list[tuple[int, int]]:
  """Tokens of each sample, and of its response."""
  pairs = zip(prompts, responses, strict=True)
  return [(len(prompt) + len(response), len(response)) for prompt, response in pairs]


def _fit(sizes, knowledge, room, texts) -> list[list[int]]:
  """Rows of samples: each goes, the longest first, to the first row with room for its tokens, its
  response and its text. Text by text, if that takes fewer rows, as it does where a row has room for
  many samples and for few texts.
  """
  by_length = sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i))
  by_text = sorted(by_length, key=lambda i: knowledge[i])
  found = (_first_fit(order, sizes, knowledge, room, texts) for order in (by_length, by_text))
  return min(found, key=len)


def _first_fit(order, sizes, knowledge, room, texts) -> list[list[int]]:
  rows: list[list[int]] = []
  held: list[tuple[int, int, frozenset[int]]] = []  # tokens, response tokens and texts of each
  for i in order:
    (size, answer), text = sizes[i], knowledge[i]
    taken = ((tokens + size, answers + answer, known | {text}) for tokens, answers, known in held)
    fits = (
      n
      for n, (tokens, answers, known) in enumerate(taken)
      if tokens <= room[0] and answers <= room[1] and len(known) <= texts
    )
    n = next(fits, len(rows))
    if n == len(rows):
      rows.append([])
      held.append((0, 0, frozenset()))
    rows[n].append(i)
    tokens, answers, known = held[n]
    held[n] = tokens + size, answers + answer, known | {text}
  return rows


def response_rows(
  hidden_SxTxD: Float[Array, "S T D"], at_SxR: Int[Array, "S R"]
) -> Float[Array, "S R D"]:
  """The hidden states that predict the response tokens. Places that the mask does not count repeat
  the row's first.
  """
  return jnp.take_along_axis(hidden_SxTxD, at_SxR[..., None], axis=1)
