"""What enters a prompt: decided here, for games, for training and for what is measured.

First the knowledge, if there is any: the tokenizer puts it behind the system text, the
conversation's own or the chat template's, in one system message (`knowledge_prefix` of
`policy/tokenizers`). Then what was said, in order, each message as later prompts show it: without
thinking. Definitions of tools stand where the chat template puts them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from oel_jax.conversations.schema import Message, shown


def messages(said: Iterable[Message], knowledge: Message | None = None) -> tuple[Message, ...]:
  """Returns the messages of the prompt whose answer follows `said`; `knowledge` as
  `schema.knowledge_message` or another makes it.
  """
  before = () if knowledge is None else (knowledge,)
  return (*before, *shown(said))


def ids(
  tokenizer: Any,
  said: Sequence[Message],
  knowledge: Message | None = None,
  *,
  tools: Sequence[str] = (),
  thinking: bool,
) -> list[int]:
  """Returns the prompt's token ids; `tools` are what `schema.Prompt` holds, and `thinking` says
  whether the chat template opens a thinking block.
  """
  return tokenizer.chat(messages(said, knowledge), tools=tools, thinking=thinking)
