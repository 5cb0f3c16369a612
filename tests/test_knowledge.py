"""Items, their limit and their files, against brute force and files written by hand."""

import dataclasses
import json
import random

import pytest
from absl import logging

from oel_jax.extraction import knowledge as lib
from oel_jax.extraction.knowledge import Item, Knowledge

MARK = "- EXPERIENCE ITEM:"


def words(text):
  return len(text.split())


def make(*texts, step=1):
  return Knowledge(tuple(Item(text, f"t{i}", step, 1) for i, text in enumerate(texts)))


@pytest.fixture
def logged(monkeypatch):
  lines = []
  for level in ("info", "warning"):
    monkeypatch.setattr(logging, level, lambda message, *args: lines.append(message % args))
  return lines


@pytest.mark.parametrize(
  "answer, expected",
  [
    ("", []),
    ("I learned nothing.", []),
    (f"{MARK} go to G", [f"{MARK} go to G"]),
    (f"Here it is:\n  {MARK} one  \r\n\n{MARK} two\nDone.", [f"{MARK} one", f"{MARK} two"]),
    (f"{MARK}\n{MARK}   \n{MARK} x", [f"{MARK} x"]),  # empty items say nothing
    # As Qwen2.5-Coder-1.5B wrote it.
    (
      "EXPERIENCE ITEM: a\n* EXPERIENCE ITEM: b\n- Experience Item: c",
      [f"{MARK} {x}" for x in "abc"],
    ),
    (
      "- **EXPERIENCE ITEM:** a\n**EXPERIENCE ITEM**: b\n-  EXPERIENCE ITEM:c",
      [f"{MARK} {x}" for x in "abc"],
    ),
    (f"so {MARK} x\n1. {MARK} x\nEXPERIENCE ITEMS: x\nAn EXPERIENCE ITEM: x", []),
    (f"{MARK} a\x0cb\u2028c", [f"{MARK} a\x0cb\u2028c"]),  # only a newline ends an item
  ],
)
def test_structured_items(answer, expected):
  assert lib.parse_items(answer, "items") == expected


@pytest.mark.parametrize(
  "answer, expected",
  [("", []), (" \n ", []), (" G is good.\n\nH is bad.\n", ["G is good.\n\nH is bad."])],
)
def test_free_text_is_one_item(answer, expected):
  assert lib.parse_items(answer, "text") == expected


def test_text_and_steps():
  carried = Item("old", "r1-deploy-3", -1, 1)
  items = (carried, Item("a", "x", 1, 2), Item("b", "x", 1, 2), Item("c", "y", 3, 2))
  whole = Knowledge(items)
  assert whole.text == "old\na\nb\nc"
  assert Knowledge().text == ""
  assert [whole.at(step).text for step in (0, 1, 2, 3, 9)] == [
    "old",
    "old\na\nb",
    "old\na\nb",
    "old\na\nb\nc",
    "old\na\nb\nc",
  ]
  assert whole.carried().items == (
    carried,
    Item("a", "x", -1, 2),
    Item("b", "x", -1, 2),
    Item("c", "y", -1, 2),
  )
  with pytest.raises(dataclasses.FrozenInstanceError):
    carried.text = "new"


def test_limit_by_hand():
  whole = make("a a a", "b b", "c c c")
  assert lib.limit(whole, 8, words) == (whole, 0)
  assert lib.limit(whole, 7, words) == (Knowledge(whole.items[1:]), 1)
  assert lib.limit(whole, 4, words) == (Knowledge(whole.items[2:]), 2)
  # What cannot fit alone goes, what can stays.
  assert lib.limit(whole, 2, words) == (
    Knowledge(whole.items[1:2]),
    2,
  )
  assert lib.limit(whole, 1, words) == (Knowledge(), 3)
  assert lib.limit(Knowledge(), 1, words) == (Knowledge(), 0)


def test_limit_counts_what_stands_between_items():
  whole = make("abc", "def", "gh")
  assert lib.limit(whole, 10, len)[1] == 0  # 8 characters and 2 newlines
  assert lib.limit(whole, 9, len)[0].text == "def\ngh"


def test_limit_equals_dropping_one_by_one():
  rng = random.Random(0)
  for _ in range(300):
    whole = make(*("w " * rng.randint(1, 6) for _ in range(rng.randint(0, 12))))
    most = rng.randint(1, 20)
    left = [item for item in whole.items if len(item.text.split()) <= most]
    while sum(len(item.text.split()) for item in left) > most:
      left.pop(0)
    assert lib.limit(whole, most, words) == (Knowledge(tuple(left)), len(whole.items) - len(left))


def test_item_over_the_limit_is_reported(logged):
  lib.limit(make("a", "b b b b", "c"), 3, words)
  assert (
    len(logged) == 1
    and "t1" in logged[0]
    and "4 tokens" in logged[0]
    and "extraction.max_knowledge_tokens = 3" in logged[0]
  )


def test_as_of_cuts_time_before_length(logged):
  """Limiting first would lose the items of step 1 to those of step 2, which as_of(1) must not even
  see.
  """
  whole = Knowledge((Item("a a", "x", 1, 1), Item("b b b", "y", 2, 1)))
  assert [
    [text.text for text in lib.as_of([whole, Knowledge()], step, max_tokens=3, count_tokens=words)]
    for step in (0, 1, 2)
  ] == [["", ""], ["a a", ""], ["b b b", ""]]
  assert len(logged) == 1 and "knowledge text 00" in logged[0] and "1 oldest of 2" in logged[0]


