"""Definitions of tools, as logs of every kind write them, in the one form that chat templates read.

| written by | a definition |
| --- | --- |
| OpenAI's chat form | {"type": "function", "function": {"name", "description", "parameters"}} |
| OpenAI's older "functions" | {"name", "description", "parameters"} |
| OpenAI's Responses API | {"type": "function", "name", "description", "parameters"} |
| Anthropic | {"name", "description", "input_schema"} |
| MCP, Codex | {"name", "description", "inputSchema"} |
| Gemini | {"functionDeclarations": [{"name", "description", "parameters"}]} |
| ShareGPT | a JSON text of a list of any of these |
"""

import json
from typing import Any

from oel_jax.conversations.log_messages import kind
from oel_jax.conversations.tool_texts import tool_text
from oel_jax.runtime import files

SCHEMAS = ("parameters", "input_schema", "inputSchema")


def definitions(given: Any) -> tuple[str, ...]:
  """The definitions that a record's "tools" or "functions" holds, each a JSON text in OpenAI's chat
  form. One that is in this form stays as it is, and so does one that is no function: a provider's
  own search, say.

  Raises:
    ValueError: it is no list of objects, or holds a number that is not finite.
  """
  if isinstance(given, str) and given.strip():
    try:
      given = json.loads(given)
    except (ValueError, RecursionError):
      pass  # told below
  if given in (None, "", [], {}):
    return ()
  if isinstance(given, list):
    given = [each for tool in given for each in _declared(tool)]
  if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
    raise ValueError(f"the tools are {kind(given)}: they must be a list of objects")
  try:
    return tuple(tool_text(_in_chat_form(tool)) for tool in given)
  except ValueError as error:
    raise ValueError("the tools hold NaN or an infinity: their numbers must be finite") from error


def _declared(tool: Any) -> list[Any]:
  """The functions that one of Gemini's tools declares; any other tool as it is."""
  names = ("functionDeclarations", "function_declarations") if isinstance(tool, dict) else ()
  return next((tool[name] for name in names if isinstance(tool.get(name), list)), [tool])


def _in_chat_form(tool: dict[str, Any]) -> dict[str, Any]:
  if "function" in tool or not isinstance(tool.get("name"), str):
    return tool
  schema = next((tool[name] for name in SCHEMAS if tool.get(name) is not None), None)
  if tool.get("type", "function") not in ("function", "custom") and schema is None:
    return tool
  function = {name: tool[name] for name in ("name", "description") if name in tool}
  return {
    "type": "function",
    "function": function if schema is None else function | {"parameters": schema},
  }


def read(path: str, field: str = "config.logs.tools") -> tuple[str, ...]:
  """The definitions in a JSON file: a list of them in any of the forms above, or an object whose
  "tools" is one, as `definitions` returns them.

  Raises:
    ValueError: it holds none; names the field and the file.
    OSError: it cannot be read.
  """
  try:
    given = json.loads(files.given(path, field).read_text(encoding="utf-8-sig"))
    found = definitions(given.get("tools") if isinstance(given, dict) else given)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{field}: {path} is no list of definitions as JSON ({error})") from error
  if not found:
    raise ValueError(f"{field}: {path} holds no definition of a tool")
  return found


def is_definition(text: str) -> bool:
  """Whether a text is the JSON of an object, as a definition is."""
  try:
    return isinstance(json.loads(text), dict)
  except (ValueError, RecursionError):
    return False
