"""Logs as others write them become conversations; whatever is wrong with them is counted."""

import json
import math
import os
import random
import tracemalloc

import pytest

from oel_jax.conversations import log_records, logs
from oel_jax.conversations.jsonl import to_line, write_jsonl
from oel_jax.conversations.schema import Conversation, Message, Source, ToolCall

ASKED = {"role": "user", "content": "What time is it?"}
NOON = {"role": "assistant", "content": "Noon."}
CALL = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TIME = ToolCall("c", "clock", "{}")
TALK = (Message("user", "What time is it?"), Message("assistant", "Noon."))


def write(path, *records) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (each if isinstance(each, str) else json.dumps(each) + "\n" for each in records)
  path.write_text("".join(lines), encoding="utf-8")
  return str(path)


def read(path, **how) -> tuple[list[Conversation], logs.Counts]:
  counts = logs.Counts()
  return list(logs.read(path, counts, **how)), counts


def log(tmp_path, *records, **how) -> tuple[str, list[Conversation], logs.Counts]:
  path = write(tmp_path / "log.jsonl", *records)
  return path, *read(path, **how)


# Forms.


def test_openai_chats_keep_tools_reasoning_and_feedback(tmp_path):
  said = [
    {"role": "developer", "content": "Be brief."},
    ASKED | {"name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look."},
    {"role": "tool", "tool_call_id": "c", "content": "12:00"},
    {
      "role": "assistant",
      "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "noon."}],
    },
  ]
  line = {
    "id": 7,
    "messages": said,
    "feedback": {"thumb": "up"},
    "score": 1,
    "outcome": "solved",
    "user": "u1",
    "x": 3,
  }
  path, found, counts = log(tmp_path, line, "\n", {"messages": [ASKED, NOON | {"weight": 0}]})
  whole = Conversation(
    "7",
    (
      Message("system", "Be brief."),
      Message("user", "What time is it?", name="ann"),
      Message("assistant", "", (TIME,), thinking="Look."),
      Message("tool", "12:00", tool_call_id="c"),
      Message("assistant", "It is noon."),
    ),
    Source("log", path, line=1),
    outcome="solved",
    reward=1.0,
    feedback='{"thumb": "up"}',
    user="u1",
  )
  assert found == [whole, Conversation("log-3", TALK, Source("log", path, line=3))]
  assert counts.seen == {
    ("form", "developer"): 1,
    ("form", "name"): 1,
    ("form", "null content"): 1,
    ("form", "parts"): 1,
    ("field", "x"): 1,
    ("field", "messages.weight"): 1,
  }
  assert (counts.records, counts.conversations, counts.damaged) == (2, 2, 0)


