"""Held-out games played one way, as evaluation.json holds them."""

import dataclasses
from typing import Any

from oel_jax.conversations.schema import ENDED
from oel_jax.report.measures import Measure, read_categories, read_mean, read_share
from oel_jax.runtime.schema import get, need, whole


@dataclasses.dataclass(frozen=True)
class Play:
  """Held-out games played one way. `response_tokens` is a mean over turns, `moves` over games;
  `leaks` counts answers; `categories` has the games passed of each category, {} if there are none;
  `cut`, the responses that the limit of tokens ended, is None by an earlier version. `texts`: of
  each knowledge text in the prompt, where it was told apart, number, games passed, responses cut.
  """

  passed: Measure
  response_tokens: Measure
  moves: Measure
  ended: dict[str, int]
  leaks: Measure
  categories: dict[str, Measure]
  cut: Measure | None = None
  texts: tuple[tuple[int, Measure, Measure], ...] = ()


def read_play(value: Any, where: str) -> Play:
  """Returns what `evaluation.episodes.play_summary` made, checked; errors name it `where`."""
  ended = get(value, "ended", where)
  categories = read_categories(value, where)
  play = Play(
    read_share(get(value, "passed", where), f"{where}.passed"),
    read_mean(get(value, "response_tokens", where), f"{where}.response_tokens"),
    read_mean(get(value, "moves", where), f"{where}.moves"),
    {name: whole(ended, name, f"{where}.ended") for name in ENDED},
    read_share(get(value, "leaks", where), f"{where}.leaks"),
    categories,
    read_share(value["cut"], f"{where}.cut") if "cut" in value else None,
    tuple(_text(text, f"{where}.texts[{i}]") for i, text in enumerate(value.get("texts", []))),
  )
  games, turns = play.passed.of, play.response_tokens.of
  for field, count, right in (
    ("ended", sum(play.ended.values()), games),
    ("moves.of", play.moves.of, games),
    ("leaks.of", play.leaks.of or turns, turns),
    ("cut.of", play.cut.of if play.cut else turns, turns),
    (
      "categories",
      sum(part.of for part in categories.values()) if categories else games,
      games,
    ),
  ):
    need(count == right, f"{where}.{field}", count, f"{right} in all, as the other counts say")
  return play


def _text(value: Any, where: str) -> tuple[int, Measure, Measure]:
  passed, cut = (
    read_share(get(value, name, where), f"{where}.{name}") for name in ("passed", "cut")
  )
  return whole(value, "text", where), passed, cut
