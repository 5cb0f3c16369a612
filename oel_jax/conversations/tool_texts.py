"""Definitions of tools: JSON texts in conversations and prompts, objects in the lines of files."""

import json
import reprlib
from typing import Any

from oel_jax.runtime import schema


def tool_text(definition: dict[str, Any]) -> str:
  """The JSON text by which conversations and prompts hold a tool's definition; ValueError if it
  holds NaN or an infinity, which no JSON has.
  """
  return json.dumps(definition, ensure_ascii=False, allow_nan=False)


def to_json(text: str) -> dict[str, Any] | str:
  """What a line holds of a definition: the object; or its text, if there is a number in it that no
  file of ours may have, such as 2**64 - 1, the most of an unsigned integer.
  """
  try:
    return schema.loads(text.encode("utf-8", "replace"))
  except ValueError:
    return text


def from_json(given: Any) -> str:
  """The inverse of `to_json`.

  Raises:
    ValueError: it is no definition.
  """
  try:
    text = given if isinstance(given, str) else tool_text(given)
    right = isinstance(json.loads(text), dict)
  except (ValueError, RecursionError):
    right = False
  if not right:
    raise ValueError(f"field 'tools' holds {reprlib.repr(given)}: each must be an object")
  return text