def test_sharegpt(tmp_path):
  said = [
    {"from": "human", "value": "What time is it?"},
    {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
    {"from": "observation", "value": "12:00"},
    {"from": "gpt", "value": "Noon."},
  ]
  line = {"id": "a", "system": "Be brief.", "conversations": said}
  path, [found], _ = log(tmp_path, line)
  assert found == Conversation(
    "a",
    (
      Message("system", "Be brief."),
      Message("user", "What time is it?"),
      Message("assistant", "", (ToolCall("", "clock", '{"zone": "UTC"}'),)),
      Message("tool", "12:00"),
      Message("assistant", "Noon."),
    ),
    Source("log", path, line=1),
  )


CALLED = Message("assistant", "", (ToolCall("", "clock", "{}"), ToolCall("", "sun", "{}")))
CALLS = '[{"name": "clock", "arguments": {}}, {"name": "sun", "arguments": {}}]'
BEFORE = (Message("user", "a"), Message("assistant", "b"))
ASKS = "What time is it?"


@pytest.mark.parametrize(
  "said, messages",
  [
    ([{"content": [{"type": "text", "text": {"value": ASKS}}]}, {}], TALK),
    ([{}, {"content": "", "refusal": "Noon."}], TALK),
    ([{}, {"content": None, "audio": {"id": "a", "transcript": "Noon."}}], TALK),
    ([{}, {"refusal": None, "audio": None}], TALK),
    ([{}, {}, {"role": "ipython", "content": "12"}], (*TALK, Message("tool", "12"))),
    (
      [{}, {"role": "tool_call", "content": CALLS}, {"role": "tool_response", "content": "12"}],
      (TALK[0], CALLED, Message("tool", "12")),
    ),
    ({"conversation": [ASKED, NOON], "model": "m"}, TALK),
    ({"conversation": {"id": "c"}, "input": [ASKED], "output": [NOON]}, TALK),
    ({"conversations": [ASKED, {"from": "bing", "value": "Noon."}]}, TALK),
    ({"instruction": ASKS, "input": "", "output": "Noon."}, TALK),
    (
      {"instruction": "What", "input": "time?", "history": [["a", "b"]], "output": "Noon."},
      (*BEFORE, Message("user", "What\ntime?"), TALK[1]),
    ),
  ],
)
def test_less_usual_forms_lose_nothing(tmp_path, said, messages):
  if isinstance(said, list):
    places = (ASKED, NOON, {})
    said = {"messages": [place | own for place, own in zip(places, said)]}
  _, [found], counts = log(tmp_path, said)
  assert found.messages == messages and counts.damaged == 0
  assert not [name for kind, name in counts.seen if kind in ("field", "part")]


def test_a_conversation_without_an_id_has_its_sessions(tmp_path):
  talk = {"messages": [ASKED, NOON]}
  names = ({"conversation_id": "c7"}, {"session_id": 8}, {"conversation_id": "c7"})
  lines = [talk | name for name in (*names, {"id": "own", "sessionId": "s"})]
  assert [one.id for one in log(tmp_path, *lines)[1]] == ["c7", "8", "c7#log.jsonl:3", "own"]


OUTPUT = {"type": "output_text", "text": "Noon."}
COMPLETION = {
  "id": "chatcmpl-1",
  "object": "chat.completion",
  "choices": [{"index": 0, "message": NOON | {"refusal": None}, "finish_reason": "stop"}],
  "usage": {"total_tokens": 9},
}


@pytest.mark.parametrize(
  "line",
  [
    {"messages": [ASKED], "response": COMPLETION},  # LiteLLM's
    {"messages": json.dumps([ASKED]), "response": json.dumps(COMPLETION)},  # from its database
    {"messages": "What time is it?", "response": "Noon."},
    {"request": {"messages": [ASKED], "model": "m"}, "response": COMPLETION},
    {"request": {"body": {"messages": [ASKED]}}, "response": {"status": 200, "body": COMPLETION}},
    {"custom_id": "a", "body": {"messages": [ASKED]}, "response": {"body": COMPLETION}},
    {"input": {"messages": [ASKED]}, "output": COMPLETION},  # OpenPipe's
    COMPLETION | {"messages": [ASKED]},
    {
      "input": [{"role": "user", "content": [{"type": "input_text", "text": "What time is it?"}]}],
      "output": [
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [OUTPUT]},
      ],
    },
    {"input": "What time is it?", "output": "Noon."},
    {  # Anthropic's
      "messages": [ASKED],
      "response": {"role": "assistant", "content": [{"type": "text", "text": "Noon."}]},
    },
  ],
)
def test_a_request_with_its_answer_is_a_conversation(tmp_path, line):
  _, [found], counts = log(tmp_path, line)
  assert found.messages == TALK and counts.damaged == 0


def test_of_litellm_the_end_user_and_failed_calls(tmp_path):
  line = {"id": "1", "messages": [ASKED], "metadata": {"user_api_key_user_id": "key's owner"}}
  good = line | {"status": "success", "response": COMPLETION, "end_user": "ann"}
  failed = line | {"status": "failure", "response": {}, "error_str": "429"}
  also = line | {"id": "2", "response": COMPLETION, "metadata": {"user_api_key_end_user_id": "bob"}}
  rest = line | {"id": "3", "response": COMPLETION, "model_parameters": {"user": "cem"}}
  _, found, counts = log(tmp_path, good, failed, also, rest)
  assert [(each.id, each.user) for each in found] == [("1", "ann"), ("2", "bob"), ("3", "cem")]
  assert counts.unanswered == 1 and counts.damaged == 0
  assert "1 conversation has no answer of the assistant's and was left out" in counts.sentences()


