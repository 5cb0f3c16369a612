"""What a round's policy can do: held-out games without knowledge and with it, what it kept, what it gives away."""

import re
from collections.abc import Sequence
from typing import Any

from oel_jax.evaluation import statistics
from oel_jax.pocket import probes
from oel_jax.trajectory import ENDED, Trajectory

# Answers that speak of the knowledge as of something handed to the speaker (traps, 42).
LEAK = re.compile(
    r"\b(experience|knowledge|lessons?|items?|notes?)\b[^.\n]{0,40}\b(given|provided|above|listed|supplied|shared)\b"
    r"|\b(given|provided|earlier|past|previous)\b[^.\n]{0,20}\b(experiences?|knowledge|games|lessons|notes)\b"
    r"|EXPERIENCE ITEM",
    re.IGNORECASE,
)


def leaks(text: str) -> bool:
  """Whether a response talks about the knowledge that it was, or seems to have been, given."""
  return LEAK.search(text) is not None


def play_summary(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
  """Passed, response tokens a turn, turns a game, how games ended, and responses that leak; with counts and intervals."""
  turns = [turn for trajectory in trajectories for turn in trajectory.turns]
  return {
      "passed": statistics.count(sum(trajectory.passed for trajectory in trajectories), len(trajectories)),
      "response_tokens": statistics.mean([turn.response_tokens for turn in turns]),
      "moves": statistics.mean([len(trajectory.turns) for trajectory in trajectories]),
      "ended": {how: sum(trajectory.ended == how for trajectory in trajectories) for how in ENDED},
      "leaks": statistics.count(sum(leaks(f"{turn.thinking}\n{turn.answer}") for turn in turns), len(turns)),
  }


def retention(policy: Any, count: int, *, seed: int) -> dict[str, Any]:
  """What must not be lost, on examples that are the same in every round: extraction, other worlds, role-symmetric worlds, other tasks."""
  if not count:
    return {}
  measured = {
      "extraction": probes.extraction(policy, count, seed=seed),
      "worlds": probes.play_worlds(policy, count, seed=seed),
      "symmetric": probes.play_worlds(policy, count, seed=seed, layout="symmetric"),
      "other": probes.other_tasks(policy, count, seed=seed),
  }
  return {name: statistics.count(found.hits, found.of) for name, found in measured.items()}
