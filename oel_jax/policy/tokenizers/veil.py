"""What users, tools and the model say, hidden from a chat template while it is rendered.

Every printable ASCII character but the quote and the backslash is replaced by one for private use.
The template can still place such a text, trim it, ask whether it is empty and quote it as JSON, all
as it does with the text itself; but it finds no word in it, and neither does who looks for control
tokens in what was rendered.
"""

import re
from collections.abc import Callable
from typing import Any

PRIVATE = range(0xF0000, 0x110000)  # planes 15 and 16 of Unicode
ANY_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
HIDDEN = tuple(code for code in range(0x21, 0x7F) if chr(code) not in '"\\')


class Veil:
  """Hides texts and shows them again, with characters that `said`, all of them, does not hold."""

  def __init__(self, said: str):
    """Raises ValueError if the text leaves too few characters of the private planes free."""
    taken = set(map(ord, ANY_PRIVATE.findall(said)))
    free = (code for code in PRIVATE if code not in taken)
    self._hide = dict(zip(HIDDEN, free, strict=False))
    self._show = {stand_in: code for code, stand_in in self._hide.items()}
    if len(self._hide) < len(HIDDEN):
      raise ValueError(f"its texts hold {len(taken)} different private-use characters")

  def hide(self, text: str) -> str:
    return text.translate(self._hide)

  def show(self, text: str) -> str:
    return text.translate(self._show)

  def hide_names(self, text: str, names: re.Pattern) -> str:
    """The text with what matches `names` hidden, and all else as it is. Each of the names must hold
    a character that can be hidden.
    """
    while names.search(text):  # again: hiding one name may leave another that overlapped it
      text = names.sub(lambda found: self.hide(found.group()), text)
    return text


def can_be_hidden(name: str) -> bool:
  return any(ord(letter) in HIDDEN for letter in name)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
  """A JSON value with each text in it changed, the names in objects too."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, list):
    return [map_texts(inner, change) for inner in value]
  if isinstance(value, dict):
    return {change(name): map_texts(inner, change) for name, inner in value.items()}
  return value
