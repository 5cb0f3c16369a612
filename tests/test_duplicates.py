"""Sketches estimate what brute force computes, and find what it finds."""

import random

import numpy as np
import pytest

from oel_jax.conversations import duplicates
from oel_jax.conversations.duplicates import CONTINUED, KEPT, NEARLY, SAME, Sketches
from oel_jax.conversations.schema import Conversation, Message, Source, ToolCall


def talk(words: str, answer="Yes.", feedback=None, system="") -> Conversation:
  head = (Message("system", system),) if system else ()
  said = (*head, Message("user", words), Message("assistant", answer))
  return Conversation("x", said, Source("log", "x"), feedback=feedback)


def sequences(text: str) -> set[tuple[str, ...]]:
  words = f"{text} yes".split()
  return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(one: set, other: set) -> float:
  return len(one & other) / len(one | other)


def changed(rng, words: list[str], count: int) -> list[str]:
  words = list(words)
  for place in rng.sample(range(len(words)), count):
    words[place] = f"new{rng.randrange(10**6)}"
  return words


def reasons(talks, near=0.8, seed=0):
  sketches = Sketches(seed)
  for each in talks:
    sketches.add(each)
  return sketches.reasons(near).tolist()


@pytest.fixture(scope="module")
def texts():
  """60 texts with 5 changed ones each: pairs of all similarities."""
  rng, found = random.Random(3), []
  for _ in range(60):
    words = [f"w{rng.randrange(5000)}" for _ in range(rng.randrange(40, 300))]
    found.append(" ".join(words))
    for share in (0.005, 0.015, 0.03, 0.06, 0.2):
      found.append(" ".join(changed(rng, words, max(1, int(share * len(words))))))
  return found


def test_sketches_estimate_the_jaccard_similarity(texts):
  sketches = Sketches()
  for text in texts:
    sketches.add(talk(text))
  stored = np.frombuffer(sketches._sketches, np.uint8).reshape(len(texts), -1)
  errors, seen, sets = [], [], [sequences(text) for text in texts]
  for begin in range(0, len(texts), 6):
    for i in range(begin, begin + 6):
      for j in range(i + 1, begin + 6):
        agree = (stored[i] == stored[j]).mean()
        true = jaccard(sets[i], sets[j])
        errors.append((agree - 1 / 256) / (1 - 1 / 256) - true)
        seen.append(true)
  assert min(seen) < 0.2 and max(seen) > 0.95 and len(errors) == 900
  assert abs(np.mean(errors)) < 0.005  # no bias: the deviation of one is at most 0.044
  assert np.std(errors) < 0.05


def test_near_duplicates_are_those_of_brute_force_but_for_the_edge(texts):
  """All beyond 0.9 are found, none below 0.7 is; between them the estimate may err."""
  found = reasons(map(talk, texts))
  sets = [sequences(text) for text in texts]
  for place, text in enumerate(sets):
    before = [jaccard(text, other) for other in sets[:place]]
    best = max(before, default=0)
    kept = max((s for s, reason in zip(before, found) if reason == KEPT), default=0)
    assert found[place] in (KEPT, NEARLY)
    if found[place] == NEARLY:
      assert best > 0.7
    else:
      assert kept < 0.9
  assert 60 < found.count(NEARLY) < 240


def test_the_same_seed_finds_the_same_and_above_1_nothing_is_near(texts):
  some = [talk(text) for text in texts[:120]]
  assert reasons(some) == reasons(some)
  assert reasons(some, near=1.1) == [KEPT] * 120
  assert reasons(some, near=1.0, seed=7).count(NEARLY) == 0


