"""A run directory as `report` reads it: every number checked once, here, so that the page and the
plots only show.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from oel_jax.conversations.jsonl import read_conversations
from oel_jax.conversations.schema import Conversation
from oel_jax.extraction import provenance
from oel_jax.extraction.provenance import Origin
from oel_jax.report import divergences, gates
from oel_jax.report.divergences import HeldOut, OwnAnswers, Unrelated
from oel_jax.report.gates import Gate
from oel_jax.report.measures import Measure, read_categories, read_share
from oel_jax.report.plays import Play, read_play
from oel_jax.runtime import files, metrics, schema
from oel_jax.runtime.manifest import Manifest
from oel_jax.runtime.schema import get, need, whole
from oel_jax.runtime.workdir import read_config

SCHEMA = 1
# Of a `Cost`, where they are known.
COUNTED = ("tokens", "flops", "programs", "compile_seconds", "trained")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A round's evaluation.json; round 0 is the base model.

  Attributes:
    without: no knowledge in the prompt.
    in_context: the round's knowledge in the prompt of the round's first weights, or the run's where
      these teach.
    after_in_context: the same knowledge in the prompt of the consolidated weights.
    first_knowledge: round 1's knowledge in the prompt of the consolidated weights.
    retention: by the names of config.evaluation.tasks; those not measured are absent.
    accumulation: (trajectories, passed in context with the knowledge as it stood after so many).
    recovered: (after − before the round) / (in context − before the round).
    made_from: what was measured → a digest of it; {} by an earlier version.
    held_out: where logs are learned from.
    retention_categories: of those of the tasks that have parts, the share of each.
    unrelated: where config.evaluation.unrelated has prompts.
    own_answers: where config.evaluation.own_answers asks for some.
    deployed_cut: responses of the round's deployed games that the limit of tokens ended, of those
      for "knowledge" and those for "prompts"; {} without games, or by an earlier version.
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
  made_from: dict[str, str]
  held_out: HeldOut | None = None
  retention_categories: dict[str, dict[str, Measure]] = dataclasses.field(default_factory=dict)
  unrelated: Unrelated | None = None
  deployed_cut: dict[str, Measure] = dataclasses.field(default_factory=dict)
  own_answers: OwnAnswers | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a stage of a round took; None where it was not counted.

  Attributes:
    tokens: sampled or trained on.
    programs: compiled, or fetched from the compilation cache.
    compile_seconds: of the compiler for them, which may work on several at a time.
    trained: of the tokens, those that the student's gradients were formed of.
  """

  round: int
  stage: str
  seconds: float
  tokens: float | None
  flops: float | None
  programs: float | None = None
  compile_seconds: float | None = None
  trained: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything the report shows.

  Attributes:
    name: of the directory.
    config: flat, by dotted names; empty if config.json is missing. `versions` and `changes` are the
      file's.
    evaluations: by round.
    steps: consolidation's lines of metrics.jsonl, in order of round and step.
    games: held-out games without knowledge, by round.
    knowledge: (name, text) pairs by round.
    items: what stands behind the items of a round; absent by an earlier version.
    said: by id, the conversations that they came from.
    answers: by round, answers to some held-out prompts of logs, before the round and after it.
  """

  name: str
  config: dict[str, Any]
  versions: dict[str, str]
  changes: list[dict[str, Any]]
  evaluations: dict[int, Evaluation]
  steps: list[dict[str, Any]]
  costs: list[Cost]
  games: dict[int, list[Conversation]]
  knowledge: dict[int, list[tuple[str, str]]]
  items: dict[int, list[Origin]]
  said: dict[str, Conversation]
  answers: dict[int, tuple[list[Conversation], list[Conversation]]]

  @property
  def tasks(self) -> tuple[str, ...]:
    """The names of the retention tasks that some round was measured on."""
    found = (task for evaluation in self.evaluations.values() for task in evaluation.retention)
    return tuple(dict.fromkeys(found))

  @property
  def rounds(self) -> int:
    """The rounds of the run: those planned, or those begun where that is not known."""
    planned = self.config.get("rounds")
    return max([planned if type(planned) is int else 0, *self.evaluations, *self.knowledge])


def read(workdir: pathlib.Path) -> Run:
  """Reads a run directory, at any moment of the run.

  Raises:
    ValueError: not a run directory, or a damaged file in it; names the file, the field, the value
      seen and what would be right.
  """
  folders = {}
  for path in workdir.iterdir() if workdir.is_dir() else ():
    if path.is_dir() and (match := re.fullmatch(r"round_(\d+)", path.name)):
      folders[int(match[1])] = path
  if not folders and not (workdir / "config.json").exists():
    raise ValueError(
      f"{workdir}: not a run directory: it must hold config.json or round_0, as a run of "
      "oel_jax.main leaves them"
    )
  config = {"config": {}, "versions": {}, "changes": []}
  if (workdir / "config.json").exists():
    config = read_config(workdir / "config.json")
  evaluations, costs, games, knowledge = {}, [], {}, {}
  items, said, answers = {}, {}, {}
  for number, folder in sorted(folders.items()):
    Manifest(folder).verify()
    if (folder / "evaluation.json").exists():
      evaluations[number] = read_evaluation(folder / "evaluation.json", number)
    if (folder / "gate.json").exists():
      # The evaluation repeats it; what cannot be read stops the run, and the report says so, too.
      gates.read_gate(folder / "gate.json")
    if (folder / "cost.json").exists():
      costs += read_costs(folder / "cost.json", number)
    if (folder / "user" / "evaluation.jsonl").exists():
      games[number] = read_conversations(folder / "user" / "evaluation.jsonl")
    kept = [folder / "user" / f"held_out_{when}.jsonl" for when in ("before", "after")]
    if all(path.exists() for path in kept):
      answers[number] = tuple(map(read_conversations, kept))
    if texts := sorted((folder / "knowledge").glob("[0-9]*.md")):
      knowledge[number] = [(path.stem, files.read_text(path)) for path in texts]
    if origins := provenance.read(folder / "user" / "items.jsonl"):
      items[number] = list(origins.values())
      if (folder / "user" / "trajectories.jsonl").exists():
        deployed = read_conversations(folder / "user" / "trajectories.jsonl")
        said |= {conversation.id: conversation for conversation in deployed}
  trained = {
    number: _steps_trained(folders[number])
    for number in evaluations
    if (folders[number] / "checkpoints").is_dir()
  }
  folder = workdir.absolute()
  # a seed alone says little
  name = "/".join(folder.parts[-2:]) if folder.name.isdigit() else folder.name
  return Run(
    name,
    _flat(config["config"]),
    config["versions"],
    config["changes"],
    evaluations,
    _steps(workdir / "metrics.jsonl", config["config"], trained),
    costs,
    games,
    knowledge,
    items,
    said,
    answers,
  )


def _flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
  found = {}
  for name, inner in value.items():
    found |= (
      _flat(inner, f"{above}{name}.")
      if isinstance(inner, dict) and inner
      else {f"{above}{name}": inner}
    )
  return found


def read_evaluation(path: pathlib.Path, number: int) -> Evaluation:
  """Returns the evaluation.json of a round.

  Raises:
    ValueError: damaged, of another round, or its counts contradict each other; names the file and
      the field.
    OSError: it cannot be read.
  """
  return files.read_json(path, lambda value: _evaluation(value, number))


def read_costs(path: pathlib.Path, number: int) -> list[Cost]:
  """Returns the entries of a round's cost.json, those of one stage added up; raises as
  `read_evaluation` does.
  """
  return files.read_json(path, lambda value: _costs(value, number))


def costs(value: Any) -> dict[str, Any]:
  """Returns the value of a cost.json, checked; raises ValueError naming the field."""
  _costs(value, 0)
  return value


def _evaluation(value: Any, number: int) -> Evaluation:
  for field, right in (("schema", SCHEMA), ("round", number)):
    need(get(value, field, schema.TOP) == right, field, value[field], str(right))
  plays = {
    name: read_play(value[name], name)
    for name in ("in_context", "after_in_context", "first_knowledge")
    if value.get(name) is not None
  }
  retention, accumulation, gate = (
    value.get("retention") or {},
    value.get("accumulation") or [],
    value.get("gate"),
  )
  need(isinstance(retention, dict), "retention", retention, "an object")
  need(isinstance(accumulation, list), "accumulation", accumulation, "a list")
  made_from = value.get("made_from", {})
  need(isinstance(made_from, dict), "made_from", made_from, "an object")
  points = []
  for index, point in enumerate(accumulation):
    where = f"accumulation[{index}]"
    points.append(
      (
        whole(point, "trajectories", where),
        read_share(get(point, "passed", where), f"{where}.passed"),
      )
    )
  if value.get("recovered") is not None:
    need(schema.is_number(value["recovered"]), "recovered", value["recovered"], "a number or null")
  return Evaluation(
    number,
    read_play(get(value, "without", schema.TOP), "without"),
    plays.get("in_context"),
    plays.get("after_in_context"),
    plays.get("first_knowledge"),
    {task: read_share(share, f"retention.{task}") for task, share in retention.items()},
    tuple(sorted(points, key=lambda point: point[0])),
    value.get("recovered"),
    gates.parse(gate) if gate is not None else None,
    made_from,
    value.get("held_out") and divergences.held_out(value["held_out"]),
    {task: parts for task, share in retention.items() if (parts := _parts(share, task))},
    value.get("unrelated") and divergences.unrelated(value["unrelated"]),
    _shares(value, "deployed_cut"),
    value.get("own_answers") and divergences.own_answers(value["own_answers"]),
  )


def _parts(share: Any, task: str) -> dict[str, Measure]:
  """The shares of the parts that a task's share is made up of; {} if it has none."""
  where = f"retention.{task}"
  parts = read_categories(share, where)
  for count in ("hits", "of") if parts else ():
    total, right = sum(getattr(part, count) for part in parts.values()), share[count]
    need(total == right, f"{where}.categories", total, f"{right} {count} in all, as {where} says")
  return parts