def event(kind, *content, **more):
  role = {"user": "user", "assistant": "assistant"}[kind]
  content = content[0] if isinstance(content[0], str) else list(content)
  message = {"role": role, "content": content} | ({"id": more.pop("of")} if "of" in more else {})
  return {"type": kind, "sessionId": "s1", "uuid": "x", "message": message} | more


def use(name):
  return {"type": "tool_use", "id": name, "name": "clock", "input": {}}


def result(name, text):
  return {"type": "tool_result", "tool_use_id": name, "content": text}


def test_claude_codes_session(tmp_path):
  """An answer stands on several lines, a tool may answer between them; the rest are events."""
  lines = [
    {"type": "file-history-snapshot", "messageId": "m", "snapshot": {}},
    {"type": "summary", "summary": "Time", "leafUuid": "x"},
    event("user", "Caveat: local commands", isMeta=True),
    event("user", "What time is it?"),
    event("assistant", {"type": "thinking", "thinking": "Look.", "signature": "s"}, of="m1"),
    event("assistant", {"type": "text", "text": "I look."}, of="m1"),
    event("assistant", use("a"), of="m1"),
    event("user", result("a", "12:00"), toolUseResult={"stdout": "12:00"}),
    event("assistant", use("b"), of="m1"),
    event("user", result("b", [{"type": "text", "text": "13:00"}])),
    {"type": "system", "subtype": "turn_duration", "durationMs": 3, "sessionId": "s1"},
    event("user", "Count the files", isSidechain=True, agentId="a7"),
    event("assistant", {"type": "text", "text": "Two."}, of="m9", isSidechain=True, agentId="a7"),
    event("assistant", {"type": "text", "text": "Noon."}, of="m2"),
    event("assistant", {"type": "text", "text": "429"}, isApiErrorMessage=True),
    event("user", "This session goes on from: it was noon.", isCompactSummary=True),
    event("assistant", {"type": "text", "text": "Good."}, of="m3"),
  ]
  path, found, counts = log(tmp_path, *lines)
  first = (
    Message("user", "What time is it?"),
    Message(
      "assistant",
      "I look.",
      (ToolCall("a", "clock", "{}"), ToolCall("b", "clock", "{}")),
      thinking="Look.",
    ),
    Message("tool", "12:00", tool_call_id="a"),
    Message("tool", "13:00", tool_call_id="b"),
    Message("assistant", "Noon."),
  )
  side = (Message("user", "Count the files"), Message("assistant", "Two."))
  later = (
    Message("user", "This session goes on from: it was noon."),
    Message("assistant", "Good."),
  )
  assert {each.id: each.messages for each in found} == {
    "s1": first,
    "s1/a7": side,
    "s1#log.jsonl:16": later,
  }
  assert found[0].source == Source("agent", path, line=4)
  events = {name: count for (kind, name), count in counts.seen.items() if kind == "event"}
  assert events == {
    "file-history-snapshot": 1,
    "summary": 1,
    "system": 1,
    "isMeta": 1,
    "isApiErrorMessage": 1,
  }
  assert counts.damaged == 0 and counts.without_call == 0


def item(**payload):
  return {"timestamp": "2026-01-01T00:00:00Z", "type": "response_item", "payload": payload}


def text(role, words):
  kind = "output_text" if role == "assistant" else "input_text"
  return item(type="message", role=role, content=[{"type": kind, "text": words}])


