"""The schema: what a line holds, lines of earlier versions, prompts and transcripts cut from games
and logs.
"""

import dataclasses
import json

import pytest
from fakes import game_of, turn_of

from oel_jax.conversations import jsonl
from oel_jax.conversations.schema import (
  Conversation,
  Message,
  Prompt,
  Source,
  ToolCall,
  conversation_from_json,
  cut_prompts,
  prompt_from_json,
  shown,
  to_json,
  transcript,
)
from oel_jax.conversations.tool_texts import tool_text

# As commit 9d56582 wrote them, digests and all.
OLD_GAME = (
  '{"schema": 1, "id": "r1-deploy-00007", "game": "FrozenLake-v0-raw", "seed": 4294967295, '
  '"outcome": "The end.", "reward": 0.1, "passed": false, "ended": "invalid", "messages": [{"role":'
  ' "user", "content": "| P | H |"}, {"role": "assistant", "content": "I go [left]\\nnow", '
  '"thinking": "Left?", "action": "[left]", "response_tokens": 12}, {"role": "user", "content": '
  '"You hit a wall!"}, {"role": "assistant", "content": "", "thinking": "", "action": "", '
  '"response_tokens": 1024}], "digest": "0cd4216dd203eaea"}\n'
)
OLD_PROMPTS = (
  '{"schema": 1, "id": "r1-deploy-00007-0", "messages": [{"role": "user", "content": "| P | H |"}],'
  ' "digest": "1801dbe9c9d4ea9d"}\n'
  '{"schema": 1, "id": "r1-deploy-00007-1", "messages": [{"role": "user", "content": "| P | H |"}, '
  '{"role": "assistant", "content": "I go [left]\\nnow"}, {"role": "user", "content": "You hit a '
  'wall!"}], "digest": "83e93d156f0c7346"}\n'
)
OLD_TRANSCRIPT = (
  "| P | H |\nAnswer: I go [left]\nnow\nYou hit a wall!\nAnswer: \nEnd of game:\nThe end."
)
GAME = game_of(
  "r1-deploy-00007",
  "FrozenLake-v0-raw",
  2**32 - 1,
  (
    turn_of("| P | H |", "Left?", "I go [left]\nnow", "[left]", 12),
    turn_of("You hit a wall!", "", "", "", 1024),
  ),
  "The end.",
  0.1,
  False,
  "invalid",
)
CALL = ToolCall("c1", "clock", '{"zone": "UTC"}')
CHAT = Conversation(
  "chat-1",
  (
    Message("system", "Be brief."),
    Message("assistant", "Hello!"),
    Message("user", "What time is it?", name="ann"),
    Message("assistant", "", (CALL,), thinking="Look."),
    Message("tool", "12:00", tool_call_id="c1", name="clock"),
    Message("assistant", "Noon."),
    Message("user", "Thanks."),
  ),
  Source("log", "shop.jsonl", line=3),
  reward=1.0,
  feedback="helpful",
)
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "Łódź"}}}
WITH_TOOLS = dataclasses.replace(CHAT, tools=(tool_text(CLOCK),))


def test_lines_of_the_version_before_are_read(tmp_path):
  (tmp_path / "games.jsonl").write_text(OLD_GAME)
  (tmp_path / "prompts.jsonl").write_text(OLD_PROMPTS)
  assert jsonl.read_conversations(tmp_path / "games.jsonl", max_damaged=0.0) == [GAME]
  assert jsonl.read_prompts(tmp_path / "prompts.jsonl", max_damaged=0.0) == cut_prompts(GAME)
  assert transcript(GAME) == OLD_TRANSCRIPT
  # Old and new lines may stand in one file: a run that was begun before goes on with it.
  jsonl.append_jsonl(tmp_path / "games.jsonl", GAME)
  assert jsonl.read_conversations(tmp_path / "games.jsonl", max_damaged=0.0) == [GAME, GAME]


def test_an_environment_that_said_nothing_at_the_end_leaves_no_line():
  quiet = dataclasses.replace(GAME, outcome="")
  assert transcript(quiet) == OLD_TRANSCRIPT.removesuffix("\nEnd of game:\nThe end.")


def test_a_game_is_told_as_a_conversation_where_the_words_are_of_conversations():
  told = transcript(GAME, "conversations")
  chat = dataclasses.replace(GAME, source=Source("log", "shop.jsonl"))
  assert told == transcript(chat) != transcript(GAME)
  assert told.endswith("\nOutcome:\nThe end.") and "User: " in told and "Assistant: " in told


SORTED = dataclasses.replace(GAME, source=Source("game", "desk", 7, category="desk"))


