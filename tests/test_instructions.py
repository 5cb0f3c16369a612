"""Instructions and their checks: answers written by hand, right and wrong, and a reader that
follows every prompt from its words alone.
"""

import json
import re

import pytest
from fakes import Tokenizer, in_turns

from oel_jax.evaluation import instruction_checks as checks
from oel_jax.evaluation import tasks
from oel_jax.evaluation.instruction_kinds import KINDS
from oel_jax.evaluation.instructions import LIMIT, draw, instructions
from oel_jax.policy.sampling.token_sampling import Sampling

SEA = "The sea is wide and blue."
# Check, what the rule says, right answers, wrong ones.
BY_HAND = [
  (
    checks.word_count,
    dict(least=5, most=5),
    [
      "The sea is very blue.",
      "It's 3 well-known ships – yes",
      "Cold wind, grey water, home.\n",
    ],
    ["The sea is blue.", "The sea is very deep blue.", "", "The sea - is blue."],
  ),
  (
    checks.sentence_count,
    dict(count=2),
    ["It is cold. We stay.", "Is it? Yes!", "It costs 3.50 today. Good...\n"],
    ["It is cold.", "It is cold. We stay", "One. Two. Three.", "It is cold, we stay", ""],
  ),
  (
    checks.line_count,
    dict(count=2),
    ["Waves roll\nand sing", "Waves roll,\n\nand sing.\n"],
    ["Waves roll and sing", "a\nb\nc", "Waves roll\n***", "Title\nWaves\nroll", ""],
  ),
  (
    checks.first_word,
    dict(word="Maybe"),
    ["Maybe the sea is cold today.", "maybe, just maybe, it will rain"],
    [
      "The sea is cold, maybe today.",
      "Maybe.",
      "Maybell likes the sea a lot.",
      '"Maybe" it is',
      "",
    ],
  ),
  (
    checks.last_word,
    dict(word="today"),
    ["The sea is very cold today.", "Who swims in the sea TODAY?\n", "we swim in it today"],
    [
      "Today the sea is cold.",
      "Today.",
      "It is as on any holitoday.",
      "It is cold today (I say).",
      "",
    ],
  ),
  (
    checks.upper,
    {},
    ["THE SEA IS 3 MILES WIDE.", "ÉTÉ AND WINTER, RAIN AND SUN\n"],
    ["The SEA IS 3 MILES WIDE.", "THE SEA IS WIDe AND BLUE", "SEA", "", SEA],
  ),
  (
    checks.lower,
    {},
    ["the sea is wide and blue.", "it rains on 3 of 4 days\n"],
    [SEA, "the sea is wide, and I swim.", "sea", ""],
  ),
  (
    checks.without_word,
    dict(word="the"),
    ["Our sea is wide and blue.", "Their weather is rather cold, they say."],
    ["Look at the sea, how blue!", SEA, "In winter, THE sea is grey.", "Blue.", ""],
  ),
  (
    checks.without_text,
    dict(text=","),
    [SEA, "It is wide. It is blue.\n"],
    ["It is wide, and it is blue.", "Blue.", ""],
  ),
  (
    checks.without_text,
    dict(text="b"),
    ["The sea is wide and grey."],
    [SEA, "BIG waves roll over the sand."],
  ),
  (
    checks.word_times,
    dict(word="green", count=2),
    ["Green hills and green woods.", "green,green: evergreen"],
    ["Green hills.", "Green, green, green.", "Greens and green", ""],
  ),
  (
    checks.question,
    {},
    ["How deep is the sea?", "Why?\n"],
    [
      "The sea is deep.",
      "How deep? And why?",
      "Sure! How deep is it?",
      "How deep is it? Tell me.",
      "?",
      "",
    ],
  ),
  (
    checks.wrapped,
    dict(before='"', after='"'),
    ['"The sea is wide."', '"Wide, it\'s wide"\n'],
    ['The "sea" is wide.', '"The "sea" is wide."', '"The sea', '"', '""', "'The sea is wide.'", ""],
  ),
  (
    checks.wrapped,
    dict(before="<<", after=">>"),
    ["<<The Sea>>", "<< The Sea >>\n"],
    ["The Sea", "<The Sea>", "<<The Sea>>!", "Title: <<The Sea>>", "<<>>", "<<a>> <<b>>", ""],
  ),
  (
    checks.separated,
    dict(separator=";", count=3),
    ["salt; sand;ships", "salt water ; sand ; ships\n"],
    ["salt, sand, ships", "salt; sand", "salt; sand; ships;", "salt;\nsand; ships", "a;b;c;d", ""],
  ),
  (
    checks.initials,
    dict(letter="m", count=3),
    ["moon, map, milk", "Moon,map,milk.", "moon, map, milk\n"],
    ["moon, map", "moon, map, sun", "moon, map, and milk", "moon, map, Moon", "moon map milk", ""],
  ),
  (
    checks.divided,
    dict(divider="***"),
    ["It is wide.\n***\nIt is blue.", "It is wide.\n\n***\n\nIt is blue.\n"],
    [
      "It is wide. *** It is blue.",
      "***\nIt is blue.",
      "It is wide.\n***",
      "a\n***\nb\n***\nc",
      "",
    ],
  ),
  (
    checks.numbered,
    dict(count=3),
    ["1. salt\n2. sand\n3. ships", "1. salt\n\n2. sand\n\n3. ships\n"],
    [
      "1. salt\n2. sand",
      "1) salt\n2) sand\n3) ships",
      "1. salt\n3. sand\n2. ships",
      "Here:\n1. salt\n2. sand\n3. ships",
      "1. salt\n2. sand\n3. ships\n4. sun",
      "1. salt 2. sand 3. ships",
      "1. \n2. sand\n3. ships",
      "",
    ],
  ),
  (
    checks.bullets,
    dict(mark="-", count=2),
    ["- salt\n- sand", "- salt: much\n\n- sand\n"],
    [
      "* salt\n* sand",
      "- salt",
      "- salt\n- sand\n- sun",
      "Here:\n- salt\n- sand",
      "-salt\n-sand",
      "",
    ],
  ),
  (
    checks.closing_line,
    dict(line="That is all."),
    ["The sea is wide.\nThat is all.", "It is wide.\n\nThat is all.\n"],
    [
      "It is wide. That is all.",
      "That is all.",
      "It is wide.\nThat is all",
      "That is all.\nIt is wide.",
      "",
    ],
  ),
  (
    checks.json_object,
    dict(keys=("name", "size")),
    [
      '{"name": "sea", "size": "large"}',
      '\n{\n "size": "large",\n "name": "sea"\n}\n',
      '```json\n{"name": "sea", "size": "large"}\n```\n',
      '```\n{"name": "sea",\n"size": "large"}\n```',
    ],
    [
      '{"name": "sea"}',
      '{"name": "sea", "size": 3}',
      '{"name": "sea", "size": ""}',
      '{"name": "sea", "size": "large", "use": "none"}',
      '{"name": "sea", "size": "large", "size": "small"}',
      '```json\n{"name": "sea", "size": "large"}\n```\nThis is the sea.',
      'JSON:\n```json\n{"name": "sea", "size": "large"}\n```',
      '[{"name": "sea", "size": "large"}]',
      '[["name", "sea"], ["size", "large"]]',
      "{'name': 'sea', 'size': 'large'}",
      '"name"',
      "",
      "[" * 100000,
    ],
  ),
  (
    checks.json_texts,
    dict(count=2),
    ['["salt", "sand"]', '[\n  "salt",\n  "sand"\n]\n'],
    [
      '["salt"]',
      '["salt", 2]',
      '["salt", "salt"]',
      '{"a": 1, "b": 2}',
      "salt, sand",
      '["salt", "sand",]',
      "",
    ],
  ),
  (
    checks.alone,
    dict(wanted="no"),
    ["no", "No.", "NO\n"],
    ["No, it is not.", "not", "no!", "**no**", "yes", "no or yes", ""],
  ),
  (
    checks.alone,
    dict(wanted="49"),
    ["49", " 49.\n"],
    ["46 + 3 = 49", "49 apples", "490", "4 9", ""],
  ),
  (
    checks.exactly,
    dict(wanted="Il pleut."),
    ["Il pleut.", "Il pleut.\n"],
    ["il pleut.", "Il pleut", '"Il pleut."', "It rains.", "Il pleut. It rains.", ""],
  ),
]


