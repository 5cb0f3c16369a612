"""Definitions of tools in every form that logs have them, read into the one that templates show."""

import json

import pytest

from oel_jax.conversations import logs, tools
from oel_jax.conversations.schema import tool_text

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
