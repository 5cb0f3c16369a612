"""A `transformers` tokenizer as a policy's: `encode` never yields a control token, and only `chat`
places them.
"""

import itertools
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from oel_jax.conversations.schema import Message
from oel_jax.policy.tokenizers.chat_template import (
  END_THINK,
  THINK,
  CannotRender,
  ChatTemplate,
  front,
  inserted_at,
  split,
)
from oel_jax.policy.tokenizers.tool_calls import MARKS

GREETING = (
  Message("user", "How are you?"),
  Message("assistant", "I am well."),
  Message("user", "Good!"),
)


class HuggingFaceTokenizer:
  """A `transformers` tokenizer with its chat template.

  The template is rendered with the messages hidden from it, so what it writes itself may hold
  control tokens, but what the messages say never becomes one and never steers it. Text
  between two control tokens is encoded in one piece: the ids are those of `apply_chat_template`
  wherever no message, call or definition of a tool holds the name of a control token. Tools stand
  where the template puts them.

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
    name = repr(tokenizer.name_or_path)
    if not getattr(tokenizer, "chat_template", None):
      raise ValueError(
        f"tokenizer {name} has no chat template: give the folder of an instruction-tuned model"
      )
    if not getattr(tokenizer, "is_fast", False):
      raise ValueError(
        f"tokenizer {name} is not one of the `tokenizers` library: the folder needs a "
        "tokenizer.json"
      )
    self._tokenizer = tokenizer
    self._control = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    self._control_ids = frozenset(self._control.values())
    self._plain = _without_added_tokens(tokenizer)
    spelled = [token for token in self._control if self._control_ids & set(self.encode(token))]
    if spelled:
      raise ValueError(
        f"tokenizer {name} makes a control token of {spelled[0]!r} in any text: a user's "
        "text could steer the model"
      )
    self.vocabulary = 1 + max(tokenizer.get_vocab().values())
    self._template = ChatTemplate(tokenizer, self._control, self.encode)
    ids, template_ids = self.chat(GREETING), self._template.as_a_whole(GREETING)
    if ids != template_ids:
      raise ValueError(
        f"tokenizer {name}: a greeting has the ids {ids} message by message but "
        f"{template_ids} as a whole"
      )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    self.eos_ids = tuple(dict.fromkeys([*eos_ids, *own, *self._template.answer_end()]))
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

  def chat(
    self, messages: Sequence[Message], *, tools: Sequence[str] = (), thinking: bool = True
  ) -> list[int]:
    """The whole prompt, ending with the assistant's header.

    Args:
      messages: those of tools and those that call them, too.
      tools: definitions, JSON texts as `schema.Prompt` has them.
      thinking: the template's `enable_thinking`.

    Raises:
      CannotRender: the template refuses such a conversation, or leaves out a part of it.
    """
    knowledge, own, rest = front(messages)
    if knowledge is not None:
      own = Message("system", self._template.with_knowledge(own, knowledge.content, tools))
    return self._template.ids(rest if own is None else (own, *rest), tools, thinking)

  def knowledge_prefix(
    self,
    message: Message,
    *,
    system: Message | None = None,
    tools: Sequence[str] = (),
    thinking: bool = True,
  ) -> tuple[int, list[int]]:
    """(skip, ids) of knowledge before conversations that begin with `system`, or with none, and
    that offer these tools.

    For messages = [system, *rest]: chat([message, *messages]) == ids + chat(messages)[skip:].

    Raises:
      CannotRender: the template changes more than that when there is knowledge.
    """
    asked = (Message("user", "?"),) if system is None else (system, Message("user", "?"))
    plain = self.chat(asked, tools=tools, thinking=thinking)
    informed = self.chat((message, *asked), tools=tools, thinking=thinking)
    skip = inserted_at(plain, informed)
    if skip is None:
      raise CannotRender(
        f"tokenizer {self._template.name}: its chat template changes the prompt when knowledge "
        "stands in its system message"
      )
    return skip, informed[: skip + len(informed) - len(plain)]

  def split_response(
    self, ids: Sequence[int], *, thinking: bool = True, tools: bool = False
  ) -> tuple[str, str]:
    """Sampled ids to (thinking, answer). A thinking that never closed leaves no answer; `thinking`
    as given to `chat`. With `tools`, the tokens that mark a call stand in the answer by their
    names, as `tool_calls.parse` reads them.
    """
    ids = [int(i) for i in ids if i not in self.eos_ids]
    opening, close = self._control.get(THINK, -1), self._control.get(END_THINK, -1)
    header = [i for i in self._template.header(thinking) if i in (opening, close)]
    decode = self._decode_with_marks if tools else self.decode
    return split(ids, opening, close, header[-1:] == [opening], decode)

  def _decode_with_marks(self, ids: Sequence[int]) -> str:
    marks = {self._control[mark]: mark for mark in MARKS if mark in self._control}
    runs = itertools.groupby(ids, key=marks.get)
    spelled = lambda mark, run: mark * len(run) if mark else self.decode(run)
    return "".join(spelled(mark, list(run)) for mark, run in runs)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer's files, chat template included, as `transformers` and engines read
    them.
    """
    self._tokenizer.save_pretrained(folder)


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
