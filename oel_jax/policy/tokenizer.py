"""Text ↔ token ids and the chat template, behind one small face: SentencePiece for the embedded
policy, Hugging Face for all others.

Untrusted text stays plain text: `encode` never yields a control token, whatever the text holds;
only `chat` places them.

What enters a prompt is decided here alone. A conversation is what its template makes of it: its own
system message replaces the template's default one. Knowledge stands behind that system text, own or
default, so that teacher and student differ in nothing else.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import sentencepiece

from oel_jax.conversations.schema import KNOWLEDGE, Message

PAD, END, THINK, END_THINK = "<|pad|>", "<|end|>", "<think>", "</think>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CONTROLS = (PAD, END, *ROLES.values(), THINK, END_THINK)


class SentencePieceTokenizer:
  """A SentencePiece model whose control pieces are `CONTROLS`.

  A message is `<|role|>` text `<|end|>`; a prompt ends with `<|assistant|>`, after which the policy
  writes, thinking between `<think>` and `</think>` if it likes, and stops with `<|end|>`. Messages
  are encoded one by one, so the ids of a conversation are those of its parts joined. Knowledge is a
  system message by itself, behind the conversation's own one if it has one.

  Attributes:
    vocabulary: number of pieces.
    pad_id, eos_ids: ids of `<|pad|>` and of what ends a response.
    digest: sha256 of the model file, hexadecimal.
  """

  def __init__(self, model: bytes):
    """Raises ValueError if this is no SentencePiece model, or a control piece is missing."""
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ValueError(
        f"tokenizer: these {len(model)} bytes are not a SentencePiece model ({error})"
      ) from error
    self.digest = hashlib.sha256(model).hexdigest()
    self.vocabulary = self._model.get_piece_size()
    self._control = {name: self._model.piece_to_id(name) for name in CONTROLS}
    missing = [name for name, i in self._control.items() if not self._model.is_control(i)]
    if missing:
      raise ValueError(
        f"tokenizer has no control piece {', '.join(missing)}: a chat needs all of "
        f"{', '.join(CONTROLS)}"
      )
    self.pad_id = self._control[PAD]
    self.eos_ids = (self._control[END],)

  def encode(self, text: str) -> list[int]:
    """Plain text to ids; `decode` gives the text back, character by character. Half a surrogate
    pair, which is no text, becomes "?".
    """
    return self._model.encode(text.encode(errors="replace").decode())

  def decode(self, ids: Sequence[int]) -> str:
    """Ids to text; control tokens and the weights' spare rows beyond the vocabulary are left
    out.
    """
    return self._model.decode([int(i) for i in ids if i < self.vocabulary])

  def chat(self, messages: Sequence[Message], *, thinking: bool = True) -> list[int]:
    """The whole prompt, ending with the assistant's header. `thinking` is the policy's own choice
    here and changes nothing.
    """
    del thinking
    knowledge, own, rest = _front(messages)
    placed = [message for message in (own, knowledge, *rest) if message is not None]
    ids = [i for message in placed for i in self._message(message)]
    return ids + [self._control[ROLES["assistant"]]]

  def knowledge_prefix(
    self, message: Message, *, system: Message | None = None, thinking: bool = True
  ) -> tuple[int, list[int]]:
    """(skip, ids) of knowledge before conversations that begin with `system`, or with none.

    For messages = [system, *rest]: chat([message, *messages]) == ids + chat(messages)[skip:].
    """
    del thinking
    before = [] if system is None else self._message(system)
    return len(before), before + self._message(message)

  def split_response(self, ids: Sequence[int], *, thinking: bool = True) -> tuple[str, str]:
    """Sampled ids to (thinking, answer). A thinking that never closed leaves no answer."""
    del thinking
    ids = [int(i) for i in ids if i not in self.eos_ids]
    return _split(ids, self._control[THINK], self._control[END_THINK], False, self.decode)

  def response(self, thinking: str, answer: str) -> list[int]:
    """The ids of a response as the policy would write it, end included; what pre-training
    teaches.
    """
    thought = (
      [self._control[THINK], *self.encode(thinking), self._control[END_THINK]] if thinking else []
    )
    return [*thought, *self.encode(answer), *self.eos_ids]

  def _message(self, message: Message) -> list[int]:
    role = "system" if message.role == KNOWLEDGE else message.role
    if role not in ROLES:
      raise ValueError(f"message role is {role!r}: it must be one of {', '.join(ROLES)}")
    return [self._control[ROLES[role]], *self.encode(message.content), *self.eos_ids]


def _front(
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


def _inserted_at(plain: Sequence[int], informed: Sequence[int]) -> int | None:
  """Where ids are put into `plain` to get `informed`; None if that is not the only difference."""
  pairs = enumerate(zip(plain, informed))
  same = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(plain), len(informed)))
  end = same + len(informed) - len(plain)
  return same if end >= same and plain[same:] == informed[end:] else None


def _split(
  ids: list[int], opening: int, close: int, opened: bool, decode: Callable[[list[int]], str]
) -> tuple[str, str]:
  """(thinking, answer) of ids in which single tokens open and close the thinking; `opened`: the
  prompt had opened it.
  """
  last = max((at for at, i in enumerate(ids) if i in (opening, close)), default=-1)
  if (ids[last] == opening) if last >= 0 else opened:
    return decode(ids).strip(), ""
  return decode(ids[: last + 1]).strip(), decode(ids[last + 1 :]).strip()


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
GREETING = (
  Message("user", "How are you?"),
  Message("assistant", "I am well."),
  Message("user", "Good!"),
)


@dataclasses.dataclass(frozen=True)
class _Slot:
  """The place of a message in a template: which one, counted from the end, and whether the template
  trims it there.
  """

  index: int
  left: bool
  right: bool

  def fill(self, text: str) -> str:
    text = text.lstrip() if self.left else text
    return text.rstrip() if self.right else text


class HuggingFaceTokenizer:
  """A `transformers` tokenizer with its chat template.

  The template is rendered with stand-ins for the messages, so what it writes itself may hold
  control tokens, but what the messages say never becomes one and never steers it. Text
  between two control tokens is encoded in one piece: the ids are those of `apply_chat_template`
  wherever no message holds the name of a control token.

  A conversation's own system message replaces the template's default one, as wherever the model is
  served. Knowledge stands behind the system text, own or default, in the one system message that
  every template has room for: it adds to the prompt and takes nothing from it.

  Attributes:
    vocabulary: one more than the highest id.
    eos_ids: what ends a response: of the generation config, of the tokenizer, and what the template
      writes after an answer.
    pad_id: the tokenizer's, or the first of eos_ids.
  """

  def __init__(self, tokenizer: Any, eos_ids: Sequence[int] = ()):
    """Wraps a PreTrainedTokenizerFast; `eos_ids` are further ids that end a response.

    Raises:
      ValueError: no chat template, or one that shortens or repeats a message; or a control token
        that its name spells even as plain text.
    """
    self._name = repr(tokenizer.name_or_path)
    if not getattr(tokenizer, "chat_template", None):
      raise ValueError(
        f"tokenizer {self._name} has no chat template: give the folder of an instruction-tuned "
        "model"
      )
    if not getattr(tokenizer, "is_fast", False):
      raise ValueError(
        f"tokenizer {self._name} is not one of the `tokenizers` library: the folder needs a "
        "tokenizer.json"
      )
    self._tokenizer = tokenizer
    template = tokenizer.get_chat_template()
    self._template = TODAY + template if "strftime_now" in template else template
    self._control = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    self._control_ids = frozenset(self._control.values())
    self._plain = _without_added_tokens(tokenizer)
    spelled = [name for name in self._control if self._control_ids & set(self.encode(name))]
    if spelled:
      raise ValueError(
        f"tokenizer {self._name} makes a control token of {spelled[0]!r} in any text: a user's "
        "text could steer the model"
      )
    self.vocabulary = 1 + max(tokenizer.get_vocab().values())
    self._layout = functools.lru_cache(maxsize=1024)(self._make_layout)
    self._joint = functools.lru_cache(maxsize=1024)(self._find_joint)
    self._default_system = self._find_default_system()
    if self._default_system:
      self._joint(self._default_system)  # a template that knowledge cannot follow is refused here
    ids, template_ids = (
      self.chat(GREETING),
      self._render([dataclasses.asdict(message) for message in GREETING], True, tokenize=True),
    )
    if ids != template_ids:
      raise ValueError(
        f"tokenizer {self._name}: a greeting has the ids {ids} message by message but "
        f"{template_ids} as a whole"
      )
    conversation = self._layout(("user", "assistant", "user"), True)
    answer = next(
      at for at, piece in enumerate(conversation) if isinstance(piece, _Slot) and piece.index == 1
    )
    end = [piece for piece in conversation[answer:] if type(piece) is int][:1]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    self.eos_ids = tuple(dict.fromkeys([*eos_ids, *own, *end]))
    self.pad_id = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

  @classmethod
  def from_folder(cls, folder: str | os.PathLike) -> "HuggingFaceTokenizer":
    """Reads tokenizer.json and its companions, and the ends of a response that the folder declares.

    Raises:
      ImportError: `transformers` is not installed.
      ValueError: no tokenizer there, or one of the kinds that `__init__` refuses.
    """
    transformers = import_transformers()
    folder = pathlib.Path(folder)
    ends = _ends(folder)
    try:
      tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises almost anything here
      raise ValueError(
        f"{folder}: no tokenizer could be read there ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:300]})"
      ) from error
    return cls(tokenizer, ends)

  def encode(self, text: str) -> list[int]:
    """Plain text to ids. `decode` gives the text back, in the tokenizer's Unicode normal form; half
    a surrogate pair becomes "?".
    """
    return self._plain.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Ids to text; control tokens and the weights' spare rows beyond the vocabulary are left
    out.
    """
    kept = [int(i) for i in ids if i < self.vocabulary and int(i) not in self._control_ids]
    return self._plain.decode(kept, skip_special_tokens=False)

  def chat(self, messages: Sequence[Message], *, thinking: bool = True) -> list[int]:
    """The whole prompt, ending with the assistant's header; `thinking` is the template's
    `enable_thinking`.

    Raises:
      ValueError: the template refuses such a conversation.
    """
    knowledge, own, rest = _front(messages)
    if knowledge is not None:
      own = Message("system", self._with_knowledge(own, knowledge.content))
    placed = rest if own is None else (own, *rest)
    roles, contents = [message.role for message in placed], [message.content for message in placed]
    return self._ids(roles, contents, thinking)

  def _with_knowledge(self, own: Message | None, knowledge: str) -> str:
    """The content of the system message: the own or default system text, then knowledge."""
    system = self._default_system
    if own is not None:
      layout = self._layout(("system", "user"), True)
      slot = next(piece for piece in layout if isinstance(piece, _Slot))
      system = slot.fill(own.content)  # what is trimmed without knowledge must not stand before it
    return system + self._joint(system) + knowledge if system else knowledge

  def _ids(self, roles: Sequence[str], contents: Sequence[str], thinking: bool) -> list[int]:
    ids: list[int] = []
    run = ""  # text since the last control token
    for piece in (*self._layout(tuple(roles), thinking), None):
      if isinstance(piece, str):
        run += piece
      elif isinstance(piece, _Slot):
        run += piece.fill(contents[len(contents) - 1 - piece.index])
      else:
        ids, run = ids + self.encode(run) + ([] if piece is None else [piece]), ""
    return ids

  def knowledge_prefix(
    self, message: Message, *, system: Message | None = None, thinking: bool = True
  ) -> tuple[int, list[int]]:
    """(skip, ids) of knowledge before conversations that begin with `system`, or with none.

    For messages = [system, *rest]: chat([message, *messages]) == ids + chat(messages)[skip:].

    Raises:
      ValueError: the template changes more than that when there is knowledge.
    """
    asked = (Message("user", "?"),) if system is None else (system, Message("user", "?"))
    plain = self.chat(asked, thinking=thinking)
    informed = self.chat((message, *asked), thinking=thinking)
    skip = _inserted_at(plain, informed)
    if skip is None:
      raise ValueError(
        f"tokenizer {self._name}: its chat template changes the prompt when knowledge stands in "
        "its system message"
      )
    return skip, informed[: skip + len(informed) - len(plain)]

  def split_response(self, ids: Sequence[int], *, thinking: bool = True) -> tuple[str, str]:
    """Sampled ids to (thinking, answer). A thinking that never closed leaves no answer; `thinking`
    as given to `chat`.
    """
    ids = [int(i) for i in ids if i not in self.eos_ids]
    opening, close = self._control.get(THINK, -1), self._control.get(END_THINK, -1)
    header = [piece for piece in self._layout(("user",), thinking) if piece in (opening, close)]
    return _split(ids, opening, close, header[-1:] == [opening], self.decode)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer's files, chat template included, as `transformers` and engines read
    them.
    """
    self._tokenizer.save_pretrained(folder)

  def _render(
    self, conversation: list[dict[str, str]], thinking: bool, tokenize: bool = False
  ) -> Any:
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
        f"tokenizer {self._name}: its chat template refuses the roles {roles}: {error}"
      ) from error

  def _make_layout(self, roles: tuple[str, ...], thinking: bool) -> tuple[int | str | _Slot, ...]:
    """What the template makes of a conversation: ids of control tokens, plain text, and the slots
    of the messages.
    """
    words = [f"MESSAGE-{len(roles) - 1 - i}-STANDS-HERE" for i in range(len(roles))]
    rest = self._render(
      [{"role": role, "content": SPACE + word + SPACE} for role, word in zip(roles, words)],
      thinking,
    )
    pieces: list[int | str | _Slot] = []
    for i, word in enumerate(words):
      before, found, rest = rest.partition(word)
      if not found or word in rest:
        raise ValueError(
          f"tokenizer {self._name}: its chat template {'repeats' if found else 'leaves out'} the "
          f"{roles[i]} message"
        )
      left, right = not before.endswith(SPACE), not rest.startswith(SPACE)
      pieces += [
        *self._cut(before if left else before.removesuffix(SPACE)),
        _Slot(len(roles) - 1 - i, left, right),
      ]
      rest = rest if right else rest.removeprefix(SPACE)
    return tuple(pieces + self._cut(rest))

  def _cut(self, text: str) -> list[int | str]:
    """The template's own text, control tokens as ids."""
    names = "|".join(re.escape(name) for name in sorted(self._control, key=len, reverse=True))
    return [self._control.get(part, part) for part in re.split(f"({names})", text) if part]

  def _find_default_system(self) -> str:
    """The words that the template puts where a system message would stand; "" if it puts none."""
    plain, informed = self._layout(("user",), True), self._layout(("system", "user"), True)
    at = next(i for i, piece in enumerate(informed) if isinstance(piece, _Slot))
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
    plain = self._ids(roles, (system, "?"), True)
    for joint in JOINTS:
      # The probe ends unlike what stands before it, so that no chance hides a merge.
      if _inserted_at(plain, self._ids(roles, (system + joint + "Rule 1", "?"), True)) is not None:
        return joint
    raise ValueError(
      f"tokenizer {self._name}: no knowledge can follow the system text {system!r:.200} without "
      "changing its ids: end it with a letter or a full stop"
    )


