"""The gate: does the knowledge help, before anything is trained on it, and does one of its texts
hurt?
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from oel_jax import report
from oel_jax.conversations.schema import Conversation
from oel_jax.evaluation import episodes, statistics
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.report import gates
from oel_jax.runtime import files
from oel_jax.runtime.manifest import differing
from oel_jax.stages import knowledge, play
from oel_jax.stages.run import GATE, Run, made_from

# A text hurts if its games are passed less often than those without knowledge, by Fisher's exact
# test, one-sided. This is the chance that a round whose texts do no harm has one left out; each of
# K texts is tested at a K-th of it. Few games cannot show harm: against 30 of 60 games passed
# without knowledge, and with 10 texts, a text needs 9 games, none of them passed.
HURTS = 0.05


def gate(run: Run, number: int, policy: Policy, texts: Sequence[str]) -> bool:
  """Plays with the knowledge and without, on the same maps. Returns whether to train. With the
  knowledge the round's teacher plays (`Run.teacher`).

  Without gain, `on_no_gain` = "warn" trains all the same, "stop" raises ValueError, and "skip"
  leaves the weights as they are if play with knowledge is worse. A text that hurts is left out of
  what `knowledge.kept` gives, and of the gain; if all of them do, none is.
  """
  path = run.round(number) / GATE
  if not run.config.consolidation.gate_episodes:
    return True
  if path.exists():
    _refuse_other(path, policy, texts)
  else:
    _measure(run, number, policy, texts)
  found = run.gate(number)
  _leave_out(run, number, found, texts)
  if found["decision"] != "train":
    _tell(run, number, found)
  return found["decision"] != "skip"


def _measure(run: Run, number: int, policy: Policy, texts: Sequence[str]) -> None:
  count, played = run.config.consolidation.gate_episodes, {}
  sampling, limit = run.sampling("evaluation"), run.config.deployment.max_response_tokens
  with run.stage(number, "gate", policy, 2 * count) as (meter, advance):
    for name, player, given in (("without", policy, ()), ("with", run.teacher(policy), texts)):
      meter.policy = player
      file = f"user/gate_{name}.jsonl"
      games = play.Games(file, f"r{number}-gate", "gate", count, sampling, given)
      played[name] = play.play(run, number, games, meter, advance)
  passed = {name: _passed(found) for name, found in played.items()}
  cut = {name: episodes.cut(found, limit) for name, found in played.items()}
  groups = play.by_text(run, number, games, played["with"])
  names = knowledge.numbers(run, number)
  by_text = _by_text(groups, passed["without"], names, limit)
  found = {**passed, "cut": cut, "texts": by_text}
  out = {entry["text"] for entry in by_text if entry["left_out"]}
  if out:
    pairs = zip(groups, names, strict=True)
    found["kept"] = _passed([game for group, name in pairs if name not in out for game in group])
  scalars = {f"passed_{name}": share["rate"] for name, share in passed.items()}
  scalars |= {f"cut_{name}": share["rate"] for name, share in cut.items()}
  run.log(number, "gate", **scalars)
  head = {"schema": 1, "made_from": made_from(policy, texts)}
  files.write_sealed(run.round(number) / GATE, head | found)


def _by_text(
  groups: Sequence[Sequence[Conversation]],
  without: dict[str, Any],
  names: Sequence[int],
  limit: int,
) -> list[dict[str, Any]]:
  """Of each text that was played: its number, what its games show, and whether it is left out.

  Args:
    groups: the games with each text (`play.by_text`).
    without: the share passed of those without.
    names: the texts' numbers.
    limit: tokens of a response.
  """
  found = []
  for games, name in zip(groups, names, strict=True):
    if not games:  # none was dealt this text
      continue
    passed = _passed(games)
    chance = statistics.fewer(passed["hits"], passed["of"], without["hits"], without["of"])
    entry = {"text": name, "passed": passed, "cut": episodes.cut(games, limit), "p": chance}
    found.append(entry | {"left_out": chance < HURTS / len(names)})
  if all(entry["left_out"] for entry in found):  # then on_no_gain says what becomes of the round
    found = [entry | {"left_out": False} for entry in found]
  return found


def _passed(games: Sequence[Conversation]) -> dict[str, Any]:
  return statistics.count(sum(bool(game.passed) for game in games), len(games))


def _leave_out(run: Run, number: int, found: dict[str, Any], texts: Sequence[str]) -> None:
  """Names the texts that gate.json says are left out where the server side sees it; gates of
  earlier versions leave out none.
  """
  said, marked = dict(zip(knowledge.numbers(run, number), texts)), {}
  for entry in found.get("texts", []):
    if entry["left_out"]:
      given, without = entry["passed"], found["without"]
      why = (
        f"{given['hits']} of {given['of']} games passed with it, {without['hits']} of "
        f"{without['of']} without knowledge (p = {entry['p']:.2g})"
      )
      marked[entry["text"]] = said[entry["text"]], why
      told = "round %d: knowledge text %02d hurts and is left out: %s"
      logging.warning(told, number, entry["text"], why)
  knowledge.leave_out(run, number, marked)


def _tell(run: Run, number: int, found: dict[str, Any]) -> None:
  """Warns that there is no gain; raises ValueError if that is to stop the run."""
  given, without = found.get("kept", found["with"]), found["without"]
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
  before, now = gates.read_gate(path).get("made_from"), made_from(policy, texts)
  changed = differing(before, now)
  if changed:
    raise ValueError(
      f"{path}: measured with other {', '.join(changed)} than the round has now: remove the "
      "round's folder, and later ones, "
      "to have these rounds done again, or choose another --workdir"
    )
