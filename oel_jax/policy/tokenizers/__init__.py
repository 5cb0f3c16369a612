"""Text ↔ token ids and the chat template, behind one small face: SentencePiece for the embedded
policy, Hugging Face for all others.

Untrusted text stays plain text: `encode` never yields a control token, whatever the text holds;
only `chat` places them.

What enters a prompt is decided here alone. A conversation is what its template makes of it: its own
system message replaces the template's default one. Knowledge stands behind that system text, own or
default, so that teacher and student differ in nothing else.
"""

from oel_jax.policy.tokenizers.chat_template import CannotRender
from oel_jax.policy.tokenizers.huggingface import HuggingFaceTokenizer, import_transformers
from oel_jax.policy.tokenizers.renderable import leave_out, renderable
from oel_jax.policy.tokenizers.sentencepiece import CONTROLS, SentencePieceTokenizer

__all__ = [
  "CONTROLS",
  "CannotRender",
  "HuggingFaceTokenizer",
  "SentencePieceTokenizer",
  "import_transformers",
  "leave_out",
  "renderable",
]