def test_codexs_session(tmp_path):
  head = {"id": "t1", "cwd": "/x", "base_instructions": {"text": "Be brief."}}
  lines = [
    {"type": "session_meta", "payload": head},
    {"type": "turn_context", "payload": {"model": "m", "cwd": "/x"}},
    text("user", "What time is it?"),
    {"type": "event_msg", "payload": {"type": "user_message", "message": "What time is it?"}},
    item(type="reasoning", summary=[{"type": "summary_text", "text": "Look."}]),
    text("assistant", "I look."),
    item(type="function_call", name="clock", arguments='{"zone": 1}', call_id="c"),
    item(type="custom_tool_call", name="patch", input="*** Begin", call_id="d", status="done"),
    item(type="function_call_output", call_id="c", output="12:00"),
    item(type="custom_tool_call_output", call_id="d", output=[OUTPUT | {"text": "ok"}]),
    item(type="ghost_snapshot", ghost_commit={}),
    text("assistant", "Noon."),
    {"type": "session_meta", "payload": head},
    {"type": "event_msg", "payload": {"type": "token_count", "info": None}},
  ]
  path, [found], counts = log(tmp_path, *lines)
  calls = (ToolCall("c", "clock", '{"zone": 1}'), ToolCall("d", "patch", "*** Begin"))
  assert found == Conversation(
    "t1",
    (
      Message("system", "Be brief."),
      Message("user", "What time is it?"),
      Message("assistant", "I look.", calls, thinking="Look."),
      Message("tool", "12:00", tool_call_id="c"),
      Message("tool", "ok", tool_call_id="d"),
      Message("assistant", "Noon."),
    ),
    Source("agent", path, line=1),
  )
  events = {name: count for (kind, name), count in counts.seen.items() if kind == "event"}
  assert events == {"turn_context": 1, "event_msg": 2, "response_item ghost_snapshot": 1}


def test_messages_of_an_agent_that_names_no_session_are_one_conversation(tmp_path):
  _, [found], _ = log(tmp_path, ASKED, NOON)
  assert found.messages == TALK


def test_json_files(tmp_path):
  talk = {"messages": [ASKED, NOON]}
  for number, content in enumerate(
    (
      json.dumps([talk, talk | {"id": "b"}]),
      json.dumps([talk, talk | {"id": "b"}], indent=2),
      json.dumps(talk, indent=2) + "\n" + json.dumps(talk),
      json.dumps({"object": "list", "data": [talk, talk]}),
      "\ufeff" + json.dumps(talk) + "\n{broken\n" + json.dumps(talk),
      "[" + json.dumps(talk) + "," + json.dumps(talk) + ", {broken",
      "[" + json.dumps(talk) + "," + json.dumps(talk) + "," + "[" * 100_000,
    )
  ):
    path = write(tmp_path / f"{number}.json", content)
    found, counts = read(path, max_damaged=0.5)
    assert [each.messages for each in found] == [TALK, TALK], content
    assert counts.damaged == ("broken" in content or "[[" in content)


def test_what_a_run_wrote_is_read_back(tmp_path):
  whole = Conversation("a", TALK, Source("log", "x", line=1), feedback="thanks", user="ann")
  write_jsonl(tmp_path / "own.jsonl", [whole])
  [found], counts = read(tmp_path / "own.jsonl")
  assert (found.id, found.messages, found.feedback, found.user) == ("a", TALK, "thanks", "ann")
  assert not counts.seen
  line = (tmp_path / "own.jsonl").read_text().replace("Noon", "Moon")
  with pytest.raises(ValueError, match="1 of 1 records are damaged.*damaged, or edited"):
    read(write(tmp_path / "edited.jsonl", line))


# Folders.


