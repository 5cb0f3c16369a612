"""The benchmarks run, tiny, on a CPU, and count what they divide by; their figures come from a
GPU.
"""

import importlib
import json
import pathlib
import sys
import types

import jax
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments/benchmarks"


HOST = "xla:none:30:8:unroll"


@pytest.fixture(name="script")
def fixture_script(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  yield importlib.import_module
  for name in (
    "cold",
    "conversations",
    "loading",
    "loss",
    "packing",
    "plan",
    "sent",
    "size",
    "step",
    "measure",
    "figures_file",
  ):
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
  "name, arguments, rows",
  [
    pytest.param("loss", ["--tiny"], 7, marks=pytest.mark.slow),
    pytest.param("step", ["tiny", "--growth"], 2, marks=pytest.mark.slow),
    pytest.param("step", ["tiny", f"--how={HOST},{HOST}:1"], 2, marks=pytest.mark.slow),
    pytest.param("step", ["tiny", "--mesh=fsdp=2", "--strong"], 3, marks=pytest.mark.slow),
  ],
)
def test_a_benchmark_runs_and_writes_its_rows(script, tmp_path, capsys, name, arguments, rows):
  script(name).main([*arguments, f"--json={tmp_path / 'found.json'}"])
  found = json.loads((tmp_path / "found.json").read_text())
  assert len(found["rows"]) == rows and found["device"] == "cpu"
  assert all(row["of limit"] > 0 and "error" not in row for row in found["rows"])
  assert "of limit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_plan_is_put_beside_what_a_round_used(script, tmp_path, rank):
  """Of fewer samples a step than the probe has, too; on a CPU nobody counts what is used."""
  small = {
    "plan.device": f"cpu,{jax.device_count()}",
    "consolidation.batch_size": 4,
    "consolidation.lora_rank": rank,
    "consolidation.log_probe": 8,
    "deployment.max_response_tokens": 16,
    "plan.prompt_tokens": 64,
    "extraction.max_knowledge_tokens": 64,
  }
  flags = [f"--config.{name}={value}" for name, value in small.items()]
  script("plan").main(["pocket-tiny", f"--json={tmp_path / 'found.json'}", *flags])
  rows = {row["what"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
  assert all(rows[name]["planned GiB"] > 0 for name in ("probe", "sampling", "step", "all"))


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
  for name in ("huggingface", "safetensors_folder"):  # imported again
    monkeypatch.delitem(sys.modules, f"oel_jax.policy.weights.{name}", raising=False)
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


@pytest.mark.slow
def test_four_processes_make_of_a_log_what_one_makes(script, tmp_path):
  script("size").main(["--tiny", f"--json={tmp_path / 'found.json'}"])
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["the same"] and [row["processes"] for row in found["rows"]] == [1, 4]
  (samples,) = found["samples"]
  assert found["lines"] == 2000 and 190 < int(samples.partition(" ")[0]) <= 202
  assert all(row["logs s"] > 0 and row["sampling s"] > 0 for row in found["rows"])
  peaks = [float(peak) for peak in found["rows"][1]["peak MB"].split(", ")]
  assert len(peaks) == 4 and min(peaks) > 0


def test_layers_that_are_not_compiled_send_what_the_last_compiled_one_does(script):
  two = {"fsdp": {"all-gather": 8.0}, "data": {"all-reduce": 4.0}}
  three = {"fsdp": {"all-gather": 11.0, "all-reduce": 1.0}, "data": {"all-reduce": 5.0}}
  assert script("sent").scaled(two, three, 5) == {
    "fsdp": {"all-gather": 11.0 + 5 * 3.0, "all-reduce": 1.0 + 5 * 1.0},
    "data": {"all-reduce": 5.0 + 5 * 1.0},
  }


def test_shapes_of_packed_batches_are_counted_without_a_step(script, tmp_path):
  script("packing").main(["tiny", "--shapes", f"--json={tmp_path / 'found.json'}"])
  (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
  # Eight prompts of 5 to 12 tokens and responses of up to 16, in rows of a tile.
  assert row["programs"] == 1 and row["rows x length x responses x texts"].startswith("8x128x")
  assert 8 * 6 <= row["tokens"] <= 8 * 28 and row["micro-batches"] >= 1
  assert row["padding"] == pytest.approx(1 - row["tokens"] / (128 * row["micro-batches"]))


def test_flops_of_a_step_are_the_published_ones(script):
  """Qwen3-1.7B, 64 x (600 + 1024), knowledge 2048: about 1.9 s of matrix work at 790 TFLOP/s, of
  which a fifth is the teacher's.
  """
  step = script("step")
  work = step.WORK["1.7b"]
  teacher, update = step.flops(work, step.architecture_lib.named(work.architecture))
  assert 1.7 < (teacher + update) / 790e12 < 2.1 and 0.2 < teacher / (teacher + update) < 0.35


STANDS_IN = """
import json, os, pathlib, sys
assert os.environ["OEL_JAX_CACHE"] and not pathlib.Path(os.environ["OEL_JAX_CACHE"]).exists()
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).split("=")[1])
if "--fail" in sys.argv:
  sys.exit("no such game")
lines = [{"stage": "evaluate", "step": 0}]
took = {1: 9.0, 2: 0.2, 3: 0.3, 4: 0.4}
lines += [{"stage": "consolidate", "step": n, "seconds": s} for n, s in took.items()]
folder.mkdir()
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
for number, stages in ((0, ["evaluate"]), (1, ["deploy", "evaluate"]), (2, ["deploy", "evaluate"])):
  (folder / f"round_{number}").mkdir()
  entries = [{"stage": stage, "seconds": FACTOR * (number + 1)} for stage in stages]
  if COUNTS:
    entries = [entry | {"programs": 3, "compile_seconds": 0.5} for entry in entries]
  (folder / f"round_{number}/cost.json").write_text(json.dumps({"stages": entries}))
"""


def test_cold_runs_are_told_stage_by_stage_beside_another_checkouts(script, tmp_path, monkeypatch):
  cold = script("cold")
  for name, factor, counts in (("now", 0.001, True), ("before", 0.004, False)):
    (tmp_path / name / "oel_jax").mkdir(parents=True)
    (tmp_path / name / "oel_jax/__init__.py").touch()
    code = STANDS_IN.replace("FACTOR", str(factor)).replace("COUNTS", str(counts))
    (tmp_path / name / "oel_jax/main.py").write_text(code)
  monkeypatch.setattr(cold, "HERE", tmp_path / "now")
  file = tmp_path / "cold.json"
  cold.main([f"--against={tmp_path / 'before'}", "--repeats=1", f"--json={file}", "--", "--x=1"])
  rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
  assert rows["deploy"]["s"] == pytest.approx(0.005) and rows["deploy"]["faster"] == pytest.approx(
    4
  )
  assert rows["base evaluate"]["s"] == pytest.approx(0.001)
  assert (rows["first step"]["s"], rows["a later step"]["s"]) == (9.0, 0.3)
  assert rows["programs"] == {"what": "programs", "s": 15} and rows["compiling"]["s"] == 2.5
  parts = ("begin and end", "base evaluate", "deploy", "evaluate")
  assert sum(rows[name]["s"] for name in parts) == pytest.approx(rows["whole"]["s"])
  with pytest.raises(RuntimeError, match="now: the run failed: no such game"):
    cold.main(["--repeats=1", "--", "--fail"])


@pytest.mark.parametrize(
  "name, arguments",
  [
    ("cold", []),
    ("conversations", []),
    ("loading", []),
    ("loss", []),
    ("packing", ["equal"]),
    ("peer_vllm", []),
    ("plan", ["qwen3-1.7b"]),
    ("sampling", []),
    ("sent", []),
    ("size", []),
    ("step", []),
  ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
  script, tmp_path, capsys, name, arguments
):
  for path in (tmp_path, tmp_path / "nowhere/found.json"):
    with pytest.raises(SystemExit) as error:
      script(name).main([*arguments, f"--json={path}"])
    assert error.value.code == 2
    assert f"argument --json: {str(path)!r}: it must be a file" in capsys.readouterr().err
  there = sorted(path.name for path in FOLDER.glob("*.py") if "--json" in path.read_text())
  assert f"{name}.py" in there and len(there) == 12  # with figures_file.py: all that have the flag


@pytest.mark.parametrize("flag", ("--architecture", "--weights", "--against"))
def test_what_is_no_architecture_weights_or_checkout_is_told_before_weights_are_written(
  script, capsys, flag
):
  with pytest.raises(SystemExit) as error:
    script("loading").main([f"{flag}=nosuch"])
  assert error.value.code == 2 and f"{flag} is 'nosuch': " in capsys.readouterr().err
