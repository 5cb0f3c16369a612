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
| Gemini | {"contents": [{"role", "parts"}]} |
| LangSmith, Langfuse | {"inputs" or "input", "outputs" or "output"}, of a call of a model |
| Helicone, Open WebUI | {"request_body", "response_body"}, {"chat": {"messages"}} |
| SWE-agent | {"trajectory", "history": [a message]} |
| Claude Code | {"type": "user" or "assistant", "sessionId", "message": {"role", "content"}} |
| Codex | {"type": "response_item", "payload": an item}, {"type": "session_meta", "payload"} |
| any agent | {"role", "content"} |

Another format that is one JSON object: the name of its list goes into `LISTS`, and the object into
this table. What an entry of the list may say stands in `log_messages` (`said`, `SPEAKERS`, `SAYS`,
`MESSAGE_KNOWN`, `*_PARTS`), items that are no messages in `log_items`, answers to requests in
`log_answers`, files that are no lines of JSON in `log_files`. An example goes into
tests/test_log_programs.py.

No error tells what somebody said: a record is named by its place, what is wrong by its kind.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from oel_jax.conversations import tools
from oel_jax.conversations.log_answers import (
  RESPONSES,
  answer,
  object_in,
  state_of_graph,
  step_of_trace,
)
from oel_jax.conversations.log_items import answers_joined, entry, item
from oel_jax.conversations.log_messages import (
  SPEAKERS,
  Seen,
  first_name,
  kind,
  opened,
  said,
  with_role,
  words,
)
from oel_jax.conversations.schema import Message

