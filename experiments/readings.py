"""What the runs of a study show: the table's lines, and differences with paired intervals.

The unit is a game, not a turn: what a game has is one number, however many turns it took. Two arms
of a seed played the same held-out games with the same random streams, so games are compared one by
one.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oel_jax.conversations.importers import read_check
from oel_jax.conversations.jsonl import read_conversations
from oel_jax.conversations.schema import Conversation
from oel_jax.evaluation import statistics
from oel_jax.runtime import files

# What a game shows.
OF_A_GAME: dict[str, Callable[[Conversation, int], float]] = {
  "passed": lambda game, limit: float(game.passed),
  "tokens": lambda game, limit: float(np.mean([one.response_tokens for one in game.answers])),
  "cut": lambda game, limit: float(np.mean([one.response_tokens >= limit for one in game.answers])),
}
NOT_SHARES = ("tokens",)
LAST = -1
Values = dict[int, np.ndarray]  # by seed, one number a game


@dataclasses.dataclass(frozen=True)
class Cell:
  """What is measured of an arm.

  Attributes:
    arm: its name.
    round: after which; 0 is the base, LAST the last that the run is to have.
    way: how the held-out games were played: "without" knowledge; "in_context", by the teacher that
      the round had; "after_in_context"; "first_knowledge"; or, a number, in context with
      the knowledge as it stood after that share of extraction.use.
    what: of OF_A_GAME; or "kl", from the base on unrelated prompts; or a retention task's name.
      These have no games.

  Of a run without games, of a text that is trained in, a prompt stands in the place of a game, and
  what its check says in that of "passed"; round 0 is "base", round 1 "after".
  """

  arm: str
  round: int = 1
  way: str | float = "without"
  what: str = "passed"


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of a table: its name, the published figures as they are printed, and what is ours."""

  name: str
  published: str | tuple[str, ...]
  cell: Cell


@dataclasses.dataclass(frozen=True)
class Compared:
  """A difference that is told with its intervals: `first` less `second`, each a cell, or several
  whose mean a game is taken of; so many times.
  """

  name: str
  first: Cell | tuple[Cell, ...]
  second: Cell | tuple[Cell, ...]
  times: int = 1


class Column:
  """The runs of a setting, DIRECTORY/SETTING/ARM/SEED."""

  def __init__(self, head: str, folder: pathlib.Path):
    self.head, self.folder = head, folder

  def arms(self) -> list[str]:
    """The arms that have runs, by name."""
    found = sorted(path.name for path in self.folder.glob("*") if path.is_dir())
    return [name for name in found if not name.startswith("begun")]

  def seeds(self, arm: str) -> list[int]:
    """The seeds of an arm's runs."""
    found = (self.folder / arm).glob("[0-9]*")
    return sorted(int(path.name) for path in found if path.is_dir() and path.name.isdigit())

  def round(self, arm: str, seed: int, number: int) -> pathlib.Path:
    """Where a run has its round."""
    return self.folder / arm / str(seed) / f"round_{number}"

  def values(self, cell: Cell | tuple[Cell, ...]) -> Values:
    """What each game shows, by seed; seeds that have not come so far are left out. Of several cells
    the mean a game.

    Raises:
      ValueError: a file is damaged; or the cells did not play the same games.
    """
    cells = cell if isinstance(cell, tuple) else (cell,)
    found = [self._values(each) for each in cells]
    seeds = set.intersection(*map(set, found)) if found else ()
    return {seed: np.mean([one[seed] for one in found], axis=0) for seed in sorted(seeds)}

  def _values(self, cell: Cell) -> Values:
    found = {seed: self._of_seed(cell, seed) for seed in self.seeds(cell.arm)}
    return {seed: values for seed, values in found.items() if values is not None}

  def _of_seed(self, cell: Cell, seed: int) -> np.ndarray | None:
    if (self.folder / cell.arm / str(seed) / "base.json").exists():
      return self._of_prompts(cell, seed)
    # Before a run has a config.json, all that its directory holds is a copy of what was begun.
    if not self.config_path(cell.arm, seed).exists():
      return None
    config, way = self.config(cell.arm, seed), cell.way
    folder = self.round(cell.arm, seed, config["rounds"] if cell.round == LAST else cell.round)
    path = folder / "evaluation.json"
    if not path.exists():
      return None
    if cell.what not in OF_A_GAME:
      measured = files.read_json(path)
      if cell.what == "kl":
        value = (measured.get("unrelated") or {}).get("kl")
      else:
        value = measured["retention"].get(cell.what, {}).get("rate")
      return None if value is None else np.array([value])
    if not isinstance(way, str):
      way = f"after_{share_of(config['extraction']['use'], way):03d}_trajectories"
    games = folder / f"user/evaluation{'' if way == 'without' else f'_{way}'}.jsonl"
    limit = config["deployment"]["max_response_tokens"]
    return _read(games, cell.what, limit) if games.exists() else None

  def _of_prompts(self, cell: Cell, seed: int) -> np.ndarray | None:
    """Of a run of `tasks.distill`, whether each held-out prompt's answer has the wanted form."""
    folder, name = self.folder / cell.arm / str(seed), "after" if cell.round else "base"
    path = folder / f"{'in_context' if cell.way == 'in_context' else name}.json"
    if cell.what != "passed" or cell.round > 1 or not path.exists():
      return None
    check = read_check(self.config(cell.arm, seed)["distill"]["obeys"])
    return np.array([float(check(one["answer"])) for one in files.read_json(path)["answers"]])

  def config(self, arm: str, seed: int) -> dict[str, Any]:
    """The run's configuration, as its config.json holds it."""
    return files.read_json(self.config_path(arm, seed))["config"]

  def config_path(self, arm: str, seed: int) -> pathlib.Path:
    """Where a run has its configuration; it is there as soon as the run has begun by itself."""
    return self.folder / arm / str(seed) / "config.json"

  def skipped(self) -> list[str]:
    """The runs' rounds that the gate skipped: "own, seed 3, round 2"."""
    return [
      f"{arm}, seed {seed}, round {number}"
      for arm in self.arms()
      for seed in self.seeds(arm)
      for number in self.rounds(arm, seed)
      if self._decision(arm, seed, number) == "skip"
    ]

  def rounds(self, arm: str, seed: int) -> list[int]:
    """The rounds that a run has evaluated, 0 for its base."""
    found = (self.folder / arm / str(seed)).glob("round_*/evaluation.json")
    names = (path.parent.name.removeprefix("round_") for path in found)
    return sorted(int(name) for name in names if name.isdigit())

  def _decision(self, arm: str, seed: int, number: int) -> str | None:
    measured = files.read_json(self.round(arm, seed, number) / "evaluation.json")
    return (measured.get("gate") or {}).get("decision")

  def counts(self, rows: Sequence[Row]) -> str:
    """How many runs and held-out games the column's rows rest on."""
    cells = [row.cell for row in rows if row.cell.what in OF_A_GAME]
    found = [values for cell in cells if (values := self.values(cell))]
    if not found:
      return "no run has come so far"
    seeds = [len(values) for values in found]
    games = [len(each) for values in found for each in values.values()]
    words = lambda numbers: " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    return f"{words(seeds)} seeds, {words(games)} held-out games or prompts, the last checkpoint."


