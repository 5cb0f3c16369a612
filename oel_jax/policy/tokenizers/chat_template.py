"""What a prompt is made of: messages, tools, knowledge behind the system text, and for Hugging Face
models the chat template around them.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from oel_jax.conversations.schema import KNOWLEDGE, Message, ToolCall
from oel_jax.policy.tokenizers.veil import Veil, can_be_hidden, map_texts

THINK, END_THINK = "<think>", "</think>"
# around a stand-in for the system text: if it is gone from what the template makes, it trims
SPACE = "\t \t"
# For templates that ask for today: a prompt must not change over night. Their own dates stay.
DAY = datetime.date(2025, 1, 1)
DAY_CODES = "%-d %-m %d %m %Y %y %B %b %A %a %j %H %M %S %F".split()
# Put before such a template, whose function of this name it defines anew.
TODAY = (
  "{%- macro strftime_now(format) %}{{ format"
  + "".join(f" | replace('{code}', '{DAY.strftime(code)}')" for code in DAY_CODES)
  + " }}{% endmacro %}{{ '' }}"
)
JOINTS = ("\n\n", "\n", " ")
ARGUMENT = "-WITH-THIS"  # behind the name of a call that is a stand-in
# A definition that is looked for in what a template makes of a conversation with tools.
SAMPLE_NAME = "the_sample_tool"
SAMPLE_TOOL = json.dumps(
  {
    "type": "function",
    "function": {
      "name": SAMPLE_NAME,
      "description": "What it does.",
      "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
  }
)


class CannotRender(ValueError):
  """A tokenizer cannot make a prompt of a conversation.

  Attributes:
    reason: why, in words that are the same for all conversations of which it is true.
  """

  def __init__(self, told: str, reason: str = ""):
    super().__init__(told)
    self.reason = reason or told


def front(
  messages: Sequence[Message],
) -> tuple[Message | None, Message | None, tuple[Message, ...]]:
  """(knowledge, the conversation's own system message, all others); None for what is not there."""
  knowledge = own = None
  rest = tuple(messages)
  if rest and rest[0].role == KNOWLEDGE:
    knowledge, *rest = rest
  if rest and rest[0].role == "system":
    own, *rest = rest
  return knowledge, own, tuple(rest)


def inserted_at(plain: Sequence[int], informed: Sequence[int]) -> int | None:
  """Where ids are put into `plain` to get `informed`; None if that is not the only difference."""
  pairs = enumerate(zip(plain, informed))
  same = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(plain), len(informed)))
  end = same + len(informed) - len(plain)
  return same if end >= same and plain[same:] == informed[end:] else None


def split(
  ids: list[int], opening: int, close: int, opened: bool, decode: Callable[[list[int]], str]
) -> tuple[str, str]:
  """(thinking, answer) of ids in which single tokens open and close the thinking; `opened`: the
  prompt had opened it.
  """
  last = max((at for at, i in enumerate(ids) if i in (opening, close)), default=-1)
  if (ids[last] == opening) if last >= 0 else opened:
    return decode(ids).strip(), ""
  return decode(ids[: last + 1]).strip(), decode(ids[last + 1 :]).strip()


@dataclasses.dataclass(frozen=True)
class SystemText:
  """What a template does with the system text.

  Attributes:
    default: the words that it puts where a system message would stand; "" if it puts none.
    left, right: whether it trims a system message there.
  """

  default: str
  left: bool
  right: bool

  def trim(self, text: str) -> str:
    text = text.lstrip() if self.left else text
    return text.rstrip() if self.right else text


