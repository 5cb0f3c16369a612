"""What a prompt holds: knowledge first, then what was said, as later prompts show it."""

from fakes import Tokenizer

from oel_jax.conversations import prompt
from oel_jax.conversations.schema import KNOWLEDGE, Message, knowledge_message

SAID = (
  Message("system", "Be brief."),
  Message("user", "A board."),
  Message("assistant", "[up]", thinking="Hm.", action="[up]", response_tokens=7),
  Message("user", "Another board."),
)
SHOWN = (*SAID[:2], Message("assistant", "[up]"), SAID[3])


def test_thinking_is_left_out_and_knowledge_stands_first():
  assert prompt.messages(SAID) == SHOWN
  known = knowledge_message("- EXPERIENCE ITEM: The goal is G.")
  assert known.role == KNOWLEDGE and prompt.messages(SAID, known) == (known, *SHOWN)


def test_the_ids_are_those_of_the_chat_template():
  tokenizer = Tokenizer()
  [place] = prompt.ids(tokenizer, SAID, thinking=True)
  assert tokenizer.seen[place] == SHOWN
