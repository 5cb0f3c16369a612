"""Which action an answer takes."""

import re


def parse_action(answer: str, pattern: str, offered: str = "") -> str:
  """The last action in an answer, as the game wants it: "[up]"; "" if there is none.

  The last, because answers often list the allowed actions before they choose.

  Args:
    answer: what stands after the thinking; an action named in the thinking was not taken.
    pattern: regular expression, case ignored; the spaces in its group 1 are squeezed, and brackets
      are put around it.
    offered: the actions in the words of the prompt. An action is spelled as it stands there; or
      else as the pattern has it; or else as it was written.
  """
  matches = list(re.finditer(pattern, answer, re.IGNORECASE))
  written = _words(matches[-1].group(1) or "") if matches else ""
  return f"[{_spelled(written, matches[-1], offered)}]" if written else ""


def _spelled(written: str, match: re.Match, offered: str) -> str:
  """The action with the case that the game offers, since games may tell [Left] from [left]."""
  for flags in (0, re.IGNORECASE):
    listed = re.search(rf"(?<!\w){re.escape(written)}(?!\w)", offered, flags)
    if listed:
      return listed.group()
  start, end = match.span(1)
  raw, exact = match.group(1), re.compile(match.re.pattern)
  for form in (raw, raw.lower(), raw.upper(), raw.capitalize()):
    found = exact.match(match.string[:start] + form + match.string[end:], match.start())
    if found and found.group(1) == form:
      return _words(form)
  return written


def _words(text: str) -> str:
  return " ".join(text.split())
