"""Definitions of tools in every form that logs have them, read into the one that templates show."""

import dataclasses
import json

import pytest

from oel_jax import config as config_lib
from oel_jax.conversations import exporters, logs, tools
from oel_jax.conversations.redact import Redactor
from oel_jax.conversations.schema import Conversation, Message, Source, by_policy, to_json
from oel_jax.conversations.tool_texts import tool_text
from oel_jax.stages import collect, user_side

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


def session(tmp_path, *lines):
  path = tmp_path / "log.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  [found] = logs.read(path, logs.Counts())
  return found


def test_a_session_has_the_tools_that_a_line_of_it_defines(tmp_path):
  head = {"id": "t", "dynamic_tools": [BARE | {"inputSchema": BARE["parameters"]}]}
  said = [
    {"type": "message", "role": role, "content": [{"type": "text", "text": role}]}
    for role in ("user", "assistant")
  ]
  codex = [{"type": "response_item", "payload": each} for each in said]
  found = session(tmp_path, {"type": "session_meta", "payload": head}, *codex)
  assert (found.tools, found.source.kind) == (TEXT, "agent")
  bare = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
  assert session(tmp_path, bare[0], bare[1] | {"tools": [BARE]}).tools == TEXT
  assert session(tmp_path, bare[0] | {"tools": ["Bash"]}, bare[1]).tools == ()  # names define none


@pytest.mark.parametrize("given", [[BARE], {"tools": [CHAT]}, "\ufeff" + json.dumps([BARE])])
def test_a_file_of_definitions(tmp_path, given):
  path = tmp_path / "tools.json"
  path.write_text(given if isinstance(given, str) else json.dumps(given))
  assert tools.read(str(path)) == TEXT


@pytest.mark.parametrize("text", ["", "a clock", "[]", "{}", "[3]", '{"tools": 3}', "[" * 100_000])
def test_a_file_without_definitions_is_refused(tmp_path, text):
  path = tmp_path / "tools.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="config.logs.tools: .*tools.json (is|holds) no "):
    tools.read(str(path))


def test_agents_that_name_no_tools_are_offered_those_of_the_file(tmp_path):
  agent = dataclasses.replace(CHATTED, source=Source("agent", "x"))
  assert collect._offering(TEXT, agent).tools == TEXT
  assert collect._offering(TEXT, CHATTED) == CHATTED  # a chat without tools had none
  own = dataclasses.replace(agent, tools=(tool_text({"type": "web_search"}),))
  assert collect._offering(TEXT, own) == own
  config = config_lib.default()
  config.logs.tools = str(tmp_path / "tools.json")
  with pytest.raises(ValueError, match='config.logs.tools is .* it must be "" where logs.path is'):
    config_lib.validate(config)
  config.logs.path = str(tmp_path)
  config_lib.validate(config)
  with pytest.raises(FileNotFoundError, match="tools.json"):
    user_side.check(config, tmp_path / "run")


def test_people_are_found_by_their_names_and_by_what_redaction_leaves_of_them(tmp_path):
  config = config_lib.default()
  assert collect.people(config) == ()
  config.logs.people = "ann, ben@example.com,"
  assert collect.people(config) == ("ann", "ben@example.com", "[EMAIL]")
  names = tmp_path / "names.txt"
  names.write_text("Ann\n")
  config.logs.redact_names = str(names)
  people = collect.people(config)
  assert people == ("ann", "ben@example.com", "[NAME]", "[EMAIL]")
  for name, own in (("ann", False), ("ben@example.com", False), ("carl", True), ("", True)):
    said = collect.redactor(config)(Message("assistant", "To Rowan.", name=name))
    assert by_policy(said, people) is own
  config.logs.people = "*"
  assert not by_policy(Message("assistant", "x"), collect.people(config))


def test_an_exported_log_holds_them(tmp_path):
  exporters.write_log(tmp_path / "log.jsonl", [dataclasses.replace(CHATTED, tools=TEXT), CHATTED])
  found = [conversation.tools for conversation in logs.read(tmp_path / "log.jsonl", logs.Counts())]
  assert found == [TEXT, ()]
