"""From trajectories to knowledge (OEL section 3): e'_i ~ π_extract(· | τ_i, e_{i-1}), e_i =
[e_{i-1}; e'_i], K texts from K seeds.

Runs on the user side, where the trajectories are, and reads nothing but them and earlier knowledge.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from oel_jax.conversations.schema import Conversation, by_policy, transcript
from oel_jax.extraction import state
from oel_jax.extraction.knowledge import Item, Knowledge, limit, longest_end, parse_items
from oel_jax.extraction.prompts import extraction_message
from oel_jax.runtime import schema
from oel_jax.runtime.seeds import derive

if TYPE_CHECKING:
  from oel_jax.policy.sampling.sampler import Sampling

UNANSWERED = (
  "nobody said anything to what the policy said (config.extraction.answered_only = False reads it "
  "all the same)"
)
AT_ONCE = 256  # prompts that are sampled together, where steps do not wait for one another
MAX_NAMED = 20  # trajectories left out that the log names, of those that it counts
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
  wording: str = "games",
  answered_only: bool = False,
  people: Collection[str] = (),
  start: Sequence[Knowledge] | None = None,
  state_path: pathlib.Path | None = None,
  weights: str = "",
  advance: Callable[[int], None] | None = None,
) -> list[Knowledge]:
  """Accumulates `texts` knowledge texts, each over all the trajectories in a random order of its
  own (OEL section 3).

  The accumulation is one after another by nature, the texts are not: each step samples all of them
  in one batch; where the extractor does not see what it wrote before, many steps are one batch.
  Which step reads which trajectory and how its answer is sampled derive from (seed, round, text,
  step), so a resumed run goes on as if never stopped.

  A step costs the same however many went before: the prompt is made of the newest items that fit,
  found among those that fitted at the step before and the new ones, and the step's items are added
  to the file. A trajectory that no prompt has room for or that nobody said anything to, and an
  answer that cannot be read, add nothing at their step; they are counted and named in the log and
  in the step's line.

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
    wording: "games" or "conversations": the words in which the extractor is asked.
    answered_only: whether to leave out trajectories in which nobody said anything to what the
      policy said.
    people: who answered in its place (`schema.by_policy`): what they say is said to it.
    start: e_0 of each text, the previous round's knowledge; None: empty.
    state_path: partial file (`extraction.state`), added to after every batch and resumed from if it
      is there. When complete, nothing is sampled any more.
    weights: names the policy's weights (`runtime.checksum.fingerprint`); a partial file of others
      is refused.
    advance: called with the number of steps that have just ended (at once with those found in
      `state_path`).

  Returns:
    K accumulations with every item that was ever written, however long: `as_of` gives the text
    after n trajectories, within the limit.

  Raises:
    ValueError: no trajectory, or all are left out; `start` with another number of
      texts; a partial file that is damaged or of another extraction. All before anything is
      sampled.
  """
  start = [Knowledge()] * texts if start is None else [text.carried() for text in start]
  if len(start) != texts:
    raise ValueError(
      f"extraction.texts is {texts}, but {len(start)} texts are carried over: it must be the same "
      "as in the previous round"
    )
  words = dict(form=form, wording=wording)
  encode = functools.partial(_encode, policy.tokenizer, thinking=thinking, **words)
  how = _Settings(
    policy=policy,
    encode=encode,
    unfit=_find_unfit(encode, trajectories, max_prompt_tokens, answered_only, people),
    form=form,
    see_previous=see_previous,
    sampling=sampling,
    max_response_tokens=max_response_tokens,
    max_knowledge_tokens=max_knowledge_tokens,
    max_prompt_tokens=max_prompt_tokens,
    seed=seed,
    round=round,
    thinking=thinking,
  )
  reads = orders(len(trajectories), texts, seed, round)
  done: list[state.Step] = []
  if state_path is not None:
    state_path, ids = pathlib.Path(state_path), [each.id for each in trajectories]
    named = dict(seed=seed, round=round, texts=texts, form=form, see_previous=see_previous)
    made_from = _made_from(weights, trajectories, wording, answered_only, people)
    identity = {**named, "trajectories": ids, "made_from": made_from}
    done = state.load(state_path, identity, start, [[ids[i] for i in order] for order in reads])
  if done and advance is not None:
    advance(len(done))
  found = [list(text.items) for text in start]
  for number, answers, left_out in _steps(how, trajectories, reads, found, done):
    told = "extraction step %d of %d: %d items from %d texts, %d answers without one"
    empty = sum(not answer for answer in answers) - len(left_out)
    logging.info(told, number, len(trajectories), sum(map(len, answers)), texts, empty)
    if state_path is not None:
      state.append(state_path, number, answers, left_out)
    if advance is not None:
      advance(1)
  return [Knowledge(tuple(items)) for items in found]


def _steps(
  how: "_Settings",
  trajectories: Sequence[Conversation],
  reads: Sequence[Sequence[int]],
  found: list[list[Item]],
  done: Sequence[state.Step],
) -> Iterator[tuple[int, state.Step, list[dict[str, Any]]]]:
  """Takes the steps that are left, and yields each as `state.append` takes it.

  Args:
    how: what all steps have in common.
    trajectories: what is read.
    reads: of each text, their numbers in the order of its steps.
    found: of each text, the items that it begins with; those of all steps are added, of those that
      are `done`, too.
    done: the steps of before.
  """
  ids = [trajectory.id for trajectory in trajectories]
  for number, answers in enumerate(done, start=1):
    _add(found, answers, [ids[order[number - 1]] for order in reads], number, how.round)
  shown = [_newest(how, items) for items in found]
  at_once = 1 if how.see_previous else max(1, AT_ONCE // len(reads))
  for first in range(len(done) + 1, len(trajectories) + 1, at_once):
    numbers = range(first, min(first + at_once, len(trajectories) + 1))
    read = {number: [trajectories[order[number - 1]] for order in reads] for number in numbers}
    for number, (answers, left_out) in _ask(how, read, shown).items():
      new = _add(found, answers, [each.id for each in read[number]], number, how.round)
      # What does not fit beside the items of before fits no better beside more: the newest that fit
      # are among those that did, and the new ones.
      shown = [_newest(how, (*text.items, *items)) for text, items in zip(shown, new, strict=True)]
      yield number, answers, left_out


def _made_from(
  weights: str,
  trajectories: Sequence[Conversation],
  wording: str,
  answered_only: bool,
  people: Collection[str],
) -> dict[str, Any]:
  """What a partial file says that it was made from; of settings only those that files of before
  were not made with.
  """
  found: dict[str, Any] = {
    "weights": weights,
    "transcripts": schema.digest([transcript(each, wording) for each in trajectories]),
  }
  if wording != "games":
    found["wording"] = wording
  if answered_only:
    found["answered_only"] = True
  if answered_only and people:
    found["people"] = ",".join(people)
  return found


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What all steps have in common: `extract`'s arguments, `encode`, and the trajectories that are
  left out, by id, and why.
  """

  policy: Any
  encode: Encode
  unfit: dict[str, str]
  form: str
  see_previous: bool
  sampling: "Sampling"
  max_response_tokens: int
  max_knowledge_tokens: int
  max_prompt_tokens: int
  seed: int
  round: int
  thinking: bool


