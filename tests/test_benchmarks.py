"""The benchmarks run, tiny, on a CPU, and count what they divide by; their figures come from a
GPU.
"""

import importlib
import json
import pathlib
import sys
import types

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments/benchmarks"


@pytest.fixture(name="script")
def fixture_script(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  yield importlib.import_module
  for name in ("conversations", "loading", "loss", "step", "measure"):
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
  "name, arguments, rows",
  [
    pytest.param("loss", ["--tiny"], 7, marks=pytest.mark.slow),
    pytest.param("step", ["tiny", "--growth"], 2, marks=pytest.mark.slow),
  ],
)
def test_a_benchmark_runs_and_writes_its_rows(script, tmp_path, capsys, name, arguments, rows):
  script(name).main([*arguments, f"--json={tmp_path / 'found.json'}"])
  found = json.loads((tmp_path / "found.json").read_text())
  assert len(found["rows"]) == rows and found["device"] == "cpu"
  assert all(row["of limit"] > 0 and "error" not in row for row in found["rows"])
  assert "of limit" in capsys.readouterr().out


def test_reading_a_folder_is_measured_in_a_process_of_its_own(script, tmp_path, monkeypatch):
  # What dependencies come by there counts in that process, too.
  (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  arguments = ["--architecture=pocket-tiny", "--repeats=1", f"--json={tmp_path / 'found.json'}"]
  script("loading").main(arguments)
  (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
  assert (
    row["s"] > 0 and row["host GiB"] > 0 and row["model GiB"] > 2 * row["largest tensor GiB"] > 0
  )
  assert row["of plain"] == row["plain s"] / row["s"] > 0
  assert (tmp_path / "seen").exists()


def test_an_older_checkout_is_told_from_one_whose_dependencies_are_missing(script, monkeypatch):
  loading, folder = script("loading"), pathlib.Path("folder")
  monkeypatch.delitem(sys.modules, "oel_jax.policy.weights.huggingface", raising=False)
  with monkeypatch.context() as without:
    without.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="import of safetensors"):
      loading.reader(folder)
  older = types.SimpleNamespace(
    read_architecture=lambda path: "its shape", load=lambda path, shape: (path, shape)
  )
  monkeypatch.setitem(sys.modules, "oel_jax.policy.weights", None)
  monkeypatch.setitem(sys.modules, "oel_jax.policy.huggingface", older)
  assert loading.reader(folder)() == (folder, "its shape")


def test_conversations_are_read_and_extracted_from_at_any_number(script, tmp_path):
  arguments = ["--lines=3000", "--trajectories", "5", "9", f"--json={tmp_path / 'found.json'}"]
  script("conversations").main(arguments)
  found = json.loads((tmp_path / "found.json").read_text())
  assert (found["reading"]["lines"], found["reading"]["damaged"]) == (3000, 3)
  assert 0 < found["reading"]["first s"] < found["reading"]["all s"]
  assert [row["trajectories"] for row in found["extraction"]] == [5, 9]


def test_flops_of_a_step_are_the_published_ones(script):
  """Qwen3-1.7B, 64 x (600 + 1024), knowledge 2048: about 1.9 s of matrix work at 790 TFLOP/s, of
  which a fifth is the teacher's.
  """
  step = script("step")
  work = step.WORK["1.7b"]
  teacher, update = step.flops(work, step.architecture_lib.named(work.architecture))
  assert 1.7 < (teacher + update) / 790e12 < 2.1 and 0.2 < teacher / (teacher + update) < 0.35
