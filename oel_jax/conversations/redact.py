"""What is taken out of records before they cross: addresses, numbers, keys and names, each replaced
by its kind in brackets, and counted; the values stand in no count, log line, error or file.

| kind | what |
| --- | --- |
| EMAIL | e-mail addresses, also written "ann (at) example (dot) com" or with %40 |
| IBAN | of the length of its country and with the right check digits (mod 97) |
| CARD | numbers as card issuers give them, with the right check digit (Luhn) |
| PHONE | numbers with a country code, in national groups, or behind a word such as "phone" |
| KEY | keys and tokens of well-known shapes: sk-…, ghp_…, AKIA…, JWTs, PEM blocks… |
| SECRET | what stands behind password, token, key, secret, Bearer…; passwords in addresses |
| NAME | names of a list that the user gives |
| OWN | texts that the user's own function changed |

What cannot be told from ordinary words and numbers stays: a phone number without groups, country
code or word before it; a password without the word. Texts that are JSON, as the arguments of calls,
are read as such: no escape hides a value. A conversation is redacted once, and prompts are cut from
what is left of it.
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from oel_jax.conversations import redact_patterns as patterns
from oel_jax.conversations import tools
from oel_jax.runtime import files, named

R = TypeVar("R")
# Fields of records that are no words of anybody's.
FIXED = {"role", "ended", "source", "kind"}
# Fields that tell one thing from another: of two, no placeholder may make one.
NAMES = {"id", "tool_call_id", "user"}
MAX_NESTED = 20  # JSON in a text in JSON…
# Of signs that stand for themselves in JSON; no halves of pairs.
_ESCAPE = re.compile(
  r"\\u(0040|00[a-fA-F][\da-fA-F]|0[1-9a-fA-F][\da-fA-F]{2}|[1-9a-cA-C][\da-fA-F]{3})"
)


class Redactor:
  """Takes out of records and texts what must not cross.

  Attributes:
    counts: what was taken out so far, by kind.
  """

  def __init__(
    self,
    names: Sequence[str] = (),
    hook: str = "",
    *,
    field: str = "config.logs.redact_hook",
  ):
    """Prepares the patterns.

    Args:
      names: of persons or whatever else, one or several words each; found as whole words, in
        capitals or not (`read_names`).
      hook: MODULE:NAME or FILE.py:NAME of a function that is given each text, after all else has
        been taken out, and returns it as it may cross; "" for none.
      field: of the configuration that gave the hook, for errors.

    Raises:
      ValueError, OSError: there is no such function.
    """
    self.counts = collections.Counter()
    self._finders = (
      ("IBAN", patterns.ibans),
      ("CARD", patterns.cards),
      ("PHONE", patterns.phones),
      ("NAME", patterns.Names(names).find),
    )
    self._hook, self._field = hook, field
    self._own = named.function(hook, field) if hook else None

  def __call__(self, record: R) -> R:
    """Returns a message, conversation, prompt or tool's call without what must not cross; whatever
    else it holds stays as it is.

    An id or a user's name that had to be changed ends in digits of a hash: no two become one.

    Raises:
      ValueError: the user's function fails, or returns no text.
    """
    return self._walked(record)

  def text(self, text: str) -> str:
    """Returns a text without what must not cross. Raises as a call."""
    return self._text(text, 0)

  def _walked(self, value: Any) -> Any:
    if isinstance(value, str):
      return self.text(value) if value else value
    if isinstance(value, (tuple, list)):
      return type(value)(map(self._walked, value))
    if not dataclasses.is_dataclass(value):
      return value
    changed = {}
    for place in dataclasses.fields(value):
      old = getattr(value, place.name)
      new = old
      if place.name in NAMES and old:
        new = self._name(old)
      elif place.name not in FIXED:
        new = self._walked(old)
      if place.name == "tools":  # of a definition, the user's own function may leave none
        new = tuple(filter(tools.is_definition, new))
      if new != old:
        changed[place.name] = new
    return dataclasses.replace(value, **changed) if changed else value

  def _name(self, old: str) -> str:
    """A name, with digits of a hash where it had to be changed. The file and line behind one that
    came before (`logs.read`) are another name, so that what is called the same stays so.
    """
    if again := re.fullmatch(r"(.+)#(.+):(\d+)", old, re.DOTALL):
      return f"{self._name(again[1])}#{self._name(again[2])}:{again[3]}"
    new = self.text(old)
    if new == old:
      return old
    return f"{new}-{hashlib.blake2b(old.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"

  def _text(self, text: str, depth: int) -> str:
    clean = self._json(text, depth) if text.lstrip()[:1] in ("{", "[") else None
    text = self._plain(text) if clean is None else clean
    if self._own is None or depth:
      return text
    own = named.called(self._hook, self._field, self._own, text, words=False)
    if not isinstance(own, str):
      told = type(own).__name__
      raise ValueError(f"{self._field} is {self._hook!r}: it returns {told}: it must be a text")
    if own != text:
      self.counts["OWN"] += 1
    return own

  def _plain(self, text: str) -> str:
    """A text that is no JSON; but a part of it may be, whose escapes must not hide anything."""
    opened = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text) if "\\u" in text else text
    clean = opened
    for kind, may_hold, pattern, put in patterns.PATTERNS:
      if may_hold(clean):
        clean, count = pattern.subn(put, clean)
        if count:
          self.counts[kind] += count
    for kind, find in self._finders:
      clean = self._cut(clean, kind, find)
    return text if clean == opened else clean

  def _cut(self, text: str, kind: str, find: Callable[[str], patterns.Spans]) -> str:
    """The text with the kind in brackets in place of each span."""
    kept, last = [], 0
    for start, end in find(text):
      kept += (text[last:start], f"[{kind}]")
      last = end
      self.counts[kind] += 1
    return "".join((*kept, text[last:])) if kept else text

  def _json(self, text: str, depth: int) -> str | None:
    """A text that is JSON with its strings, names and numbers redacted: it stays JSON, and as it is
    if there is nothing to take out. None for any other text.
    """
    if depth >= MAX_NESTED:
      return None
    try:
      value = json.loads(text)
      clean = self._value(value, depth + 1)
    except (ValueError, RecursionError):
      return None
    return text if clean == value else json.dumps(clean, ensure_ascii=False)

  def _value(self, value: Any, depth: int) -> Any:
    if isinstance(value, list):
      return [self._value(each, depth) for each in value]
    if isinstance(value, dict):
      clean = {}
      for name, inner in value.items():
        put = self._text(name, depth)
        while put in clean:  # two addresses are one placeholder
          put += "'"
        clean[put] = self._named(name, inner, depth)
      return clean
    if isinstance(value, str):
      return self._text(value, depth)
    if type(value) in (int, float):
      return self._in_words("", value, "", depth)
    return value

  def _named(self, name: str, value: Any, depth: int) -> Any:
    """The value of a field, whose name may say what it is: a password, a phone number."""
    if isinstance(value, list):
      return [self._named(name, each, depth) for each in value]
    clean = self._value(value, depth)
    if clean != value or type(value) not in (str, int, float) or value == "":
      return clean
    quote = '"' if isinstance(value, str) else ""
    return self._in_words(f"{name}: {quote}", value, quote, depth)

  def _in_words(self, before: str, value: Any, after: str, depth: int) -> Any:
    """The value as it is, or what is left of it as a text between these words."""
    text = f"{before}{value}{after}"
    clean = self._text(text, depth)
    if clean == text or not (clean.startswith(before) and clean.endswith(after)):
      return value
    return clean[len(before) : len(clean) - len(after)]


def read_names(path: str, field: str = "config.logs.redact_names") -> list[str]:
  """The names of a file in UTF-8: one a line, of one word or several; empty lines are none.

  Raises:
    ValueError: a name is one letter, which would be found in every text; names file and line.
    OSError: there is no such file.
  """
  found = []
  text = files.given(path, field).read_bytes()
  try:
    lines = text.decode("utf-8-sig").splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{field}: {path} is not a text in UTF-8 (byte {error.start})") from None
  for number, line in enumerate(lines, start=1):
    name = line.strip()
    if len(name) == 1 and name.isascii():
      raise ValueError(f"{field}: line {number} of {path} is one letter: it must be a name")
    if name:
      found.append(name)
  return found
