"""What a prompt is made of: messages, knowledge behind the system text, and for Hugging Face models
the chat template around them.
"""

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from oel_jax.conversations.schema import KNOWLEDGE, Message

THINK, END_THINK = "<think>", "</think>"
# around a stand-in for a message: if it is gone from what the template makes, the template trims
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


def front(
  messages: Sequence[Message],
) -> tuple[Message | None, Message | None, tuple[Message, ...]]:
  """(knowledge, the conversation's own system message, all others); None for what is not there.

  Raises:
    ValueError: a message calls a tool or is one's, which no prompt can show yet: left out, it would
      be another conversation.
  """
  for number, message in enumerate(messages, start=1):
    if message.role == "tool" or message.tool_calls:
      raise ValueError(
        f"message {number}, the {message.role}'s, is of a tool or calls one: prompts cannot show "
        "tools yet; leave the conversation out"
      )
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
class Slot:
  """The place of a message in a template: which one, counted from the end, and whether the template
  trims it there.
  """

  index: int
  left: bool
  right: bool

  def fill(self, text: str) -> str:
    text = text.lstrip() if self.left else text
    return text.rstrip() if self.right else text


class ChatTemplate:
  """A tokenizer's chat template, which is rendered with stand-ins for the messages.

  What the template writes itself may hold control tokens; what the messages say never becomes one
  and never steers it. Text between two control tokens is encoded in one piece.

  Attributes:
    name: of the tokenizer, quoted, for errors.
    default_system: the words that the template puts where a system message would stand; "" if it
      puts none.
    layout: (roles, thinking) → what the template makes of such a conversation: ids of control
      tokens, plain text, and the slots of the messages.
    joint: system text → what between it and knowledge leaves the ids of the text as they are alone.
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
    self._tokenizer, self._control, self._encode = tokenizer, control, encode
    template = tokenizer.get_chat_template()
    self._template = TODAY + template if "strftime_now" in template else template
    self.layout = functools.lru_cache(maxsize=1024)(self._make_layout)
    self.joint = functools.lru_cache(maxsize=1024)(self._find_joint)
    self.default_system = self._find_default_system()
    if self.default_system:
      self.joint(self.default_system)  # a template that knowledge cannot follow is refused here

  def ids(self, roles: Sequence[str], contents: Sequence[str], thinking: bool) -> list[int]:
    """Returns the whole prompt, ending with the assistant's header."""
    ids: list[int] = []
    run = ""  # text since the last control token
    for piece in (*self.layout(tuple(roles), thinking), None):
      if isinstance(piece, str):
        run += piece
      elif isinstance(piece, Slot):
        run += piece.fill(contents[len(contents) - 1 - piece.index])
      else:
        ids, run = ids + self._encode(run) + ([] if piece is None else [piece]), ""
    return ids

  def with_knowledge(self, own: Message | None, knowledge: str) -> str:
    """The content of the system message: the own or default system text, then knowledge."""
    system = self.default_system
    if own is not None:
      layout = self.layout(("system", "user"), True)
      slot = next(piece for piece in layout if isinstance(piece, Slot))
      system = slot.fill(own.content)  # what is trimmed without knowledge must not stand before it
    return system + self.joint(system) + knowledge if system else knowledge

  def render(
    self, conversation: list[dict[str, str]], thinking: bool, tokenize: bool = False
  ) -> Any:
    """Returns what the template makes of a conversation, text or (`tokenize`) ids.

    Raises:
      ValueError: the template refuses it.
    """
    try:
      return self._tokenizer.apply_chat_template(
        conversation,
        tokenize=tokenize,
        return_dict=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
        chat_template=self._template,
      )
    except Exception as error:  # templates refuse by raising errors of Jinja's
      roles = ", ".join(message["role"] for message in conversation)
      raise ValueError(
        f"tokenizer {self.name}: its chat template refuses the roles {roles}: {error}"
      ) from error

  def _make_layout(self, roles: tuple[str, ...], thinking: bool) -> tuple[int | str | Slot, ...]:
    """What the template makes of a conversation: ids of control tokens, plain text, and the slots
    of the messages.
    """
    words = [f"MESSAGE-{len(roles) - 1 - i}-STANDS-HERE" for i in range(len(roles))]
    rest = self.render(
      [{"role": role, "content": SPACE + word + SPACE} for role, word in zip(roles, words)],
      thinking,
    )
    pieces: list[int | str | Slot] = []
    for i, word in enumerate(words):
      before, found, rest = rest.partition(word)
      if not found or word in rest:
        raise ValueError(
          f"tokenizer {self.name}: its chat template {'repeats' if found else 'leaves out'} the "
          f"{roles[i]} message"
        )
      left, right = not before.endswith(SPACE), not rest.startswith(SPACE)
      pieces += [
        *self._cut(before if left else before.removesuffix(SPACE)),
        Slot(len(roles) - 1 - i, left, right),
      ]
      rest = rest if right else rest.removeprefix(SPACE)
    return tuple(pieces + self._cut(rest))

  def _cut(self, text: str) -> list[int | str]:
    """The template's own text, control tokens as ids."""
    names = "|".join(re.escape(name) for name in sorted(self._control, key=len, reverse=True))
    return [self._control.get(part, part) for part in re.split(f"({names})", text) if part]

  def _find_default_system(self) -> str:
    """The words that the template puts where a system message would stand; "" if it puts none."""
    plain, informed = self.layout(("user",), True), self.layout(("system", "user"), True)
    at = next(i for i, piece in enumerate(informed) if isinstance(piece, Slot))
    before, after = informed[:at], informed[at + 1 :]
    head, words = (
      (before[:-1], before[-1]) if before and isinstance(before[-1], str) else (before, "")
    )
    fits = (
      len(plain) == len(head) + 1 + len(after)
      and plain[: len(head)] == head
      and plain[len(head) + 1 :] == after
    )
    middle = plain[len(head)] if fits else ""
    return (
      middle.removeprefix(words) if isinstance(middle, str) and middle.startswith(words) else ""
    )

  def _find_joint(self, system: str) -> str:
    """What between a system text and knowledge leaves the ids of the text as they are alone."""
    roles = ("system", "user")
    plain = self.ids(roles, (system, "?"), True)
    for joint in JOINTS:
      # The probe ends unlike what stands before it, so that no chance hides a merge.
      if inserted_at(plain, self.ids(roles, (system + joint + "Rule 1", "?"), True)) is not None:
        return joint
    raise ValueError(
      f"tokenizer {self.name}: no knowledge can follow the system text {system!r:.200} without "
      "changing its ids: end it with a letter or a full stop"
    )