def _ask(
  how: _Settings, read: Mapping[int, Sequence[Conversation]], shown: Sequence[Knowledge]
) -> dict[int, tuple[state.Step, list[dict[str, Any]]]]:
  """Samples steps of all texts in one batch. Returns of each, by its number, the items of each
  answer, and what is left out, as `state.append` takes it.

  Args:
    read: what each text reads, by the step's number.
    shown: of each text, what the extractor sees of it.
  """
  found, asked = {}, []
  for number, each in read.items():
    unfit = [(text, it.id) for text, it in enumerate(each) if it.id in how.unfit]
    left_out = [dict(text=text, trajectory=id, why=how.unfit[id]) for text, id in unfit]
    found[number] = [[] for _ in each], left_out
    asked += [(number, text) for text, it in enumerate(each) if it.id not in how.unfit]
  if not asked:
    return found
  responses = how.policy.sample(
    [_prompt(how.encode, read[n][text], shown[text], how.max_prompt_tokens) for n, text in asked],
    [derive(how.seed, how.round, "extract", text, number) for number, text in asked],
    sampling=how.sampling,
    max_new_tokens=how.max_response_tokens,
  )
  for (number, text), response in zip(asked, responses, strict=True):
    answers, left_out = found[number]
    try:
      answers[text] = _items_of(how, response)
    except ValueError as error:
      name, why = read[number][text].id, f"the answer cannot be read: {error}"
      left_out.append(dict(text=text, trajectory=name, why=why))
      told = "extraction step %d, text %d: trajectory %s left out: %s"
      logging.warning(told, number, text, name, why)
  return found


def _items_of(how: _Settings, response: Sequence[int]) -> list[str]:
  """The items of a response. Half a surrogate pair, which no file can hold, becomes a "?"."""
  answer = how.policy.tokenizer.split_response(response, thinking=how.thinking)[1]
  return parse_items(answer.encode("utf-8", "replace").decode("utf-8"), how.form)