def test_nonempty(logged, tmp_path):
  full = make("a")
  assert lib.nonempty([full, full], tmp_path) == [full, full] and not logged
  assert lib.nonempty([Knowledge(), full, make(" ")], tmp_path) == [full]
  assert "00, 02" in logged[0]
  with pytest.raises(ValueError, match=f"{tmp_path}: all 2 knowledge texts are empty"):
    lib.nonempty([Knowledge(), Knowledge()], tmp_path)


HARD = Knowledge(
  (
    Item(f'{MARK} über <|im_start|> </think> "q" \\n', "r1-deploy-00001", -1, 1),
    Item("two\r\n\nparagraphs\u2028 \n", "b", 2, 2),
  )
)


@pytest.mark.parametrize(
  "whole",
  [Knowledge(), make("a"), make("a", "b", "c"), HARD],
  ids=["empty", "one", "three", "hard"],
)
def test_files_round_trip(tmp_path, whole):
  lib.write(tmp_path / "knowledge", 7, whole)
  assert lib.read(tmp_path / "knowledge", 7) == whole
  assert sorted(path.name for path in (tmp_path / "knowledge").iterdir()) == ["07.jsonl", "07.md"]


def test_files_are_what_the_design_says(tmp_path):
  lib.write(tmp_path, 0, HARD)
  lines = (tmp_path / "00.jsonl").read_bytes().decode().split("\n")
  assert lines.pop() == ""
  assert [
    {name: value for name, value in json.loads(line).items() if name != "digest"} for line in lines
  ] == [
    {
      "schema": 1,
      "text": HARD.items[0].text,
      "trajectory": "r1-deploy-00001",
      "step": -1,
      "round": 1,
    },
    {"schema": 1, "text": HARD.items[1].text, "trajectory": "b", "step": 2, "round": 2},
  ]
  assert (tmp_path / "00.md").read_bytes() == (
    HARD.items[0].text + "\n" + HARD.items[1].text + "\n"
  ).encode()


def test_rewriting_replaces(tmp_path):
  lib.write(tmp_path, 0, make("a", "b"))
  lib.write(tmp_path, 0, make("c"))
  assert lib.read(tmp_path, 0) == make("c")


GOOD = {"schema": 1, "text": "b", "trajectory": "t1", "step": 1, "round": 1}


@pytest.mark.parametrize(
  "line, words_of_error",
  [
    ('{"schema": 1, "text": "b"', "damaged (Expecting ',' delimiter"),
    (
      json.dumps({**GOOD, "digest": "0123456789abcdef"}),
      'is not what its field "digest" was made of',
    ),
    (json.dumps({**GOOD, "step": 2**70}), "is beyond 64 bits"),
    ("[]", '"schema": 1'),
    (json.dumps({**GOOD, "schema": 2}), '"schema": 1'),
    (json.dumps({**GOOD, "text": None}), '"text" is None'),
    (json.dumps({**GOOD, "trajectory": 4}), '"trajectory" is 4'),
    (json.dumps({**GOOD, "step": 0}), '"step" is 0: it must be 1 or more, or -1'),
    (json.dumps({**GOOD, "step": True}), '"step" is True'),
    (json.dumps({k: v for k, v in GOOD.items() if k != "round"}), '"round" is None'),
  ],
)
def test_damaged_line(tmp_path, line, words_of_error):
  lib.write(tmp_path, 0, make("a", "b", "c"))
  lines = (tmp_path / "00.jsonl").read_text().split("\n")
  lines[1] = line
  (tmp_path / "00.jsonl").write_text("\n".join(lines))
  with pytest.raises(ValueError) as error:
    lib.read(tmp_path, 0)
  assert str(error.value).startswith(f"{tmp_path / '00.jsonl'}:2: ") and words_of_error in str(
    error.value
  )


def test_file_cut_off(tmp_path):
  lib.write(tmp_path, 0, make("a", "b"))
  whole = (tmp_path / "00.jsonl").read_bytes()
  (tmp_path / "00.jsonl").write_bytes(whole[:-1])
  with pytest.raises(ValueError, match="00.jsonl:2: the last line is cut off"):
    lib.read(tmp_path, 0)
  (tmp_path / "00.jsonl").write_bytes(whole.replace(b'"b"', b'"\xff"'))
  with pytest.raises(ValueError, match="00.jsonl:2: not UTF-8"):
    lib.read(tmp_path, 0)


@pytest.mark.parametrize(
  "text, line",
  [
    ("a\nB\nc\n", 2),
    ("a\nb\n", 3),
    ("a\nb\nc\nd\n", 4),
    ("", 1),
    ("a\nb\nc", 4),
    ("a\r\nb\nc\n", 1),
  ],
)
def test_text_that_disagrees(tmp_path, text, line):
  lib.write(tmp_path, 0, make("a", "b", "c"))
  (tmp_path / "00.md").write_bytes(text.encode())
  with pytest.raises(ValueError, match=f"00.md:{line}: .*00.jsonl"):
    lib.read(tmp_path, 0)


@pytest.mark.parametrize("suffix", ["md", "jsonl"])
def test_missing_file(tmp_path, suffix):
  lib.write(tmp_path, 0, make("a"))
  (tmp_path / f"00.{suffix}").unlink()
  with pytest.raises(FileNotFoundError, match=f"00.{suffix}"):
    lib.read(tmp_path, 0)
