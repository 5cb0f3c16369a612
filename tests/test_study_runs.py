"""The commands of the paper's tables and figures, whole, with runs that are a shadow of what the
files ask for.
"""

import ast
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from oel_jax import loop
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import distill, stage

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import running  # noqa: E402
import study as study_lib  # noqa: E402

FEWER = {
  "deployment.episodes": 4,
  "deployment.slots": 4,
  "extraction.texts": 2,
  "extraction.trajectories": 4,
  "extraction.use": 4,
  "extraction.top_p": 1.0,
  "extraction.top_k": 0,
  "consolidation.steps": 2,
  "consolidation.batch_size": 4,
  "consolidation.checkpoint_every": 2,
  "consolidation.gate_episodes": 4,
  "consolidation.log_probe": 0,
  "evaluation.episodes": 4,
  "evaluation.top_p": 1.0,
  "evaluation.top_k": 0,
  "evaluation.retention": 1,
}
SHORT = [f"--config.{name}={value}" for name, value in FEWER.items()]
# What each command takes, and a line of its table, as far as no number is in it.
COMMANDS = {
  "oel_table1": ([], "| raw trajectories consolidated | 7.8 | "),
  "oel_table2": (
    ["--other=pocket", "--budgets=40"],
    "| other, in context (40 tokens a response) | ",
  ),
  "oel_figure4": ([], "| round 3, in context with ½ of "),
  "oel_figure5": ([], "| round 3, tokens a response | about 70% of the base | "),
  "oel_figure6": ([], "| other %, off-policy-imitation, round 2 |  | "),
  "oel_figure7": (["--sizes=1.5M=pocket"], "| 1.5M, consolidated | gains | "),
  "opcd_tables": ([], "| on-policy, live teacher |  | 18.8 | "),
  "ten_rounds": (["--rounds=2", "--variants=plain,guard"], "| guard, round 1 | "),
  "contested_axes": (["--axes=renewed,cut"], "| renewed=never+cut=out, round 2, passed % |  | "),
}


def in_this_process(command, environment, log):
  """What `python -m oel_jax.main` does with these flags, where all is compiled already."""
  said = dict(flag.removeprefix("--").split("=", 1) for flag in command[3:])
  path, _, size = said.pop("config").partition(":")
  config = importlib.import_module(pathlib.Path(path).stem).get_config(size)
  fields = {
    name.removeprefix("config."): value for name, value in said.items() if "config." in name
  }
  for name, value in fields.items():
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      pass
    config.update_from_flattened_dict({name: value})
  if "stage" in said:
    stage.run(config, said["workdir"], stage=said["stage"], number=int(said["round"]))
  else:
    (distill if "distill" in config else loop).run(config, said["workdir"])
  return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_makes_its_runs_and_its_table(name, tmp_path, monkeypatch, capsys):
  make = mesh_lib.make_mesh
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda asked: make(asked, jax.devices()[:1]))
  monkeypatch.setattr(study_lib, "_commit", lambda: "")
  monkeypatch.setattr(running, "_status", in_this_process)
  rest, line = COMMANDS[name]
  module = importlib.import_module(name)
  command = ["pocket", str(tmp_path), "--seeds=0", *rest, *SHORT]
  study_lib.main(module.STUDY, command)
  told = capsys.readouterr().out.partition("**")[2]  # what the runs say stands before it
  lines = told.splitlines()
  found = [each for each in lines if each.startswith(line)]
  assert len(found) == 1 and any(c.isdigit() for c in found[0].removeprefix(line)), told
  assert "embedded policy, 3 × 3" in lines[2]
  # The same again, from what is there.
  monkeypatch.setattr(running, "_status", None)
  study_lib.main(module.STUDY, command)
  assert capsys.readouterr().out.partition("**")[2] == told


@pytest.mark.slow
def test_the_command_as_it_is_given(tmp_path):
  """Processes, flags and all."""
  command = [sys.executable, str(ROOT / "experiments/oel_table1.py"), "pocket", str(tmp_path)]
  environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), JOBS="2")
  environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  done = subprocess.run(
    [*command, "--seeds=0", *SHORT], env=environment, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stderr + done.stdout
  assert "| extracted knowledge consolidated | 21.4 | " in done.stdout
  assert "Table made at commit" in done.stdout or not (ROOT / ".git").exists()


@pytest.mark.slow
def test_all_of_them_make_one_file(tmp_path):
  script = [str(ROOT / "experiments/papers.sh"), "pocket", str(tmp_path / "made"), "--print"]
  environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHON=sys.executable)
  done = subprocess.run(["bash", *script], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  told = (tmp_path / "made/papers.md").read_text()
  assert told == done.stdout and told.count("**OEL, ") == 6 and "**OPCD" in told