def import_transformers() -> Any:
  """The module `transformers`, without its warning that there is no PyTorch: only its tokenizers
  are used here.

  Raises:
    ImportError: it is not installed, or Jinja, which it renders chat templates with, is not.
  """
  # It warns while it is imported.
  logging.getLogger("transformers").addFilter(_is_not_about_pytorch)
  try:
    import jinja2  # noqa: F401  transformers itself asks for it at the first template only
    import transformers
  except ImportError as error:
    raise ImportError(
      'a Hugging Face folder or GGUF file needs the extra "hf": pip install "oel_jax[hf]" '
      f"({error})"
    ) from error
  return transformers


def _is_not_about_pytorch(record: logging.LogRecord) -> bool:
  return not record.getMessage().startswith("PyTorch was not found")


def _without_added_tokens(tokenizer: Any) -> Any:
  """The backend as it reads plain text: no name of a control token is special to it."""
  import tokenizers

  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  return tokenizers.Tokenizer.from_str(
    json.dumps(spec | {"added_tokens": [], "post_processor": None})
  )


def _ends(folder: pathlib.Path) -> list[int]:
  """The end-of-sequence ids of generation_config.json or, if it has none, of config.json, or [].

  In this order, as in `transformers`: config.json may hold a family's default, which is an ordinary
  token here.
  """
  for path in (folder / "generation_config.json", folder / "config.json"):
    if not path.is_file():
      continue
    try:
      given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
      raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    found = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(i) is not int or i < 0 for i in found):
      raise ValueError(f'{path}: "eos_token_id" is {given!r}: it must be an id or a list of ids')
    if found:
      return found
  return []
