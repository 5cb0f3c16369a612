"""What one record of a log says, whoever wrote it: a whole conversation, a part of an agent's
session, or an event that is no message.

| written by | a record |
| --- | --- |
| OpenAI's chat lines, fine-tuning files | {"messages": [{"role", "content"}]} |
| ShareGPT, LMSYS's chats | {"conversations": [{"from", "value"}]}, {"conversation": [a message]} |
| proxies: LiteLLM, and others like it | {"messages", "response": {"choices": [{"message"}]}} |
| Alpaca | {"instruction", "input", "output", "history": [[asked, answered]]} |
| requests kept with their answers | {"request": {"messages"}, "response"}, or "input", "output"… |
| OpenAI's Responses API | {"input": items, "output": items} |
| Claude Code | {"type": "user" or "assistant", "sessionId", "message": {"role", "content"}} |
| Codex | {"type": "response_item", "payload": an item}, {"type": "session_meta", "payload"} |
| any agent | {"role", "content"} |

Another format that is one JSON object: the name of its list goes into `LISTS`, and the object into
this table. What an entry of the list may say stands in `log_messages` (`said`, `SPEAKERS`, `SAYS`,
`MESSAGE_KNOWN`), files that are no lines of JSON in `log_files`. An example goes into
tests/test_logs.py.

No error tells what somebody said: a record is named by its place, what is wrong by its kind.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from oel_jax.conversations import tools
from oel_jax.conversations.log_messages import (
  SPEAKERS,
  Seen,
  first_name,
  joined,
  kind,
  opened,
  said,
  words,
)
from oel_jax.conversations.schema import Message, ToolCall

SESSIONS = ("sessionId", "session_id", "session", "conversation_id")
LISTS = ("messages", "conversations", "conversation")  # what holds a conversation's messages
REQUESTS, RESPONSES = ("request", "input", "body"), ("response", "output", "completion")
USERS = ("user", "user_id", "userId", "end_user", "safety_identifier", "user_api_key_end_user_id")
# Of a record, what is read or what says nothing of the conversation; the rest is counted by name.
KNOWN = {
  "id", "custom_id", "system", "instructions", "tools", "functions",
  "choices", "feedback", "outcome", "reward", "score", "metadata", "schema", "digest", "source",
  "passed", "ended", "object", "model", "created", "created_at", "timestamp", "usage", "status",
  "error", "dataset", "split", "tags", "language", "store", "n", "seed", "temperature",
  "top_p", "max_tokens", "max_completion_tokens", "tool_choice", "parallel_tool_calls", "method",
  "url", "trace_id", "call_type", "startTime", "endTime", "completionStartTime", "response_time",
  "response_cost", "response_cost_failure_debug_info", "total_tokens", "prompt_tokens",
  "completion_tokens", "model_map_information", "model_id", "model_group", "model_parameters",
  "api_base", "cache_hit", "cache_key", "saved_cache_cost", "request_tags", "hidden_params",
  "requester_ip_address", "error_str", "error_information", "stream", "custom_llm_provider",
  "instruction", "history", *LISTS, *REQUESTS, *RESPONSES, *USERS, *SESSIONS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Record:
  """What a record of a log holds.

  Attributes:
    messages: in order.
    session: the agent's session that they are a part of, "" if it has no name; None for a whole
      conversation.
    side: of a session's sub-agents, which one.
    joins: names the model's response that the messages are a part of, "" if unknown: what has one
      name is one message.
    begins: the model's context begins anew here, with these messages.
    heads: these messages stand before a session or nowhere.
    id, user, outcome, reward, feedback, tools: of the conversation, where the record names them.
  """

  messages: tuple[Message, ...]
  session: str | None = None
  side: str = ""
  joins: str = ""
  begins: bool = False
  heads: bool = False
  id: str = ""
  user: str | None = None
  outcome: str | None = None
  reward: float | None = None
  feedback: str | None = None
  tools: tuple[str, ...] = ()


def read(data: Any, seen: Seen) -> Record | None:
  """Returns what a record says, None if it is an event that is no message.

  Args:
    data: the record's JSON value.
    seen: gets what was met: ("event", its type), ("field", a name that is not read), ("part", the
      type of one that is no text), ("form", "developer", "parts", "null content", "name" or
      "choices").

  Raises:
    ValueError: it is neither; says which kind of thing stands where, never what somebody said.
  """
  if not isinstance(data, dict):
    raise ValueError(f"a JSON object is needed, this is {kind(data)}")
  payload = data.get("payload")
  if isinstance(data.get("type"), str) and isinstance(payload, dict):
    return _codex(data["type"], payload, seen)
  request = _request(data)
  if request is not None:
    return _whole(data, request, seen)
  if data.get("type") is None and next(_answer(data, []), None) is not None:
    raise ValueError("an answer without what was asked: the request must stand in the same record")
  return _agent(data, seen)


# Whole conversations.


def _request(data: dict[str, Any]) -> dict[str, Any] | None:
  """The object that holds what was said before the answer."""
  inner = [opened(data.get(name)) for name in REQUESTS]
  bodies = [opened(value.get("body")) for value in inner if isinstance(value, dict)]
  for value in (data, *inner, *bodies):
    if isinstance(value, dict) and any(_lists(value)):
      return value
  if isinstance(data.get("instruction"), str):
    return {"messages": _alpaca(data)}
  if "call_id" not in data and any(data.get(name) for name in RESPONSES):  # the Responses API's
    for value in (data, *inner, *bodies):
      if isinstance(value, dict) and isinstance(value.get("input"), (str, list)):
        return value
  return None


def _alpaca(data: dict[str, Any]) -> list[dict[str, Any]]:
  """What stands before the answer: turns of before, an instruction, its input."""
  history, more = data.get("history") or [], data.get("input")
  if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
    raise ValueError(f"the history is {kind(history)}: it must be a list of pairs")
  pairs = (zip(("user", "assistant"), pair) for pair in history)
  said = [{"role": role, "content": text} for pair in pairs for role, text in pair]
  asked = filter(None, (data["instruction"], more if isinstance(more, str) else ""))
  return [*said, {"role": "user", "content": "\n".join(asked)}]


def _lists(value: dict[str, Any]) -> Iterator[str]:
  """Which of LISTS an object has; of the Responses API's the conversation is an object's id."""
  return (n for n in LISTS if n in value and (n != LISTS[-1] or isinstance(value[n], list)))


def _whole(data: dict[str, Any], request: dict[str, Any], seen: Seen) -> Record:
  seen += (("field", name) for name in data if name not in KNOWN)
  given = opened(request[next(itertools.chain(_lists(request), ["input"]))])
  if isinstance(given, dict) and "messages" in given:
    given = opened(given["messages"])
  if isinstance(given, str):
    given = [{"role": "user", "content": given}]
  if not isinstance(given, list) or not given:
    raise ValueError(f"the conversation is {kind(given)}: it must be a list of messages")
  messages = [message for each in given for message in _entry(each, seen)]
  system = request.get("system", request.get("instructions"))
  if system and messages[0].role != "system":
    messages = said({"role": "system", "content": system}, seen) + messages
  if request is not data or messages[-1].role != "assistant":
    messages += _answer(data, seen)
  # LiteLLM keeps the rest of a request in "model_parameters".
  meta, rest = (_object(data.get(name)) for name in ("metadata", "model_parameters"))
  places = [place.get(name) for place in (request, data, rest) for name in ("tools", "functions")]
  offered = next(filter(None, places), None)
  reward = _reward(data.get("reward", data.get("score", meta.get("score"))))
  return Record(
    tuple(_joined(messages)),
    id=first_name(data.get("id"), data.get("custom_id"), *(data.get(name) for name in SESSIONS)),
    user=first_name(*(place.get(name) for place in (data, request, meta, rest) for name in USERS))
    or None,
    outcome=words(data.get("outcome", meta.get("outcome"))),
    reward=reward,
    feedback=words(data.get("feedback", meta.get("feedback"))),
    tools=tools.definitions(offered),
  )


def _reward(value: Any) -> float | None:
  if value is None:
    return None
  if type(value) not in (int, float):
    raise ValueError(f"the reward is {kind(value)}: it must be a number")
  try:
    reward = float(value)
  except OverflowError:  # a whole number of more than 308 digits
    reward = math.inf
  if not math.isfinite(reward):  # Python writes NaN for what was not scored
    raise ValueError(f"the reward is {reward}: it must be finite, or null where there is none")
  return reward


def _object(value: Any) -> dict[str, Any]:
  """An object, or what stands as one in a text; an empty one for anything else."""
  value = opened(value)
  return value if isinstance(value, dict) else {}


def _answer(data: dict[str, Any], seen: Seen) -> Iterator[Message]:
  """The messages of the answer that stands beside a request."""
  given = next((data[name] for name in RESPONSES if data.get(name)), None)
  given = opened(data if given is None else given)
  if isinstance(given, dict) and isinstance(opened(given.get("body")), dict):
    given = opened(given["body"])
  if isinstance(given, str):
    given = {"role": "assistant", "content": given}
  elif isinstance(given, dict) and isinstance(given.get("choices"), list) and given["choices"]:
    if len(given["choices"]) > 1:
      seen.append(("form", "choices"))
    choice = given["choices"][0]
    choice = choice if isinstance(choice, dict) else {}
    given = choice.get("message", {"role": "assistant", "content": choice.get("text")})
  elif isinstance(given, dict) and isinstance(given.get("output"), list):
    given = given["output"]
  elif isinstance(given, dict) and given is not data and "content" in given:
    given = {"role": "assistant"} | given
  else:
    given = given if isinstance(given, list) else []
  for each in given if isinstance(given, list) else [given]:
    yield from _entry(each, seen)


def _entry(value: Any, seen: Seen) -> list[Message]:
  """The messages of one entry of a list: a message, or an item of the Responses API."""
  if isinstance(value, dict) and "role" not in value and "from" not in value:
    item = _item(value, seen)
    if item is not None:
      return item
  return said(value, seen)


def _joined(messages: list[Message]) -> Iterator[Message]:
  """The messages, an answer's thinking and calls in one message with its text.

  Items of the Responses API come one by one; where each message has its text or its calls, nothing
  changes.
  """
  before = None
  for message in messages:
    follows = before is not None and before.role == message.role == "assistant"
    if follows and not (message.content and (before.content or before.tool_calls)):
      before = joined(before, message)
    else:
      if before is not None:
        yield before
      before = message
  if before is not None:
    yield before


# Agents' sessions.


def _agent(data: dict[str, Any], seen: Seen) -> Record | None:
  """A line of an agent's trace: Claude Code's, an item of its own, or a bare message."""
  event = data.get("type", data.get("record_type"))
  event = event if isinstance(event, str) else None
  inner = data["message"] if isinstance(data.get("message"), dict) else data
  if data.get("isMeta") or data.get("isApiErrorMessage"):  # not the user's, not the model's
    seen.append(("event", "isMeta" if data.get("isMeta") else "isApiErrorMessage"))
    return None
  who = inner.get("role", inner.get("from"))
  if who is None and inner is not data and event in SPEAKERS:
    inner, who = {"role": event} | inner, event
  session = first_name(*(data.get(name) for name in SESSIONS))
  if who is None:
    messages = _item(data, seen)
    if messages is None and event:
      seen.append(("event", event))
      return None
    if messages is None:
      raise ValueError("a message, a conversation or an event is needed: this has no role, no type")
    return Record(tuple(messages), session, joins=_side(messages))
  messages = tuple(said(inner, seen))
  user = first_name(*(data.get(name) for name in USERS)) or None
  return Record(
    messages,
    session,
    side=first_name(data.get("agentId")) or "side" if data.get("isSidechain") else "",
    joins=first_name(inner.get("id")) if who == "assistant" and inner is not data else "",
    begins=data.get("isCompactSummary") is True,
    user=user,
    feedback=words(data.get("feedback")),
    tools=_offered(data.get("tools")),
  )


def _offered(given: Any) -> tuple[str, ...]:
  """The definitions in a session's line; some lines have tools' names alone, which define none."""
  objects = isinstance(given, list) and all(isinstance(tool, dict) for tool in given)
  return tools.definitions(given) if objects else ()


def _codex(event: str, payload: dict[str, Any], seen: Seen) -> Record | None:
  """A line of Codex's: the session's head, an item of the conversation, or an event."""
  if event == "session_meta":
    base = payload.get("base_instructions")
    text = base.get("text") if isinstance(base, dict) else payload.get("instructions")
    head = (Message("system", text),) if isinstance(text, str) and text else ()
    offered = _offered(payload.get("dynamic_tools"))
    return Record(head, "", heads=True, id=first_name(payload.get("id")), tools=offered)
  if event == "compacted" and isinstance(payload.get("replacement_history"), list):
    history = [m for each in payload["replacement_history"] for m in _entry(each, seen)]
    return Record(tuple(_joined(history)), "", begins=True)
  if event != "response_item":
    seen.append(("event", event))
    return None
  messages = _item(payload, seen)
  if messages is None:
    seen.append(("event", f"{event} {payload.get('type')}"))
    return None
  return Record(tuple(messages), "", joins=_side(messages))


def _side(messages: list[Message]) -> str:
  """What follows one another from the model is one response."""
  return "*" if messages and messages[0].role == "assistant" else ""


def _item(value: dict[str, Any], seen: Seen) -> list[Message] | None:
  """The messages of an item as OpenAI's Responses API and Codex write it; None if it is none."""
  what = value.get("type")
  call = first_name(value.get("call_id"), value.get("id"))
  if what == "message" or (what is None and "role" in value):
    return said(value, seen)
  if what in ("function_call", "custom_tool_call"):
    arguments = value.get("arguments", value.get("input"))
    name = value.get("name")
    if not isinstance(name, str):
      raise ValueError(f"the name of a tool's call is {kind(name)}: it must be a text")
    return [Message("assistant", "", (ToolCall(call, name, words(arguments) or ""),))]
  if what == "local_shell_call":
    arguments = words(value.get("action")) or ""
    return [Message("assistant", "", (ToolCall(call, "local_shell", arguments),))]
  if what in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
    output = value.get("output")
    output = output.get("content") if isinstance(output, dict) else output
    result = said({"role": "tool", "content": output}, seen)[0]
    return [dataclasses.replace(result, tool_call_id=call)]
  if what == "reasoning":
    lists = [value[name] for name in ("summary", "content") if isinstance(value.get(name), list)]
    texts = [part.get("text") for each in lists for part in each if isinstance(part, dict)]
    thinking = "\n".join(text for text in texts if isinstance(text, str))
    return [Message("assistant", "", thinking=thinking)]
  return None
