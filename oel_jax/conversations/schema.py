"""What was said, by games, logs and agents alike: messages, conversations, and the prompts that are
cut from them.

A conversation never leaves the user side of a run directory. What crosses to the server side are
prompts (what stood before one answer, as chat messages) and knowledge texts. Their files are
`conversations/jsonl.py`'s; here is what one line of them holds.
"""

import dataclasses
import itertools
import re
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

from oel_jax.conversations import tool_texts

SCHEMA = 2
READS = (1, 2)  # 1: games alone, which named game and seed where "source" stands now
ROLES = ("system", "user", "assistant", "tool")
KNOWLEDGE = "knowledge"  # the role of a message that holds knowledge
ENDED = ("passed", "lost", "invalid", "turn_limit")
GAME, LOG, AGENT = KINDS = ("game", "log", "agent")


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """A call that an assistant's message makes.

  Attributes:
    id: what the tool's message answers to with its `tool_call_id`; "" if the record names none.
    name: of the tool.
    arguments: a JSON text, as the model wrote it; it may be broken.
  """

  id: str
  name: str
  arguments: str


@dataclasses.dataclass(frozen=True)
class Message:
  """One chat message.

  Attributes:
    role: one of ROLES; or KNOWLEDGE, which only the first message may have: nobody said it, and
      where it stands in a prompt is for `policy/tokenizers/` to say.
    content: an assistant's is what stands after its thinking.
    tool_calls: an assistant's, in order.
    tool_call_id: a tool's: the call that it answers.
    name: a tool's name, or that of one of several speakers.
    thinking: text before an assistant's content; never shown again in later prompts.
    action: what the environment took from an assistant's content, "" if nothing.
    response_tokens: sampled tokens of an assistant's message, thinking and end-of-sequence
      included; None where nobody counted.
  """

  role: str
  content: str
  tool_calls: tuple[ToolCall, ...] = ()
  tool_call_id: str = ""
  name: str = ""
  thinking: str = ""
  action: str = ""
  response_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a conversation came from.

  Attributes:
    kind: one of KINDS.
    name: the registered name of a game; the file of a log.
    seed: of a game's map.
    line: of a log's file, from 1; in an array, the item's number.
    category: of a game, which sort of episode it was, by its own word.
  """

  kind: str
  name: str
  seed: int | None = None
  line: int | None = None
  category: str | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One finished conversation. A game's has all of the optional fields but feedback, user and
  tools, and its messages are the user's and the assistant's in turn; after one that calls tools
  stand their results in place of the user's.

  Attributes:
    id: unique in its file, e.g. "r1-deploy-00017".
    messages: in order.
    source: where it came from.
    outcome: how it ended, in words: what a game said last; the turn limit is said in our words.
    reward: a game's own, 1.0 for a win; or a log's score.
    passed: of a game: reward >= config.deployment.passed_reward, by the game's own end.
    ended: of a game: one of ENDED.
    feedback: what a user said of it afterwards.
    user: who the user was, as a log names them; what a user said is all held out, or none of it.
    tools: definitions of the tools that the assistant was offered, in order, each a JSON text of an
      object as OpenAI writes it: {"type": "function", "function": {"name", …}} (`tool_texts`).
  """

  id: str
  messages: tuple[Message, ...]
  source: Source
  outcome: str | None = None
  reward: float | None = None
  passed: bool | None = None
  ended: str | None = None
  feedback: str | None = None
  user: str | None = None
  tools: tuple[str, ...] = ()

  @property
  def answers(self) -> tuple[Message, ...]:
    """The assistant's messages."""
    return tuple(message for message in self.messages if message.role == "assistant")


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What stood before one answer: `messages` ends with a user's or a tool's. `id` names
  conversation and answer, from 0, e.g. "r1-prefix-00017-2"; `tools` are the conversation's.
  """

  id: str
  messages: tuple[Message, ...]
  tools: tuple[str, ...] = ()


def conversation_of(id: str) -> str:
  """The id of the conversation that the prompt of this id was cut from."""
  return id.rpartition("-")[0]


def by_policy(message: Message, people: Collection[str] = ()) -> bool:
  """Whether the policy said it: an assistant's message, but where one of `people`, by their names
  in such messages, answered in its place; "*": people answered everywhere.
  """
  return message.role == "assistant" and "*" not in people and message.name not in people


# a knowledge text with nothing in it: `knowledge_message` of it is the wrapper alone (the control
# of that name)
EMPTY = " "


# What stands above the items, by config.extraction.wording: nothing, in conversations.
KNOWLEDGE_HEADS = {"games": "Experience from earlier games:\n", "conversations": ""}


def knowledge_message(knowledge: str, wording: str = "games") -> Message:
  """The message that gives a conversation knowledge; nothing else of its prompt changes. `wording`
  is one of KNOWLEDGE_HEADS.
  """
  return Message(KNOWLEDGE, f"{KNOWLEDGE_HEADS[wording]}{knowledge}")


def shown(messages: Iterable[Message]) -> tuple[Message, ...]:
  """The messages as later prompts show them: without thinking, action and count."""
  return tuple(
    dataclasses.replace(message, thinking="", action="", response_tokens=None)
    for message in messages
  )


def cut_prompts(conversation: Conversation) -> list[Prompt]:
  """What stood before each answer of a conversation (OEL section 3: D is cut from deployed
  trajectories). An answer that nothing was asked before, a greeting say, gives none.
  """
  said = shown(conversation.messages)
  places = [place for place, message in enumerate(said) if message.role == "assistant"]
  return [
    Prompt(f"{conversation.id}-{number}", said[:place], conversation.tools)
    for number, place in enumerate(places)
    if place and said[place - 1].role in ("user", "tool")
  ]


def transcript(conversation: Conversation, wording: str = "games") -> str:
  """The conversation as plain text for the extractor, without thinking: what was said and how it
  ended. A game is told as one unless `wording`, config.extraction.wording, is "conversations".
  """
  game = conversation.source.kind == GAME and wording == "games"
  lines = [_game_line(message) if game else _line(message) for message in conversation.messages]
  if conversation.outcome:  # nobody may have said anything
    lines.append(f"{'End of game' if game else 'Outcome'}:\n{conversation.outcome}")
  if conversation.feedback is not None:
    lines.append(f"Feedback:\n{conversation.feedback}")
  return "\n".join(lines)


def _game_line(message: Message) -> str:
  if message.role == "assistant":
    return _with_calls("Answer", message)
  return f"Tool: {message.content}" if message.role == "tool" else message.content


def _line(message: Message) -> str:
  return _with_calls(f"{message.role.capitalize()} {message.name}".rstrip(), message)


def _with_calls(who: str, message: Message) -> str:
  calls = [f"Call of {call.name}: {call.arguments}" for call in message.tool_calls]
  return "\n".join([f"{who}: {message.content}"] * bool(message.content or not calls) + calls)


def to_json(record: Conversation | Prompt) -> dict[str, Any]:
  """The record as a JSON object: messages as OpenAI writes them, what is not known left out."""
  data = {"schema": SCHEMA, "id": record.id}
  if isinstance(record, Conversation):
    data["source"] = _known(dataclasses.asdict(record.source))
  if record.tools:
    data["tools"] = list(map(tool_texts.to_json, record.tools))
  data["messages"] = [_message_to_json(message) for message in record.messages]
  if isinstance(record, Conversation):
    names = ("outcome", "reward", "passed", "ended", "feedback", "user")
    data |= _known({name: getattr(record, name) for name in names})
  return data


def _known(fields: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in fields.items() if value is not None}


def _message_to_json(message: Message) -> dict[str, Any]:
  data = {"role": message.role, "content": message.content}
  if message.tool_calls:
    data["tool_calls"] = [
      {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
      }
      for call in message.tool_calls
    ]
  data |= {
    name: getattr(message, name) for name in ("tool_call_id", "name") if getattr(message, name)
  }
  # An answer that we sampled says that there was no thinking and no action.
  sampled = message.response_tokens is not None
  for name in ("thinking", "action"):
    if sampled or getattr(message, name):
      data[name] = getattr(message, name)
  return data | ({"response_tokens": message.response_tokens} if sampled else {})


def conversation_from_json(data: dict[str, Any]) -> Conversation:
  """The inverse of `to_json`; a game's object of schema version 1 is converted.

  Raises:
    ValueError: a field is missing or is not what it must be; names it and the value.
  """
  _check_version(data)
  if data["schema"] == 1:
    game, seed = field(data, "game", str), field(data, "seed", int)
    data = data | {"source": {"kind": GAME, "name": game, "seed": seed}}
  source = _source(field(data, "source", dict))
  reward = optional(data, "reward", float, int)
  result = Conversation(
    id=field(data, "id", str),
    messages=_messages(data),
    source=source,
    outcome=optional(data, "outcome", str),
    reward=None if reward is None else float(reward),
    passed=optional(data, "passed", bool),
    ended=optional(data, "ended", str),
    feedback=optional(data, "feedback", str),
    user=optional(data, "user", str),
    tools=_tools(data),
  )
  if source.kind == GAME:
    _check_game(data)
  return result


def prompt_from_json(data: dict[str, Any]) -> Prompt:
  """The inverse of `to_json`; prompts of schema version 1 are the same. Raises as
  `conversation_from_json` does.
  """
  _check_version(data)
  result = Prompt(field(data, "id", str), _messages(data), _tools(data))
  last = result.messages[-1].role
  if last not in ("user", "tool"):
    raise ValueError(
      f"the last message of a prompt is the {last}'s: it must be the user's or a tool's"
    )
  return result


def _check_version(data: dict[str, Any]) -> None:
  if field(data, "schema", int) not in READS:
    known = " and ".join(map(str, READS))
    raise ValueError(f"schema version {data['schema']}, this version of oel_jax reads {known}")


def _source(data: dict[str, Any]) -> Source:
  if field(data, "kind", str) not in KINDS:
    raise ValueError(f"field 'kind' is {data['kind']!r}: it must be one of {', '.join(KINDS)}")
  seed, line = optional(data, "seed", int), optional(data, "line", int)
  category = optional(data, "category", str)
  return Source(data["kind"], field(data, "name", str), seed, line, category)


# A user's message, then answers, each with the results of its calls or a user's message behind it.
_GAME = re.compile("u(a(u|t+))*at*")


def _check_game(data: dict[str, Any]) -> None:
  """Raises ValueError unless the object has what a game always has."""
  roles = [message["role"] for message in data["messages"]]
  if not _GAME.fullmatch("".join(role[0] for role in roles)):
    raise ValueError(
      f"the roles of a game's messages are {reprlib.repr(roles)}: they must be user and assistant "
      "in turn, and tool only after an assistant"
    )
  for before, message in itertools.pairwise(data["messages"]):
    if message["role"] == "tool" and before["role"] == "assistant":
      field(before, "tool_calls", list)
  for message in (each for each in data["messages"] if each["role"] == "assistant"):
    for name, kind in (("thinking", str), ("action", str), ("response_tokens", int)):
      field(message, name, kind)
  for name, kinds in (("outcome", [str]), ("reward", [float, int]), ("passed", [bool])):
    field(data, name, *kinds)
  field(data["source"], "seed", int)
  if field(data, "ended", str) not in ENDED:
    known = ", ".join(map(repr, ENDED))
    raise ValueError(f"field 'ended' is {data['ended']!r}: it must be one of {known}")


def _tools(data: dict[str, Any]) -> tuple[str, ...]:
  return tuple(map(tool_texts.from_json, optional(data, "tools", list) or []))


def _messages(data: dict[str, Any]) -> tuple[Message, ...]:
  lines = field(data, "messages", list)
  if not lines:
    raise ValueError("field 'messages' is []: it must hold at least one message")
  return tuple(_message(line, number) for number, line in enumerate(lines, start=1))


def _message(data: Any, number: int) -> Message:
  role, content = field(data, "role", str), field(data, "content", str)
  if role not in ROLES:
    known = ", ".join(ROLES)
    raise ValueError(f"the role of message {number} is {role!r}: it must be one of {known}")
  given = {
    name: field(data, name, *kinds) for name, kinds in _OPTIONAL if data.get(name) is not None
  }
  if given.get("response_tokens", 0) < 0:
    seen = given["response_tokens"]
    raise ValueError(f"field 'response_tokens' of message {number} is {seen}: it must be 0 or more")
  if "tool_calls" in given:
    given["tool_calls"] = tuple(map(_call, given["tool_calls"]))
  return Message(role, content, **given)


_OPTIONAL = (
  ("tool_calls", (list,)),
  ("tool_call_id", (str,)),
  ("name", (str,)),
  ("thinking", (str,)),
  ("action", (str,)),
  ("response_tokens", (int,)),
)


def _call(data: Any) -> ToolCall:
  function = field(data, "function", dict)
  return ToolCall(
    optional(data, "id", str) or "", field(function, "name", str), field(function, "arguments", str)
  )


def field(data: Any, name: str, *types: type) -> Any:
  """A field of exactly one of these types: true is no int here. Raises ValueError that names it."""
  if not isinstance(data, dict) or name not in data:
    raise ValueError(f"field {name!r} is missing")
  if type(data[name]) not in types:
    raise ValueError(
      f"field {name!r} is {reprlib.repr(data[name])}: it must be of type "
      f"{' or '.join(kind.__name__ for kind in types)}"
    )
  return data[name]


def optional(data: Any, name: str, *types: type) -> Any:
  """`field`, or None where it is missing or null."""
  given = isinstance(data, dict) and data.get(name) is not None
  return field(data, name, *types) if given else None
