"""Logs in the form in which programs of others write them say what was said, by whom and in what
order: each compared with messages that were written down by hand.
"""

import json

import pytest

from oel_jax.conversations import logs
from oel_jax.conversations.schema import Conversation, Message, Source, ToolCall

ASKS, SAYS = "What time is it?", "It is noon."
ASKED, NOON = {"role": "user", "content": ASKS}, {"role": "assistant", "content": SAYS}
ARGUMENTS = {"zone": "UTC"}
CALL = ToolCall("c1", "clock", '{"zone": "UTC"}')
SYSTEM, USER, ANSWER = (
  Message("system", "Be brief."),
  Message("user", ASKS),
  Message("assistant", SAYS),
)
LOOKS = Message("assistant", "", (CALL,), thinking="Look.")
RESULT = Message("tool", "12:00", tool_call_id="c1")
COMPLETION = {"object": "chat.completion", "choices": [{"index": 0, "message": NOON}]}


def read(tmp_path, *records, suffix=".jsonl", **how):
  path = tmp_path / f"log{suffix}"
  lines = suffix == ".jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))
  counts = logs.Counts()
  return list(logs.distinct(path, counts, **how)), counts


def messages(tmp_path, *records, **how):
  found, counts = read(tmp_path, *records, **how)
  assert counts.damaged == 0 and counts.without_call == 0
  return [each.messages for each in found]


def part(what, text=None, **more):
  return {"type": what} | ({} if text is None else {"text": text}) | more


# The AI SDK of Vercel: messages of an application's page, and those that go to the model.

UI_CALL = {"toolCallId": "c1", "input": ARGUMENTS, "output": {"time": "12:00"}}
UI_PARTS = [
  part("step-start"),
  part("reasoning", "Look.", state="done"),
  part("tool-clock", state="output-available", **UI_CALL),
  part("step-start"),
  part("text", SAYS, state="done"),
]
OLD_CALL = {"toolCallId": "c1", "toolName": "clock", "args": ARGUMENTS, "result": {"time": "12:00"}}
MODEL_CALL = part("tool-call", toolCallId="c1", toolName="clock", input=ARGUMENTS)
MODEL_RESULT = {"toolCallId": "c1", "toolName": "clock"}
OUTPUT = {"type": "json", "value": {"time": "12:00"}}


@pytest.mark.parametrize(
  "answer",
  [
    [{"role": "assistant", "parts": UI_PARTS}],
    [{"role": "assistant", "content": SAYS, "parts": UI_PARTS}],  # its text stands there, too
    [
      {
        "role": "assistant",
        "content": SAYS,
        "parts": [
          part("reasoning", reasoning="Look."),
          part("tool-invocation", toolInvocation=OLD_CALL | {"state": "result"}),
          part("text", SAYS),
        ],
        "toolInvocations": [OLD_CALL],
      }
    ],
    [
      {"role": "assistant", "content": [part("reasoning", "Look."), MODEL_CALL]},
      {"role": "tool", "content": [part("tool-result", output=OUTPUT, **MODEL_RESULT)]},
      {"role": "assistant", "content": [part("text", SAYS)]},
    ],
  ],
)
def test_the_ai_sdks_calls_and_results_stand_in_their_order(tmp_path, answer):
  asked = {"role": "user", "parts": [part("text", ASKS)]}
  [found] = messages(tmp_path, {"id": "c", "messages": [asked, *answer]})
  assert found == (USER, LOOKS, Message("tool", '{"time": "12:00"}', tool_call_id="c1"), ANSWER)


def test_calls_of_one_step_stay_together_and_a_failure_is_a_result(tmp_path):
  parts = [
    part("text", "I look."),
    part("tool-clock", toolCallId="c1", input=ARGUMENTS, output="12:00"),
    part("dynamic-tool", toolName="sun", toolCallId="c2", input={}, errorText="cloudy"),
    part("text", SAYS),
  ]
  [found] = messages(tmp_path, {"messages": [ASKED, {"role": "assistant", "parts": parts}]})
  looks = Message("assistant", "I look.", (CALL, ToolCall("c2", "sun", "{}")))
  assert found == (USER, looks, RESULT, Message("tool", "cloudy", tool_call_id="c2"), ANSWER)