def test_a_folder_is_read_in_order_with_ids_of_its_own(tmp_path):
  talk = {"id": "a", "messages": [ASKED, NOON]}
  for name in ("b/2.jsonl", "a.ndjson", "b/10.jsonl", "c.json"):
    write(tmp_path / name, talk)
  (tmp_path / "old.jsonl.gz").write_bytes(b"\x1f\x8b")
  (tmp_path / "notes.md").write_text("hello")
  (tmp_path / "agent-a7.meta.json").write_text('{"agentType": "x"}')
  (tmp_path / "again").symlink_to(tmp_path / "b")
  os.mkfifo(tmp_path / "pipe.jsonl")  # to open it would wait for ever
  found, counts = read(tmp_path)
  ids = ["a", "a#c.json:1", "a#b/10.jsonl:1", "a#b/2.jsonl:1"]
  assert [each.id for each in found] == ids
  others = {".jsonl.gz": 1, ".md": 1, ".meta.json": 1, "links to folders": 1, ".jsonl": 1}
  assert counts.files == 4 and counts.other_files == others
  [told] = [sentence for sentence in counts.sentences() if "left alone" in sentence]
  assert told.startswith("5 files were left alone: ") and told.endswith(
    "; what is compressed must be unpacked, and the names of logs end in .jsonl, .ndjson, "
    ".jsonlines, .json, .traj"
  )


def test_a_folder_or_file_without_logs(tmp_path):
  with pytest.raises(ValueError, match="holds no file whose name ends in .* and is empty"):
    read(tmp_path)
  (tmp_path / "a.zip").write_bytes(b"PK")
  with pytest.raises(ValueError, match="holds no file whose name ends in .*; it holds .zip 1"):
    read(tmp_path)
  with pytest.raises(ValueError, match="a.zip is compressed: it must be unpacked"):
    read(tmp_path / "a.zip")
  with pytest.raises(FileNotFoundError):
    read(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match="s3://bucket/logs.*files are read .* on this machine only"):
    read("s3://bucket/logs")
  path = write(tmp_path / "events.jsonl", {"type": "summary"}, {"messages": [ASKED]})
  with pytest.raises(ValueError) as error:
    read(path)
  assert str(error.value) == (
    f"{path} holds no conversation that can be used: 1 conversation has no answer of the "
    "assistant's and was left out; 1 record is an event and no message: summary 1"
  )
  (tmp_path / "blank.jsonl").write_text("\n \n")
  with pytest.raises(ValueError, match="blank.jsonl .* can be used: its 1 files have no record"):
    read(tmp_path / "blank.jsonl")


# What is wrong.


@pytest.mark.parametrize(
  "content, read_from",
  [("{0}\n{1}\n{0}", [1, 3]), ("[{0},{1},{0}]", [1])],  # nobody knows where the number's item ends
)
def test_a_number_that_python_does_not_read_is_damage_at_its_place(tmp_path, content, read_from):
  talk = {"messages": [ASKED, NOON]}
  long = json.dumps(talk)[:-1] + ', "n": ' + "1" * 5000 + "}"
  content = content.replace("{0}", json.dumps(talk)).replace("{1}", long)
  found, counts = read(write(tmp_path / "log.json", content), max_damaged=0.5)
  assert [each.source.line for each in found] == read_from
  [place] = counts.places
  assert place.startswith(f"{tmp_path / 'log.json'}:2: a whole number has more digits")


@pytest.mark.parametrize(
  "line, told",
  [
    ("{nonsense\n", "Expecting property name"),
    ('{"messages": [{"role": "user", "content": "cut o\n', "string starting at: character 43"),
    ("[" * 100_000 + "\n", "nested too deeply"),
    ("3\n", "a JSON object is needed, this is a number"),
    ({"messages": []}, "the conversation is an empty list: it must be a list of messages"),
    ({"messages": ["SECRET"]}, "a message is a text: it must be an object"),
    ({"messages": [{"role": "narrator", "content": "SECRET"}]}, "said by 'narrator': it must be"),
    (
      {"messages": [{"role": "user", "txt": "SECRET"}]},
      "of user says nothing: it must have content",
    ),
    ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is a number"),
    ({"messages": [{"role": "user", "content": [3]}]}, "a part of a message is a number"),
    ({"messages": [ASKED | {"tool_calls": 3}]}, "the calls of a message are a number"),
    ({"messages": [ASKED | {"tool_calls": ["SECRET"]}]}, "a tool's call is a text: it must be an"),
    ({"messages": [ASKED], "score": "SECRET"}, "the reward is a text: it must be a number"),
    ({"messages": [ASKED], "score": math.nan}, "the reward is nan: it must be finite, or null"),
    ({"messages": [ASKED], "reward": -math.inf}, "the reward is -inf: it must be finite"),
    ({"messages": [ASKED], "metadata": {"score": 10**400}}, "the reward is inf: it must be finite"),
    ({"messages": [ASKED], "tools": [{"x": [math.nan]}]}, "the tools hold NaN or an infinity"),
    ({"conversations": [{"from": "function_call", "value": None}]}, "a tool's call is null"),
    ({"hello": "SECRET"}, "a message, a conversation or an event is needed"),
    ({"id": "b", "response": {"body": COMPLETION}}, "an answer without what was asked"),
  ],
)
def test_what_is_no_conversation_is_left_out_counted_and_named(tmp_path, line, told):
  good = {"messages": [ASKED, NOON]}
  path, found, counts = log(tmp_path, good, line, good, max_damaged=0.5)
  assert [conversation.source.line for conversation in found] == [1, 3]
  [place] = counts.places
  assert counts.damaged == 1 and place.startswith(f"{path}:2: ") and told in place
  assert "SECRET" not in place
  with pytest.raises(ValueError, match="1 of 3 records are damaged, more than 5% of them; the fir"):
    read(path)


