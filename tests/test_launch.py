"""The launchers of runs: what a dry run prints, and that the flags reach oel_jax.main as they were
given. gcloud, xpk, srun and the interpreter are scripts that stand in for them.
"""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = ["--config=a.py:b", "--workdir=/s/run", "--config.policy.weights=/a b/it's $HOME"]
MAIN = ["-m", "oel_jax.main"]

# What each launcher needs to be told, and the extra of the environment that it makes.
LAUNCHERS = {
  "gpu.sh": ({}, "[hf,cuda]"),
  "slurm.sbatch": ({}, "[hf,cuda]"),
  "tpu_pod.sh": ({"TPU_NAME": "pod", "ZONE": "z"}, "[hf,tpu]"),
  "gke.sh": (
    dict(CLUSTER="c", PROJECT="p", ZONE="z", TPU_TYPE="v5litepod-16", STORAGE="s", WORKLOAD="w"),
    "[hf,tpu]",
  ),
}

# The last argument of either holds the command, behind --command=.
STAND_INS = {
  "nvidia-smi": "exit 0",
  "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
  "gcloud": 'cd "$WORKER"; last="${@: -1}"; '
  'if [ "$4" = scp ]; then cp "$5" "${6#*:}"; else exec bash -c "${last#--command=}"; fi',
  "xpk": 'for word in "$@"; do case $word in --script-dir=*) folder=${word#*=} ;; esac; done; '
  'cp -r "$folder" "$WORKER/oel_jax"; cd "$folder"; last="${@: -1}"; '
  'exec bash -c "${last#--command=}"',
}


