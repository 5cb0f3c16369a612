"""The command line: what it starts, and one clear line for each mistake."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest
from processes import python_path

from oel_jax import main
from oel_jax.runtime import files

CONFIG = """
import ml_collections
from ml_collections import config_dict

def get_config(size="small"):
  if size not in ("small", "pretrain"):
    raise ValueError(f"size {size!r}: it must be small or pretrain")
  group = dict(steps=3, weights=config_dict.placeholder(str))
  policy = dict(weights="models/mine")
  config = ml_collections.ConfigDict(dict(seed=0, rate=0.5, group=group, policy=policy))
  if size == "pretrain":
    config.task = "pretrain"
  return config
"""

# Stands in for the stages, then runs main as `python -m oel_jax.main` does.
DRIVER = """
import runpy, sys, types
import jax, oel_jax, oel_jax.pocket

def run(config, workdir, resume_anyway=None):
  group = config.group
  print("loop", config.seed, group.steps, group.weights, workdir, resume_anyway, config.is_locked)
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  print("cache", jax.config.jax_compilation_cache_dir, seconds)
  if config.rate == 6.0:
    print("weights", config.policy.weights)
  if config.rate == 1.0:
    open("/nowhere/at/all")
  if config.rate == 3.0:
    from oel_jax.runtime import finite, signals
    ends = [
      signals.Terminated("step 7 is saved in X"),
      finite.NotFiniteError("step 5: loss is nan"),
    ]
    raise ends[config.seed]
  if config.rate == 4.0:
    import os, signal
    os.kill(os.getpid(), config.seed)
    raise RuntimeError("not ended by the signal")
  if config.rate == 5.0:
    import resource
    from oel_jax.runtime.checkpoint import Checkpoints
    with Checkpoints(workdir) as checkpoints:
      # Stands for a disk that takes no more.
      resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
      key = jax.random.key(0)
      checkpoints.save(2, {str(i): jax.random.normal(key, 100_000) for i in range(12)})
      checkpoints.wait()
  if config.rate == 2.0:
    jax.numpy.zeros((2, 3)).reshape(7)

def pretrain(config, workdir, resume_anyway):
  print("pretrain", config.seed, workdir)

for package, name, function in ((oel_jax, "loop", run), (oel_jax.pocket, "pretrain", pretrain)):
  module = types.ModuleType(name)
  module.run = function
  sys.modules[f"{package.__name__}.{name}"] = module
  setattr(package, name, module)
runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)
"""


# Forks itself for each line of its input, which tells the flags and where the output goes; answers
# with the exit status. What takes two seconds of each start, importing JAX, is done once; the child
# runs and ends as a process that was started with these flags.
SERVER = """
import json, os, sys, warnings
import absl.app, jax, ml_collections
from ml_collections import config_flags

for line in sys.stdin:
  order = json.loads(line)
  with warnings.catch_warnings():
    # JAX has no threads yet, of which they warn: nothing has been computed.
    warnings.filterwarnings("ignore", ".*fork")
    child = os.fork()
  if not child:
    break
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
  os._exit(0)
for number, name in enumerate((os.devnull, order["out"], order["err"])):
  os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
os.environ["OEL_JAX_CACHE"] = order["cache"]
sys.argv = order["argv"]
with open(sys.argv[0]) as file:
  exec(compile(file.read(), sys.argv[0], "exec"), {"__name__": "driver"})