def test_whatever_stands_where_is_a_record_that_can_be_written_or_a_value_error():
  rng = random.Random(0)
  odd = [None, 3, True, "", "x", "{", '{"a": 1}', [], {}, [None], {"role": "user"}, math.nan]
  seeds = [
    {"messages": [ASKED, NOON | {"tool_calls": [CALL]}], "response": COMPLETION, "tools": [{}]},
    {"conversations": [{"from": "function_call", "value": '{"name": "f"}'}], "metadata": {"a": 1}},
    {"messages": [ASKED], "score": 1, "tools": [CALL]},
    {"input": [{"type": "message", "role": "user", "content": [OUTPUT]}], "output": [{"type": 1}]},
    event("assistant", {"type": "thinking", "thinking": "x"}, use("a"), of="m"),
    event("user", result("a", [OUTPUT])),
    {"contents": [{"role": "model", "parts": [{"functionCall": {"name": "f"}}]}], "system": "x"},
    {"type": "ai", "data": {"content": [{"type": "tool-f", "output": 1}], "response_metadata": {}}},
    {"run_type": "llm", "inputs": {"messages": [[ASKED]]}, "outputs": {"generations": [[{}]]}},
    {"run_type": "chain", "inputs": {"messages": [ASKED]}, "outputs": {"messages": [NOON]}},
    {"chat": {"messages": [ASKED, {"role": "assistant", "parts": [{"type": "text"}]}]}},
    {"request": {"input": [{"type": "x_call"}]}, "response": {"candidates": [{"content": {}}]}},
    item(type="reasoning", summary=[{"text": "x"}]),
    item(type="function_call_output", call_id="c", output={"content": "x"}),
    {"type": "compacted", "payload": {"replacement_history": [ASKED]}},
  ]

  def changed(value):
    if rng.random() < 0.15:
      return rng.choice(odd)
    if isinstance(value, dict):
      return {name: changed(inner) for name, inner in value.items() if rng.random() > 0.05}
    return [changed(inner) for inner in value] if isinstance(value, list) else value

  outcomes = set()
  for _ in range(5000):
    try:
      found = log_records.read(changed(rng.choice(seeds)), [])
    except ValueError:
      outcomes.add("ValueError")
      continue
    outcomes.add(type(found).__name__)
    if found:
      said = dict(reward=found.reward, feedback=found.feedback, tools=found.tools)
      to_line(Conversation("a", found.messages, Source("log", ""), **said))
  assert outcomes == {"Record", "NoneType", "ValueError"}


def test_names_that_are_none_are_not_told(tmp_path):
  lines = [{"messages": [ASKED, NOON], "ann@example.com": n, f"own_{n}": 1} for n in range(1100)]
  _, _, counts = log(tmp_path, *lines)
  assert counts.seen[("field", "other")] == 1100 + 101 and len(counts.seen) == 1000
  assert "ann" not in "".join(counts.sentences())


