"""OEL, Figure 7: models of several sizes, each with its own knowledge. The paper's gain at every
size, larger ones more.

    JOBS=4 python experiments/oel_figure7.py pocket runs/figure7 \\
        --sizes=0.9M=FILE,1.5M=pocket,6M=FILE
    JOBS=2 python experiments/oel_figure7.py desk runs/figure7 --sizes=0.5B=GGUF,1.5B=GGUF
    python experiments/oel_figure7.py qwen3-1.7b runs/figure7 \\
        --sizes=1.7b=FOLDER,4b=FOLDER,8b=FOLDER

Files are what policy.weights takes: experiments/pretrain_pocket.py makes embedded policies of
other sizes. With a qwen3 setting a size is a key of `frozen_lake.PAPER`, and has the paper's
constants for that model.
"""

import argparse
import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import frozen_lake  # noqa: E402
from readings import Cell, Compared, Row  # noqa: E402
from study import GAMES, Changes, Setting, Study, main  # noqa: E402

GROUPS = {"learning_rate": "consolidation", "steps": "consolidation"}  # else of extraction


def add_options(parser: argparse.ArgumentParser) -> None:
  """The sizes and their weights."""
  told = "NAME=WEIGHTS with commas between, from small to large"
  parser.add_argument("--sizes", default="", help=told)


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, Changes]:
  """An arm a size, numbered in the order given."""
  pairs = [each.partition("=") for each in options.sizes.split(",") if each]
  if not options.print and not (pairs and all(name and weights for name, _, weights in pairs)):
    raise ValueError(f"--sizes is {options.sizes!r}: it must be NAME=WEIGHTS, with commas between")
  found = {}
  for place, (name, _, weights) in enumerate(pairs):
    changes = {"policy.weights": weights}
    if setting.config.startswith("frozen_lake.py:qwen3"):
      size = f"qwen3-{name}"
      if size not in frozen_lake.PAPER:
        raise ValueError(f"--sizes names {name!r}: it must be 1.7b, 4b or 8b for a qwen3 setting")
      constants = frozen_lake.PAPER[size].items()
      exact = frozen_lake.get_config(f"{size}{frozen_lake.AS_IT_IS}")
      changes["deployment.episodes"] = exact.deployment.episodes
      changes |= {f"{GROUPS.get(field, 'extraction')}.{field}": v for field, v in constants}
    found[f"{place + 1}-{name}"] = changes
  _refuse_another_order(list(found), pathlib.Path(options.directory) / setting.name)
  return found


def _refuse_another_order(arms: list[str], folder: pathlib.Path) -> None:
  """Raises ValueError if the directory has a size at another place, or another size at one's."""
  there = [path.name for path in folder.glob("[1-9]*-*") if path.is_dir()]
  together = sorted({*arms, *there}, key=lambda name: (_place(name), name))
  for parts in ([name.partition("-")[part] for name in together] for part in (0, 2)):
    if again := [part for part in parts if parts.count(part) > 1]:
      said = ", ".join(name for name in together if again[0] in name.split("-", 1))
      raise ValueError(
        f"--sizes and {folder} together have {said}: sizes keep their places: give those that are "
        "there as they were, and larger ones behind them, or another directory"
      )


def _place(arm: str) -> int:
  return int(arm.partition("-")[0])


def rows(names: list[str]) -> list[Row]:
  """Each size before, with its knowledge in context, and after."""
  found = []
  for arm in sorted(names, key=_place):
    size = arm.partition("-")[2]
    found.append(Row(f"{size}, base", "", Cell(arm, 0)))
    found.append(Row(f"{size}, in context", "", Cell(arm, 1, "in_context")))
    found.append(Row(f"{size}, consolidated", "gains", Cell(arm)))
  return found


def compared(names: list[str]) -> list[Compared]:
  """What each size gains, and whether the larger of two gains more."""
  order = sorted(names, key=_place)
  found = [Compared(f"gain of {arm.partition('-')[2]}", Cell(arm), Cell(arm, 0)) for arm in order]
  for small, large in itertools.combinations(order, 2):
    told = f"gain of {large.partition('-')[2]} above that of {small.partition('-')[2]}"
    sides = (Cell(large), Cell(small, 0)), (Cell(large, 0), Cell(small))
    found.append(Compared(told, *sides, times=2))  # of two cells the mean is taken
  return found


STUDY = Study(
  title="OEL, Figure 7: sizes, percent passed; published: every size gains, larger ones more",
  settings=GAMES,
  paper="qwen3-1.7b",
  arms=arms,
  rows=rows,
  compared=compared,
  begins="",
  sizes=True,
  options=add_options,
)

if __name__ == "__main__":
  main(STUDY)