def share_of(use: int, share: float) -> int:
  """How many trajectories that share of `use` is, at least one."""
  return max(1, round(use * share))


@functools.cache
def _read(path: pathlib.Path, what: str, limit: int) -> np.ndarray:
  games = read_conversations(path, max_damaged=0.0)
  return np.array([OF_A_GAME[what](game, limit) for game in games])


def told(values: Values, what: str) -> str:
  """Mean ± standard error over the seeds, in percent if it is a share; "" of no seed."""
  if not values:
    return ""
  scale = 1 if what in NOT_SHARES else 100
  means = scale * np.array([each.mean() for each in values.values()])
  error = f" ± {means.std(ddof=1) / np.sqrt(len(means)):.1f}" if len(means) > 1 else ""
  return f"{means.mean():.1f}{error}"


def table(
  columns: Sequence[Column], rows: Sequence[Row], published: Sequence[str] = ("published",)
) -> list[str]:
  """Lines of Markdown: each row's published figures, then ours, a column a setting."""
  lines = markdown(["", *published, *(column.head for column in columns)])
  for row in rows:
    ours = [told(column.values(row.cell), row.cell.what) for column in columns]
    theirs = row.published if isinstance(row.published, tuple) else [row.published]
    lines.append(line([row.name, *theirs, *ours]))
  return lines


def intervals(columns: Sequence[Column], compared: Sequence[Compared]) -> list[str]:
  """Lines of Markdown: each difference in each column that has it, with both intervals."""
  lines, many = [], 0
  for column in columns:
    for one in compared:
      if (found := difference(column, one)) is not None:
        many += 1
        lines.append(line([one.name, column.head, *_numbers(one, found)]))
  if not lines:
    return []
  head = markdown(["difference", "", "mean", "over games", "over seeds", "told apart"])
  about = (
    "Intervals are 95% and paired, a game the unit. Over games: the same trained models on other "
    "games. Over seeds: models of other seeds (Student's t). Told apart: 0 lies outside all that "
    f"there are. Of {many} differences that are none, about {many / 20:.1f} would lie outside by "
    "chance."
  )
  return [*head, *lines, "", about]


def difference(column: Column, compared: Compared) -> dict[str, Any] | None:
  """`statistics.paired` over the seeds that both sides have; None if there is none.

  Raises:
    ValueError: the two sides of a seed did not play as many games.
  """
  first, second = column.values(compared.first), column.values(compared.second)
  seeds = sorted(first.keys() & second.keys())
  if not seeds:
    return None
  try:
    times = compared.times
    sides = [[times * values[seed] for seed in seeds] for values in (first, second)]
    return statistics.paired(*sides)
  except ValueError as error:
    raise ValueError(f"{column.folder}: {compared.name}: {error}") from error


def _numbers(compared: Compared, found: dict[str, Any]) -> list[str]:
  cell = compared.first[0] if isinstance(compared.first, tuple) else compared.first
  scale = 1 if cell.what in NOT_SHARES else 100
  between = [found["games"], found["seeds"]]
  shown = [f"[{scale * i[0]:+.1f}, {scale * i[1]:+.1f}]" if i else "–" for i in between]
  known = [i for i in between if i]
  apart = all(low > 0 or high < 0 for low, high in known)
  return [
    f"{scale * found['difference']:+.1f}",
    *shown,
    ("yes" if apart else "no") if known else "–",
  ]


def markdown(head: Sequence[str]) -> list[str]:
  """The two lines that begin a table."""
  return [line(head), "|" + "---|" * len(head)]


def line(cells: Sequence[str]) -> str:
  """A line of a table."""
  return f"| {' | '.join(cells)} |"