def test_no_utf_8(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n' + json.dumps(ASKED).encode())
  with pytest.raises(ValueError, match="1 of 2 records are damaged.*a.jsonl:1: not UTF-8 at byte"):
    read(tmp_path)
  (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
  with pytest.raises(ValueError, match="1 of 1 records are damaged.*a.json:1: not UTF-8"):
    read(tmp_path)


def test_a_message_that_is_too_long_ends_its_conversation_there(tmp_path):
  long = {"role": "user", "content": "x" * 2_000_000}
  path, [found], counts = log(
    tmp_path, {"messages": [ASKED, NOON, long, NOON]}, {"messages": [long, NOON]}
  )
  assert found.messages == TALK
  assert (counts.too_long, counts.unanswered) == (2, 1)
  found, counts = read(path, max_message=3_000_000)
  assert len(found) == 2 and counts.too_long == 0


def test_a_record_beyond_all_bounds_is_not_held(tmp_path, monkeypatch):
  monkeypatch.setattr(logs.log_files, "MAX_RECORD", 1 << 10)
  monkeypatch.setattr(logs.log_files, "_CHUNK", 1 << 8)
  good = {"messages": [ASKED, NOON]}
  _, found, counts = log(tmp_path, good, {"messages": "x" * 5000}, good, max_damaged=0.5)
  assert len(found) == 2 and counts.places[0].endswith("log.jsonl:2: a line of more than 0 MiB")
  path = write(tmp_path / "a.json", json.dumps([good, {"messages": "x" * 5000}, good]))
  found, counts = read(path, max_damaged=0.5)
  assert len(found) == 1 and "nothing behind it is read" in counts.places[0]


def test_half_a_surrogate_pair(tmp_path):
  said = {"role": "assistant", "content": "a\ud83d", "tool_calls": [CALL | {"id": "d"}]}
  said["tool_calls"][0]["function"] = {"name": "f", "arguments": "{\udc00}"}
  _, found, counts = log(tmp_path, {"messages": [ASKED, said]}, {"messages": [ASKED, NOON]})
  [own, _] = found
  assert own.messages[1].content == "a\ufffd"
  assert own.messages[1].tool_calls[0].arguments == "{\ufffd}"
  assert counts.half_pairs == 1


def test_results_without_calls_images_and_several_choices(tmp_path):
  result = {"role": "tool", "tool_call_id": "z", "content": {"a": 1}}
  image = {"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image_url"}]}
  two = COMPLETION | {"choices": COMPLETION["choices"] * 2}
  called = [ASKED, NOON | {"tool_calls": [CALL]}, result | {"tool_call_id": "c"}, NOON]
  _, found, counts = log(
    tmp_path,
    {"messages": [ASKED, result, NOON]},
    {"messages": called},
    {"messages": [image], "response": two},
  )
  assert counts.without_call == 1
  assert [each.messages[0].content for each in found][2] == "See [image_url]"
  assert found[0].messages[1] == Message("tool", '{"a": 1}', tool_call_id="z")
  assert counts.seen[("part", "image_url")] == counts.seen[("form", "choices")] == 1


# Duplicates and the split.


def test_duplicates_are_left_out_and_told(tmp_path, caplog):
  caplog.set_level("INFO")
  words = " ".join(f"word{n}" for n in range(60))
  asked = {"role": "user", "content": words}
  close = {"role": "user", "content": words.replace("word30 ", "other ")}
  more = [asked, NOON, ASKED, NOON]
  lines = [
    {"id": "first", "messages": [ASKED, NOON]},
    {"id": "start", "messages": [asked, NOON]},
    {"id": "again", "messages": [ASKED, NOON], "feedback": "thanks"},
    {"id": "whole", "messages": more},
    {"id": "close", "messages": [close, NOON, ASKED, NOON]},
    {"id": "third", "messages": [ASKED, NOON]},
  ]
  path = write(tmp_path / "log.jsonl", *lines)
  counts = logs.Counts()
  found = [each.id for each in logs.distinct(path, counts)]
  assert found == ["again", "whole"]  # the one with feedback; the one that goes on
  assert (counts.same, counts.continued, counts.near) == (2, 1, 1)
  assert counts.conversations == 6
  assert "1 conversation nearly says the same as an earlier one and was left out" in caplog.text
  found = [each.id for each in logs.distinct(path, logs.Counts(), near=1.1)]
  assert found == ["again", "whole", "close"]
  assert json.loads(json.dumps(counts.as_json()))["near"] == 1