def _shares(value: Any, name: str) -> dict[str, Measure]:
  """An object of shares; {} where it is absent."""
  shares = value.get(name, {})
  need(isinstance(shares, dict), name, shares, "an object")
  return {what: read_share(share, f"{name}.{what}") for what, share in shares.items()}


def _costs(value: Any, number: int) -> list[Cost]:
  """The entries of a round's cost.json; those of one stage, from several processes, are added
  up.
  """
  stages = get(value, "stages", schema.TOP)
  need(isinstance(stages, list), "stages", stages, "a list")
  result: dict[str, Cost] = {}
  for index, entry in enumerate(stages):
    where = f"stages[{index}]"
    need(
      isinstance(get(entry, "stage", where), str),
      f"{where}.stage",
      entry["stage"],
      "a stage's name",
    )
    for name in ("seconds", *COUNTED):
      known = entry.get(name)
      ok = (schema.is_number(known) and known >= 0) or (name != "seconds" and known is None)
      need(ok, f"{where}.{name}", known, "a number, 0 or more")
    before = result.get(entry["stage"], Cost(number, entry["stage"], 0.0, 0, 0.0, 0, 0.0, 0))
    counted = {name: _sum(getattr(before, name), entry.get(name)) for name in COUNTED}
    seconds = before.seconds + entry["seconds"]
    result[entry["stage"]] = Cost(number, entry["stage"], seconds, **counted)
  return list(result.values())