def test_anthropics_own_tools_are_no_words_of_the_answer(tmp_path):
  use = {"type": "server_tool_use", "id": "c1", "name": "clock", "input": ARGUMENTS}
  found = {"type": "clock_tool_result", "tool_use_id": "c1", "content": [part("text", "12:00")]}
  answer = {"role": "assistant", "content": [use, found, part("text", SAYS)]}
  looks = Message("assistant", "", (CALL,))
  assert messages(tmp_path, {"messages": [ASKED, answer]}) == [(USER, looks, RESULT, ANSWER)]


def test_anthropics_request_names_the_user_and_an_answer_alone_is_refused(tmp_path):
  request = {"system": "Be brief.", "messages": [ASKED], "metadata": {"user_id": "u7"}}
  answer = {"type": "message", "role": "assistant", "content": [part("text", SAYS)]}
  answer |= {"id": "m", "stop_reason": "end_turn"}
  [found], counts = read(tmp_path, {"request": request, "response": answer}, answer, max_damaged=1)
  assert (found.messages, found.user) == ((SYSTEM, USER, ANSWER), "u7")
  [place] = counts.places
  assert "an answer without what was asked" in place


# OpenAI's Responses API.


def test_instructions_stand_before_what_the_developer_says(tmp_path):
  developer = {"role": "developer", "content": "In UTC."}
  record = {"request": {"instructions": "Be brief.", "input": [developer, ASKED]}}
  record["response"] = {"object": "response", "output": [{"type": "message"} | NOON]}
  [found] = messages(tmp_path, record)
  assert found == (SYSTEM, Message("system", "In UTC."), USER, ANSWER)


def test_instructions_and_tools_that_the_response_alone_repeats(tmp_path):
  tool = {"type": "function", "name": "clock", "parameters": {}}
  response = {"instructions": "Be brief.", "tools": [tool], "output": [{"type": "message"} | NOON]}
  [found], _ = read(tmp_path, {"call_type": "aresponses", "messages": ASKS, "response": response})
  assert found.messages == (SYSTEM, USER, ANSWER)
  assert [json.loads(text)["function"]["name"] for text in found.tools] == ["clock"]


def test_what_openais_own_tools_did_is_left_out_and_told(tmp_path):
  search = {"type": "web_search_call", "id": "w", "status": "completed", "action": {}}
  output = [part("reasoning", summary=[]), search, {"type": "message"} | NOON]
  [found], counts = read(tmp_path, {"request": {"input": ASKS}, "response": {"output": output}})
  assert found.messages == (USER, ANSWER) and counts.seen["event", "web_search_call"] == 1


@pytest.mark.parametrize("of", ["request", "response"])
def test_a_request_that_goes_on_from_another_response_is_refused(tmp_path, of):
  record = {"request": {"input": "And now?"}, "response": {"output": [{"type": "message"} | NOON]}}
  record[of]["previous_response_id"] = "resp_1"
  first = {"request": {"input": ASKS}, "response": {"output": [{"type": "message"} | NOON]}}
  found, counts = read(tmp_path, first, record, max_damaged=1)
  assert [each.messages for each in found] == [(USER, ANSWER)]
  assert "must stand in its input" in counts.places[0]


# Gemini.


def test_gemini(tmp_path):
  request = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "contents": [
      {"parts": [{"text": ASKS}]},
      {
        "role": "model",
        "parts": [
          {"text": "Look.", "thought": True},
          {"functionCall": {"id": "c1", "name": "clock", "args": ARGUMENTS}},
        ],
      },
      {
        "role": "user",
        "parts": [{"functionResponse": {"id": "c1", "name": "clock", "response": {"time": 12}}}],
      },
    ],
    "tools": [{"functionDeclarations": [{"name": "clock"}, {"name": "sun"}]}],
  }
  answer = {"candidates": [{"content": {"role": "model", "parts": [{"text": SAYS}]}}]}
  found, _ = read(
    tmp_path, {"request": request, "response": answer}, request | {"response": answer}
  )
  result = Message("tool", '{"time": 12}', tool_call_id="c1", name="clock")
  assert [each.messages for each in found] == [(SYSTEM, USER, LOOKS, result, ANSWER)]
  assert [json.loads(text)["function"]["name"] for text in found[0].tools] == ["clock", "sun"]


