"""What the table of ten rounds is made of, against counts by hand."""

import argparse
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from test_study import leave_run

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import readings  # noqa: E402
import ten_rounds  # noqa: E402

PASSED = {  # by variant, of each round from the base, what four games show
  "plain": ([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]),
  "guard": ([0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]),
}


class Column(readings.Column):
  """Runs of one seed, of which games and costs alone are known."""

  def values(self, cell):
    games = PASSED[cell.arm]
    known = cell.way == "without" and cell.what == "passed" and cell.round < len(games)
    return {0: np.array(games[cell.round], float)} if known else {}


@pytest.fixture(name="column")
def fixture_column(tmp_path):
  share = {"rate": 0.0, "hits": 0, "of": 4, "interval": [0.0, 0.6]}
  mean = {"mean": 3.0, "of": 4, "interval": [2.0, 4.0]}
  ended = {"passed": 0, "lost": 4, "invalid": 0, "turn_limit": 0}
  play = {"passed": share, "response_tokens": mean, "moves": mean, "ended": ended, "leaks": share}
  for name, games in PASSED.items():
    for number in range(len(games)):
      folder = tmp_path / name / "0" / f"round_{number}"
      folder.mkdir(parents=True)
      sure = {"prompts": 4, "entropy": 0.5 / 2**number, "k": 8, "topk_mass": 0.9, "kl": 0.1}
      found = {"schema": 1, "round": number, "without": play, "retention": {"worlds": share}}
      (folder / "evaluation.json").write_text(json.dumps(found | {"own_answers": sure}))
      spent = {"stage": "evaluate", "seconds": 1.0, "tokens": 10, "flops": 100.0}
      trained = {"stage": "consolidate", "seconds": 1.0, "tokens": 40, "flops": 200.0}
      trained |= {"trained": 40}
      if name == "guard":
        trained |= {"trained": 10, "flops": 120.0}
      stages = [spent, trained][: 1 + (number > 0)]
      (folder / "cost.json").write_text(json.dumps({"schema": 1, "stages": stages}))
  return Column("lake", tmp_path)


def test_a_fall_is_from_the_best_round_to_the_lowest_after_it(column):
  lines = ten_rounds._falls(column, ["plain", "guard"])
  # Of plain, two games of four are lost from round 1 to 2: mean 0.5, variance (4 / 3) / 4.
  errors = 0.5 / np.sqrt(((0.5**2) * 4 / 3) / 4)
  assert lines[2] == f"| plain | 1 | 100.0 | 2 | 50.0 | {errors:.1f} |"
  assert lines[3] == "| guard | 2 | 100.0 | 2 | 0.0 | – |"


def test_rounds_and_costs_are_told_beside_plain(column):
  aside = column.folder / "plain/0/round_3.replaced-1"  # as --stage=withdraw leaves one
  shutil.copytree(column.round("plain", 0, 3), aside)
  lines = ten_rounds.details(column)
  assert "| passed without knowledge, % | base | 1 | 2 | 3 |" in lines
  assert "| plain | 0.0 | 100.0 | 50.0 | 75.0 |" in lines
  assert "| entropy of its own answers, nats × 100 | base | 1 | 2 | 3 |" in lines
  assert lines.count("| plain | 50.0 | 25.0 | 12.5 | 6.2 |") == 1
  # Three rounds of training each, and four of evaluation.
  assert "| plain | 100.0 | 1.00 | 1.00 |" in lines
  assert f"| guard | 25.0 | 0.60 | {(4 * 100 + 3 * 120) / (4 * 100 + 3 * 200):.2f} |" in lines
  assert not any("round 1's knowledge" in line for line in lines)  # which nobody measured


@pytest.mark.parametrize("rounds", (1, 2, 3))
def test_the_last_row_is_of_the_last_round_that_a_run_is_to_have(tmp_path, rounds):
  """Whatever --rounds said; a run that has not come so far has none yet."""
  for name in PASSED:
    games = {
      f"{number} without": [(passed, (4,)) for passed in each]
      for number, each in enumerate(PASSED[name][: rounds + 1])
    }
    leave_run(tmp_path / name / "0", games, rounds=rounds)
    begun = {head: each for head, each in games.items() if int(head[0]) < rounds}
    leave_run(tmp_path / name / "1", begun, rounds=rounds)
  column = readings.Column("lake", tmp_path)
  found = {row.name: column.values(row.cell) for row in ten_rounds.rows(column.arms())}
  for name, games in PASSED.items():
    assert {seed: list(each) for seed, each in found[f"{name}, last round"].items()} == {
      0: games[rounds]
    }
    assert list(found[f"{name}, round 1"][0]) == games[1]
  [compared] = ten_rounds.compared(column.arms())
  above = np.mean(PASSED["guard"][rounds]) - np.mean(PASSED["plain"][rounds])
  assert readings.difference(column, compared)["difference"] == above


def test_variants_differ_from_plain_in_what_they_say():
  options = argparse.Namespace(variants="plain,select,guard", rounds=4)
  found = ten_rounds.arms(None, options)
  assert list(found) == ["plain", "select", "guard"]
  assert found["select"] == found["plain"] | {"consolidation.select": 0.25}
  changed = {name for name in found["guard"] if found["guard"][name] != found["plain"].get(name)}
  assert changed == {
    "consolidation.select",
    "consolidation.balance",
    "consolidation.anchor",
    "consolidation.on_no_gain",
    "extraction.start_from",
  }
  with pytest.raises(ValueError, match="--variants has 'all': they are plain, select"):
    ten_rounds.arms(None, argparse.Namespace(variants="all", rounds=4))
  with pytest.raises(ValueError, match="--rounds is 0: it must be 1 or more"):
    ten_rounds.arms(None, argparse.Namespace(variants="plain", rounds=0))