def test_what_is_damaged_is_told_once_though_it_is_read_twice(tmp_path, caplog):
  path = write(tmp_path / "log.jsonl", {"messages": [ASKED, NOON]}, "{nonsense\n")
  assert len(list(logs.distinct(path, logs.Counts(), max_damaged=0.5))) == 1
  assert caplog.text.count(f"skipped a damaged record: {path}:2: Expecting property name") == 1
  with pytest.raises(ValueError, match="1 of 2 records are damaged"):
    next(logs.distinct(path, logs.Counts()))  # before the first conversation


def test_a_log_that_changes_between_the_passes_is_refused(tmp_path, monkeypatch):
  path = write(tmp_path / "log.jsonl", {"messages": [ASKED, NOON]})
  stream = logs.distinct(path, logs.Counts())
  read_first = logs.read

  def changed(*args, **how):
    yield from read_first(*args, **how)
    write(tmp_path / "log.jsonl", {"messages": [ASKED, NOON | {"content": "Midnight."}]})

  monkeypatch.setattr(logs, "read", changed)
  with pytest.raises(ValueError, match="changed while it was read: nothing may write to it"):
    list(stream)


def spoken(words, user=None):
  return Conversation("a", (Message("user", words), TALK[1]), Source("log", "x"), user=user)


def test_the_split_keeps_a_user_on_one_side_and_its_share():
  users = [[spoken(f"{n} {k}", user=f"user {n}") for k in range(3)] for n in range(2000)]
  sides = [{logs.held_out(each, 0.2, seed=3) for each in one} for one in users]
  assert all(len(side) == 1 for side in sides)
  assert 0.17 < sum(side == {True} for side in sides) / len(sides) < 0.23  # 3.3 sigma
  alone = [spoken(f"a question of its own, number {n}") for n in range(2000)]
  held = [logs.held_out(each, 0.2, seed=3) for each in alone]
  assert 0.17 < sum(held) / len(held) < 0.23
  assert held != [logs.held_out(each, 0.2, seed=4) for each in alone]
  assert not any(logs.held_out(each, 0.0, 3) for each in alone)
  assert all(logs.held_out(each, 1.0, 3) for each in alone)


def test_without_a_user_a_conversation_that_goes_on_stays_on_its_side():
  begun = spoken("Hello, where do I find the form for a new badge?")
  more = (*begun.messages, Message("user", "And then?"), Message("assistant", "Sign it."))
  goes_on = Conversation("b", more, begun.source)
  assert all(
    logs.held_out(begun, 0.5, seed) == logs.held_out(goes_on, 0.5, seed) for seed in range(40)
  )
  # "Hi" alone tells nobody apart: what is said next counts, too.
  sides = set()
  for n in range(40):
    said = (*spoken("Hi").messages, Message("user", f"My printer {n} fails"))
    sides.add(logs.held_out(Conversation("c", said, begun.source), 0.5, 1))
  assert sides == {True, False}


def test_logs_are_streamed(tmp_path):
  """Ten times as many conversations take but their sketches' bytes more."""

  def peak(count):
    path = tmp_path / f"{count}.jsonl"
    with open(path, "w") as file:
      for n in range(count):
        asked = {"role": "user", "content": f"{n} " * 30 + "x" * 2000}
        file.write(json.dumps({"messages": [asked, NOON]}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in logs.distinct(path, logs.Counts())) == count
    bytes_ = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return bytes_

  small, large = peak(40), peak(400)
  assert (large - small) / 360 < 1200  # a line alone is 2,200 bytes