@pytest.mark.parametrize("check, rule, right, wrong", BY_HAND)
def test_a_check_agrees_with_answers_judged_by_hand(check, rule, right, wrong):
  assert [answer for answer in right if not check(answer, **rule)] == []
  assert [answer for answer in wrong if check(answer, **rule)] == []


def test_every_check_was_tried_by_hand():
  used = {getattr(one.check, "func", one.check) for one in draw(len(KINDS), 0)}
  assert used == {check for check, *_ in BY_HAND}


# A reader of prompts that knows nothing but their words.

UNITS = "zero one two three four five six seven eight nine".split()
TENS = dict(thirty=30, forty=40, sixty=60, seventy=70, ninety=90)


def follow(prompt: str) -> str:
  """An answer that does what the prompt says."""
  numbers = [int(number) for number in re.findall(r"\d+", prompt)]
  quoted, after = re.findall(r'"([^"]*)"', prompt), prompt.rpartition(": ")[2]
  has = lambda *phrases: all(phrase in prompt for phrase in phrases)
  many = lambda item, between, count: between.join([item] * count)
  if has("exactly", "words."):
    return many("salt", " ", numbers[0])
  if has("at most"):
    return many("salt", " ", numbers[1])
  if has("in this form"):
    return re.sub("thing", "rain", after)
  if has("exactly", "short sentences"):
    return many("It rains.", " ", numbers[0])
  if has("poem"):
    return many("It rains", "\n", numbers[0])
  if has("first word"):
    return f"{quoted[0]} it does rain here."
  if has("last word"):
    return f"It will rain a lot {quoted[0]}."
  if has("CAPITAL"):
    return "IT DOES RAIN A LOT."
  if has("small letters"):
    return "it does rain a lot."
  if has("Never use the word"):
    return "It rains, it rains, it rains."
  if has("The letter"):
    return "Tom is on time so most men sit in sun." if quoted[0] not in "tmsnioeu" else ""
  if has("any comma"):
    return "It does rain a lot here. It is cold and wet here."
  if has("times."):
    return many(quoted[0], " and ", numbers[0])
  if has("Ask me"):
    return "Does it rain?"
  if has("double quotes"):
    return '"It rains."'
  if has("title for"):
    before, after = re.search(r"between (\S+) and (\S+) and", prompt).groups()
    return f"{before}Rain{after}"
  if has("alphabetical"):
    return ", ".join(sorted(after.split(", ")))
  if has("different words"):
    return ", ".join(quoted[0] + end for end in "abcd"[: numbers[0]])
  if has("three lines"):
    return f"It rains.\n{re.search(r'only (.+) and then', prompt)[1]}\nIt snows."
  if has("numbered list"):
    return "\n".join(f"{i + 1}. rain" for i in range(numbers[0]))
  if has("bullet points"):
    return many(f"{quoted[0]}rain", "\n", numbers[0])
  if has("on a line of its own"):
    return f"It rains.\n{after}"
  if has("JSON object"):
    return json.dumps(dict.fromkeys(quoted, "rain"))
  if has("JSON array"):
    return json.dumps([f"rain {i}" for i in range(numbers[0])])
  if has("yes or no"):
    return "yes" if numbers[0] > numbers[1] else "no"
  if has("What is", " + "):
    return str(numbers[0] + numbers[1])
  if has("What is", " - "):
    return str(numbers[0] - numbers[1])
  if has("in digits"):
    ten, unit = quoted[0].split("-")
    return str(TENS[ten] + UNITS.index(unit))
  if has("reverse order"):
    return " ".join(reversed(after.split()))
  if has("order's number"):
    return str(numbers[0])
  if has("On which day"):
    return re.search(r"\w+day", prompt)[0]
  if has("is an animal"):
    return re.search("horse|tiger|rabbit|sheep|camel|eagle", prompt)[0]
  if has("in the place of"):
    return after.replace(quoted[1], quoted[0])
  if has("exactly", "write nothing else") or has("Do not translate"):
    return after
  raise AssertionError(f"a prompt that nothing here knows: {prompt}")


