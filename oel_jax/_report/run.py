"""A run directory as `report` reads it: every number checked once, here, so that the page and the plots only show."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import reprlib
from typing import Any

from absl import logging

from oel_jax.trajectory import ENDED, Trajectory, read_trajectories

SCHEMA = 1
RETENTION = ("extraction", "worlds", "symmetric", "other")
DECISIONS = ("train", "warn", "skip")


@dataclasses.dataclass(frozen=True)
class Measure:
  """One measured number.

  Attributes:
    value: a share in [0, 1], or a mean in its own unit; None if `of` is 0.
    of: how many cases it rests on.
    interval: 95%, low and high; None if there is none.
    hits: of a share, how many of the cases; None of a mean.
  """

  value: float | None
  of: int
  interval: tuple[float, float] | None
  hits: int | None = None


@dataclasses.dataclass(frozen=True)
class Play:
  """Held-out games played one way. `response_tokens` is a mean over turns, `moves` over games; `leaks` counts answers."""

  passed: Measure
  response_tokens: Measure
  moves: Measure
  ended: dict[str, int]
  leaks: Measure


@dataclasses.dataclass(frozen=True)
class Gate:
  """Whether knowledge in the prompt helped the round's first weights, and what was decided: one of DECISIONS."""

  without: Measure
  with_knowledge: Measure
  decision: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A round's evaluation.json; round 0 is the base model.

  Attributes:
    without: no knowledge in the prompt.
    in_context: the round's knowledge in the prompt of the round's first weights.
    after_in_context: the same knowledge in the prompt of the consolidated weights.
    first_knowledge: round 1's knowledge in the prompt of the consolidated weights.
    retention: by the names in RETENTION; those not measured are absent.
    accumulation: (trajectories, passed in context with the knowledge as it stood after so many).
    recovered: (after − before the round) / (in context − before the round).
  """

  round: int
  without: Play
  in_context: Play | None
  after_in_context: Play | None
  first_knowledge: Play | None
  retention: dict[str, Measure]
  accumulation: tuple[tuple[int, Measure], ...]
  recovered: float | None
  gate: Gate | None


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a stage of a round took. `tokens` were sampled or trained on; None where it was not counted."""

  round: int
  stage: str
  seconds: float
  tokens: float | None
  flops: float | None


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything the report shows.

  Attributes:
    name: of the directory.
    config: flat, by dotted names; empty if config.json is missing. `versions` and `changes` are the file's.
    evaluations: by round.
    steps: consolidation's lines of metrics.jsonl, in order of round and step.
    games: held-out games without knowledge, by round.
    knowledge: (name, text) pairs by round.
  """

  name: str
  config: dict[str, Any]
  versions: dict[str, str]
  changes: list[dict[str, Any]]
  evaluations: dict[int, Evaluation]
  steps: list[dict[str, Any]]
  costs: list[Cost]
  games: dict[int, list[Trajectory]]
  knowledge: dict[int, list[tuple[str, str]]]

  @property
  def rounds(self) -> int:
    """The rounds of the run: those planned, or those begun where that is not known."""
    planned = self.config.get("rounds")
    return max([planned if type(planned) is int else 0, *self.evaluations, *self.knowledge])


def read(workdir: pathlib.Path) -> Run:
  """Reads a run directory, at any moment of the run.

  Raises:
    ValueError: not a run directory, or a damaged file in it; names the file, the field, the value seen and what would be right.
  """
  folders = {}
  for path in workdir.iterdir() if workdir.is_dir() else ():
    if path.is_dir() and (match := re.fullmatch(r"round_(\d+)", path.name)):
      folders[int(match[1])] = path
  if not folders and not (workdir / "config.json").exists():
    raise ValueError(f"{workdir}: not a run directory: it must hold config.json or round_0, as a run of oel_jax.main leaves them")
  config = {"config": {}, "versions": {}, "changes": []}
  if (workdir / "config.json").exists():
    config = _checked(workdir / "config.json", _config)
  evaluations, costs, games, knowledge = {}, [], {}, {}
  for number, folder in sorted(folders.items()):
    if (folder / "evaluation.json").exists():
      evaluations[number] = _checked(folder / "evaluation.json", lambda value, number=number: _evaluation(value, number))
    if (folder / "cost.json").exists():
      costs += _checked(folder / "cost.json", lambda value, number=number: _costs(value, number))
    if (folder / "user" / "evaluation.jsonl").exists():
      games[number] = read_trajectories(folder / "user" / "evaluation.jsonl")
    if texts := sorted((folder / "knowledge").glob("[0-9]*.md")):
      knowledge[number] = [(path.stem, path.read_text(encoding="utf-8", errors="replace")) for path in texts]
  folder = workdir.absolute()
  name = "/".join(folder.parts[-2:]) if folder.name.isdigit() else folder.name  # a seed alone says little
  return Run(name, _flat(config["config"]), config["versions"], config["changes"], evaluations,
             _steps(workdir / "metrics.jsonl"), costs, games, knowledge)


def _checked(path: pathlib.Path, parse) -> Any:
  """Parses a JSON file; whatever is wrong with it becomes one ValueError that names the file."""

  def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

  try:
    return parse(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse))
  except (ValueError, RecursionError) as error:  # both JSON's and UTF-8's errors are ValueErrors
    advice = "restore it from a copy" if path.name == "config.json" else "remove it, and the same command as before will make it again"
    raise ValueError(f"{path}: damaged, or not written by this version of oel_jax: {error}; {advice}") from error


def _config(value: Any) -> dict[str, Any]:
  for field, kind in (("config", dict), ("versions", dict), ("changes", list)):
    _need(isinstance(_get(value, field, "the file"), kind), field, value[field], f"of type {kind.__name__}")
  for index, change in enumerate(value["changes"]):
    where = f"changes[{index}]"
    _need(_is_number(_get(change, "time", where)), f"{where}.time", change["time"], "seconds since 1970")
    _need(isinstance(_get(change, "fields", where), list), f"{where}.fields", change["fields"], "a list")
    for field, name in itertools.product(change["fields"], ("field", "was", "is")):
      _get(field, name, f"{where}.fields")
  return value


def _flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
  found = {}
  for name, inner in value.items():
    found |= _flat(inner, f"{above}{name}.") if isinstance(inner, dict) and inner else {f"{above}{name}": inner}
  return found


def _evaluation(value: Any, number: int) -> Evaluation:
  for field, right in (("schema", SCHEMA), ("round", number)):
    _need(_get(value, field, "the file") == right, field, value[field], str(right))
  plays = {name: _play(value[name], name) for name in ("in_context", "after_in_context", "first_knowledge") if value.get(name) is not None}
  retention, accumulation, gate = value.get("retention") or {}, value.get("accumulation") or [], value.get("gate")
  _need(isinstance(retention, dict), "retention", retention, "an object")
  _need(isinstance(accumulation, list), "accumulation", accumulation, "a list")
  points = []
  for index, point in enumerate(accumulation):
    where = f"accumulation[{index}]"
    points.append((_whole(point, "trajectories", where), _share(_get(point, "passed", where), f"{where}.passed")))
  if gate is not None:
    _need(_get(gate, "decision", "gate") in DECISIONS, "gate.decision", gate["decision"], "one of " + ", ".join(map(repr, DECISIONS)))
    gate = Gate(_share(_get(gate, "without", "gate"), "gate.without"), _share(_get(gate, "with", "gate"), "gate.with"), gate["decision"])
  if value.get("recovered") is not None:
    _need(_is_number(value["recovered"]), "recovered", value["recovered"], "a number or null")
  return Evaluation(
      number,
      _play(_get(value, "without", "the file"), "without"),
      plays.get("in_context"),
      plays.get("after_in_context"),
      plays.get("first_knowledge"),
      {task: _share(retention[task], f"retention.{task}") for task in RETENTION if retention.get(task) is not None},
      tuple(sorted(points, key=lambda point: point[0])),
      value.get("recovered"),
      gate,
  )


def _play(value: Any, where: str) -> Play:
  ended = _get(value, "ended", where)
  return Play(
      _share(_get(value, "passed", where), f"{where}.passed"),
      _mean(_get(value, "response_tokens", where), f"{where}.response_tokens"),
      _mean(_get(value, "moves", where), f"{where}.moves"),
      {name: _whole(ended, name, f"{where}.ended") for name in ENDED},
      _share(_get(value, "leaks", where), f"{where}.leaks"),
  )


def _share(value: Any, where: str) -> Measure:
  hits, of = _whole(value, "hits", where), _whole(value, "of", where)
  _need(hits <= of, f"{where}.hits", hits, f"at most {where}.of ({of})")
  measure = _measure(value, "rate", of, where)
  if measure.value is not None:  # a share that contradicts its own counts must not be printed as a result
    _need(of > 0 and abs(measure.value - hits / of) <= 1e-3, f"{where}.rate", measure.value, f"hits / of ({hits} / {of})")
  return dataclasses.replace(measure, hits=hits)


def _mean(value: Any, where: str) -> Measure:
  return _measure(value, "mean", _whole(value, "of", where), where)


def _measure(value: Any, name: str, of: int, where: str) -> Measure:
  number, interval = _get(value, name, where), value.get("interval")
  _need(_is_number(number) or (number is None and of == 0), f"{where}.{name}", number, "a number")
  if interval is not None:
    pair = isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)) and interval[0] <= interval[1]
    _need(pair or (of == 0 and interval == [None, None]), f"{where}.interval", interval, "two numbers, low and high")
  return Measure(number, of, tuple(interval) if interval and number is not None else None)


def _costs(value: Any, number: int) -> list[Cost]:
  """The entries of a round's cost.json; those of one stage, from several processes, are added up."""
  stages = _get(value, "stages", "the file")
  _need(isinstance(stages, list), "stages", stages, "a list")
  result: dict[str, Cost] = {}
  for index, entry in enumerate(stages):
    where = f"stages[{index}]"
    _need(isinstance(_get(entry, "stage", where), str), f"{where}.stage", entry["stage"], "a stage's name")
    for name in ("seconds", "tokens", "flops"):
      known = _is_number(entry.get(name)) or (name != "seconds" and entry.get(name) is None)
      _need(known, f"{where}.{name}", entry.get(name), "a number")
    before = result.get(entry["stage"], Cost(number, entry["stage"], 0.0, 0, 0.0))
    tokens, flops = _sum(before.tokens, entry.get("tokens")), _sum(before.flops, entry.get("flops"))
    result[entry["stage"]] = Cost(number, entry["stage"], before.seconds + entry["seconds"], tokens, flops)
  return list(result.values())


def _sum(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a + b


def _steps(path: pathlib.Path) -> list[dict[str, Any]]:
  """Consolidation's lines; of a step that was done again, the last. Damaged lines are skipped: a curve is right without them."""
  found = {}
  for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
    try:
      record = json.loads(line)
      if record["stage"] == "consolidate":
        found[int(record["round"]), int(record["step"])] = record
    except (ValueError, KeyError, TypeError, OverflowError):
      logging.warning("%s:%d: skipped, not a line of metrics", path, number)
  return [found[key] for key in sorted(found)]


def _get(value: Any, field: str, where: str) -> Any:
  _need(isinstance(value, dict), where, value, "an object")
  if field not in value:
    raise ValueError(f"{where} has no field {field!r}")
  return value[field]


def _whole(value: Any, field: str, where: str) -> int:
  number = _get(value, field, where)
  _need(type(number) is int and number >= 0, f"{where}.{field}", number, "a whole number, 0 or more")
  return number


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _need(ok: bool, field: str, value: Any, right: str) -> None:
  if not ok:
    raise ValueError(f"{field} is {reprlib.repr(value)}: it must be {right}")
