"""Text ↔ token ids and the chat template, behind one small face.

Untrusted text stays plain text: `encode` never yields a control token, whatever the text holds; only `chat` places them.
"""

import hashlib
from collections.abc import Sequence

import sentencepiece

from oel_jax.trajectory import Message

PAD, END, THINK, END_THINK = "<|pad|>", "<|end|>", "<think>", "</think>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CONTROLS = (PAD, END, *ROLES.values(), THINK, END_THINK)


class SentencePieceTokenizer:
  """A SentencePiece model whose control pieces are `CONTROLS`.

  A message is `<|role|>` text `<|end|>`; a prompt ends with `<|assistant|>`, after which the policy writes, thinking between
  `<think>` and `</think>` if it likes, and stops with `<|end|>`. Messages are encoded one by one, so the ids of a conversation are
  those of its parts joined, and a system message in front changes nothing behind it.

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
      raise ValueError(f"tokenizer: these {len(model)} bytes are not a SentencePiece model ({error})") from error
    self.digest = hashlib.sha256(model).hexdigest()
    self.vocabulary = self._model.get_piece_size()
    self._control = {name: self._model.piece_to_id(name) for name in CONTROLS}
    missing = [name for name, i in self._control.items() if not self._model.is_control(i)]
    if missing:
      raise ValueError(f"tokenizer has no control piece {', '.join(missing)}: a chat needs all of {', '.join(CONTROLS)}")
    self.pad_id = self._control[PAD]
    self.eos_ids = (self._control[END],)

  def encode(self, text: str) -> list[int]:
    """Plain text to ids; `decode` gives the text back, character by character. Half a surrogate pair, which is no text, becomes "?"."""
    return self._model.encode(text.encode(errors="replace").decode())

  def decode(self, ids: Sequence[int]) -> str:
    """Ids to text; control tokens and the weights' spare rows beyond the vocabulary are left out."""
    return self._model.decode([int(i) for i in ids if i < self.vocabulary])

  def chat(self, messages: Sequence[Message], *, thinking: bool = True) -> list[int]:
    """The whole prompt, ending with the assistant's header. `thinking` is the policy's own choice here and changes nothing."""
    del thinking
    return [i for message in messages for i in self._message(message)] + [self._control[ROLES["assistant"]]]

  def knowledge_prefix(self, message: Message) -> list[int]:
    """The ids that a system message puts before a conversation: chat([message, *rest]) == knowledge_prefix(message) + chat(rest)."""
    return self._message(message)

  def split_response(self, ids: Sequence[int]) -> tuple[str, str]:
    """Sampled ids to (thinking, answer). A thinking that never closed leaves no answer."""
    ids = [int(i) for i in ids if i not in self.eos_ids]
    close, opening = self._control[END_THINK], self._control[THINK]
    last = max((at for at, i in enumerate(ids) if i in (opening, close)), default=-1)
    if last >= 0 and ids[last] == opening:
      return self.decode(ids).strip(), ""
    return self.decode(ids[: last + 1]).strip(), self.decode(ids[last + 1 :]).strip()

  def response(self, thinking: str, answer: str) -> list[int]:
    """The ids of a response as the policy would write it, end included; what pre-training teaches."""
    thought = [self._control[THINK], *self.encode(thinking), self._control[END_THINK]] if thinking else []
    return [*thought, *self.encode(answer), *self.eos_ids]

  def _message(self, message: Message) -> list[int]:
    if message.role not in ROLES:
      raise ValueError(f"message role is {message.role!r}: it must be one of {', '.join(ROLES)}")
    return [self._control[ROLES[message.role]], *self.encode(message.content), *self.eos_ids]
