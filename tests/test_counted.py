"""Sentences about one thing and about several."""

import pytest

from oel_jax.conversations.logs import Counts
from oel_jax.runtime.counted import counted


@pytest.mark.parametrize(
  "count, sentence, told",
  [
    (1, "records are events and no messages", "1 record is an event and no message"),
    (2, "records are events and no messages", "2 records are events and no messages"),
    (0, "prompts", "0 prompts"),
    (
      1,
      "parts of messages are no text and stand as their type in brackets",
      "1 part of message is no text and stands as its type in brackets",
    ),
  ],
)
def test_a_sentence_agrees_with_its_number(count, sentence, told):
  assert counted(count, sentence) == told


def test_what_logs_hold_once_is_told_of_one():
  counts = Counts(1, 1, 1, *[1] * 8)
  assert counts.sentences() == [
    "read 1 conversation from 1 record of 1 file",
    "1 record is damaged and was left out",
    "1 conversation has no answer of the assistant's and was left out",
    "1 conversation ends before a message that is too long",
    "1 conversation holds half a surrogate pair, which stands as U+FFFD now",
    "1 conversation holds a tool's result that no call asked for",
    "1 conversation says the same as another and was left out",
    "1 conversation is the beginning of another and was left out",
    "1 conversation nearly says the same as an earlier one and was left out",
  ]
