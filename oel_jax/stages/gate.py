"""The gate: does the knowledge help, before anything is trained on it?"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from oel_jax import report
from oel_jax.evaluation import statistics
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.report import records
from oel_jax.runtime import files
from oel_jax.runtime.manifest import differing
from oel_jax.stages import play
from oel_jax.stages.run import GATE, Run, made_from


def gate(run: Run, number: int, policy: Policy, texts: Sequence[str]) -> bool:
  """Plays with the knowledge and without, on the same maps. Returns whether to train.

  Without gain, `on_no_gain` = "warn" trains all the same, "stop" raises ValueError, and "skip"
  leaves the weights as they are if play with knowledge is worse.
  """
  path = run.round(number) / GATE
  if not run.config.consolidation.gate_episodes:
    return True
  if path.exists():
    _refuse_other(path, policy, texts)
  else:
    _measure(run, number, policy, texts)
  found = run.gate(number)
  if found["decision"] != "train":
    _tell(run, number, found)
  return found["decision"] != "skip"


def _measure(run: Run, number: int, policy: Policy, texts: Sequence[str]) -> None:
  count, passed = run.config.consolidation.gate_episodes, {}
  with run.stage(number, "gate", policy, 2 * count) as (meter, advance):
    for name, given in (("without", ()), ("with", texts)):
      games = play.Games(
        f"user/gate_{name}.jsonl",
        f"r{number}-gate",
        "gate",
        count,
        run.sampling("evaluation"),
        given,
      )
      played = play.play(run, number, games, meter, advance)
      passed[name] = statistics.count(sum(bool(game.passed) for game in played), len(played))
  run.log(number, "gate", **{f"passed_{name}": share["rate"] for name, share in passed.items()})
  files.write_sealed(
    run.round(number) / GATE, {"schema": 1, "made_from": made_from(policy, texts), **passed}
  )


def _tell(run: Run, number: int, found: dict[str, Any]) -> None:
  """Warns that there is no gain; raises ValueError if that is to stop the run."""
  given, without = found["with"], found["without"]
  logging.warning(
    "round %d: no gain from the knowledge: %d of %d passed with it, %d without: %s",
    number,
    given["hits"],
    given["of"],
    without["hits"],
    "not consolidated" if found["decision"] == "skip" else "consolidated all the same",
  )
  if run.config.consolidation.on_no_gain == "stop":
    report.write(run.folder)
    raise ValueError(
      f"round {number}: with the knowledge {given['hits']} of {given['of']} games are passed, "
      f'without it {without["hits"]}; config.consolidation.on_no_gain is "stop": take "warn" '
      'or "skip", or better knowledge'
    )


def _refuse_other(path: pathlib.Path, policy: Policy, texts: Sequence[str]) -> None:
  """Raises ValueError if gate.json compares play with other weights or knowledge than the
  round's.
  """
  before, now = records.read_gate(path).get("made_from"), made_from(policy, texts)
  changed = differing(before, now)
  if changed:
    raise ValueError(
      f"{path}: measured with other {', '.join(changed)} than the round has now: remove the "
      "round's folder, and later ones, "
      "to have these rounds done again, or choose another --workdir"
    )
