"""What the files of the paper's tables and figures share: the settings, the runs that a table rests
on, and its reading.

A file declares a `Study` and gives it to `main`. Its one command makes the runs that are missing,
JOBS of them at a time, then prints the table with all that its directory holds:

    JOBS=8 python experiments/oel_table1.py pocket runs/table1

    runs/table1/SETTING/ARM/SEED      a run directory, as oel_jax.main makes it
    runs/table1/SETTING/begun/SEED    what the runs of this seed begin with: games, prompts, texts

Published figures stand beside ours, with a column for each setting; one that nobody has run yet
is empty. Called again, a command goes on with what was cut off.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import readings  # noqa: E402
import running  # noqa: E402

from oel_jax.runtime import schema  # noqa: E402

BEGUN = "begun"
# Raw trajectories, and an empty wrapper, have no items: what chooses among these is off.
NO_ITEMS = {
  "extraction.min_support": 1,
  "extraction.told_by_others": False,
  "extraction.newest_wins": False,
  "extraction.repeats": True,
}
# 128 maps, the paper's, have a standard error near 4.4 points.
QWEN3 = {
  "evaluation.episodes": 512,
  "evaluation.tasks": ("oel_jax.evaluation.instructions:instructions",),
  "evaluation.retention": 256,
  "evaluation.unrelated": str(HERE / "data/unrelated.txt"),
}
Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
  """A game and a model: a column of a table.

  Attributes:
    name: the word of the command line.
    config: FILE.py:SIZE in experiments/.
    head: of its column.
    changes: of the configuration, in each of its runs.
    raw: what raw trajectories in the place of items need beside that.
    weights: whether --weights must name the policy's.
    ends: how many tokens of the model's end a response.
    plays: whether games are played; else a given text is trained in (`tasks.distill`).
  """

  name: str
  config: str
  head: str
  changes: Changes = dataclasses.field(default_factory=dict)
  raw: Changes = dataclasses.field(default_factory=dict)
  weights: bool = True
  ends: int = 2
  plays: bool = True

  def default(self) -> Any:
    """The configuration as its file has it."""
    file, _, size = self.config.partition(":")
    return importlib.import_module(file.removesuffix(".py")).get_config(size)


_POCKET = dict(
  changes={"evaluation.accumulation": ()},
  raw={"extraction.max_knowledge_tokens": 480},
  weights=False,
  ends=1,
)
_DESK = dict(changes={"evaluation.episodes": 512}, raw=NO_ITEMS)
SETTINGS = {
  setting.name: setting
  for setting in (
    Setting("pocket", "frozen_lake.py:pocket-table", "embedded policy, 3 × 3", **_POCKET),
    Setting("pocket-4x4", "frozen_lake.py:pocket-4x4", "embedded policy, 4 × 4", **_POCKET),
    Setting("desk", "help_desk.py:desk", "help desk", **_DESK),
    Setting(
      "desk-changing", "help_desk.py:changing", "help desk, rules that change each round", **_DESK
    ),
    Setting(
      "smollm2-135m",
      "system_prompt.py:smollm2-135m",
      "SmolLM2-135M, a system prompt",
      weights=False,
      plays=False,
    ),
    Setting("sokoban-qwen3-4b", "sokoban.py:qwen3-4b-instruct-paper", "Sokoban, Qwen3-4B", QWEN3),
    Setting("qwen3-1.7b", "frozen_lake.py:qwen3-1.7b-paper", "Qwen3-1.7B", QWEN3),
    Setting("qwen3-4b", "frozen_lake.py:qwen3-4b-paper", "Qwen3-4B", QWEN3),
    Setting("qwen3-8b", "frozen_lake.py:qwen3-8b-paper", "Qwen3-8B", QWEN3),
  )
}
GAMES = ("pocket", "pocket-4x4", "desk", "sokoban-qwen3-4b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")


@dataclasses.dataclass(frozen=True)
class Study:
  """A table or a figure.

  Attributes:
    title: its first line.
    settings: names of SETTINGS, in the order of the columns; one without runs has no column, but
      for `paper`.
    paper: the setting that the published figures are of.
    arms: (setting, options) → the runs of a seed, each by its name what it changes in the
      configuration.
    rows: (arms) → the table's lines, for the runs of these names.
    compared: (arms) → what is told with intervals.
    begins: what those runs of a seed begin with together that differ in nothing before: "deploy"
      (games and prompts), "extract" (knowledge and gate, too), or "" (nothing).
    rounds: of each run; 0: as the setting has them.
    published: heads of the columns of published figures.
    sizes: whether each arm names its own weights.
    about: what is to be known beside the numbers.
    options: gives the command line's parser what this study alone takes.
    details: (column) → further lines, printed under the table.
  """

  title: str
  settings: tuple[str, ...]
  paper: str
  arms: Callable[[Setting, argparse.Namespace], dict[str, Changes]]
  rows: Callable[[Sequence[str]], Sequence[readings.Row]]
  compared: Callable[[Sequence[str]], Sequence[readings.Compared]] = lambda arms: ()
  begins: str = "deploy"
  rounds: int = 1
  published: tuple[str, ...] = ("published",)
  sizes: bool = False
  about: str = ""
  options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
  details: Callable[[readings.Column], Sequence[str]] = lambda column: ()


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
  """Makes the runs of the setting that the command line names, and prints the table; ends the
  process with status 1 if a run failed, 2 if the command is wrong.
  """
  options, flags = _parse(study, arguments)
  setting, folder = SETTINGS[options.setting], pathlib.Path(options.directory)
  try:
    arms = study.arms(setting, options)
    _refuse_varied(arms, flags)
    with running.ended_together():
      failed = 0 if options.print else _make(study, setting, arms, folder, options, flags)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(_table(study, folder))
  if failed:
    sys.exit(f"error: {failed} runs failed: the same command goes on with them")


def _parse(study: Study, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    description=study.title, epilog="JOBS runs share the device, or the first DEVICES GPUs."
  )
  parser.add_argument("setting", choices=study.settings, help="a game and a model")
  parser.add_argument("directory", help="of the runs; made, or gone on with")
  parser.add_argument("--seeds", default="0,1,2,3,4", help="with commas between (%(default)s)")
  if not study.sizes:
    parser.add_argument("--weights", help="of the policy, where the setting has none of its own")
  parser.add_argument("--print", action="store_true", help="print what is there, run nothing")
  study.options(parser)
  options, flags = parser.parse_known_args(arguments)
  for flag in flags:
    if not flag.startswith("--config.") or "=" not in flag:
      parser.error(f"{flag}: of other flags only --config.FIELD=VALUE go to the runs")
  numbers = re.fullmatch("[0-9]+(,[0-9]+)*", options.seeds)
  seeds = [int(seed) for seed in options.seeds.split(",")] if numbers else []
  if not seeds or len(set(seeds)) < len(seeds):
    right = "whole numbers from 0 with commas between, each once"
    parser.error(f"--seeds is {options.seeds!r}: it must be {right}")
  options.seeds, options.flags = seeds, flags
  needs = SETTINGS[options.setting].weights and not study.sizes and not options.print
  if needs and not options.weights:
    parser.error(f"{options.setting} needs --weights: a Hugging Face folder or a .gguf file")
  return options, flags


def given(options: argparse.Namespace, setting: Setting, field: str) -> Any:
  """The value of a field in the setting's runs: what --config.FIELD= says, else the setting's.

  Raises:
    ValueError: the flag's value is of another kind than the setting's.
  """
  said = dict(flag.removeprefix("--config.").split("=", 1) for flag in options.flags)
  default = functools.reduce(getattr, field.split("."), setting.default())
  if field not in said:
    return default
  try:
    value = ast.literal_eval(said[field])
  except (ValueError, SyntaxError):
    value = said[field]
  if type(value) is not type(default):
    told = f"--config.{field} is {said[field]!r}: it must be of type {type(default).__name__}"
    raise ValueError(told)
  return value


def _refuse_varied(arms: dict[str, Changes], flags: Sequence[str]) -> None:
  """Raises ValueError if a flag, which goes to every run, sets what the runs are told apart by."""
  for flag in flags:
    field = flag.removeprefix("--config.").partition("=")[0]
    if field == "seed":
      raise ValueError(f"{flag}: every run would have it: give --seeds")
    values = [(name, repr(changes.get(field, "as it is"))) for name, changes in arms.items()]
    if others := [each for each in values if each[1] != values[0][1]]:
      told = " and ".join(f"{name} ({value})" for name, value in (values[0], others[0]))
      raise ValueError(f"{flag}: every run would have it, and in this field {told} differ")


def _make(
  study: Study,
  setting: Setting,
  arms: dict[str, Changes],
  folder: pathlib.Path,
  options: argparse.Namespace,
  flags: Sequence[str],
) -> int:
  """Makes what is missing of a setting's runs; returns how many failed."""
  top = (folder / setting.name).absolute()
  own = {"policy.weights": options.weights} if getattr(options, "weights", None) else {}
  own |= {"rounds": study.rounds} if study.rounds else {}
  running.give_devices()
  begins = study.begins if setting.plays else ""
  before = {name: _before(begins, changes) for name, changes in arms.items()}

  def run(name: str, seed: int, changes: Changes, *stage: str) -> bool:
    changes = {"seed": seed, **setting.changes, **own, **changes}
    folder = top / name / str(seed)
    command = [f"--config={HERE / setting.config}", f"--workdir={folder}"]
    command += [f"--config.{field}={value}" for field, value in changes.items()]
    return running.run(folder, [*command, *flags, *stage])

  def begin(name: str, seed: int) -> bool:
    stages = [("evaluate", 0), ("deploy", 1), ("extract", 1)]
    stages = stages[: 3 if begins == "extract" else 2]
    how = [(f"--stage={stage}", f"--round={number}") for stage, number in stages]
    return all(run(name, seed, dict(before.values())[name], *each) for each in how)

  def go_on(name: str, seed: int) -> bool:
    if begins:
      running.copy(top / before[name][0] / str(seed), top / name / str(seed))
    return run(name, seed, arms[name])

  whole = {}
  if begins:  # the first goes ahead: what it compiled lies in the cache for the others
    wanted = [(name, seed) for name in dict(before.values()) for seed in options.seeds]
    done = [begin(*wanted[0]), *running.at_a_time([(begin, *each) for each in wanted[1:]])]
    whole = dict(zip(wanted, done, strict=True))
  calls = [
    (go_on, arm, seed)
    for seed in options.seeds
    for arm in arms
    if whole.get((before[arm][0], seed), True)
  ]
  return running.at_a_time(calls).count(False) + len(arms) * len(options.seeds) - len(calls)