class Reader:
  """A policy that answers as `answer` says, and notes how it was asked."""

  def __init__(self, answer):
    self.answer, self.tokenizer, self.asked = answer, Tokenizer(), []

  @in_turns
  def sample(self, prompts, seeds, **how):
    self.asked.append((list(seeds), how))
    said = [self.tokenizer.seen[prompt[0]][-1].content for prompt in prompts]
    return [self.tokenizer.put(self.answer(one)) for one in said]


def examine(answer, limit: int = 96) -> tuple[tasks.Count, Reader]:
  reader = Reader(answer)
  policy = tasks.Examinee(reader, Sampling(0.7, 0.8, 20), limit, False)
  return instructions(policy, 400, seed=3), reader


def test_who_does_what_the_words_say_follows_every_instruction():
  found, reader = examine(follow)
  assert {kind: part.hits / part.of for kind, part in found.categories.items()} == dict.fromkeys(
    KINDS, 1.0
  )
  assert (found.hits, found.of) == (400, 400)
  [(seeds, how)] = reader.asked
  assert len(set(seeds)) == 400
  assert how == dict(sampling=Sampling(0.7, 0.8, 20), max_new_tokens=LIMIT)
  assert examine(follow, 1024)[1].asked[0][1]["max_new_tokens"] == 1024