# LangChain's messages, and LangSmith's runs that hold them. They were made by langchain-core 1.2.6.

REST = {"additional_kwargs": {}, "response_metadata": {}, "name": None, "id": None}
LC_CALL = {"name": "clock", "args": ARGUMENTS, "id": "c1", "type": "tool_call"}
USE = {"type": "tool_use", "id": "c1", "name": "clock", "input": ARGUMENTS}
LC = [
  ("SystemMessage", {"type": "system", "content": "Be brief."}),
  ("HumanMessage", {"type": "human", "content": ASKS}),
  # Anthropic's models: a part says the call, too
  ("AIMessage", {"type": "ai", "content": [part("reasoning", reasoning="Look."), USE]}),
  ("ToolMessage", {"type": "tool", "content": "12:00", "tool_call_id": "c1"}),
  ("AIMessageChunk", {"type": "AIMessageChunk", "content": SAYS}),
]
LC[2][1]["tool_calls"] = [LC_CALL]
PLAIN = [message | REST for _, message in LC]
DATA = [{"type": message["type"], "data": message | REST} for _, message in LC]
IDS = ["langchain", "schema", "messages"]
LC_DUMPED = [
  {"lc": 1, "type": "constructor", "id": [*IDS, name], "kwargs": message} for name, message in LC
]
LC_TALK = (SYSTEM, USER, LOOKS, RESULT, ANSWER)


@pytest.mark.parametrize("said", [PLAIN, DATA, LC_DUMPED])
def test_langchains_messages(tmp_path, said):
  assert messages(tmp_path, {"messages": said}) == [LC_TALK]
  answer = {"generations": [[{"text": SAYS, "message": said[-1]}]], "llm_output": {}}
  run = {"run_type": "llm", "inputs": {"messages": [said[:-1]]}, "outputs": answer}
  run |= {"extra": {"metadata": {"user_id": "ann"}}, "session_id": "the project's"}
  run |= {"id": "r1", "feedback_stats": {"thumb": {"avg": 0.0}}}
  graph = {"id": "r0", "run_type": "chain", "inputs": {"messages": said[:2]}}
  graph["outputs"] = {"messages": said}
  tool = {"id": "r2", "run_type": "tool", "inputs": {"input": "x"}, "outputs": {"output": "y"}}
  [found], counts = read(tmp_path, graph, run, tool)  # the graph repeats what the run says
  assert (found.id, found.user, found.messages) == ("r1", "ann", LC_TALK)
  assert found.feedback == '{"thumb": {"avg": 0.0}}' and counts.seen["event", "tool"] == 1


def test_of_langgraphs_runs_the_outputs_are_all_or_what_is_new(tmp_path):
  graph = {"id": "g", "run_type": "chain", "inputs": {"messages": [["user", ASKS]]}}
  graph["outputs"] = {"messages": PLAIN}
  assert messages(tmp_path, graph) == [LC_TALK]
  node = {"id": "n", "run_type": "chain", "inputs": {"messages": PLAIN[:-1]}}
  node["outputs"] = {"messages": PLAIN[-1:]}
  assert messages(tmp_path, node) == [LC_TALK]
  tools = {"id": "t", "run_type": "chain", "inputs": {"tool_call": LC_CALL}}
  tools["outputs"] = {"messages": PLAIN[3:4]}
  [found], counts = read(tmp_path, tools, node)
  assert found.id == "n" and counts.seen["event", "chain"] == 1


@pytest.mark.parametrize("said", [PLAIN, DATA])
def test_langchains_messages_as_records(tmp_path, said):
  assert messages(tmp_path, *said) == [LC_TALK]


# Traces and proxies.


