"""From trajectories to knowledge (OEL section 3): e'_i ~ π_extract(· | τ_i, e_{i-1}), e_i =
[e_{i-1}; e'_i], K texts from K seeds.

Runs on the user side, where the trajectories are, and reads nothing but them and earlier knowledge.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from oel_jax.conversations.schema import Conversation, transcript
from oel_jax.extraction.knowledge import (
  CARRIED,
  Item,
  Knowledge,
  limit,
  longest_end,
  parse_item,
  parse_items,
)
from oel_jax.extraction.prompts import extraction_message
from oel_jax.runtime import schema
from oel_jax.runtime.files import read_json, write_sealed
from oel_jax.runtime.seeds import derive

if TYPE_CHECKING:
  from oel_jax.policy.sampling.sampler import Sampling

SCHEMA = 1
Encode = Callable[[Conversation, Knowledge], list[int]]


def extract(
  policy,
  trajectories: Sequence[Conversation],
  *,
  texts: int,
  form: str,
  see_previous: bool,
  sampling: "Sampling",
  max_response_tokens: int,
  max_knowledge_tokens: int,
  max_prompt_tokens: int,
  seed: int,
  round: int,
  thinking: bool = True,
  start: Sequence[Knowledge] | None = None,
  state_path: pathlib.Path | None = None,
  weights: str = "",
  advance: Callable[[int], None] | None = None,
) -> list[Knowledge]:
  """Accumulates `texts` knowledge texts, each over all the trajectories in a random order of its
  own (OEL section 3).

  The accumulation is one after another by nature, the texts are not: each step samples all of them
  in one batch. Which step reads which trajectory and how its answer is sampled derive from (seed,
  round, text, step), so a resumed run goes on as if never stopped.

  Args:
    policy: π_extract; its `tokenizer` and `sample` are used.
    trajectories: what every text reads, in the same order at every call.
    texts: K.
    form: "items" or "text", see `parse_items`.
    see_previous: whether the prompt holds e_{i-1}; if not, e'_i ~ π_extract(· | τ_i).
    sampling: temperature, top_p and top_k.
    max_response_tokens: sampled tokens a step, thinking included.
    max_knowledge_tokens: the extractor sees the newest whole items that fit in so many tokens.
    max_prompt_tokens: policy.max_prompt_tokens; to keep to it, the extractor sees fewer of the
      oldest items still.
    seed: config.seed.
    round: the round, from 1.
    thinking: whether the chat template opens a thinking block.
    start: e_0 of each text, the previous round's knowledge; None: empty.
    state_path: partial file, replaced after every step and resumed from if it is there. When
      complete, nothing is sampled any more.
    weights: names the policy's weights (`runtime.checksum.fingerprint`); a partial file of others
      is refused.
    advance: called with the number of steps that have just ended (at once with those found in
      `state_path`).

  Returns:
    K accumulations with every item that was ever written, however long: `as_of` gives the text
    after n trajectories, within the limit.

  Raises:
    ValueError: no trajectory; `start` with another number of texts; a trajectory whose prompt is
      over `max_prompt_tokens` without any knowledge; a partial file that is damaged or of another
      extraction. All before anything is sampled.
  """
  start = [Knowledge()] * texts if start is None else [text.carried() for text in start]
  if len(start) != texts:
    raise ValueError(
      f"extraction.texts is {texts}, but {len(start)} texts are carried over: it must be the same "
      "as in the previous round"
    )
  encode = functools.partial(_encode, policy.tokenizer, form=form, thinking=thinking)
  _check_prompts(encode, trajectories, max_prompt_tokens)
  identity = {
    "seed": seed,
    "round": round,
    "texts": texts,
    "form": form,
    "see_previous": see_previous,
    "trajectories": [trajectory.id for trajectory in trajectories],
    "made_from": {
      "weights": weights,
      "transcripts": schema.digest([transcript(trajectory) for trajectory in trajectories]),
    },
  }
  state_path = pathlib.Path(state_path) if state_path is not None else None
  orders = _orders(trajectories, texts, seed, round)
  done, found = _load(state_path, identity, start, orders) if state_path is not None else (0, start)
  if done and advance is not None:
    advance(done)

  def seen(text: Knowledge) -> Knowledge:
    return (
      limit(text, max_knowledge_tokens, lambda words: len(policy.tokenizer.encode(words)))[0]
      if see_previous
      else Knowledge()
    )

  for step in range(done + 1, len(trajectories) + 1):
    read = [order[step - 1] for order in orders]
    prompts = [
      _prompt(encode, trajectory, seen(text), max_prompt_tokens)
      for trajectory, text in zip(read, found)
    ]
    seeds = [derive(seed, round, "extract", text, step) for text in range(texts)]
    responses = policy.sample(prompts, seeds, sampling=sampling, max_new_tokens=max_response_tokens)
    answers = [
      parse_items(policy.tokenizer.split_response(response, thinking=thinking)[1], form)
      for response in responses
    ]
    found = [
      Knowledge(text.items + tuple(Item(line, trajectory.id, step, round) for line in answer))
      for text, trajectory, answer in zip(found, read, answers, strict=True)
    ]
    logging.info(
      "extraction step %d of %d: %d items from %d texts, %d answers without one",
      step,
      len(trajectories),
      sum(map(len, answers)),
      texts,
      sum(not answer for answer in answers),
    )
    if state_path is not None:
      _save(state_path, identity, step, found)
    if advance is not None:
      advance(1)
  return found


def raw_knowledge(
  trajectories: Sequence[Conversation], *, texts: int, seed: int, round: int
) -> list[Knowledge]:
  """The control without extraction: whole transcripts are the items (OEL Table 1, "raw
  trajectories").

  Text k reads the trajectories in the order in which `extract` reads them for its text k, so the
  two differ in nothing else.

  Returns:
    `texts` whole accumulations, as from `extract`: `as_of` limits them, the oldest whole
    transcripts going first.
  """
  return [
    Knowledge(
      tuple(
        Item(transcript(trajectory), trajectory.id, step, round)
        for step, trajectory in enumerate(order, start=1)
      )
    )
    for order in _orders(trajectories, texts, seed, round)
  ]


def _orders(
  trajectories: Sequence[Conversation], texts: int, seed: int, round: int
) -> list[list[Conversation]]:
  """For each text, all the trajectories in its own random order."""
  draws = [
    np.random.default_rng(derive(seed, round, "extract-order", text)).permutation(len(trajectories))
    for text in range(texts)
  ]
  return [[trajectories[i] for i in draw] for draw in draws]


def _encode(
  tokenizer, trajectory: Conversation, knowledge: Knowledge, *, form: str, thinking: bool
) -> list[int]:
  return tokenizer.chat(
    [extraction_message(transcript(trajectory), knowledge.text, form=form)], thinking=thinking
  )


def _prompt(
  encode: Encode, trajectory: Conversation, knowledge: Knowledge, max_prompt_tokens: int
) -> list[int]:
  """The prompt's tokens with as many of the newest items as it has room for; the record and the
  question are always whole.
  """
  shown = longest_end(knowledge, lambda rest: len(encode(trajectory, rest)) <= max_prompt_tokens)
  if len(shown.items) < len(knowledge.items):
    logging.info(
      "trajectory %s: the %d oldest of %d items not shown to the extractor, to keep to "
      "policy.max_prompt_tokens = %d",
      trajectory.id,
      len(knowledge.items) - len(shown.items),
      len(knowledge.items),
      max_prompt_tokens,
    )
  return encode(trajectory, shown)


def _check_prompts(
  encode: Encode, trajectories: Sequence[Conversation], max_prompt_tokens: int
) -> None:
  """Every text reads every trajectory, so one that can never fit is found now and not hours
  later.
  """
  if not trajectories:
    raise ValueError("extraction has 0 trajectories to read: it needs at least 1")
  for trajectory in trajectories:
    tokens = len(encode(trajectory, Knowledge()))
    if tokens > max_prompt_tokens:
      raise ValueError(
        f"policy.max_prompt_tokens is {max_prompt_tokens}: the extraction prompt of trajectory "
        f"{trajectory.id} has {tokens} "
        "tokens without any knowledge; it must be at least that, or the trajectory left out"
      )


def _save(path: pathlib.Path, identity: dict, done: int, found: Sequence[Knowledge]) -> None:
  items = [[dataclasses.asdict(item) for item in text.items] for text in found]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_sealed(path, {"schema": SCHEMA, **identity, "done": done, "items": items})


def _load(
  path: pathlib.Path,
  identity: dict,
  start: Sequence[Knowledge],
  orders: Sequence[Sequence[Conversation]],
) -> tuple[int, list[Knowledge]]:
  """Steps done and the texts so far: those of the partial file, or (0, start) if there is none.
  Raises ValueError if it is not ours.
  """
  if not path.exists():
    return 0, list(start)
  return read_json(
    path,
    functools.partial(_parse_state, identity=identity, start=start, orders=orders),
    "delete the file to extract anew",
  )


def _parse_state(
  state: Any, identity: dict, start: Sequence[Knowledge], orders: Sequence[Sequence[Conversation]]
) -> tuple[int, list[Knowledge]]:
  for field, right in {"schema": SCHEMA, **identity}.items():
    seen = state.get(field) if isinstance(state, dict) else None
    # An earlier version's does not say.
    if seen != right and not (field == "made_from" and seen is None):
      raise ValueError(
        f'"{field}" of the partial extraction is {seen!r:.200}, this run has {right!r:.200}'
      )
  done, items = state.get("done"), state.get("items")
  steps, texts = len(identity["trajectories"]), identity["texts"]
  if type(done) is not int or not 0 <= done <= steps:
    raise ValueError(f'"done" is {done!r}: it must be from 0 to {steps}')
  if (
    not isinstance(items, list)
    or len(items) != texts
    or not all(isinstance(text, list) for text in items)
  ):
    raise ValueError(f'"items" must hold {texts} lists')
  found = [
    Knowledge(tuple(parse_item(record, f"text {index}") for record in text))
    for index, text in enumerate(items)
  ]
  for index, (text, carried, order) in enumerate(zip(found, start, orders, strict=True)):
    if text.at(CARRIED) != carried:
      raise ValueError(
        f"text {index} began from other knowledge ({len(text.at(CARRIED).items)} items) than this "
        "run's "
        f"({len(carried.items)} items)"
      )
    _check_places(index, text, done, order)
  return done, found


def _check_places(index: int, text: Knowledge, done: int, order: Sequence[Conversation]) -> None:
  """Raises ValueError unless the text's items stand in the order of their steps, none after `done`,
  each with its step's trajectory.
  """
  last = CARRIED
  for number, item in enumerate(text.items):
    if item.step < last or item.step > done:
      raise ValueError(
        f'text {index}, item {number}: "step" is {item.step}: it must be from {max(last, 1)} to '
        f'"done" ({done})'
      )
    last = item.step
    if item.step != CARRIED and item.trajectory != order[item.step - 1].id:
      raise ValueError(
        f'text {index}, item {number}: "trajectory" is {item.trajectory!r}: step {item.step} of '
        "this text reads "
        f"{order[item.step - 1].id!r}"
      )
