"""Whole runs in two processes on this machine: the files of one process, kills, signals, stages."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from test_distributed import finish, free_port, launch

ROUND = {
  "rounds": 1,
  "deployment.episodes": 5,
  "deployment.slots": 4,
  "extraction.texts": 3,
  "extraction.trajectories": 3,
  "extraction.use": 3,
  "extraction.max_knowledge_tokens": 60,
  "consolidation.steps": 3,
  "consolidation.batch_size": 4,
  "consolidation.checkpoint_every": 1,
  "consolidation.gate_episodes": 3,
  "consolidation.log_probe": 3,
  "consolidation.on_no_gain": "warn",
  "evaluation.episodes": 3,
  "evaluation.retention": 1,
  "evaluation.accumulation": (),
}


def command(workdir, cache, *flags: str, **changes) -> list[str]:
  settings = ROUND | {name.replace("__", "."): value for name, value in changes.items()}
  return [
    "-m",
    "oel_jax.main",
    "--config=experiments/frozen_lake.py:pocket",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
    *flags,
  ]


def joining(port: int, me: int, processes: int = 2, timeout: float = 120) -> list[str]:
  flags = dict(coordinator_address=f"127.0.0.1:{port}", num_processes=processes, process_id=me)
  return [f"--{name}={value}" for name, value in (flags | {"start_timeout": timeout}).items()]


def start_both(workdir, cache, *flags: str, devices: int = 1, **changes) -> list[subprocess.Popen]:
  port = free_port()
  return [
    launch(
      command(workdir, cache, *joining(port, me), *flags, **changes),
      devices=devices,
      OEL_JAX_CACHE=str(cache),
    )
    for me in (0, 1)
  ]


def wait_for(pattern: str, workdir, started) -> None:
  """Returns when a file of this name is in the run directory."""
  while not list(workdir.glob(pattern)):
    assert all(process.poll() is None for process in started)
    time.sleep(0.02)


def losses(folder) -> list[float]:
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [line["loss"] for line in lines if line["stage"] == "consolidate" and line["step"]]


@pytest.fixture(scope="module", name="cache")
def fixture_cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compilations")


@pytest.fixture(scope="module", name="pair")
def fixture_pair(cache, tmp_path_factory):
  """The run directory of two processes with one device each, and what they said."""
  workdir = tmp_path_factory.mktemp("pair") / "run"
  return workdir, finish(start_both(workdir, cache))


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_with_as_many_devices(pair, cache, tmp_path):
  workdir, told = pair
  alone = tmp_path / "run"
  finish([launch(command(alone, cache), devices=2, OEL_JAX_CACHE=str(cache))], (0,))
  for path in sorted(alone.glob("round_*/**/*.jsonl")) + sorted(alone.glob("round_1/knowledge/*")):
    assert (workdir / path.relative_to(alone)).read_bytes() == path.read_bytes(), path
  np.testing.assert_allclose(losses(workdir), losses(alone), rtol=0, atol=1e-5)
  made = lambda folder: {
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if "state" not in path.parts and "events." not in path.name
  }
  assert len(losses(alone)) == 3 and made(alone) == made(workdir)
  assert "round 1: deploy" in told[0][0] and told[1][0].count("\n") == told[1][0].count("[Gloo]")


@pytest.mark.slow
def test_a_finished_run_is_found_whole_and_stays_as_it_is(pair, cache):
  workdir, _ = pair
  before = {path: path.stat().st_mtime_ns for path in workdir.glob("round_*/**/*")}
  finish(start_both(workdir, cache))
  assert {path: path.stat().st_mtime_ns for path in workdir.glob("round_*/**/*")} == before


# What is there when a stage begins, or is at work.
TRACES = {
  "deploy": "round_0/evaluation.json",
  "extract": "round_1/prompts.jsonl",
  "gate": "round_1/knowledge/whole",
  "consolidate": "round_1/checkpoints/1",
  "save": "round_1/checkpoints/*orbax-checkpoint-tmp*",
  "evaluate": "round_1/checkpoints/3",
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "stage, victim",
  [
    ("deploy", 0),
    ("deploy", 1),
    ("extract", 1),
    ("gate", 0),
    ("consolidate", 0),
    ("consolidate", 1),
    ("save", 0),
    ("save", 1),
    ("evaluate", 1),
  ],
)
def test_a_process_that_is_killed_ends_the_other_with_one_line_and_the_run_goes_on(
  pair, cache, tmp_path, victim, stage
):
  workdir = tmp_path / "run"
  started = start_both(workdir, cache)
  wait_for(TRACES[stage], workdir, started)
  started[victim].kill()
  begun = time.monotonic()
  other = started[1 - victim]
  _, said = other.communicate(timeout=120)
  assert time.monotonic() - begun < 60 and other.returncode == 2
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  # JAX aborts the others where process 0, which serves its store, has gone.
  right = ["JAX has aborted it, most likely", "process 1 of 2 has shown no sign of life"][victim]
  assert len(errors) == 1 and right in errors[0]
  started[victim].communicate()
  finish(start_both(workdir, cache))
  same_run(workdir, pair[0])


def same_run(workdir, right) -> None:
  """Games, knowledge and prompts byte for byte, and the losses."""
  for path in sorted(right.glob("round_*/**/*.jsonl")) + sorted(right.glob("round_1/knowledge/*")):
    assert (workdir / path.relative_to(right)).read_bytes() == path.read_bytes(), path
  np.testing.assert_array_equal(losses(workdir), losses(right))


@pytest.mark.slow
@pytest.mark.parametrize("stage, victim", [("deploy", 0), ("deploy", 1), ("consolidate", 1)])
def test_sigterm_to_one_process_ends_both_and_the_run_goes_on(pair, cache, tmp_path, victim, stage):
  workdir = tmp_path / "run"
  started = start_both(workdir, cache)
  wait_for(TRACES[stage], workdir, started)
  started[victim].send_signal(signal.SIGTERM)
  begun = time.monotonic()
  said = [process.communicate(timeout=120)[1] for process in started]
  assert time.monotonic() - begun < 30
  if stage == "consolidate":  # both save the step that is under way
    assert [process.returncode for process in started] == [143, 143]
    assert all("is saved in" in text for text in said)
  else:
    assert started[victim].returncode == 143 and "stopped by SIGTERM" in said[victim]
    assert started[1 - victim].returncode == 2
    right = f"error: another process has ended: process {victim} of 2: stopped by SIGTERM"
    assert right in said[1 - victim]
  finish(start_both(workdir, cache))
  same_run(workdir, pair[0])


@pytest.mark.slow
def test_two_processes_of_four_devices_and_one_of_eight_make_the_run_of_one_device(cache, tmp_path):
  spread = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  alone = dict(OEL_JAX_CACHE=str(cache))
  finish([launch(command(tmp_path / "one", cache), **alone)], (0,))
  finish([launch(command(tmp_path / "eight", cache, **spread), devices=8, **alone)], (0,))
  finish(start_both(tmp_path / "pair", cache, devices=4, **spread))
  for name in ("eight", "pair"):
    for path in sorted((tmp_path / "one").glob("round_*/**/*.jsonl")):
      found = tmp_path / name / path.relative_to(tmp_path / "one")
      assert found.read_bytes() == path.read_bytes(), path
    right = losses(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / name), right, rtol=0, atol=1e-5)
  assert len(right) == 3


@pytest.mark.slow
def test_logs_and_another_writer_are_for_two_processes_too(pair, cache, tmp_path):
  """And what touches no devices is done by process 0 beside the other."""
  logs = tmp_path / "logs.jsonl"
  said = (pair[0] / "round_1/user/prefix_trajectories.jsonl").read_bytes()
  logs.write_bytes(said + (pair[0] / "round_1/user/trajectories.jsonl").read_bytes())
  changes = {
    "logs__path": logs,
    "logs__held_out": 0.4,
    "deployment__environment": "",
    "consolidation__gate_episodes": 0,
    "extraction__weights": "pocket",
    "evaluation__in_context": False,
  }
  two, one = tmp_path / "two", tmp_path / "one"
  finish(start_both(two, cache, **changes))
  how = dict(devices=2, OEL_JAX_CACHE=str(cache))
  finish([launch(command(one, cache, **changes), **how)], (0,))
  same = [*one.glob("round_*/**/*.jsonl"), *one.glob("round_1/knowledge/*")]
  for path in same:
    assert (two / path.relative_to(one)).read_bytes() == path.read_bytes(), path
  np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)
  away = [
    json.loads((run / "round_1/evaluation.json").read_text())["held_out"] for run in (two, one)
  ]
  assert away[0]["prompts"] == away[1]["prompts"] > 0
  for name in ("kl_before", "kl_after"):
    np.testing.assert_allclose(away[0][name], away[1][name], rtol=0, atol=1e-5)
  (two / "report/index.html").unlink()
  finish(start_both(two, cache, "--stage=report", **changes))
  assert (two / "report/index.html").exists()
  taken = json.loads((two / "round_1/user/trajectories.jsonl").read_text().splitlines()[0])["id"]
  finish(start_both(two, cache, "--stage=withdraw", withdraw=taken, **changes))
  assert taken in (two / "withdrawn.json").read_text()
  told = finish(start_both(two, cache, "--stage=export", **changes), (2, 2))
  assert "only a model that came from Hugging Face" in told[0][1]


DISTILL = """
import pathlib

