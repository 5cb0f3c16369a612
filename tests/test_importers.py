"""What a user gives arrives as it is, or is refused with the place: texts, prompts, checks."""

import json
import re

import numpy as np
import pytest

from oel_jax.conversations import importers, redact, tools
from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.conversations.schema import Message, Prompt

TALK = [{"role": "user", "content": "How are you?"}]


def given(tmp_path, name: str, content: str | bytes) -> str:
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def contents(path: str) -> list[str]:
  return [prefix.messages[-1].content for prefix in importers.read_prompts(path, "prompts")]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
  "content",
  ["Be brief.\n", "Be\tbrief.", "two\n\nlines", "a\u2028b\x0cc\x85d", "\u00e9e\u0301", ""],
)
def test_a_text_is_read_as_it_stands(tmp_path, content):
  for data in (content.encode(), MARK + content.encode(), content.replace("\n", "\r\n").encode()):
    assert importers.read_text(given(tmp_path, "text.txt", data), "knowledge") == content


@pytest.mark.parametrize(
  "character", "\x0b \x0c \x1c \x1d \x1e \x85 \u2028 \u2029 \r \ufeff".split(" ")
)
def test_a_line_ends_with_a_newline_and_with_nothing_else(tmp_path, character):
  line = f"one{character}two"
  for end in ("\n", "\r\n"):
    assert contents(given(tmp_path, "a.txt", f"{line}{end}{end}  {line}{end} \t {end}three")) == [
      line,
      f"  {line}",
      "three",
    ]
  written = "".join(
    json.dumps({"messages": [{"role": "user", "content": line}]}, ensure_ascii=False) + "\r\n"
    for _ in range(2)
  )
  assert contents(given(tmp_path, "a.jsonl", written)) == [line, line]


def test_every_usual_form_of_prompts(tmp_path):
  first, second = (
    {"id": "a", "messages": TALK},
    {"messages": [{"role": "system", "content": "Be kind."}, *TALK]},
  )
  expected = [
    Prompt("a", (Message("user", "How are you?"),)),
    Prompt("held_out-2", (Message("system", "Be kind."), Message("user", "How are you?"))),
  ]
  lines = f"{json.dumps(first)}\n{json.dumps(second)}\n"
  for name in ("a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.json", "a.JSON"):
    for mark in (b"", MARK):
      assert (
        importers.read_prompts(given(tmp_path, name, mark + lines.encode()), "held_out") == expected
      )
  for text in (
    json.dumps([first, second]),
    json.dumps([first, second], indent=2),
    "\n " + json.dumps([first, second]),
  ):
    assert (
      importers.read_prompts(given(tmp_path, "a.json", MARK + text.encode()), "held_out")
      == expected
    )
  for name in ("a.txt", "a.TXT", "a.text"):
    found = importers.read_prompts(given(tmp_path, name, MARK + b"\nHello\n{a set}\n"), "held_out")
    assert found == [
      Prompt("held_out-2", (Message("user", "Hello"),)),
      Prompt("held_out-3", (Message("user", "{a set}"),)),
    ]


@pytest.mark.parametrize(
  "name, content, told",
  [
    (
      "a.jsonl.gz",
      "x",
      "config.distill.prompts is '.*a.jsonl.gz', which is compressed: it must be unpacked",
    ),
    ("a.TXT.ZST", "x", "which is compressed"),
    ("a.csv", "prompt\nHello\n", "config.distill.prompts is '.*a.csv': the name must end in .txt"),
    ("prompts", "Hello\n", "the name must end in .txt"),
    ("a.txt", b"\xff\xfeH\x00", "a.txt is not a text in UTF-8"),
    (
      "a.txt",
      json.dumps({"messages": TALK}),
      "a.txt:1: a conversation as JSON among user messages: .* end in .jsonl",
    ),
    (
      "a.jsonl",
      f"{json.dumps({'messages': TALK})}\nHello\n",
      "a.jsonl:2: not JSON that can be read",
    ),
    ("a.jsonl", '"Hello"', 'a.jsonl:1: an object with "messages" is needed'),
    ("a.jsonl", json.dumps([{"messages": TALK}]), 'a.jsonl:1: an object with "messages" is needed'),
    (
      "a.json",
      json.dumps([{"messages": TALK}, 3]),
      'a.json, item 2: an object with "messages" is needed, this is 3',
    ),
    ("a.json", json.dumps([{"messages": TALK}])[:-5], "a.json: not JSON that can be read"),
    (
      "a.jsonl",
      '{"messages": [], "messages": []}',
      "a.jsonl:1: not JSON .*an object holds 'messages' more than once",
    ),
    (
      "a.jsonl",
      json.dumps({"prompt": "Hello"}),
      "a.jsonl:1: \"prompt\" is 'Hello', which is not read here and would be lost",
    ),
    ("a.jsonl", json.dumps({"schema": 3, "messages": TALK}), 'a.jsonl:1: "schema" is 3'),
    ("a.jsonl", json.dumps({"id": ["a"], "messages": TALK}), "a.jsonl:1: \"id\" is \\['a'\\]"),
    ("a.jsonl", "\n\n", "a.jsonl holds no prompts"),
    ("a.json", "[]", "a.json holds no prompts"),
  ],
)
def test_other_files_are_refused_by_name_and_place(tmp_path, name, content, told):
  with pytest.raises(ValueError, match=told) as error:
    importers.read_prompts(given(tmp_path, name, content), "prompts")
  assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


