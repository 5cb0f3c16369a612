"""What finished games show: how many were passed, how long they and their answers were, and what
was given away.
"""

import re
from collections.abc import Sequence
from typing import Any

from oel_jax.conversations.schema import ENDED, Trajectory
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


def play_summary(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
  """Passed, response tokens a turn, turns a game, how games ended, and responses that leak; with
  counts and intervals.
  """
  turns = [turn for trajectory in trajectories for turn in trajectory.turns]
  return {
    "passed": statistics.count(
      sum(trajectory.passed for trajectory in trajectories), len(trajectories)
    ),
    "response_tokens": statistics.mean([turn.response_tokens for turn in turns]),
    "moves": statistics.mean([len(trajectory.turns) for trajectory in trajectories]),
    "ended": {how: sum(trajectory.ended == how for trajectory in trajectories) for how in ENDED},
    "leaks": statistics.count(
      sum(leaks(f"{turn.thinking}\n{turn.answer}") for turn in turns), len(turns)
    ),
  }
