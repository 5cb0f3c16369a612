"""Extraction with a policy that records what it is asked, and answers from its prompt and seed
alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import random
import re
import subprocess
import sys

import pytest
from absl import logging
from fakes import game_of, turn_of

from oel_jax.conversations.schema import Conversation, Message, Source, transcript
from oel_jax.extraction import Item, Knowledge, extract, knowledge, raw_knowledge, state
from oel_jax.runtime.files import write_sealed
from oel_jax.runtime.seeds import derive

extract_lib = sys.modules["oel_jax.extraction.extract"]  # the package's name is the function's
MARK = "- EXPERIENCE ITEM:"
K, N = 3, 5
SAMPLING = object()


class Tokenizer:
  """A token is a character; 0 ends the thinking, 1 the response."""

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, ids):
    return "".join(map(chr, ids))

  def chat(self, messages, *, thinking=True):
    return self.encode(
      "".join(f"[{m.role}]{m.content}" for m in messages) + ("[think]" if thinking else "[plain]")
    )

  def split_response(self, ids, thinking=True):
    text = self.decode(ids).removesuffix("\x01")
    thinking, closed, answer = text.partition("\x00")
    return (thinking, answer) if closed else (text, "")


class Policy:
  """Answers "item N from PROMPT-HASH and SEED"; `broken_at` raises at that call, `answer` overrides
  the answer's text.
  """

  def __init__(self, broken_at=None, answer=None):
    self.tokenizer = Tokenizer()
    self.calls = []  # of (prompts as text, seeds)
    self.broken_at = broken_at
    self.answer = answer or (
      lambda prompt, seed: (
        f"Well.\n{MARK} first {name(prompt, seed)}\n{MARK} second {name(prompt, seed)}"
      )
    )

  def sample(self, prompts, seeds, *, sampling, max_new_tokens):
    assert sampling is SAMPLING and max_new_tokens == 99 and len(prompts) == len(seeds)
    if len(self.calls) == self.broken_at:
      raise KeyboardInterrupt
    self.calls.append(([self.tokenizer.decode(p) for p in prompts], list(seeds)))
    return [
      self.tokenizer.encode(f"hm\n{MARK} thought\x00{self.answer(p, s)}\x01")
      for p, s in zip(*self.calls[-1])
    ]


def name(prompt, seed):
  return hashlib.md5(f"{prompt}{seed}".encode()).hexdigest()[:8]


def game(i):
  turn = turn_of(f"board {i}", "secret thought", f"[up] {i}", "[up]", 9)
  return game_of(f"r1-deploy-{i:05d}", "Game", i, (turn, turn), f"outcome {i}", 0.0, False, "lost")


GAMES = [game(i) for i in range(N)]


def run(policy, games=GAMES, **changes):
  arguments = dict(
    texts=K,
    form="items",
    see_previous=True,
    sampling=SAMPLING,
    max_response_tokens=99,
    max_knowledge_tokens=10**6,
    max_prompt_tokens=10**6,
    seed=0,
    round=1,
  )
  return extract(policy, games, **(arguments | changes))


def read_by(prompt):
  """Which game the prompt shows; fails unless exactly one whole record is in it."""
  ways = ("games", "conversations")
  shown = [g for g in GAMES if any(transcript(g, way) in prompt for way in ways)]
  assert len(shown) == 1
  return shown[0]


def shown_items(prompt):
  """Item lines of "Known before this game", not of the question that ends the prompt."""
  return [line for line in prompt.split("\n") if line.startswith(MARK)]


def test_one_batch_a_step_and_exact_provenance():
  policy = Policy()
  texts = run(policy)
  assert len(policy.calls) == N and len(texts) == K
  expected = [[] for _ in range(K)]
  for step, (prompts, seeds) in enumerate(policy.calls, start=1):
    assert len(prompts) == K
    for k, (prompt, seed) in enumerate(zip(prompts, seeds)):
      assert seed == derive(0, 1, "extract", k, step)
      assert shown_items(prompt) == [item.text for item in expected[k]]
      assert "secret thought" not in prompt
      expected[k] += [
        Item(f"{MARK} {which} {name(prompt, seed)}", read_by(prompt).id, step, 1)
        for which in ("first", "second")
      ]
  assert [list(text.items) for text in texts] == expected


def test_each_text_reads_all_games_in_its_own_order():
  policy = Policy()
  games = [game(i) for i in range(12)]
  texts = run(policy, games)
  orders = [[item.trajectory for item in text.items[::2]] for text in texts]
  assert all(sorted(order) == [g.id for g in games] for order in orders)
  assert len({tuple(order) for order in orders} | {tuple(g.id for g in games)}) == K + 1
  again = [[item.trajectory for item in text.items[::2]] for text in run(Policy(), games)]
  other_round = [
    [item.trajectory for item in text.items[::2]] for text in run(Policy(), games, round=2)
  ]
  assert again == orders and all(a != b for a, b in zip(other_round, orders))


def test_texts_do_not_depend_on_how_many_there_are():
  assert run(Policy(), texts=2) == run(Policy())[:2]


def test_without_previous_knowledge():
  policy = Policy()
  texts = run(
    policy, see_previous=False, start=[Knowledge((Item("carried", "x", 4, 1),))] * K, round=2
  )
  assert not any(
    "first" in prompt or "carried" in prompt for prompts, _ in policy.calls for prompt in prompts
  )
  assert all(len(text.items) == 1 + 2 * N for text in texts)


def test_steps_that_see_nothing_of_each_other_are_one_batch(tmp_path, monkeypatch):
  found = {}
  for at_once, calls in ((1, N), (2 * K + 1, (N + 1) // 2), (N * K, 1)):
    monkeypatch.setattr(extract_lib, "AT_ONCE", at_once)
    policy, file = Policy(), tmp_path / f"{at_once}.jsonl"
    texts = run(policy, see_previous=False, state_path=file)
    assert len(policy.calls) == calls
    found[at_once] = texts, file.read_bytes()
  assert found[1] == found[2 * K + 1] == found[N * K]


def test_carried_over_knowledge_comes_first_and_is_shown():
  start = [Knowledge((Item(f"old {k}", f"r1-deploy-0000{k}", k + 1, 1),)) for k in range(K)]
  policy = Policy()
  texts = run(policy, start=start, round=2)
  for k, text in enumerate(texts):
    assert text.items[0] == Item(f"old {k}", f"r1-deploy-0000{k}", -1, 1)
    assert [(item.step, item.round) for item in text.items[1:]] == [
      (step, 2) for step in range(1, N + 1) for _ in range(2)
    ]
    assert (
      f"old {k}\n" in policy.calls[0][0][k] and f"old {k}\n{MARK} first" in policy.calls[1][0][k]
    )
    assert text.at(0).text == f"old {k}"


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_reaches_the_template(thinking):
  policy = Policy()
  run(policy, thinking=thinking)
  assert all(
    prompt.endswith("[think]" if thinking else "[plain]")
    for prompts, _ in policy.calls
    for prompt in prompts
  )


def test_the_words_of_conversations_speak_of_no_game():
  policy = Policy()
  run(policy, wording="conversations")
  for prompts, _ in policy.calls:
    for prompt in prompts:
      asked = prompt.replace(transcript(read_by(prompt), "conversations"), "")
      assert "conversation" in asked and "game" not in asked and "board" not in asked
      assert asked.count(MARK) == len(shown_items(asked)) + 1  # and the form that is asked for


@pytest.mark.parametrize("answered", ["", "feedback", "outcome", "user", "tool"])
def test_what_nobody_answered_is_left_out_if_asked_to(answered, caplog):
  caplog.set_level("WARNING")
  said = [Message("user", "My parcel is late."), Message("assistant", "Desk Alder.")]
  said += [Message(answered, "Desk Rowan it is.")] if answered in ("user", "tool") else []
  words = {answered: "Desk Rowan it is."} if answered in ("feedback", "outcome") else {}
  alone = Conversation("alone", tuple(said), Source("log", "f"), **words)
  policy = lambda: Policy(answer=lambda prompt, seed: f"{MARK} {seed}")
  texts = run(policy(), [alone, *GAMES], answered_only=True)
  read = {item.trajectory for text in texts for item in text.items}
  assert read == {game.id for game in GAMES} | ({"alone"} if answered else set())
  assert ("in 1 nobody answered" in caplog.text) == (not answered)
  assert run(policy(), [alone])[0].items
  if not answered:
    with pytest.raises(ValueError, match="all 1 are left out.*answered_only = False reads it"):
      run(policy(), [alone], answered_only=True)


def test_what_people_answered_in_the_policys_place_is_read():
  ann = Message("assistant", "Desk Rowan.", name="ann")
  asked = Message("user", "My parcel is late.")
  by_ann = Conversation("ann", (asked, ann), Source("log", "f"))
  handed_over = Conversation("over", (asked, Message("assistant", "?"), ann), Source("log", "f"))
  alone = Conversation("alone", (asked, Message("assistant", "Desk Alder.")), Source("log", "f"))
  policy = lambda: Policy(answer=lambda prompt, seed: f"{MARK} {seed}")
  conversations = [by_ann, handed_over, alone, *GAMES]
  games = {game.id for game in GAMES}
  for people, more in (
    ((), set()),
    (("ann",), {"ann", "over"}),
    (("*",), {"ann", "over", "alone"}),
  ):
    texts = run(policy(), conversations, answered_only=True, people=people)
    assert {item.trajectory for text in texts for item in text.items} == games | more
    how = dict(texts=1, seed=0, round=1, answered_only=True, people=people)
    [raw] = raw_knowledge(conversations, **how)
    assert {item.trajectory for item in raw.items} == games | more


def test_free_text():
  policy = Policy(answer=lambda prompt, seed: f" Para {seed}.\n\nMore. ")
  texts = run(policy, form="text")
  assert [item.text for item in texts[1].items] == [
    f"Para {seeds[1]}.\n\nMore." for _, seeds in policy.calls
  ]
  assert [item.step for item in texts[1].items] == [1, 2, 3, 4, 5]


def test_answers_without_items(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "info", lambda message, *args: lines.append(message % args))
  texts = run(Policy(answer=lambda prompt, seed: "" if seed % 2 else "nothing to tell"))
  assert texts == [Knowledge()] * K
  assert lines[-1] == f"extraction step {N} of {N}: 0 items from {K} texts, {K} answers without one"

  class Unfinished(Policy):
    def sample(self, *args, **kwargs):
      # The length limit fell inside the thinking.
      return [ids[: ids.index(0)] for ids in super().sample(*args, **kwargs)]

  assert run(Unfinished()) == [Knowledge()] * K


def test_extractor_sees_the_newest_items_within_the_knowledge_limit():
  policy = Policy()
  line = len(f"{MARK} first 01234567")  # "second" is one longer
  # Three items of either kind with their newlines, not four.
  texts = run(policy, max_knowledge_tokens=3 * line + 4)
  for step, (prompts, _) in enumerate(policy.calls, start=1):
    for k, prompt in enumerate(prompts):
      assert shown_items(prompt) == [item.text for item in texts[k].at(step - 1).items[-3:]]
  assert all(len(text.items) == 2 * N for text in texts)  # what was not shown is not forgotten
  assert all(
    len(text.items) == 3
    for text in knowledge.as_of(texts, N, max_tokens=3 * line + 4, count_tokens=len)
  )


def test_long_prompt_loses_oldest_shown_items_only():
  whole = Policy()
  run(whole, see_previous=False)
  longest = max(len(prompt) for prompts, _ in whole.calls for prompt in prompts)
  line = len(f"{MARK} second 01234567\n")
  policy = Policy()
  texts = run(policy, max_prompt_tokens=longest + len("Known before this game:\n\n") + 2 * line)
  assert (
    max(len(prompt) for prompts, _ in policy.calls for prompt in prompts)
    <= longest + len("Known before this game:\n\n") + 2 * line
  )
  for step, (prompts, _) in enumerate(policy.calls, start=1):
    for k, prompt in enumerate(prompts):
      assert shown_items(prompt) == [item.text for item in texts[k].at(step - 1).items[-2:]]
      assert read_by(prompt) and prompt.endswith("[think]")  # record and question are whole
  tight = Policy()
  run(tight, max_prompt_tokens=longest)  # no room for knowledge is no error
  assert len(tight.calls) == N


def test_prompt_of_exactly_the_limit_is_left_alone():
  free, exact, below = Policy(), Policy(), Policy()
  run(free)
  longest = max(len(prompt) for prompts, _ in free.calls for prompt in prompts)
  run(exact, max_prompt_tokens=longest)
  run(below, max_prompt_tokens=longest - 1)
  assert exact.calls == free.calls != below.calls


def test_record_that_cannot_fit():
  huge = game_of("huge", "Game", 0, (), "x" * 5000, 0.0, False, "lost")
  policy = Policy()
  with pytest.raises(
    ValueError, match=r"all 1 are left out; the first, huge: .* has [0-9]+ tokens .* \(3000\)"
  ) as error:
    run(policy, [huge], max_prompt_tokens=3000)
  assert not policy.calls
  needed = int(re.search("has ([0-9]+) tokens", str(error.value)).group(1))
  with pytest.raises(ValueError, match="huge"):
    run(policy, [huge], max_prompt_tokens=needed - 1)
  run(policy, [huge], max_prompt_tokens=needed)
  assert max(len(prompt) for prompts, _ in policy.calls for prompt in prompts) == needed


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("broken_at", [None, 0, 2])
def test_a_record_that_no_prompt_has_room_for_is_left_out_and_the_others_are_as_without_it(
  tmp_path, caplog, broken_at
):
  huge = game_of("huge", "Game", 0, (), "x" * 5000, 0.0, False, "lost")
  small = game_of("huge", "Game", 0, (), "x", 0.0, False, "lost")
  path, policy = tmp_path / "state.jsonl", Policy()
  if broken_at is not None:
    with pytest.raises(KeyboardInterrupt):
      run(Policy(broken_at=broken_at), [*GAMES, huge], state_path=path, max_prompt_tokens=3000)
  found = run(policy, [*GAMES, huge], state_path=path, max_prompt_tokens=3000)
  # What is sampled elsewhere goes by text and step, and is the same where the record is short; but
  # for what it taught, which later prompts show.
  other = run(Policy(), [*GAMES, small], see_previous=False)
  alone = run(Policy(), [*GAMES, huge], see_previous=False, max_prompt_tokens=3000)
  for text, whole, part in zip(found, other, alone, strict=True):
    assert [item.trajectory for item in text.items] == [
      item.trajectory for item in whole.items if item.trajectory != "huge"
    ]
    assert list(part.items) == [item for item in whole.items if item.trajectory != "huge"]
  left_out = [
    (line["step"], one["text"], one["trajectory"])
    for line in lines_of(path)[1:]
    for one in line["left_out"]
  ]
  places = [
    [raw.trajectory for raw in text.items].index("huge") + 1
    for text in raw_knowledge([*GAMES, huge], texts=K, seed=0, round=1)
  ]
  assert sorted(left_out) == sorted((step, k, "huge") for k, step in enumerate(places))
  assert "trajectory huge left out: its extraction prompt has" in caplog.text
  assert "1 of 6 trajectories are left out of every text" in caplog.text


def test_an_answer_that_cannot_be_read_is_left_out_and_named(tmp_path, caplog):
  class Broken(Policy):
    def __init__(self):
      super().__init__()
      self.tokenizer.split_response = self.split

    def split(self, ids, thinking=True):
      if "board 3" in self.calls[-1][0][self.read]:
        self.read += 1
        raise ValueError("no such id")
      self.read += 1
      return Tokenizer().split_response(ids, thinking)

    def sample(self, *args, **how):
      self.read = 0
      return super().sample(*args, **how)

  path = tmp_path / "state.jsonl"
  found = run(Broken(), state_path=path)
  for text in found:
    assert {item.trajectory for item in text.items} == {g.id for g in GAMES} - {GAMES[3].id}
  left_out = [one for line in lines_of(path)[1:] for one in line["left_out"]]
  assert sorted(one["text"] for one in left_out) == list(range(K))
  assert {one["why"] for one in left_out} == {"the answer cannot be read: no such id"}
  assert f"trajectory {GAMES[3].id} left out: the answer cannot be read" in caplog.text
  done = Policy()
  assert run(done, state_path=path) == found and not done.calls


def test_half_a_surrogate_pair_in_an_item_ends_nothing(tmp_path):
  path, policy = tmp_path / "state.jsonl", Policy(answer=lambda *_: f"{MARK} a\ud83d b")
  found = run(policy, state_path=path)
  assert found[0].items[0].text == f"{MARK} a? b"
  assert run(Policy(), state_path=path) == found


def test_a_line_separator_inside_an_item_ends_no_line_of_the_file(tmp_path):
  path = tmp_path / "extraction.jsonl"
  run(Policy(answer=lambda prompt, seed: f"{MARK} one\u2028two"), state_path=path)
  header, *steps = state.read(path)
  assert len(header["trajectories"]) == len(steps) == N
  assert all(step["items"] == [[f"{MARK} one\u2028two"]] * K for step in steps)


def test_what_the_extractor_sees_is_what_the_limit_leaves_of_all_items():
  """The newest items are kept from step to step; here they are found anew among all of them."""
  lengths = random.Random(4)
  extra = {}

  def answer(prompt, seed):
    size = extra.setdefault(seed, lengths.choice((3, 10, 40, 400)))  # 400 are over the limit alone
    return f"{MARK} {name(prompt, seed)} {'y' * size}\n{MARK} {'z' * (size // 2)}"

  policy = Policy(answer=answer)
  games = [game(i) for i in range(12)]
  texts = run(policy, games, max_knowledge_tokens=200)
  for step, (prompts, _) in enumerate(policy.calls, start=1):
    for k, prompt in enumerate(prompts):
      kept, _ = knowledge.limit(texts[k].at(step - 1), 200, len)
      assert shown_items(prompt) == [item.text for item in kept.items]


def files(directory, texts):
  for k, text in enumerate(texts):
    knowledge.write(directory, k, text)
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("see_previous", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_interrupted_anywhere_gives_the_same_files(tmp_path, monkeypatch, see_previous, carried):
  monkeypatch.setattr(extract_lib, "AT_ONCE", K)  # a step a batch in either case
  start = [Knowledge((Item(f"old {k}", "x", 2, 1),)) for k in range(K)] if carried else None
  changes = dict(see_previous=see_previous, start=start, max_knowledge_tokens=150)
  whole = files(tmp_path / "whole", run(Policy(), **changes))
  for broken_at in range(N):
    state = tmp_path / f"round_{broken_at}" / "state.jsonl"
    with pytest.raises(KeyboardInterrupt):
      run(Policy(broken_at=broken_at), state_path=state, **changes)
    policy, steps = Policy(), []
    assert (
      files(
        tmp_path / f"cut_{broken_at}",
        run(policy, state_path=state, advance=steps.append, **changes),
      )
      == whole
    )
    assert len(policy.calls) == N - broken_at
    assert steps == ([broken_at] if broken_at else []) + [1] * (N - broken_at)
    assert [path.name for path in state.parent.iterdir()] == ["state.jsonl"]
    done = Policy()
    assert (
      files(tmp_path / f"again_{broken_at}", run(done, state_path=state, **changes)) == whole
      and not done.calls
    )


@pytest.mark.parametrize(
  "changes, field",
  [
    (dict(texts=2), '"texts" of the partial extraction is 3, this run has 2'),
    (dict(games=GAMES[:4]), '"trajectories"'),
    (dict(games=GAMES[::-1]), '"trajectories"'),
    (dict(seed=1), '"seed"'),
    (dict(round=2), '"round"'),
    (dict(form="text"), '"form"'),
    (
      dict(see_previous=False),
      '"see_previous" of the partial extraction is True, this run has False',
    ),
    (dict(start=[Knowledge((Item("old", "x", 1, 1),))] * K), "text 0 began from other knowledge"),
  ],
)
def test_partial_file_of_another_extraction(tmp_path, changes, field):
  state = tmp_path / "state.jsonl"
  with pytest.raises(KeyboardInterrupt):
    run(Policy(broken_at=2), state_path=state)
  before, policy = state.read_bytes(), Policy()
  with pytest.raises(ValueError) as error:
    run(policy, state_path=state, **changes)
  assert (
    str(state) in str(error.value)
    and field in str(error.value)
    and "delete the file" in str(error.value)
  )
  assert not policy.calls and state.read_bytes() == before


def line_of(**fields):
  """A line as someone wrote it by hand: no digest that would tell."""
  return json.dumps({"schema": 2, **fields})


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda lines: [lines[0][:40], *lines[1:]], "state.jsonl:1: damaged: "),
    (lambda lines: ["[]", *lines[1:]], "state.jsonl:1: damaged: the line is []"),
    (lambda lines: [lines[0], lines[1][:-9], *lines[2:]], "state.jsonl:2: damaged: "),
    (
      lambda lines: [*lines[:3], lines[3].replace("second", "third", 1), *lines[4:]],
      'state.jsonl:4: damaged: damaged, or edited: the rest of it is not what its field "digest"',
    ),
    (lambda lines: [line_of(), *lines[1:]], '"seed" of the partial extraction is None'),
    (lambda lines: [lines[0], *lines[2:]], 'line 2: "step" is 2: it must be 1'),
    (
      lambda lines: [*lines, line_of(step=N + 1, items=[[]] * K)],
      'line 7: "step" is 6: it must be at',
    ),
    (
      lambda lines: [lines[0], line_of(step=1, items=[[]])],
      'line 2: "items" is [[]]: it must be 3',
    ),
    (lambda lines: [lines[0], line_of(step=1, items=[[], [1], []])], 'line 2: "items" is'),
  ],
)
def test_damaged_partial_file(tmp_path, change, words):
  path = tmp_path / "state.jsonl"
  run(Policy(), state_path=path)
  path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
  with pytest.raises(ValueError) as error:
    run(Policy(), state_path=path)
  assert str(error.value).startswith(str(path)) and words in str(error.value)
  assert "delete the file" in str(error.value)


def test_a_kill_may_cut_the_last_line_anywhere(tmp_path):
  whole, path = tmp_path / "whole.jsonl", tmp_path / "state.jsonl"
  found = run(Policy(), state_path=whole)
  data, last = whole.read_bytes(), whole.read_bytes().rindex(b"\n", 0, -1) + 1
  for cut in (*range(0, len(data), 61), *range(last, len(data), 7), len(data) - 1):
    path.write_bytes(data[:cut])
    assert run(Policy(), state_path=path) == found and path.read_bytes() == data


# The partial file as earlier versions wrote it: one object, all items of all texts.


def old_state(tmp_path, done, **changes):
  """Writes extraction.json after `done` steps, as the version before wrote it."""
  path = tmp_path / "extraction.jsonl"
  with pytest.raises(KeyboardInterrupt) if done < N else contextlib.nullcontext():
    run(Policy(broken_at=done), state_path=path, weights="aa")
  header = lines_of(path)[0]
  fields = {name: header[name] for name in header if name not in ("schema", "start", "digest")}
  texts = run(Policy())
  items = [[dataclasses.asdict(item) for item in text.at(done).items] for text in texts]
  path.unlink()
  old = path.with_suffix(".json")
  fields = {"schema": 1, **fields, "done": done, "items": items} | changes
  write_sealed(old, {name: value for name, value in fields.items() if value is not None})
  return old


@pytest.mark.parametrize("done", [0, 3, N])
@pytest.mark.parametrize("made_from", [True, False])  # the first versions did not say
def test_a_partial_file_of_an_earlier_version_is_gone_on_with(tmp_path, done, made_from):
  old = old_state(tmp_path, done, **({} if made_from else {"made_from": None}))
  before, policy = old.read_bytes(), Policy()
  assert run(policy, state_path=tmp_path / "extraction.jsonl", weights="aa") == run(Policy())
  assert len(policy.calls) == N - done and not old.exists()
  [kept] = tmp_path.glob("extraction.json.replaced-*")
  assert kept.read_bytes() == before
  run(Policy(), state_path=tmp_path / "whole.jsonl", weights="aa")
  assert (tmp_path / "extraction.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def items_of(state):
  return json.loads(state)["items"]


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda state: state[: len(state) // 2], "damaged"),
    (lambda state: "[]", '"schema"'),
    (lambda state: damage(state, schema=2), '"schema"'),
    (lambda state: damage(state, done=N + 1), '"done" is 6'),
    (
      lambda state: state.replace(f"{MARK} second", f"{MARK} third", 1),
      'is not what its field "digest" was made of',
    ),
    (
      lambda state: damage(state, done=N - 1),
      'text 0, item 8: "step" is 5: it must be from 4 to "done" (4)',
    ),
    (
      lambda state: damage(state, items=[items_of(state)[0][::-1], *items_of(state)[1:]]),
      'item 2: "step" is 4: it must be from 5',
    ),
    (
      lambda state: damage(state, items=[items_of(state)[1], *items_of(state)[1:]]),
      'text 0, item 2: "trajectory" is',
    ),
    (lambda state: damage(state, items=[[]]), '"items" must hold 3 lists'),
    (lambda state: damage(state, items=[[], [{"text": 1}], []]), 'text 1: "text" is 1'),
  ],
)
def test_damaged_partial_file_of_an_earlier_version(tmp_path, change, words):
  old = old_state(tmp_path, N)
  old.write_text(change(old.read_text()))
  with pytest.raises(ValueError) as error:
    run(Policy(), state_path=tmp_path / "extraction.jsonl", weights="aa")
  assert str(error.value).startswith(str(old)) and words in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ["extraction.json"]


def damage(state, **fields):
  """With the fields changed, and no digest that would tell."""
  return json.dumps(
    {name: value for name, value in (json.loads(state) | fields).items() if name != "digest"}
  )


def test_a_partial_file_of_other_weights_or_other_games_under_the_same_ids(tmp_path):
  state = tmp_path / "state.jsonl"
  with pytest.raises(KeyboardInterrupt):
    run(Policy(broken_at=2), state_path=state, weights="aa")
  for changes in (
    dict(weights="bb"),
    dict(weights="aa", wording="conversations"),
    dict(weights="aa", games=[GAMES[0], *map(game, range(2, N + 1))]),
  ):
    games = [
      dataclasses.replace(played, id=g.id)
      for g, played in zip(GAMES, changes.pop("games", GAMES), strict=True)
    ]
    with pytest.raises(
      ValueError, match='"made_from" of the partial extraction is .* delete the file'
    ):
      run(Policy(), games, state_path=state, **changes)


def test_refusals():
  with pytest.raises(ValueError, match="0 trajectories"):
    run(Policy(), [])
  with pytest.raises(ValueError, match="extraction.texts is 3, but 2 texts are carried over"):
    run(Policy(), start=[Knowledge()] * 2)


def test_raw_trajectories_in_the_order_of_extraction():
  extracted = run(Policy())
  raw = raw_knowledge(GAMES, texts=K, seed=0, round=1)
  by_id = {g.id: g for g in GAMES}
  for text, other in zip(raw, extracted, strict=True):
    assert [(item.trajectory, item.step, item.round) for item in text.items] == [
      (i.trajectory, i.step, i.round) for i in other.items[::2]
    ]
    assert [item.text for item in text.items] == [
      transcript(by_id[item.trajectory]) for item in text.items
    ]
  size = len(transcript(GAMES[0]))  # all are of one length
  limited = knowledge.as_of(raw, 4, max_tokens=2 * size + 1, count_tokens=len)
  assert [[item.step for item in text.items] for text in limited] == [[3, 4]] * K


def test_raw_trajectories_leave_out_what_extraction_leaves_out():
  silent = dataclasses.replace(GAMES[1], outcome="", messages=GAMES[1].messages[:2])
  games = [GAMES[0], silent, GAMES[2]]
  how = dict(texts=1, seed=0, round=1)
  [told] = raw_knowledge(games, answered_only=True, wording="conversations", **how)
  [every] = raw_knowledge(games, **how)
  assert [i.trajectory for i in told.items] == [
    i.trajectory for i in every.items if i.trajectory != silent.id
  ]
  assert [i.step for i in every.items] == [1, 2, 3]
  assert all("Outcome:" in i.text and "End of game" not in i.text for i in told.items)


def test_extraction_never_imports_deployment():
  code = (
    "import sys, oel_jax.extraction; "
    "print([m for m in sys.modules if 'deployment' in m or 'textarena' in m])"
  )
  assert (
    subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    == "[]"
  )