def test_of_langfuses_observations_only_calls_of_a_model_are_said(tmp_path):
  shared = {"traceId": "t", "userId": "ann"}
  good = shared | {"id": "o1", "type": "GENERATION", "input": [ASKED], "output": NOON}
  others = [
    shared | {"id": f"o{kind}", "type": kind, "input": "SELECT 1", "output": "2 rows"}
    for kind in ("SPAN", "TOOL", "RETRIEVER")
  ]
  [found], counts = read(tmp_path, *others, good)
  assert (found.messages, found.user) == ((USER, ANSWER), "ann")
  assert {name: n for (kind, name), n in counts.seen.items() if kind == "event"} == {
    "SPAN": 1,
    "TOOL": 1,
    "RETRIEVER": 1,
  }


def test_a_page_of_a_list_holds_records(tmp_path):
  rows = [{"id": str(n), "traceId": "t", "type": "GENERATION", "input": [ASKED]} for n in range(2)]
  rows = [row | {"output": NOON | {"content": f"At {row['id']}."}} for row in rows]
  for rest in ({"object": "list", "has_more": False}, {"meta": {"page": 1}}, {"error": None}):
    path = tmp_path / "page.json"
    path.write_text(json.dumps({"data": rows} | rest))
    assert [each.id for each in logs.read(path, logs.Counts())] == ["0", "1"]


ITEMS = [
  {"id": "msg_1", "type": "message", "role": "developer", "content": "Be brief."},
  {"id": "msg_2", "type": "message", "role": "user", "content": "Rain?"},
  {"id": "fc_1", "type": "function_call", "call_id": "c", "name": "sky", "arguments": "{}"},
  {"id": "fco_1", "type": "function_call_output", "call_id": "c", "output": "grey"},
  {"id": "msg_3", "type": "message", "role": "assistant", "content": "Soon."},
]


@pytest.mark.parametrize(
  "items",
  [ITEMS, ITEMS[1:], ITEMS[:2] + ITEMS[4:], ITEMS[1:2] + ITEMS[4:]],
  ids=["all", "a call", "told", "an answer"],
)
@pytest.mark.parametrize("step", [1, -1], ids=["asc", "desc"])
@pytest.mark.parametrize("name", ["items.json", "items.jsonl"])
def test_a_page_of_items_is_one_conversation_in_its_order(tmp_path, items, step, name):
  """OpenAI's lists of a conversation's or a response's items come newest first by default."""
  page = {"object": "list", "data": items[::step], "has_more": False}
  path = tmp_path / name
  path.write_text("\n".join(json.dumps(page) for _ in range(2)))
  found = list(logs.read(path, logs.Counts()))
  assert len(found) == 2
  written = {"developer": "system", "function_call": "assistant", "function_call_output": "tool"}
  spoke = [each.get("role", each["type"]) for each in items]
  for record in found:
    assert [each.role for each in record.messages] == [written.get(who, who) for who in spoke]
    calls = [each.tool_calls for each in record.messages if each.tool_calls]
    assert len(calls) == spoke.count("function_call")


@pytest.mark.parametrize("empty", ["{}", {}])
def test_litellms_database(tmp_path, empty):
  """`messages` is empty there, and `user` the key's owner."""
  row = {
    "request_id": "1",
    "user": "owner",
    "end_user": "ann",
    "messages": empty,
    "proxy_server_request": json.dumps({"model": "m", "messages": [ASKED]}),
    "response": json.dumps(COMPLETION),
  }
  other = row | {"end_user": "", "proxy_server_request": {"messages": [ASKED | {"content": "Hm?"}]}}
  [found, unnamed], _ = read(tmp_path, row, other)
  assert (found.messages, found.user, unnamed.user) == ((USER, ANSWER), "ann", None)


@pytest.mark.parametrize(
  "record",
  [
    {
      "request_user_id": "ann",
      "request_body": {"messages": [ASKED]},
      "response_body": COMPLETION,
    },
    {
      "request": {"user_id": "ann", "body": {"messages": [ASKED]}},
      "response": {"body": COMPLETION},
    },
  ],
)
def test_helicone(tmp_path, record):
  [found], _ = read(tmp_path, record)
  assert (found.messages, found.user) == ((USER, ANSWER), "ann")