def script(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/bash\n{text}\n")
  path.chmod(0o755)


@pytest.fixture(name="launch")
def fixture_launch(tmp_path):
  """Runs a launcher in a repository of its own, with stand-ins for what is not here and an
  environment whose interpreter writes down how the package was called.
  """
  top, worker, venv = tmp_path / "top", tmp_path / "worker", tmp_path / "venv"
  shutil.copytree(ROOT / "launch", top / "launch")
  shutil.copy(ROOT / "setup.cfg", top)
  (top / ".gitignore").write_text("ignored\n")
  (top / "ignored").touch()
  subprocess.run(["git", "init", "--quiet", top], check=True)
  worker.mkdir()
  called = tmp_path / "called"
  script(venv / "bin/python", f'[ "$2" != oel_jax.main ] || printf "%s\\0" "$@" > {called}')
  for extra in ("[hf,cuda]", "[hf,tpu]"):
    shutil.copy(ROOT / "setup.cfg", venv / f"installed{extra}")

  def launch(name, *arguments, stand_ins=STAND_INS, **environment):
    for stand_in, text in stand_ins.items():
      script(tmp_path / "bin" / stand_in, text)
    kept = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
    kept["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    kept |= {"VENV": str(venv), "WORKER": str(worker)}
    done = subprocess.run(
      ["bash", top / "launch" / name, *arguments],
      capture_output=True,
      text=True,
      env=kept | environment,
    )
    return done.returncode, done.stdout, done.stderr

  launch.worker, launch.venv = worker, venv
  launch.called = lambda: called.read_text().split("\0")[:-1] if called.exists() else None
  return launch


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_prints_the_commands_and_runs_none(name, launch):
  told, extra = LAUNCHERS[name]
  tell = {stand_in: f'touch "$WORKER/{stand_in}"' for stand_in in (*STAND_INS, "docker", "tar")}
  status, output, errors = launch(name, "--dry-run", *FLAGS, stand_ins=tell, **told)
  assert status == 0, errors
  assert not list(launch.worker.iterdir()) and launch.called() is None
  lines = [shlex.split(line) for line in output.splitlines() if not line.startswith("#SBATCH")]
  python = f"{launch.venv}/bin/python"
  if name == "gpu.sh":
    assert lines == [
      ["environment", str(launch.venv), extra],
      ["exec", "env", "XLA_PYTHON_CLIENT_MEM_FRACTION=.95", python, *MAIN, *FLAGS],
    ]
  elif name == "slurm.sbatch":
    assert "#SBATCH --ntasks-per-node=8" in output and "#SBATCH --gpus-per-node=8" in output
    assert lines == [
      ["environment", str(launch.venv), extra],
      ["srun", "--gpu-bind=none", "--cpus-per-task=12", "--kill-on-bad-exit=1", python]
      + [*MAIN, "--distributed", *FLAGS],
    ]
  elif name == "tpu_pod.sh":
    copy, run = lines
    gcloud, both = ["gcloud", "compute", "tpus", "tpu-vm"], ["--zone=z", "--worker=all"]
    assert copy == [*gcloud, "scp", "/tmp/oel_jax.tar.gz", "pod:oel_jax.tar.gz", *both]
    assert run[:-1] == [*gcloud, "ssh", "pod", *both]
    assert shlex.split(run[-1])[-5:] == ["bash", "oel_jax/launch/worker.sh", *FLAGS]
  else:
    (create,) = lines
    assert create[:3] == ["xpk", "workload", "create"]
    assert create[3:-1] == [
      *("--workload=w", "--cluster=c", "--project=p", "--zone=z", "--tpu-type=v5litepod-16"),
      *("--num-slices=1", "--storage=s", "--max-restarts=10"),
      *("--base-docker-image=python:3.12", "--script-dir=/tmp/oel_jax"),
    ]
    command = create[-1].removeprefix("--command=")
    assert shlex.split(command) == ["bash", "launch/worker.sh", *FLAGS]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_flags_reach_every_process_as_they_were_given(name, launch):
  told, _ = LAUNCHERS[name]
  status, _, errors = launch(name, *FLAGS, **told)
  assert status == 0, errors
  one_process = name == "gpu.sh"
  assert launch.called() == [*MAIN, *([] if one_process else ["--distributed"]), *FLAGS]
  if name in ("tpu_pod.sh", "gke.sh"):
    there = {path.name for path in (launch.worker / "oel_jax").iterdir()}
    assert there == {".gitignore", "launch", "setup.cfg"}


@pytest.mark.parametrize(
  "name, arguments, told, message",
  [
    ("gpu.sh", FLAGS[1:], {}, "--config is not given"),
    ("slurm.sbatch", [FLAGS[0], "--workdirs=/x"], {}, "--workdir is not given"),
    ("tpu_pod.sh", FLAGS, {"ZONE": "z"}, "TPU_NAME is not set: the first lines of"),
    ("gke.sh", FLAGS, dict(CLUSTER="c", PROJECT="p", ZONE="z"), "TPU_TYPE is not set"),
  ],
)
def test_what_is_missing_is_named_before_anything_runs(name, arguments, told, message, launch):
  status, output, errors = launch(name, *arguments, **told)
  assert status == 2 and message in errors and not output and launch.called() is None


def test_a_machine_without_a_gpu_is_told_so(launch):
  status, _, errors = launch("gpu.sh", *FLAGS, stand_ins={"nvidia-smi": "exit 9"})
  assert status == 2 and "nvidia-smi finds no GPU" in errors and launch.called() is None


def test_sbatch_from_another_folder_is_told_so(launch, tmp_path):
  status, _, errors = launch("slurm.sbatch", *FLAGS, SLURM_SUBMIT_DIR=str(tmp_path))
  assert status == 2 and f"{tmp_path} is not the top of the repository" in errors


def test_a_worker_with_an_old_python_makes_its_environment_with_another(launch, tmp_path):
  """TPU VMs have Python 3.10: uv brings 3.12."""
  newer = tmp_path / "newer/python"
  script(newer, f'case "$*" in -c*) echo 3.12 ;; "-m venv"*) cp -r {launch.venv} "$3" ;; esac')
  old = tmp_path / "old/python"
  tells = f'*"python find"*) echo {newer} ;; *) echo "$*" >> {old}.log ;;'
  script(old, f'case "$*" in -c*) exit 1 ;; {tells} esac')
  made = str(tmp_path / "made")
  status, _, errors = launch("worker.sh", *FLAGS, PYTHON=str(old), VENV=made)
  assert status == 0, errors
  assert launch.called() == [*MAIN, "--distributed", *FLAGS]
  assert (tmp_path / "old/python.log").read_text().splitlines() == [
    "-m pip install --quiet --user uv",
    "-m uv python install --quiet 3.12",
  ]


@pytest.mark.parametrize("size", ["desk", "all"])
def test_the_help_desks_script_runs_each_seed_and_prints_its_tables(size, tmp_path):
  """A seed that fails is told, and neither the others nor the tables wait for it."""
  stand_in = tmp_path / "python"  # makes the seed's folder, and prints its arguments
  runs = tmp_path / "my runs"
  fails = '[[ "$*" != *--config.seed=1\\ * ]] || exit 3'
  script(stand_in, f'echo "$@"\n{fails}\n[ $1 != -m ] || mkdir "${{4#--workdir=}}"')
  done = subprocess.run(
    ["bash", "experiments/help_desk.sh", runs, "/m/it's", "--config.rounds=2"],
    cwd=ROOT,
    env=os.environ | {"PYTHON": str(stand_in), "SEEDS": "0 1 7", "JOBS": "3", "SIZE": size},
    capture_output=True,
    text=True,
  )
  for seed in (0, 1, 7):
    asked = [
      *MAIN,
      f"--config=experiments/help_desk.py:{size}",
      f"--workdir={runs}/{seed}",
      f"--config.seed={seed}",
      "--config.policy.weights=/m/it's",
      "--config.rounds=2",
    ]
    assert (runs / f"{seed}.log").read_text() == f"{' '.join(asked)}\n"
  assert done.returncode == 1
  assert done.stderr == f"error: seed 1 ended with status 3: see {runs}/1.log\n"
  tables = [f"experiments/table.py {runs}/0/ {runs}/7/"]
  tables += [f"experiments/table.py --categories {runs}/0/ {runs}/7/"] if size == "all" else []
  assert [line for line in done.stdout.splitlines() if line] == tables


@pytest.mark.parametrize("fails", ["", "--workdir=*/4x4/7 ", "--workdir=*/loop/0 ", "table.py --c"])
def test_the_tables_script_runs_all_and_says_by_its_status_if_one_failed(fails, tmp_path):
  """In a folder with spaces, too, and with signs that mean something to a shell."""
  stand_in, runs = tmp_path / "python", tmp_path / "my runs & a|b"
  stops = f'[[ "$*" != *{fails.replace(" ", chr(92) + " ")}* ]] || exit 3\n' if fails else ""
  script(stand_in, f'echo "$@"\n{stops}[ $1 != -m ] || mkdir -p "${{4#--workdir=}}"')
  done = subprocess.run(
    ["bash", "experiments/table.sh", runs],
    cwd=ROOT,
    env=os.environ
    | {"PYTHON": str(stand_in), "SEEDS": "0 7", "JOBS": "3", "CONTROLS": "own empty"},
    capture_output=True,
    text=True,
  )
  made = sorted(str(path.relative_to(runs)) for path in runs.glob("*/*.log"))
  assert made == sorted(
    f"{name}/{n}.log" for name in ("loop", "own", "empty", "4x4") for n in (0, 7)
  )
  assert f"experiments/table.py --controls {runs}/own {runs}/empty\n" in done.stdout
  assert done.returncode == bool(fails), done.stderr