@pytest.mark.parametrize(
  "conversation", [GAME, CHAT, SORTED, WITH_TOOLS], ids=["game", "chat", "sorted", "tools"]
)
def test_a_conversation_is_read_back_equal(conversation):
  data = json.loads(json.dumps(to_json(conversation)))
  assert conversation_from_json(data) == conversation
  for prompt in cut_prompts(conversation):
    assert prompt_from_json(json.loads(json.dumps(to_json(prompt)))) == prompt


def test_what_is_not_known_stands_in_no_line():
  data = to_json(CHAT)
  assert list(data) == ["schema", "id", "source", "messages", "reward", "feedback"]
  assert data["source"] == {"kind": "log", "name": "shop.jsonl", "line": 3}
  assert data["messages"][2:5] == [
    {"role": "user", "content": "What time is it?", "name": "ann"},
    {
      "role": "assistant",
      "content": "",
      "tool_calls": [
        {
          "id": "c1",
          "type": "function",
          "function": {"name": "clock", "arguments": '{"zone": "UTC"}'},
        }
      ],
      "thinking": "Look.",
    },
    {"role": "tool", "content": "12:00", "tool_call_id": "c1", "name": "clock"},
  ]


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 2**64 - 1, -(2**63) - 1, 10**30, 1.5e300])
def test_a_tools_numbers_are_read_back_whatever_their_size(number, tmp_path):
  """An unsigned integer's largest, say, as a bound of a parameter: our lines hold 64 bits."""
  large = tool_text({"name": "clock", "parameters": {"maximum": number}})
  said = dataclasses.replace(CHAT, tools=(tool_text(CLOCK), large))
  jsonl.write_jsonl(tmp_path / "said.jsonl", [said])
  jsonl.write_jsonl(tmp_path / "prompts.jsonl", cut_prompts(said))
  assert jsonl.read_conversations(tmp_path / "said.jsonl", max_damaged=0.0) == [said]
  assert jsonl.read_prompts(tmp_path / "prompts.jsonl", max_damaged=0.0) == cut_prompts(said)


def test_tools_stand_in_a_line_as_objects_and_in_each_prompt():
  assert to_json(WITH_TOOLS)["tools"] == [CLOCK]
  assert "tools" not in to_json(CHAT)
  assert all(prompt.tools == WITH_TOOLS.tools for prompt in cut_prompts(WITH_TOOLS))
  assert [to_json(prompt)["tools"] for prompt in cut_prompts(WITH_TOOLS)] == [[CLOCK]] * 2
  assert hash(WITH_TOOLS) != hash(CHAT)  # as frozen as all else


def test_prompts_are_what_stood_before_each_answer_without_thinking():
  first, second = cut_prompts(CHAT)  # nothing was asked before the greeting
  said = list(CHAT.messages)
  said[3] = Message("assistant", "", (CALL,))
  assert first == Prompt("chat-1-1", tuple(said[:3]))
  assert second == Prompt("chat-1-2", tuple(said[:5]))
  assert shown(CHAT.messages) == tuple(said)
  assert CHAT.answers == (CHAT.messages[1], CHAT.messages[3], CHAT.messages[5])


def test_the_transcript_of_a_chat_says_who_said_what():
  assert transcript(CHAT) == (
    "System: Be brief.\nAssistant: Hello!\nUser ann: What time is it?\n"
    'Call of clock: {"zone": "UTC"}\nTool clock: 12:00\nAssistant: Noon.\nUser: Thanks.\n'
    "Feedback:\nhelpful"
  )


@pytest.mark.parametrize(
  "change, told",
  [
    (lambda data: data.pop("source"), "field 'source' is missing"),
    (lambda data: data["source"].update(kind="dream"), "field 'kind' is 'dream'"),
    (lambda data: data["source"].update(line="3"), "field 'line' is '3'"),
    (lambda data: data["source"].update(category=3), "field 'category' is 3"),
    (lambda data: data["messages"][0].update(role="narrator"), "role of message 1 is 'narrator'"),
    (lambda data: data["messages"][0].update(content=None), "field 'content' is None"),
    (lambda data: data["messages"][3].update(tool_calls=[3]), "field 'function' is missing"),
    (lambda data: data["messages"][3]["tool_calls"][0]["function"].pop("name"), "field 'name' is"),
    (lambda data: data.update(feedback=3), "field 'feedback' is 3"),
    (lambda data: data.update(tools="clock"), "field 'tools' is 'clock': it must be of type list"),
    (lambda data: data.update(tools=[CLOCK, 3]), "field 'tools' holds 3: each must be an object"),
    (lambda data: data.update(tools=["clock"]), "field 'tools' holds 'clock': each must be an obj"),
    (lambda data: data["source"].update(kind="game"), "the roles of a game's messages are"),
  ],
)
def test_what_is_no_conversation_is_refused_by_field(change, told):
  data = to_json(CHAT)
  change(data)
  with pytest.raises(ValueError, match=told):
    conversation_from_json(data)