def test_exact_duplicates_and_beginnings():
  first = talk("Where is the form?")
  more = Conversation(
    "y",
    (*first.messages, Message("user", "And then?"), Message("assistant", "Sign.")),
    first.source,
  )
  rated = talk("Where is the form?", feedback="wrong")
  other = talk("Where is the form?", answer="No.")
  calls, again = (
    Conversation(id_, (first.messages[0], Message("assistant", "", (call,))), first.source)
    for id_, call in (("z", ToolCall("1", "f", "{}")), ("w", ToolCall("2", "f", "{}")))
  )
  assert reasons([first, first]) == [KEPT, SAME]
  assert reasons([first, rated, first]) == [SAME, KEPT, SAME]
  assert reasons([first, more]) == reasons([first, more], 1.1) == [CONTINUED, KEPT]
  assert reasons([more, first]) == [KEPT, CONTINUED]
  assert reasons([rated, more]) == [KEPT, KEPT]
  assert reasons([first, other, calls, again]) == [KEPT, KEPT, KEPT, SAME]
  assert reasons([]) == []


def test_what_has_feedback_is_not_left_out_for_what_has_none():
  words = " ".join(f"w{n}" for n in range(100))
  close = words.replace("w50 ", "x ")
  assert reasons([talk(words), talk(close)]) == [KEPT, NEARLY]
  assert reasons([talk(words), talk(close, feedback="wrong")]) == [KEPT, KEPT]
  assert reasons([talk(words, feedback="ok"), talk(close, feedback="no")]) == [KEPT, NEARLY]


def test_a_system_text_that_all_share_makes_no_two_alike():
  system = " ".join(f"rule{n}" for n in range(500))
  texts = ["My printer on floor 3 is broken", "I need a new badge for the gate", "Hi"]
  assert reasons([talk(text, system=system) for text in texts]) == [KEPT] * 3


def test_short_and_unspaced_texts():
  assert reasons([talk("Hi"), talk("Hi!"), talk("Ho")], near=0.99) == [KEPT, NEARLY, KEPT]
  text = (
    "我的打印机坏了请问在哪里可以找到维修的表格谢谢你的帮助今天是星期一我们在三楼的办公室里等你"
  )
  assert reasons([talk(text), talk(text + "再见"), talk(text[::-1])]) == [KEPT, NEARLY, KEPT]


def test_many_near_duplicates_of_a_few_are_all_found():
  """One name in every band: the later ones are compared with the first of them."""
  words = [" ".join(f"{kind}{n}" for n in range(200)) for kind in "abc"]
  rng = random.Random(1)
  texts = [" ".join(changed(rng, words[n % 3].split(), 1)) for n in range(600)]
  found = reasons(map(talk, texts))
  assert found[:3] == [KEPT] * 3 and found.count(KEPT) < 10
  assert duplicates.NAMES[NEARLY] == "near"


def test_calls_that_repeat_a_conversation_under_another_system_text_are_its_beginnings():
  """Many programs write the time into it at each call."""
  said, calls = (), []
  for turn in range(3):
    asked = Message("user", f"question {turn}")
    said = (*said, asked, Message("assistant", f"answer {turn}"))
    head = Message("system", f"It is 12:0{turn}.")
    calls.append(Conversation("x", (head, *said), Source("log", "x")))
  assert reasons(calls, near=2) == [CONTINUED, CONTINUED, KEPT]
  two = [talk("question", system=text) for text in ("Be brief.", "Be polite.")]
  assert reasons(two, near=2) == [KEPT, KEPT]


def test_an_answer_that_comes_back_with_other_spaces_is_the_same():
  """OpenAI's servers write {"a":1,…}; LangChain sends back {"a": 1, …}."""
  user, result = Message("user", "question"), Message("tool", "12", tool_call_id="c")
  call = lambda text: Message("assistant", "", (ToolCall("c", "clock", text),))
  done, more = Message("assistant", "Noon."), Message("user", "And now?")
  calls = [
    (user, call('{"a":1,"b":"x y"}')),
    (user, call('{"a": 1, "b": "x y"}'), result, Message("assistant", "Noon.\n")),
    (user, call('{"b": "x y", "a": 1}'), result, done, more, done),
    (user, call('{"a": 1, "b": "xy"}')),
    (user, call('{"a": 1')),
  ]
  talks = [Conversation("x", said, Source("log", "x")) for said in calls]
  assert reasons(talks, near=2) == [CONTINUED, CONTINUED, KEPT, KEPT, KEPT]
