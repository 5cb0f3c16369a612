"""A round of the quickstart on a GPU, as a user runs it."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu
TOP = pathlib.Path(__file__).parents[1]


def test_a_round_learns_and_all_its_numbers_are_finite(tmp_path):
  fields = {
    "rounds": 1,
    "evaluation.episodes": 64,
    "evaluation.retention": 16,
    "consolidation.gate_episodes": 16,
  }
  command = [
    sys.executable,
    "-m",
    "oel_jax.main",
    "--config=experiments/frozen_lake.py:pocket",
    f"--workdir={tmp_path}",
  ]
  done = subprocess.run(
    command + [f"--config.{name}={value}" for name, value in fields.items()],
    cwd=TOP,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  before, after = (
    json.loads((tmp_path / f"round_{i}/evaluation.json").read_text()) for i in (0, 1)
  )
  print("passed", before["without"]["passed"], after["without"]["passed"])
  assert after["without"]["passed"]["rate"] > before["without"]["passed"]["rate"]

  def finite(value):
    if isinstance(value, dict):
      return all(map(finite, value.values()))
    if isinstance(value, list):
      return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)

  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert lines and finite(lines) and finite([before, after])