def _sum(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a + b


def _steps_trained(folder: pathlib.Path) -> int | None:
  """After how many steps the round's training ended; None by a version that did not say."""
  made_from = Manifest(folder).made_from("checkpoints")
  return int(made_from["steps"]) if made_from else None


def _steps(
  path: pathlib.Path, config: dict[str, Any], done: Mapping[int, int | None]
) -> list[dict[str, Any]]:
  """Consolidation's lines; of a step that was done again, the last. What is damaged or missing is
  told and left out of the curves.

  `done` are the rounds that were trained to the end, with their steps, or None for as many as the
  configuration has: of these no line may be missing.
  """
  found = {}
  for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
    try:
      record = metrics.read_line(line)
    except ValueError as error:
      logging.warning("%s:%d: skipped, not a line of metrics (%s)", path, number, error)
      continue
    if record["stage"] == "consolidate":
      found[record["round"], record["step"]] = record
  settings = _flat(config)
  first, later = (settings.get(f"consolidation.{name}") for name in ("steps", "later_steps"))
  for number in sorted({number for number, _ in found} | set(done)):
    last = max((step for other, step in found if other == number), default=0)
    planned = done.get(number) or (later if number > 1 and later else first)
    if number in done and type(planned) is int:
      last = max(last, planned)
    if missing := [step for step in range(1, last + 1) if (number, step) not in found]:
      logging.warning(
        "%s: round %d has no line for steps %s: the curves lack them",
        path,
        number,
        ", ".join(map(str, missing[:20])),
      )
  return [found[key] for key in sorted(found)]