class ChatTemplate:
  """A tokenizer's chat template, rendered with what is said hidden from it.

  What the template writes itself may hold control tokens; what messages and calls of tools say
  never becomes one and never steers it. A definition of a tool may steer it, as types of parameters
  do in some, and never becomes a control token either. Text between two control tokens is encoded
  in one piece.

  Attributes:
    name: of the tokenizer, quoted, for errors.
    system: whether there are tools → what the template does with the system text.
    joint: (system text, tools) → what between it and knowledge leaves the ids of the text as they
      are alone.
    header: thinking → the control tokens of a prompt that is one user message.
  """

  def __init__(self, tokenizer: Any, control: dict[str, int], encode: Callable[[str], list[int]]):
    """Wraps the template of a PreTrainedTokenizerFast.

    Args:
      tokenizer: the one of `transformers`.
      control: names of control tokens → ids.
      encode: plain text → ids.

    Raises:
      ValueError: the template shortens or repeats a message, or knowledge cannot follow its default
        system text.
    """
    self.name = repr(tokenizer.name_or_path)
    self._tokenizer, self._encode = tokenizer, encode
    # What cannot be hidden would be found in what people say, too.
    self._control = {name: i for name, i in control.items() if can_be_hidden(name)}
    names = sorted(self._control, key=len, reverse=True)
    self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
    self._check_shape = functools.lru_cache(maxsize=1024)(self._look_at_shape)
    self.system = functools.lru_cache(maxsize=2)(self._find_system)
    self.joint = functools.lru_cache(maxsize=1024)(self._find_joint)
    self.header = functools.lru_cache(maxsize=2)(self._find_header)
    if self.system(False).default:
      self.joint(self.system(False).default, ())  # what knowledge cannot follow is refused here

  def ids(
    self, messages: Sequence[Message], tools: Sequence[str] = (), thinking: bool = True
  ) -> list[int]:
    """Returns the whole prompt, ending with the assistant's header.

    Raises:
      CannotRender: the template refuses the messages, or leaves out something of them.
    """
    shape = tuple((said.role, bool(said.content), len(said.tool_calls)) for said in messages)
    self._check_shape(shape, bool(tools), thinking)
    ids: list[int] = []
    for piece in self._pieces(messages, tools, thinking):
      ids += self._encode(piece) if isinstance(piece, str) else [piece]
    return ids

  def with_knowledge(self, own: Message | None, knowledge: str, tools: Sequence[str]) -> str:
    """The content of the system message: the own or default system text, then knowledge."""
    system = self.system(bool(tools))
    # What is trimmed without knowledge must not stand before it.
    text = system.default if own is None else system.trim(own.content)
    if own is None and not text:
      return knowledge
    return text + self.joint(text, tuple(tools)) + knowledge

  def answer_end(self) -> list[int]:
    """The control token that the template writes after an answer, or none."""
    said = (Message("user", "ASKED"), Message("assistant", "ANSWERED"), Message("user", "AGAIN"))
    pieces = self._pieces(said, (), True)
    answer = next(at for at, piece in enumerate(pieces) if "ANSWERED" in str(piece))
    return [piece for piece in pieces[answer:] if isinstance(piece, int)][:1]

  def as_a_whole(self, messages: Sequence[Message]) -> list[int]:
    """The ids that `transformers` makes of messages, which control tokens may stand in."""
    said = [{"role": message.role, "content": message.content} for message in messages]
    return self._render(said, [], True, tokenize=True)

  def _pieces(
    self, messages: Sequence[Message], tools: Sequence[str], thinking: bool
  ) -> list[int | str]:
    """What the template makes of a conversation: ids of control tokens, and the text between."""
    definitions = [json.loads(tool) for tool in tools]
    said = [_as_openai(message, str) for message in messages]
    try:
      veil = Veil(json.dumps([said, definitions], ensure_ascii=False))
    except ValueError as error:
      raise CannotRender(f"the conversation cannot be shown: {error}") from error
    text = self._render(
      [_as_openai(message, veil.hide) for message in messages],
      map_texts(definitions, lambda text: veil.hide_names(text, self._names)),
      thinking,
      show=veil.show,
    )
    pieces, end = [], 0
    for found in self._names.finditer(text):
      pieces += [veil.show(text[end : found.start()]), self._control[found.group()]]
      end = found.end()
    return [piece for piece in (*pieces, veil.show(text[end:])) if piece != ""]

  def _render(
    self,
    conversation: list[dict[str, Any]],
    tools: list[Any],
    thinking: bool,
    *,
    tokenize: bool = False,
    show: Callable[[str], str] = str,
  ) -> Any:
    """Returns what the template makes of a conversation, text or (`tokenize`) ids.

    Raises:
      CannotRender: the template refuses it.
    """
    try:
      # A model may have a template of its own for tools.
      template = self._tokenizer.get_chat_template(tools=tools or None)
      return self._tokenizer.apply_chat_template(
        conversation,
        tools=tools or None,  # Llama's template asks whether there is a list, though it be empty
        tokenize=tokenize,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
        chat_template=TODAY + template if "strftime_now" in template else template,
      )
    except Exception as error:  # templates refuse by raising errors of Jinja's
      roles, told = ", ".join(message["role"] for message in conversation), show(str(error))
      refuses = f"tokenizer {self.name}: its chat template refuses"
      raise CannotRender(
        f"{refuses} the roles {roles}: {told}", f"{refuses} such conversations: {told}"
      ) from error

  def _look_at_shape(
    self, shape: tuple[tuple[str, bool, int], ...], tools: bool, thinking: bool
  ) -> None:
    """Raises CannotRender unless the template shows all of conversations of a shape: of each
    message the role, whether it has content, and how many calls of tools.
    """
    messages = [_stand_in(number, *said) for number, said in enumerate(shape)]
    offered = (SAMPLE_TOOL,) if tools else ()
    text = "".join(map(str, self._pieces(messages, offered, thinking)))
    for message in messages:
      count = text.count(message.content) if message.content else 1
      # What is said beside a call is left out by some templates: then no model of theirs reads it.
      if count > 1 or not (count or message.tool_calls):
        self._refuse(f"{'repeats' if count else 'leaves out'} the {message.role} message")
      for call in message.tool_calls:
        if call.name not in text or call.name + ARGUMENT not in text:
          self._refuse("leaves out calls of tools: the model knows none")
    if tools and SAMPLE_NAME not in text:
      self._refuse("leaves out the definitions of tools: the model knows none")

  def _refuse(self, told: str) -> NoReturn:
    raise CannotRender(f"tokenizer {self.name}: its chat template {told}")

  def _find_header(self, thinking: bool) -> tuple[int, ...]:
    pieces = self._pieces((Message("user", "?"),), (), thinking)
    return tuple(piece for piece in pieces if isinstance(piece, int))

  def _find_system(self, tools: bool) -> SystemText:
    """Compares a conversation that has a system message with one that has none."""
    word, user = "THE-SYSTEM-TEXT", {"role": "user", "content": "?"}
    system = {"role": "system", "content": SPACE + word + SPACE}
    offered = [json.loads(SAMPLE_TOOL)] if tools else []
    plain = self._render([user], offered, True)
    before, found, after = self._render([system, user], offered, True).partition(word)
    if not found or word in after:
      self._refuse(f"{'repeats' if found else 'leaves out'} the system message")
    left, right = not before.endswith(SPACE), not after.startswith(SPACE)
    before, after = before.removesuffix(SPACE), after.removeprefix(SPACE)
    alike = plain.startswith(before) and plain.endswith(after)
    default = plain[len(before) : max(0, len(plain) - len(after))] if alike else ""
    return SystemText("" if self._names.search(default) else default, left, right)

  def _find_joint(self, system: str, tools: tuple[str, ...]) -> str:
    """What between a system text and knowledge leaves the ids of the text as they are alone."""
    ids = lambda text: self.ids((Message("system", text), Message("user", "?")), tools)
    plain = ids(system)
    for joint in JOINTS if system else ("", *JOINTS):
      # The probes end unlike what stands before them, and unlike each other: definitions of tools
      # may follow, and no chance must hide a merge.
      informed = [ids(system + joint + probe) for probe in ("Rule 1", "Rule.")]
      if all(inserted_at(plain, found) is not None for found in informed):
        return joint
    raise CannotRender(
      f"tokenizer {self.name}: no knowledge can follow the system text {system!r:.200} without "
      "changing its ids: end it with a letter or a full stop",
      f"tokenizer {self.name}: no knowledge can follow their system texts without changing the ids",
    )