def _before(begins: str, changes: Changes) -> tuple[str, Changes]:
  """What an arm's runs begin with: the name of its folder, and what of its changes acts before."""
  later = ("consolidation.",) if begins == "extract" else ("consolidation.", "extraction.")
  found = {name: value for name, value in changes.items() if not name.startswith(later)}
  words = sorted(f"{name}={value}" for name, value in found.items())
  return BEGUN + (f"-{schema.digest(words)[:8]}" if words else ""), found


def _table(study: Study, folder: pathlib.Path) -> str:
  """The table with a column for each setting of the study, as Markdown."""
  columns = {name: readings.Column(SETTINGS[name].head, folder / name) for name in study.settings}
  columns = [each for name, each in columns.items() if each.arms() or name == study.paper]
  arms = list(dict.fromkeys(arm for column in columns for arm in column.arms()))
  rows = study.rows(arms)
  try:
    lines = [f"**{study.title}**", "", *readings.table(columns, rows, study.published)]
    lines += ["", *readings.intervals(columns, study.compared(arms))]
    for column in columns:
      lines += study.details(column) if column.arms() else ()
    counts = [f"{column.head}: {column.counts(rows)}" for column in columns if column.arms()]
    for column in columns:
      if skipped := column.skipped():
        told = "; ".join(skipped)
        counts.append(f"{column.head}: skipped by the gate, so nothing was trained: {told}.")
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  return "\n".join([*lines, "", *counts, *([study.about] if study.about else []), _commit()])


def _commit() -> str:
  """Which code this is, where it is a checkout with Git."""
  try:
    ask = ["git", "-C", str(HERE), "describe", "--always", "--dirty=, changed"]
    found = subprocess.run(ask, capture_output=True, text=True)
  except OSError:
    return ""
  return f"Table made at commit {found.stdout.strip()}." if found.returncode == 0 else ""
