"""Definitions of tools in every form that logs have them, read into the one that templates show."""

import dataclasses
import json

import pytest

from oel_jax.conversations import exporters, logs, tools
from oel_jax.conversations.redact import Redactor
from oel_jax.conversations.schema import Conversation, Message, Source, to_json, tool_text

PARAMETERS = {"type": "object", "properties": {"zone": {"type": "string"}}}
BARE = {"name": "clock", "description": "Tells the time.", "parameters": PARAMETERS}
CHAT = {"type": "function", "function": BARE}
TEXT = (tool_text(CHAT),)


@pytest.mark.parametrize(
  "given",
  [
    [CHAT],
    [BARE],
    [{"type": "function", **BARE}],
    [{"name": "clock", "description": "Tells the time.", "input_schema": PARAMETERS}],
    json.dumps([CHAT]),
    json.dumps([BARE]),
  ],
  ids=["chat", "functions", "responses", "anthropic", "text", "text of functions"],
)
def test_every_form_is_read(given):
  assert tools.definitions(given) == TEXT


@pytest.mark.parametrize("given", [None, [], "", {}])
def test_none_are_none(given):
  assert tools.definitions(given) == ()


@pytest.mark.parametrize(
  "tool",
  [
    CHAT | {"strict": True},
    {"type": "web_search"},
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
  ],
)
def test_what_is_no_bare_function_stays_as_it_is(tool):
  assert tools.definitions([tool]) == (tool_text(tool),)


@pytest.mark.parametrize("given", ["a clock", 3, {"name": "clock"}, ["clock"], '{"name": "clock"}'])
def test_others_are_told(given):
  with pytest.raises(ValueError, match="the tools are .*: they must be a list of objects"):
    tools.definitions(given)


def test_a_log_gives_them_to_its_conversations(tmp_path):
  said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
  lines = [
    {"messages": said, "tools": [CHAT]},
    {"messages": said, "functions": [BARE]},
    {"conversations": [{"from": "gpt", "value": "Hello."}], "tools": json.dumps([BARE])},
    {"request": {"messages": said[:1], "tools": [CHAT]}, "response": "Hello."},
    {"messages": said},
  ]
  path = tmp_path / "log.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = [conversation.tools for conversation in logs.read(path, logs.Counts())]
  assert found == [TEXT, TEXT, TEXT, TEXT, ()]


CHATTED = Conversation(
  "a", (Message("user", "Hi"), Message("assistant", "Hello.")), Source("log", "x")
)


def test_what_is_redacted_stays_a_definition_or_goes(tmp_path):
  told = {"name": "mail", "description": 'Writes to "ann@example.com".'}
  with_two = dataclasses.replace(CHATTED, tools=(tool_text(told), *TEXT))
  [mail, clock] = to_json(Redactor()(with_two))["tools"]
  assert clock == CHAT and mail["name"] == "mail"
  assert mail["description"].startswith('Writes to "[') and "ann" not in mail["description"]
  hook = tmp_path / "own.py"
  hook.write_text("def clean(text):\n  return '' if 'mail' in text else text\n")
  assert Redactor(hook=f"{hook}:clean")(with_two).tools == TEXT


def test_an_exported_log_holds_them(tmp_path):
  exporters.write_log(tmp_path / "log.jsonl", [dataclasses.replace(CHATTED, tools=TEXT), CHATTED])
  found = [conversation.tools for conversation in logs.read(tmp_path / "log.jsonl", logs.Counts())]
  assert found == [TEXT, ()]