CALL = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


@pytest.mark.parametrize(
  "name, value",
  [
    ("tools", [{"type": "function", "function": {"name": "clock"}}]),
    ("functions", [{"name": "clock"}]),
    ("system", "Be kind."),
    ("documents", [{"text": "x"}]),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("tool_choice", "auto"),
  ],
)
def test_what_a_conversation_would_lose_is_refused(tmp_path, name, value):
  lines = [{"messages": TALK, name: None}, {"messages": TALK, name: value}]
  path = given(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
  with pytest.raises(
    ValueError, match=f'a.jsonl:2: "{name}" is .*, which is not read here and would be lost'
  ):
    importers.read_prompts(path, "prompts")


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"tool_calls": [CALL]}, '"tool_calls" is .* would be lost'),
    ({"function_call": {"name": "clock"}}, '"function_call" is .* would be lost'),
    ({"name": "Ann"}, "\"name\" is 'Ann', which .* would be lost"),
    ({"reasoning_content": "Hm."}, "\"reasoning_content\" is 'Hm.', which .* would be lost"),
    ({"thinking": "Hm."}, '"thinking" is .* would be lost'),
    ({"refusal": "No."}, '"refusal" is .* would be lost'),
    ({"audio": {"id": "x"}}, '"audio" is .* would be lost'),
    (
      {"role": "tool", "tool_call_id": "c"},
      "\"role\" is 'tool': it must be one of system, user, assistant",
    ),
    ({"role": "developer"}, "\"role\" is 'developer'"),
    ({"role": "knowledge"}, "\"role\" is 'knowledge'"),
    ({"role": ["user"]}, "\"role\" is .'user'.: it must be one of"),
    ({"content": None}, '"content" is None: it must be a text, or a list of one text part'),
    ({"content": 3}, '"content" is 3: it must be a text'),
    (
      {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      '"content" is .*: it must be a text, or a list of one',
    ),
    (
      {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
      '"content" is .*: it must be a text, or a list of one',
    ),
    (
      {"content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]},
      '"cache_control" is .* would be lost',
    ),
  ],
)
def test_what_a_message_would_lose_is_refused(tmp_path, changes, told):
  answer = {"role": "assistant", "content": "Well."} | changes
  path = given(tmp_path, "a.jsonl", json.dumps({"messages": [*TALK, answer, *TALK]}))
  with pytest.raises(ValueError, match=f"a.jsonl:1, message 2: {told}"):
    importers.read_prompts(path, "prompts")


def test_fields_that_say_nothing_and_a_single_text_part_are_read(tmp_path):
  answer = {
    "role": "assistant",
    "content": [{"type": "text", "text": "Well."}],
    "tool_calls": [],
    "refusal": None,
    "name": "",
  }
  line = {
    "schema": 1,
    "id": 7,
    "model": "m",
    "metadata": {"a": 1},
    "tools": [],
    "messages": [*TALK, answer, *TALK],
  }
  [found] = importers.read_prompts(given(tmp_path, "a.jsonl", json.dumps(line)), "prompts")
  assert found.id == "7" and [message.content for message in found.messages] == [
    "How are you?",
    "Well.",
    "How are you?",
  ]


def test_the_prompts_of_a_run_are_prompts(tmp_path):
  prefixes = [Prompt(f"r1-{i}", (Message("user", f"Go {i}"),)) for i in range(3)]
  write_jsonl(tmp_path / "prefixes.jsonl", prefixes)
  assert importers.read_prompts(str(tmp_path / "prefixes.jsonl"), "prompts") == prefixes


def test_the_last_message_must_be_the_users(tmp_path):
  path = given(
    tmp_path,
    "a.jsonl",
    json.dumps({"messages": [*TALK, {"role": "assistant", "content": "Well."}]}),
  )
  with pytest.raises(
    ValueError, match="a.jsonl:1: the last message is the assistant's: it must be the user's"
  ):
    importers.read_prompts(path, "prompts")


@pytest.mark.parametrize(
  "place",
  [
    "gs://bucket/a.txt",
    "s3://bucket/a.txt",
    "https://host/a.txt",
    "file:///a.txt",
    "gs:/bucket/a.txt",
  ],
)
def test_an_address_is_no_path(place, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  right = "this machine only, so it must be a path here"
  with pytest.raises(ValueError, match=f"config.distill.knowledge is '{place}': .*{right}"):
    importers.read_text(place, "knowledge")
  with pytest.raises(ValueError, match=f"config.distill.held_out is '{place}': .*{right}"):
    importers.read_prompts(place, "held_out")
  check = place.replace(".txt", ".py")
  with pytest.raises(ValueError, match=f"config.distill.obeys is '{check}': .*{right}"):
    importers.read_check(f"{check}:f")
  assert not list(tmp_path.iterdir())


# Checks.


def check(tmp_path, code: str, function: str = "f"):
  return importers.read_check(f"{given(tmp_path, 'check.py', code)}:{function}")


DATACLASS = """from __future__ import annotations
import dataclasses
import typing

@dataclasses.dataclass(frozen=True)
class Limit:
  words: int = 3
  next: typing.Optional[Limit] = None

def f(answer: str) -> bool:
  return typing.get_type_hints(Limit)["words"] is int and len(answer.split()) <= Limit().words
"""


def test_a_check_may_use_what_any_module_may(tmp_path):
  first = check(tmp_path, DATACLASS)
  assert first("two words") is True and first("no less than four") is False
  # Another file does not take the first one's place.
  second = check(tmp_path, "def f(answer):\n  return False\n")
  assert second("two words") is False and first("two words") is True


def test_a_check_says_true_or_false_in_python_or_numpy(tmp_path):
  for value, expected in (
    ("True", True),
    ("np.bool_(False)", False),
    ("np.array([1, 2]).min() > 0", True),
  ):
    assert (
      check(tmp_path, f"import numpy as np\ndef f(answer):\n  return {value}\n")("x") is expected
    )
  assert isinstance(np.array([1, 2]).min() > 0, np.bool_)


@pytest.mark.parametrize(
  "code, told",
  [
    (
      "def f(answer):\n  answer == 'x'\n",
      "for the answer 'x' it returns None: it must be True or False",
    ),
    ("def f(answer):\n  return 1\n", "for the answer 'x' it returns 1: it must be True or False"),
    (
      "import re\ndef f(answer):\n  return re.match('x', answer)\n",
      "for the answer 'x' it returns <re.Match obj.*: it must be True or False",
    ),
    (
      "import numpy as np\ndef f(answer):\n  return np.array([True])\n",
      ".*: it must be True or False",
    ),
    (
      "def f(answer):\n  return answer[5] == 'x'\n",
      r"it fails for the answer 'x' \(IndexError: string index out of range\)",
    ),
    ("def f(answer):\n  exit(0)\n", r"it fails for the answer 'x' \(SystemExit: 0\)"),
    ("def f():\n  return True\n", r"it fails for the answer 'x' \(TypeError: "),
  ],
)
def test_what_a_check_does_wrong_is_told_in_a_line_that_names_it(tmp_path, code, told):
  with pytest.raises(ValueError, match=f"config.distill.obeys is '.*check.py:f': {told}") as error:
    check(tmp_path, code)("x")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "code, told",
  [
    ("f = 3\n", "the file has no function f"),
    ("def f(answer)\n  pass\n", r"the file cannot be run \(SyntaxError: "),
    ("import sys\nsys.exit(0)\n", r"the file cannot be run \(SystemExit: 0, at .*check.py:2\)"),
    ("open('/no/such/file')\n", r"the file cannot be run \(FileNotFoundError: "),
  ],
)
def test_a_file_that_cannot_be_a_check(tmp_path, code, told):
  with pytest.raises(ValueError, match=f"config.distill.obeys is '.*check.py:f': {told}"):
    check(tmp_path, code)


def test_a_check_that_is_not_there(tmp_path):
  with pytest.raises(
    OSError,
    match=re.escape(f"config.distill.obeys is '{tmp_path}/none.py:f': there is no such file"),
  ):
    importers.read_check(f"{tmp_path}/none.py:f")


def test_a_file_that_is_not_there_is_told_with_the_field(tmp_path):
  names = {
    "config.distill.prompts": lambda path: importers.read_prompts(path, "prompts"),
    "config.logs.redact_names": redact.read_names,
    "config.logs.tools": tools.read,
  }
  for field, read in names.items():
    path = str(tmp_path / "no.txt")
    with pytest.raises(FileNotFoundError, match=f"^{field} is '{path}': there is no such file$"):
      read(path)
    with pytest.raises(
      IsADirectoryError, match=f"^{field} is '{tmp_path}': it is a folder, and mu"
    ):
      read(str(tmp_path))