def test_ollamas_answer(tmp_path):
  answer = {"model": "m", "message": NOON | {"thinking": "Look."}, "done": True}
  [found] = messages(tmp_path, {"request": {"messages": [ASKED]}, "response": answer})
  assert found == (USER, Message("assistant", SAYS, thinking="Look."))


def test_an_answer_that_is_a_stream_of_events_is_refused(tmp_path):
  chunk = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": SAYS}}]}
  for stream in (f"data: {json.dumps(chunk)}\n\n", [chunk]):
    record = {"request": {"messages": [ASKED]}, "response": stream}
    found, counts = read(tmp_path, {"messages": [ASKED, NOON]}, record, max_damaged=1)
    assert len(found) == 1 and "its pieces must be joined to one answer" in counts.places[0]


def test_empty_feedback_is_none(tmp_path):
  for given in ({"feedback_stats": {}}, {"feedback": ""}, {"metadata": {"feedback": []}}):
    [found], _ = read(tmp_path, {"messages": [ASKED, NOON]} | given)
    assert found.feedback is None


def test_feedback_on_one_answer_is_kept(tmp_path):
  said = [ASKED, NOON | {"annotation": {"rating": -1}}, ASKED, NOON | {"feedback": "Wrong."}]
  [found], counts = read(tmp_path, {"id": "c", "chat": {"messages": said}})
  assert found.feedback == '{"rating": -1}\nWrong.'
  assert not [name for kind, name in counts.seen if kind == "field"]
  lines = [ASKED, NOON | {"feedback": "Wrong.", "user_id": "ann"}, ASKED | {"feedback": ""}]
  [found], _ = read(tmp_path, *(line | {"session": "s"} for line in lines))
  assert (found.feedback, found.user) == ("Wrong.", "ann")


def test_what_gemini_was_shown_stands_in_brackets(tmp_path):
  shown = [{"text": ASKS}, {"inlineData": {"mimeType": "image/png", "data": "AA"}}]
  said = [{"role": "user", "parts": shown}, {"role": "model", "parts": [{"text": SAYS}]}]
  [found] = messages(tmp_path, {"contents": said})
  assert found == (Message("user", f"{ASKS}[inlineData]"), ANSWER)


def test_parts_as_opentelemetry_names_them(tmp_path):
  said = [
    {"role": "user", "parts": [{"type": "text", "content": ASKS}]},
    {
      "role": "assistant",
      "parts": [
        {"type": "reasoning", "content": "Look."},
        {"type": "tool_call", "id": "c1", "name": "clock", "arguments": ARGUMENTS},
      ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "12:00"}]},
    {"role": "assistant", "parts": [{"type": "text", "content": SAYS}], "finish_reason": "stop"},
  ]
  assert messages(tmp_path, {"messages": said}) == [(USER, LOOKS, RESULT, ANSWER)]


# Thinking that stands in the text.


@pytest.mark.parametrize(
  "text, thinking, content",
  [
    (f"<think>\nLook.\n</think>\n\n{SAYS}", "Look.", SAYS),
    (f"Look.\n</think>\n\n{SAYS}", "Look.", SAYS),  # the mark that opens it stood in the prompt
    (f"<think>\n\n</think>\n\n{SAYS}", "", SAYS),
    ("<think>Look, and then it was cut", "Look, and then it was cut", ""),
    ("Write <think>, then </think>.", "", "Write <think>, then </think>."),
    (
      '<details type="reasoning" done="true">\n<summary>Thought for 2 seconds</summary>'
      '\n> Look.\n</details>\n<details type="tool_calls" done="true" id="c1" name="clock" '
      'arguments="{}" result="&quot;12:00&quot;">\n<summary>Tool Executed</summary>\n</details>\n'
      f"{SAYS}",
      "> Look.",
      SAYS,
    ),
  ],
)
def test_thinking_in_an_answers_text_is_none_of_it(tmp_path, text, thinking, content):
  talk = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
  [found] = messages(tmp_path, {"conversations": talk})
  assert found == (Message("user", text), Message("assistant", content, thinking=thinking))