def _add(
  found: Sequence[list[Item]], answers: state.Step, read: Sequence[str], step: int, round: int
) -> list[list[Item]]:
  """Adds a step's items to each text and returns them; `read`: the id of the trajectory that each
  text read.
  """
  new = [
    [Item(text, trajectory, step, round) for text in answer]
    for answer, trajectory in zip(answers, read, strict=True)
  ]
  for items, added in zip(found, new, strict=True):
    items += added
  return new


def _newest(how: _Settings, items: Sequence[Item]) -> Knowledge:
  """The newest of the items that the extractor may see, within the limit of tokens."""
  if not how.see_previous:
    return Knowledge()
  count = lambda text: len(how.policy.tokenizer.encode(text))
  return limit(Knowledge(tuple(items)), how.max_knowledge_tokens, count)[0]


def raw_knowledge(
  trajectories: Sequence[Conversation],
  *,
  texts: int,
  seed: int,
  round: int,
  wording: str = "games",
  answered_only: bool = False,
  people: Collection[str] = (),
) -> list[Knowledge]:
  """The control without extraction: whole transcripts are the items (OEL Table 1, "raw
  trajectories").

  Text k reads the trajectories in the order in which `extract` reads them for its text k, and
  leaves out those that it leaves out with `answered_only` and `people`, so the two differ in
  nothing else.

  Returns:
    `texts` whole accumulations, as from `extract`: `as_of` limits them, the oldest whole
    transcripts going first.
  """
  return [
    Knowledge(
      tuple(
        Item(transcript(trajectories[i], wording), trajectories[i].id, step, round)
        for step, i in enumerate(order, start=1)
        if not answered_only or _has_answer(trajectories[i], people)
      )
    )
    for order in orders(len(trajectories), texts, seed, round)
  ]


def orders(count: int, texts: int, seed: int, round: int) -> list[list[int]]:
  """For each text, all the trajectories' numbers in its own random order."""
  return [
    np.random.default_rng(derive(seed, round, "extract-order", text)).permutation(count).tolist()
    for text in range(texts)
  ]


def _encode(
  tokenizer, trajectory: Conversation, knowledge: Knowledge, *, thinking: bool, **words: str
) -> list[int]:
  told = transcript(trajectory, words["wording"])
  asked = extraction_message(told, knowledge.text, **words)
  return tokenizer.chat([asked], thinking=thinking)


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


def _find_unfit(
  encode: Encode,
  trajectories: Sequence[Conversation],
  max_prompt_tokens: int,
  answered_only: bool,
  people: Collection[str],
) -> dict[str, str]:
  """Trajectories that no prompt has room for or can hold, or that teach nothing, by id, and why;
  found before anything is sampled.

  Raises:
    ValueError: there is no trajectory, or all are left out.
  """
  if not trajectories:
    raise ValueError("extraction has 0 trajectories to read: it needs at least 1")
  unfit = {}
  for trajectory in trajectories:
    if answered_only and not _has_answer(trajectory, people):
      unfit[trajectory.id] = UNANSWERED
      continue
    try:
      tokens = len(encode(trajectory, Knowledge()))
    except ValueError as error:
      unfit[trajectory.id] = f"it cannot be made a prompt: {error}"
      continue
    if tokens > max_prompt_tokens:
      unfit[trajectory.id] = (
        f"its extraction prompt has {tokens} tokens without any knowledge, over "
        f"policy.max_prompt_tokens ({max_prompt_tokens})"
      )
  broken = [(name, why) for name, why in unfit.items() if why != UNANSWERED]
  for name, why in broken[:MAX_NAMED]:
    logging.warning("extraction: trajectory %s left out: %s", name, why)
  if len(unfit) == len(trajectories):
    name, why = next(iter(unfit.items()))
    raise ValueError(
      f"extraction has 0 trajectories to read: all {len(trajectories)} are left out; the first, "
      f"{name}: {why}"
    )
  if unfit:
    told = "extraction: %d of %d trajectories are left out of every text; in %d nobody answered"
    logging.warning(told, len(unfit), len(trajectories), len(unfit) - len(broken))
  return unfit


def _has_answer(trajectory: Conversation, people: Collection[str]) -> bool:
  """Whether anybody said anything to what the policy said, or one of `people` in its place. Else
  there are only its own words, which an extractor takes for right.
  """
  own = [by_policy(message, people) for message in trajectory.messages]
  roles = [message.role for message in trajectory.messages]
  if trajectory.outcome or trajectory.feedback or own.count(True) < roles.count("assistant"):
    return True
  first = own.index(True) if True in own else len(roles)
  return any(role in ("user", "tool") for role in roles[first:])