from oel_jax import distill

def get_config():
  here = pathlib.Path(__file__).parent
  config = distill.default()
  config.distill.update({name: str(here / f"{name}.txt") for name in NAMES})
  config.distill.obeys = str(here / "check.py") + ":short"
  config.policy.weights = "pocket"
  config.deployment.max_response_tokens = 24
  config.consolidation.update(steps=3, batch_size=5, checkpoint_every=1, log_probe=3)
  return config

NAMES = ("knowledge", "prompts", "held_out", "unrelated")
"""


def distilling(folder, run: str, *flags: str) -> list[str]:
  """A command that trains a text of its own on prompts of its own; uneven numbers of them."""
  said = {
    "knowledge": ["- EXPERIENCE ITEM: G is the goal.", "- EXPERIENCE ITEM: H is a hole."],
    "prompts": [f"Repeat: {'ABCDEFG'[i:]}" for i in range(7)],
    "held_out": [f"Sort: {'GFEDC'[i:]}" for i in range(5)],
    "unrelated": ["Repeat: GAG", "Sort: BAD", "Repeat: FACE"],
  }
  for name, lines in said.items():
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
  (folder / "check.py").write_text("def short(answer):\n  return len(answer) < 7\n")
  (folder / "distill.py").write_text(DISTILL)
  told = [f"--config={folder}/distill.py", f"--workdir={folder / run}"]
  return ["-m", "oel_jax.main", *told, *flags]


@pytest.mark.slow
def test_a_text_is_distilled_by_two_processes_as_by_one_with_as_many_devices(cache, tmp_path):
  """And goes on where one of them was killed."""
  how = dict(OEL_JAX_CACHE=str(cache))
  finish([launch(distilling(tmp_path, "one"), devices=2, **how)], (0,))

  def start() -> list[subprocess.Popen]:
    port = free_port()
    commands = [distilling(tmp_path, "two", *joining(port, me)) for me in (0, 1)]
    return [launch(command, **how) for command in commands]

  started = start()
  wait_for("round_1/checkpoints/1", tmp_path / "two", started)
  started[1].kill()
  _, said = started[0].communicate(timeout=120)
  assert "process 1 of 2 has shown no sign of life" in said
  started[1].communicate()
  told = finish(start())
  assert "recovered: " in told[0][0] and told[1][0].count("\n") == told[1][0].count("[Gloo]")
  one, two = tmp_path / "one", tmp_path / "two"
  for name in ("base", "in_context", "after"):
    answers = [json.loads((run / f"{name}.json").read_text())["answers"] for run in (one, two)]
    assert answers[0] == answers[1] and len(answers[0]) == 5
  np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)
  assert len(losses(one)) == 3
  found = [json.loads((run / "results.json").read_text()) for run in (one, two)]
  assert found[0]["unrelated_kl"] > 0
  np.testing.assert_allclose(*[each.pop("unrelated_kl") for each in found], rtol=0, atol=1e-5)
  for each in found:
    each.pop("digest", None)
  assert found[0]["after"] == found[1]["after"]


@pytest.mark.slow
def test_a_task_for_one_process_is_refused_in_several(tmp_path):
  port, told = free_port(), ["--config=experiments/pretrain_pocket.py", f"--workdir={tmp_path}/run"]
  started = [launch(["-m", "oel_jax.main", *told, *joining(port, me)]) for me in (0, 1)]
  for _, said in finish(started, (2, 2)):
    assert "error: config.task 'pretrain' is done by one process, and this is one of 2: " in said
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_of_different_configurations_are_told(cache, tmp_path):
  port = free_port()
  flags = [joining(port, me) for me in (0, 1)]
  started = [
    launch(command(tmp_path / "run", cache, *flags[me], seed=me), OEL_JAX_CACHE=str(cache))
    for me in (0, 1)
  ]
  for _, said in finish(started, (2, 2)):
    assert "error: config.seed is 0 in process 0 and 1 in process 1: all processes must" in said
  assert not (tmp_path / "run").exists()