# Programs that people and agents talk to.


def test_open_webuis_export(tmp_path):
  tree = {"messages": {"u": ASKED, "x": NOON, "a": NOON}, "currentId": "a"}
  chat = {"title": "Time", "history": tree, "messages": [ASKED, NOON]}
  [found], _ = read(tmp_path, {"id": "c", "user_id": "ann", "chat": chat}, suffix=".json")
  assert (found.id, found.user, found.messages) == ("c", "ann", (USER, ANSWER))


def test_swe_agents_trajectory(tmp_path):
  said = [
    {"role": "system", "content": "Be brief.", "agent": "main", "message_type": "system_prompt"},
    ASKED | {"message_type": "observation"},
    NOON | {"thought": "Look.", "action": "date", "message_type": "action"},
  ]
  file = tmp_path / "a.traj"
  file.write_text(json.dumps({"trajectory": [{}], "history": said, "info": {}}, indent=2))
  [found] = logs.read(tmp_path, logs.Counts())
  assert [(m.role, m.content) for m in found.messages] == [
    ("system", "Be brief."),
    ("user", ASKS),
    ("assistant", SAYS),
  ]
  # Elsewhere a history is not the whole: it would be answered to what was not asked.
  with pytest.raises(ValueError, match="holds no conversation"):
    read(
      tmp_path, {"history": [ASKED, NOON], "query": "And now?", "response": "One."}, max_damaged=1
    )


def test_lines_of_several_sessions_that_come_mixed(tmp_path):
  lines = [
    {"chatId": chat, "role": role, "content": f"{role} {turn} of {chat}"}
    for turn in range(2)
    for role in ("user", "assistant")
    for chat in ("a", "b")
  ]
  found, _ = read(tmp_path, *lines, near=2)
  assert {each.id: [m.content for m in each.messages] for each in found} == {
    chat: [f"{role} {turn} of {chat}" for turn in range(2) for role in ("user", "assistant")]
    for chat in ("a", "b")
  }


def test_only_so_many_sessions_are_open(tmp_path, monkeypatch):
  monkeypatch.setattr("oel_jax.conversations.log_sessions.MAX_OPEN", 2)
  lines = [message | {"session": s} for s in "abcba" for message in (ASKED, NOON)]
  read(tmp_path, *lines)
  found = logs.read(tmp_path / "log.jsonl", logs.Counts())
  assert [(each.id, len(each.messages)) for each in found] == [
    ("a", 2),
    ("c", 2),
    ("b", 4),
    ("a#log.jsonl:9", 2),
  ]


def claude(role, text, uuid, parent, **more):
  message = {"role": role, "content": [part("text", text)]}
  return {"type": role, "sessionId": "s", "uuid": uuid, "parentUuid": parent, "message": message}


@pytest.mark.parametrize("parent", ["2", "event"])
def test_what_is_taken_back_in_claude_code_stood_in_no_later_prompt(tmp_path, parent):
  """The next message goes on from the line before what is taken back, which may be an event."""
  lines = [
    claude("user", "one", "1", None),
    claude("assistant", "One.", "2", "1"),
    {"type": "system", "sessionId": "s", "uuid": "event", "parentUuid": "2"},
    claude("user", "two", "3", "event"),
    claude("assistant", "Two.", "4", "3"),
    claude("user", "three", "5", "4"),
    claude("assistant", "Three.", "6", "5"),
    claude("user", "two again", "7", parent),
    claude("assistant", "Two again.", "8", "7"),
    claude("user", "four", "9", "8"),
    claude("assistant", "Four.", "10", "9"),
    claude("user", "anew", "11", None),
    claude("assistant", "Anew.", "12", "11"),
    claude("user", "so far: anew", "13", None) | {"isCompactSummary": True},
    claude("assistant", "Good.", "14", "13"),
  ]
  found, _ = read(tmp_path, *lines, near=2)
  assert {each.id: [m.content for m in each.messages] for each in found} == {
    "s": ["one", "One.", "two", "Two.", "three", "Three."],
    "s#log.jsonl:8": ["one", "One.", "two again", "Two again.", "four", "Four."],
    "s#log.jsonl:12": ["anew", "Anew."],
    "s#log.jsonl:14": ["so far: anew", "Good."],
  }


