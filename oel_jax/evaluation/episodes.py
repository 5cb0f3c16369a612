"""What finished games show: how many were passed, how long they and their answers were, and what
was given away.
"""

import re
from collections.abc import Sequence
from typing import Any

from oel_jax.conversations.schema import ENDED, Conversation
from oel_jax.evaluation import statistics

# Answers that speak of the knowledge as of something handed to the speaker.
LEAK = re.compile(
  r"\b(experience|knowledge|lessons?|items?|notes?)\b[^.\n]{0,40}"
  r"\b(given|provided|above|listed|supplied|shared)\b"
  r"|\b(given|provided|earlier|past|previous)\b[^.,\n]{0,20}"
  r"\b(experiences?|knowledge|games|lessons|notes)\b"
  r"|EXPERIENCE ITEM",
  re.IGNORECASE,
)


def leaks(text: str) -> bool:
  """Whether a response talks about the knowledge that it was, or seems to have been, given."""
  return LEAK.search(text) is not None


def play_summary(games: Sequence[Conversation], limit: int | None = None) -> dict[str, Any]:
  """Passed, response tokens a turn, turns a game, how games ended, responses that leak, and those
  that a limit of tokens cut if one is given; with counts and intervals. Where games say of which
  category they are, passed ones of each, too.
  """
  answers = [answer for game in games for answer in game.answers]
  found = {
    "passed": statistics.count(sum(game.passed for game in games), len(games)),
    "response_tokens": statistics.mean([answer.response_tokens for answer in answers]),
    "moves": statistics.mean([len(game.answers) for game in games]),
    "ended": {how: sum(game.ended == how for game in games) for how in ENDED},
    "leaks": statistics.count(
      sum(leaks(f"{answer.thinking}\n{answer.content}") for answer in answers), len(answers)
    ),
  }
  found |= {"cut": cut(games, limit)} if limit else {}
  categories = sorted({game.source.category for game in games} - {None})
  return found | ({"categories": _by_category(games, categories)} if categories else {})


def _by_category(games: Sequence[Conversation], categories: Sequence[str]) -> dict[str, Any]:
  passed = {
    name: [game.passed for game in games if game.source.category == name] for name in categories
  }
  return {name: statistics.count(sum(found), len(found)) for name, found in passed.items()}


def cut(games: Sequence[Conversation], limit: int) -> dict[str, Any]:
  """The share of responses that the limit of `limit` tokens ended, as `statistics.count`; one that
  came to its own end with just so many counts, too.
  """
  answers = [answer for game in games for answer in game.answers]
  return statistics.count(sum(one.response_tokens >= limit for one in answers), len(answers))
