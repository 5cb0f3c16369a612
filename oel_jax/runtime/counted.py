"""Sentences that begin with a number of things."""

import re

# What a sentence about several things has, and one about one of them.
_ONE = {
  "conversations": "conversation",
  "events": "an event",
  "fields": "field",
  "files": "file",
  "items": "item",
  "messages": "message",
  "parts": "part",
  "prompts": "prompt",
  "records": "record",
  "are": "is",
  "end": "ends",
  "have": "has",
  "hold": "holds",
  "say": "says",
  "stand": "stands",
  "stay": "stays",
  "their": "its",
  "they": "it",
  "were": "was",
}


def counted(count: int, sentence: str) -> str:
  """The sentence, written of several things, with their number before it: counted(1, "records are
  damaged") is "1 record is damaged".
  """
  if count == 1:
    sentence = re.sub(r"\w+", lambda word: _ONE.get(word[0], word[0]), sentence)
  return f"{count} {sentence}"