def test_results_of_calls_that_ran_at_once_take_nothing_back(tmp_path):
  def line(role, uuid, parent, *parts):
    return claude(role, "", uuid, parent) | {
      "message": {"role": role, "content": list(parts), "id": "m"}
    }

  uses = [{"type": "tool_use", "id": n, "name": "clock", "input": {}} for n in ("a", "b")]
  results = [{"type": "tool_result", "tool_use_id": n, "content": n} for n in ("a", "b")]
  lines = [
    claude("user", "one", "1", None),
    line("assistant", "2", "1", uses[0]),
    line("assistant", "3", "2", uses[1]),
    line("user", "4", "2", results[0]),  # each follows its own call
    line("user", "5", "3", results[1]),
    claude("user", "[Request interrupted by user]", "6", "4"),
    claude("user", "two", "7", "6"),
    claude("assistant", "Two.", "8", "7"),
  ]
  [found] = messages(tmp_path, *lines)
  assert [m.content for m in found] == [
    "one",
    "",
    "a",
    "b",
    lines[5]["message"]["content"][0]["text"],
    "two",
    "Two.",
  ]


def codex(role, text):
  content = [part("output_text" if role == "assistant" else "input_text", text)]
  payload = {"type": "message", "role": role, "content": content}
  return {"type": "response_item", "payload": payload}


HERE = "<environment_context>\n  <cwd>/home/ann/project</cwd>\n</environment_context>"


def test_what_is_rolled_back_in_codex_stood_in_no_later_prompt(tmp_path):
  lines = [
    {"type": "session_meta", "payload": {"id": "t", "base_instructions": {"text": "Be brief."}}},
    codex("user", HERE),
    codex("user", "one"),
    codex("assistant", "One."),
    codex("user", HERE),
    codex("user", "two"),
    codex("assistant", "Two."),
    {"type": "event_msg", "payload": {"type": "thread_rolled_back", "num_turns": 1}},
    codex("user", "three"),
    codex("assistant", "Three."),
  ]
  found, _ = read(tmp_path, *lines, near=2)
  head = ["Be brief.", HERE, "one", "One.", HERE]
  assert [[m.content for m in each.messages] for each in found] == [
    [*head, "two", "Two."],
    [*head, "three", "Three."],
  ]


def test_an_older_codexs_session(tmp_path):
  lines = [
    {"id": "t", "timestamp": "2025-06-01T00:00:00Z", "instructions": "Be brief."},
    {"record_type": "state"},
    {"type": "message", "id": None} | ASKED,
    {"type": "reasoning", "summary": [], "encrypted_content": "x"},
    {"type": "message", "id": "m"} | NOON,
  ]
  [found], counts = read(tmp_path, *lines)
  assert (found.id, found.messages, counts.damaged) == ("t", (SYSTEM, USER, ANSWER), 0)


@pytest.mark.parametrize("history", [None, [], [{"type": "message"} | ASKED | {"content": "So."}]])
def test_a_summary_begins_codexs_context_anew(tmp_path, history):
  summary = {"message": "So."} | ({} if history is None else {"replacement_history": history})
  lines = [
    codex("user", "one"),
    codex("assistant", "One."),
    {"type": "compacted", "payload": summary},
  ]
  lines += [codex("user", "two"), codex("assistant", "Two.")]
  found, _ = read(tmp_path, *lines, near=2)
  assert [[m.content for m in each.messages] for each in found] == [
    ["one", "One."],
    ["So.", "two", "Two."],
  ]


# What follows from them.


def test_codexs_sessions_are_split_by_what_the_user_says():
  sides = set()
  for number in range(40):
    said = (Message("user", HERE), Message("user", f"Question {number}"), ANSWER)
    sides.add(logs.held_out(Conversation("c", said, Source("agent", "x")), 0.5, 1))
  assert sides == {True, False}