"""


def environment(cache: pathlib.Path) -> dict[str, str]:
  own = dict(JAX_PLATFORMS="cpu", PYTHONPATH=python_path(), OEL_JAX_CACHE=str(cache))
  return os.environ | own


@pytest.fixture(scope="module", name="server")
def fixture_server(tmp_path_factory):
  folder = tmp_path_factory.mktemp("server")
  (folder / "server.py").write_text(SERVER)
  with subprocess.Popen(
    [sys.executable, str(folder / "server.py")],
    env=environment(folder),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture(name="start")
def fixture_start(tmp_path, server):
  """`alone`: in an interpreter of its own, as users start it."""
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "driver.py").write_text(DRIVER)
  (tmp_path / "models/mine").mkdir(parents=True)

  def start(*flags: str, size: str = "", alone: bool = False) -> subprocess.CompletedProcess:
    argv = [str(tmp_path / "driver.py"), f"--config={tmp_path}/config.py{size}"]
    argv += [f"--workdir={tmp_path}/run", *flags]
    if alone:
      return subprocess.run(
        [sys.executable, *argv],
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=60,
      )
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("")
    err.write_text("")
    order = dict(argv=argv, out=str(out), err=str(err), cache=str(tmp_path / "cache"))
    print(json.dumps(order), file=server.stdin, flush=True)
    status = int(server.stdout.readline())
    return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())

  return start


def test_starts_the_loop_with_the_overrides(start, tmp_path):
  flags = "--config.seed=4", "--config.group.weights=pocket", "--resume_anyway"
  done = start(*flags, alone=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    f"loop 4 3 pocket {tmp_path}/run True True",
    f"cache {tmp_path}/cache 0.3",
  ]


def test_help_lists_the_experiments_and_their_sizes(start):
  out = start("--help").stdout
  assert "experiments/frozen_lake.py:SIZE  Frozen Lake, 3 × 3 with two holes" in out
  assert "SIZE: pocket, pocket-table, pocket-4x4, qwen3-1.7b, qwen3-4b, qwen3-8b" in out


@pytest.mark.parametrize(
  "source, told",
  [
    ("def get_config(:\n  pass\n\ndef get_config():\n", "cannot be read: SyntaxError("),
    ("import no_such_package\n\ndef get_config(size):\n", "cannot be read: "),
    ('"""Mine."""\nSIZES = 1 / 0\n\ndef get_config():\n  pass\n', "ZeroDivisionError("),
  ],
)
def test_help_lists_the_others_beside_a_file_that_is_broken(source, told, tmp_path, monkeypatch):
  folder = tmp_path / "experiments"
  folder.mkdir()
  (folder / "broken.py").write_text(source)
  (folder / "whole.py").write_text(
    '"""A game.\n\nMore."""\nSIZES = ("s", "m")\n\ndef get_config():\n  pass\n'
  )
  (folder / "table.py").write_text("print('not an experiment')\n")
  monkeypatch.setattr(main, "__file__", str(tmp_path / "oel_jax/main.py"))
  broken, whole, sizes = main._experiments().strip().splitlines()[1:]
  assert broken.startswith("  experiments/broken.py:SIZE  cannot be read: ") and told in broken
  assert (whole, sizes) == ("  experiments/whole.py:SIZE  A game.", "    SIZE: s, m")


def test_starts_the_pre_training(start, tmp_path):
  assert start(size=":pretrain").stdout == f"pretrain 0 {tmp_path}/run\n"


@pytest.mark.slow
def test_paths_of_the_configuration_are_relative_to_it_and_those_given_to_where_one_is(
  start, tmp_path
):
  here = pathlib.Path.cwd()
  for flags, found in (
    ((), tmp_path / "models/mine"),
    (("--config.policy.weights=models/mine",), here / "models/mine"),
    (("--config.policy.weights=pocket",), "pocket"),
    (("--config.policy.weights", "../x"), here.parent / "x"),
  ):
    assert start("--config.rate=6.0", *flags).stdout.splitlines()[-1] == f"weights {found}"
  (tmp_path / "models/mine").rmdir()
  done = start()
  assert done.returncode == 2 and done.stderr == (
    "error: config.policy.weights is 'models/mine': there is no such file or folder, neither in "
    f"{tmp_path}, where the configuration's file lies, nor in {here}, the working directory\n"
  )


@pytest.mark.parametrize(
  "flag, told",
  [
    (
      "--config.group.step=4",
      'config.group.step: the configuration has no such field. Did you mean "steps"',
    ),
    ("--config.seed=1.5", "--config.seed=1.5: invalid literal for int"),
    ("--config.seed=None", "--config.seed=None: invalid literal for int"),
    ("--config.rate=high", "--config.rate=high: could not convert string to float"),
    ("--bogus=1", "bogus"),
    ("bogus", "unexpected argument 'bogus'"),
    ("--config=/nowhere/config.py", "/nowhere/config.py"),
    ("--workdir=", "--workdir is missing"),
    ("--stage=play", "value should be one of <run|deploy|extract|consolidate|evaluate"),
    ("--round=first", "--round=first"),
    ("--config.rate=1.0", "No such file or directory: '/nowhere/at/all'"),
  ],
)
def test_a_mistake_is_one_line(start, flag, told):
  done = start(flag)
  errors = done.stderr.splitlines()
  assert done.returncode == 2 and len(errors) == 1, done.stderr
  assert errors[0].startswith("error: ") and told in errors[0]


AGAIN = "give the same command again to go on"


@pytest.mark.parametrize(
  "rate, seed, status, told",
  [
    (3.0, 1, 2, "error: step 5: loss is nan"),
    (3.0, 0, 143, f"stopped by SIGTERM: step 7 is saved in X; {AGAIN} from there"),
    (4.0, signal.SIGTERM, 143, f"stopped by SIGTERM: {AGAIN} from what is written"),
    (4.0, signal.SIGINT, 130, f"stopped by Ctrl-C: {AGAIN} from what is written"),
  ],
)
def test_a_run_that_stops_says_why_in_one_line(start, rate, seed, status, told):
  done = start(f"--config.rate={rate}", f"--config.seed={int(seed)}")
  assert (done.returncode, done.stderr) == (status, told + "\n")


def test_a_checkpoint_that_cannot_be_written_is_one_line(start):
  """TensorStore and Orbax each have a traceback for every array; `_unraisable` lets others pass."""
  done = start("--config.rate=5.0")
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert "could not write the checkpoint of step 2" in done.stderr


def test_what_else_nobody_can_catch_is_shown(monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
  for text in ("Event loop is closed", "another"):
    main._unraisable(types.SimpleNamespace(exc_value=RuntimeError(text)))
  assert [str(found.exc_value) for found in shown] == ["another"]
  never = "Task exception was never retrieved\nfuture: <Task>"
  for said, error, passes in (
    (never, ValueError('Error writing "0/0"'), False),
    (never, ValueError("another"), True),
    ("Executing took 1 s", None, True),
  ):
    info = error and (type(error), error, None)
    record = logging.LogRecord("asyncio", logging.ERROR, "", 1, said, (), info)
    assert main._is_not_about_a_write(record) == passes


def test_an_unknown_size_is_one_line(start):
  done = start(size=":huge", alone=True)
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert (
    "config.py:huge" in done.stderr and "size 'huge': it must be small or pretrain" in done.stderr
  )


def test_debug_and_errors_that_are_bugs_keep_their_traceback(start):
  done = start("--config.rate=1.0", "--debug")
  assert done.returncode == 1 and "Traceback" in done.stderr and "FileNotFoundError" in done.stderr
  done = start("--config.rate=2.0")  # raised inside JAX: not something that the user wrote
  assert done.returncode == 1 and "Traceback" in done.stderr and "reshape" in done.stderr


def test_an_error_of_this_package_is_one_line(tmp_path):
  with pytest.raises(ValueError) as ours:
    files.write_json(tmp_path / "x", float("nan"))
  with pytest.raises(ValueError) as anothers:
    int("elsewhere")
  assert main._is_told_in_one_line(ours.value)
  assert not main._is_told_in_one_line(anothers.value)