MAY_LACK = {"without_commas", "without_letter", "without_word"}  # what must not be there is not


@pytest.mark.parametrize(
  "lazy, may_pass",
  [
    (lambda prompt: "", set()),
    (lambda prompt: prompt, MAY_LACK | {"at_most_words"}),
    (lambda prompt: f"Sure! Here:\n{follow(prompt)}\nI hope it helps.", MAY_LACK | {"word_times"}),
    (lambda prompt: SEA, MAY_LACK | {"at_most_words", "word_count"}),
  ],
  ids=["nothing", "the prompt", "chat around it", "one sentence for all"],
)
def test_who_follows_no_instruction_passes_only_where_nothing_is_wanted_of_the_form(lazy, may_pass):
  found, _ = examine(lazy)
  assert {kind for kind, part in found.categories.items() if part.hits} <= may_pass


def test_prompts_go_by_the_seed_alone_and_are_many():
  first = draw(256, 7)
  again, other = draw(300, 7), draw(256, 8)
  prompts = [one.prompt for one in first]
  assert prompts == [one.prompt for one in again[:256]]
  assert len(set(prompts)) > 230
  assert len(set(prompts) & {one.prompt for one in other}) < 40
  counts = [sum(one.kind == kind for one in first) for kind in KINDS]
  assert min(counts) >= 7 and max(counts) - min(counts) <= 1


def test_a_task_with_parts_has_their_shares_and_their_intervals():
  reader = Reader(lambda prompt: follow(prompt) if "JSON" in prompt else "")
  policy = tasks.Examinee(reader, Sampling(0.7), 96, False)
  found = tasks.measure({"instructions": instructions}, policy, len(KINDS), seed=0)["instructions"]
  assert (found["hits"], found["of"]) == (2, len(KINDS))
  assert found["categories"].keys() == KINDS.keys()
  assert found["categories"]["json_texts"]["rate"] == 1.0
  assert found["categories"]["upper"]["rate"] == 0.0
  assert found["categories"]["upper"]["interval"][1] > 0.5  # one example says little


def test_parts_that_do_not_make_up_the_whole_are_refused():
  def task(policy, count, *, seed):
    return tasks.Count(3, 4, {"one": tasks.Count(1, 2), "two": tasks.Count(1, 2)})

  with pytest.raises(ValueError, match="task returns categories with 2 hits in all: it must be 3"):
    tasks.measure({"task": task}, None, 4, seed=0)
