"""The sampling benchmark runs, small, and its shares are what its times say."""

import importlib.util
import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments/benchmarks"
_spec = importlib.util.spec_from_file_location("sampling", FOLDER / "sampling.py")
sampling = importlib.util.module_from_spec(_spec)
sys.path.insert(0, str(FOLDER))  # as for a script: it shares a module with its neighbours
_spec.loader.exec_module(sampling)
sys.path.remove(str(FOLDER))


def test_it_runs_and_its_limit_is_that_of_the_bytes(tmp_path, capsys):
  path = tmp_path / "figures.json"
  result = sampling.main(["--architecture=pocket-tiny", "--rows=tiny", "--repeats=1", "--copy_bytes=1048576", f"--json={path}"])
  assert json.loads(path.read_text()) == result and [row["batch"] for row in result["rows"]] == [1, 4]
  layer = 32 * 2 * 16 + 2 * (32 * 1 * 16) + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 16  # q; k and v; o; feed-forward; norms
  weights = 576 * 32 + 2 * layer + 32
  for row in result["rows"]:
    read = 4 * weights + row["batch"] * (20 + 4) * 2 * 2 * 16 * 4  # 2 layers, keys and values, one head of 16
    assert row["limit_ms"] == pytest.approx(1e3 * read / result["bytes_per_s"])
    assert row["share"] == pytest.approx(row["limit_ms"] / row["decode_ms"])
  assert capsys.readouterr().out.count("| 20 | 8 |") == 2