def _as_openai(message: Message, change: Callable[[str], str]) -> dict[str, Any]:
  """The message as templates read it, what is said in it changed. A field that says nothing is not
  there: Llama's template takes a message with an empty list of calls for one that calls.
  """
  data: dict[str, Any] = {"role": message.role, "content": change(message.content)}
  if message.tool_calls:
    data["tool_calls"] = [_call_as_openai(call, change) for call in message.tool_calls]
  if message.role == "tool":
    fields = {"tool_call_id": message.tool_call_id, "name": message.name}
    data |= {name: change(text) for name, text in fields.items() if text}
  return data


def _call_as_openai(call: ToolCall, change: Callable[[str], str]) -> dict[str, Any]:
  """The call with its arguments as an object: of a JSON text, Qwen2.5's and Llama's templates make
  a JSON text once more, quotes and all. Arguments that are no object stay the text that they are.
  """
  try:
    arguments = json.loads(call.arguments) if call.arguments.strip() else {}
  except (ValueError, RecursionError):
    arguments = None
  given = map_texts(arguments if isinstance(arguments, dict) else call.arguments, change)
  data = {"type": "function", "function": {"name": change(call.name), "arguments": given}}
  return {"id": change(call.id)} | data if call.id else data


def _stand_in(number: int, role: str, content: bool, calls: int) -> Message:
  """A message of such a shape, of words that occur nowhere else."""
  names = [f"CALL-{number}-{k}-STANDS-HERE" for k in range(calls)]
  made = tuple(ToolCall("", name, json.dumps({"word": name + ARGUMENT})) for name in names)
  return Message(role, f"MESSAGE-{number}-STANDS-HERE" if content else "", made)
