"""The embedded policy's tokenizer: a SentencePiece model with control pieces for the chat."""

import hashlib
from collections.abc import Sequence

import sentencepiece

from oel_jax.conversations.schema import KNOWLEDGE, Message
from oel_jax.policy.tokenizers.chat_template import END_THINK, THINK, CannotRender, front, split

PAD, END = "<|pad|>", "<|end|>"
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

  def chat(
    self, messages: Sequence[Message], *, tools: Sequence[str] = (), thinking: bool = True
  ) -> list[int]:
    """The whole prompt, ending with the assistant's header. `thinking` is the policy's own choice
    here and changes nothing.

    Raises:
      CannotRender: the messages offer, call or answer for tools.
    """
    del thinking
    if tools or any(message.role == "tool" or message.tool_calls for message in messages):
      raise CannotRender(
        "the embedded policy's chat has no place for tools, their calls and their results: leave "
        "such conversations out, or train a model whose chat template shows them"
      )
    knowledge, own, rest = front(messages)
    placed = [message for message in (own, knowledge, *rest) if message is not None]
    ids = [i for message in placed for i in self._message(message)]
    return ids + [self._control[ROLES["assistant"]]]

  def knowledge_prefix(
    self,
    message: Message,
    *,
    system: Message | None = None,
    tools: Sequence[str] = (),
    thinking: bool = True,
  ) -> tuple[int, list[int]]:
    """(skip, ids) of knowledge before conversations that begin with `system`, or with none.

    For messages = [system, *rest]: chat([message, *messages]) == ids + chat(messages)[skip:].
    """
    del tools, thinking  # of tools `chat` tells
    before = [] if system is None else self._message(system)
    return len(before), before + self._message(message)

  def split_response(
    self, ids: Sequence[int], *, thinking: bool = True, tools: bool = False
  ) -> tuple[str, str]:
    """Sampled ids to (thinking, answer). A thinking that never closed leaves no answer."""
    del thinking, tools
    ids = [int(i) for i in ids if i not in self.eos_ids]
    return split(ids, self._control[THINK], self._control[END_THINK], False, self.decode)

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