SESSIONS = (
  "sessionId", "session_id", "session", "conversation_id", "conversationId", "thread_id",
  "threadId", "chat_id", "chatId",
)  # fmt: skip
# What holds a conversation's messages.
LISTS = ("messages", "conversations", "contents", "history", "conversation")
REQUESTS = (
  "request", "request_body", "proxy_server_request", "inputs", "input", "body",
  "chat",
)  # fmt: skip
# LiteLLM's "user" is the owner of the key, beside its end user.
USERS = (
  "end_user", "user_api_key_end_user_id", "user", "user_id", "userId", "safety_identifier",
  "request_user_id",
)  # fmt: skip
OLD_HEAD = {"id", "timestamp", "instructions", "git"}  # of an older Codex's session
OFFERED = ("tools", "functions")
SYSTEMS = ("system", "instructions", "systemInstruction", "system_instruction")
# Of a record, what is read or what says nothing of the conversation; the rest is counted by name.
KNOWN = {
  "id", "custom_id", "tools", "functions",
  "choices", "feedback", "outcome", "reward", "score", "metadata", "schema", "digest", "source",
  "passed", "ended", "object", "model", "created", "created_at", "timestamp", "usage", "status",
  "error", "dataset", "split", "tags", "language", "store", "n", "seed", "temperature",
  "top_p", "max_tokens", "max_completion_tokens", "tool_choice", "parallel_tool_calls", "method",
  "url", "trace_id", "call_type", "startTime", "endTime", "completionStartTime", "response_time",
  "response_cost", "response_cost_failure_debug_info", "total_tokens", "prompt_tokens",
  "completion_tokens", "model_map_information", "model_id", "model_group", "model_parameters",
  "api_base", "cache_hit", "cache_key", "saved_cache_cost", "request_tags", "hidden_params",
  "requester_ip_address", "error_str", "error_information", "stream", "custom_llm_provider",
  "instruction", "feedback_stats", *LISTS, *REQUESTS, *RESPONSES, *USERS,
  *SESSIONS, *SYSTEMS,
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
    name, follows: of a line, and of the line that a user's message follows: what the user said
      since then is taken back.
    takes_back: how many of the user's messages are taken back here, with all that came after.
    heads: these messages stand before a session or nowhere.
    id, user, outcome, reward, feedback, tools: of the conversation, where the record names them.
  """

  messages: tuple[Message, ...]
  session: str | None = None
  side: str = ""
  joins: str = ""
  begins: bool = False
  name: str = ""
  follows: str = ""
  takes_back: int = 0
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
  if {"id", "timestamp", "instructions"} <= data.keys() <= OLD_HEAD:
    return _codex("session_meta", data, seen)
  step = step_of_trace(data)
  if step:
    seen.append(("event", step))
    return None
  request = _request(data)
  if request is not None:
    return _whole(data, request, seen)
  alone = data.get("type") is None and next(answer(data, []), None) is not None
  if alone or (data.get("type") == "message" and "stop_reason" in data):  # Anthropic's
    raise ValueError("an answer without what was asked: the request must stand in the same record")
  return _agent(data, seen)


# Whole conversations.


def _places(data: dict[str, Any]) -> list[dict[str, Any]]:
  """The record and the objects in it that may be a request."""
  inner = [object_in(data.get(name)) for name in REQUESTS]
  return [data, *inner, *(object_in(value.get("body")) for value in inner)]


def _request(data: dict[str, Any]) -> dict[str, Any] | None:
  """The object that holds what was said before the answer."""
  places, state = _places(data), state_of_graph(data)
  for value in places if state is None else (state,):
    if any(_lists(value)):
      return value
  if isinstance(data.get("instruction"), str):
    return {"messages": _alpaca(data)}
  if "call_id" not in data and any(data.get(name) for name in RESPONSES):  # the Responses API's
    for value in places:
      if isinstance(value.get("input"), (str, list)):
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
  """Which of LISTS an object has: what has such a name may be something else elsewhere, a text, an
  id, Alpaca's pairs, or the empty object that LiteLLM's database holds beside the request.
  """
  for name in LISTS:
    given = opened(value.get(name))
    objects = isinstance(given, list) and all(isinstance(each, dict) for each in given)
    sure = name in LISTS[:2] and "proxy_server_request" not in value
    if name in value and (sure or objects and (name != "history" or "trajectory" in value)):
      yield name


def _whole(data: dict[str, Any], request: dict[str, Any], seen: Seen) -> Record:
  seen += (("field", name) for name in data if name not in KNOWN)
  response = object_in(next((data[name] for name in RESPONSES if data.get(name)), None))
  if request.get("previous_response_id") or response.get("previous_response_id"):
    raise ValueError(
      "it goes on from another response (previous_response_id), whose messages are not in this "
      "record: all that was said before must stand in its input"
    )
  given = opened(request[next(itertools.chain(_lists(request), ["input"]))])
  if isinstance(given, dict) and "messages" in given:
    given = opened(given["messages"])
  if isinstance(given, str):
    given = [{"role": "user", "content": given}]
  if isinstance(given, list) and given and isinstance(given[0], list):  # LangChain's, of a batch
    given = given[0]
  if not isinstance(given, list) or not given:
    raise ValueError(f"the conversation is {kind(given)}: it must be a list of messages")
  messages = [message for each in given for message in entry(each, seen)]
  places = (request, response)
  system = next(filter(None, (place.get(name) for place in places for name in SYSTEMS)), None)
  if system:
    system = said({"role": "system", "content": _texts(system)}, seen)
    messages = messages if messages[:1] == system else system + messages
  own = request is data or request == state_of_graph(data)
  if not own or not messages or messages[-1].role != "assistant":
    messages += answer(data, seen)
  # LiteLLM keeps the rest of a request in "model_parameters".
  meta, rest = (object_in(data.get(name)) for name in ("metadata", "model_parameters"))
  places = (request, data, rest, response)
  offered = next(filter(None, (place.get(name) for place in places for name in OFFERED)), None)
  reward = _reward(data.get("reward", data.get("score", meta.get("score"))))
  return Record(
    tuple(answers_joined(messages)),
    id=first_name(data.get("id"), data.get("custom_id"), *(data.get(name) for name in SESSIONS)),
    user=_user(data, meta, rest),
    outcome=words(data.get("outcome", meta.get("outcome"))),
    reward=reward,
    feedback=_feedback(data, meta, *filter(None, map(object_in, given))),
    tools=tools.definitions(offered),
  )


def _texts(system: Any) -> Any:
  """What the system says, without the object around Gemini's parts."""
  return system["parts"] if isinstance(system, dict) and "parts" in system else system


def _user(data: dict[str, Any], *others: dict[str, Any]) -> str | None:
  """Who the user was: as the record says, its request, or what stands beside them."""
  places = [*_places(data), *others]
  places += [object_in(place.get("metadata")) for place in places]
  places.append(object_in(object_in(data.get("extra")).get("metadata")))  # LangSmith's
  names = [name for name in USERS if name != "user" or "end_user" not in data]
  return first_name(*(place.get(name) for name in names for place in places)) or None


def _feedback(*places: dict[str, Any]) -> str | None:
  """What was said of it afterwards, of all of it or of one answer; an empty object, as LangSmith
  writes, is nothing.
  """
  names = ("feedback", "feedback_stats", "annotation")  # LangSmith's, Open WebUI's
  given = [place.get(name) for place in places for name in names]
  texts = dict.fromkeys(words(each) for each in given if each not in (None, "", {}, []))
  return "\n".join(texts) or None


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


# Agents' sessions.


def _agent(data: dict[str, Any], seen: Seen) -> Record | None:
  """A line of an agent's trace: Claude Code's, an item of its own, or a bare message."""
  event = data.get("type", data.get("record_type"))
  event = event if isinstance(event, str) else None
  inner = data["message"] if isinstance(data.get("message"), dict) else data
  if event in ("human", "ai") or "response_metadata" in {**data, **object_in(data.get("data"))}:
    inner = with_role(inner)
  if data.get("isMeta") or data.get("isApiErrorMessage"):  # not the user's, not the model's
    seen.append(("event", "isMeta" if data.get("isMeta") else "isApiErrorMessage"))
    return None
  who = inner.get("role", inner.get("from"))
  if who is None and inner is not data and event in SPEAKERS:
    inner, who = {"role": event} | inner, event
  session = first_name(*(data.get(name) for name in SESSIONS))
  if who is None:
    messages = item(data, seen)
    if messages is None and event:
      seen.append(("event", event))
      return None
    if messages is None:
      raise ValueError(
        "a message, a conversation or an event is needed: this has no role, no type; write it as "
        'an object with "messages", each with "role" and "content"'
      )
    return Record(tuple(messages), session, joins=_side(messages))
  messages = tuple(said(inner, seen))
  asks = all(message.role == "user" for message in messages)
  user = first_name(*(data.get(name) for name in USERS)) or None
  return Record(
    messages,
    session,
    side=first_name(data.get("agentId")) or "side" if data.get("isSidechain") else "",
    joins=first_name(inner.get("id")) if who == "assistant" and inner is not data else "",
    begins=data.get("isCompactSummary") is True,
    name=first_name(data.get("uuid")),
    follows=first_name(data["parentUuid"]) or "nothing" if asks and "parentUuid" in data else "",
    user=user,
    feedback=_feedback(data),
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
  history, summary = payload.get("replacement_history"), payload.get("message")
  if event == "compacted" and not history and isinstance(summary, str):
    history = [{"role": "user", "content": summary}]  # all that older versions write
  if event == "compacted" and isinstance(history, list):
    history = [message for each in history for message in entry(each, seen)]
    return Record(tuple(answers_joined(history)), "", begins=True)
  turns = payload.get("num_turns")
  if payload.get("type") == "thread_rolled_back" and type(turns) is int and turns > 0:
    return Record((), "", takes_back=turns)
  if event != "response_item":
    seen.append(("event", event))
    return None
  messages = item(payload, seen)
  if messages is None:
    seen.append(("event", f"{event} {payload.get('type')}"))
    return None
  return Record(tuple(messages), "", joins=_side(messages))


def _side(messages: list[Message]) -> str:
  """What follows one another from the model is one response."""
  return "*" if messages and messages[0].role == "assistant" else ""
