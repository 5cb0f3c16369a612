"""Runs a configuration: `python -m oel_jax.main --config=experiments/NAME.py:SIZE --workdir=DIR
[--config.FIELD=VALUE ...]`.

The same command goes on with a run that was stopped. What runs is the online loop, or, where the
configuration has a `task`: "distill", consolidation of a given text alone, or "pretrain", the
pre-training of the embedded policy. `--stage=export` writes a run's newest weights to DIR/export, a
Hugging Face folder; `--stage=withdraw` takes the conversations out of a run that
`--config.withdraw` names; `--stage=plan`, which needs no --workdir, says what the run would take of
the devices that `--config.plan.device` names; `--stage=deploy`, `extract`, `consolidate` or
`evaluate`, with `--round=N`, is that stage of a round alone.
"""

if __name__ == "__main__":
  # Before the imports below, which take seconds: Ctrl-C is one line from the beginning.
  from oel_jax.runtime import signals

  signals.install()

import ast
import json
import logging as python_logging
import os
import pathlib
import re
import runpy
import sys
import traceback
import warnings
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from oel_jax.runtime import distributed, watch
from oel_jax.runtime.finite import NotFiniteError
from oel_jax.runtime.signals import Terminated

ALONE = ("report", "withdraw")  # stages that process 0 does, whatever others there are

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration: experiments/NAME.py, or NAME.py:SIZE.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory: made, or gone on with.")
_STAGE = flags.DEFINE_enum(
  "stage",
  "run",
  ["run", "deploy", "extract", "consolidate", "evaluate", "export", "report", "withdraw", "plan"],
  "run: all of it; export: its newest weights to WORKDIR/export; report: WORKDIR/report anew; "
  "withdraw: takes the conversations that --config.withdraw names out of it; plan: says what the "
  "run will take of the devices that --config.plan.device names, and does nothing else; one "
  "of the others: that stage of --round alone. Of these, consolidate is the server side: it needs "
  "round_N/knowledge and round_N/prompts.jsonl, and leaves round_N/checkpoints.",
)
_ROUND = flags.DEFINE_integer(
  "round", 1, "Round of the --stage, from 1; --stage=evaluate --round=0 is the base model's."
)
_DTYPE = flags.DEFINE_enum(
  "export_dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Type of the exported tensors."
)
_RESUME_ANYWAY = flags.DEFINE_bool(
  "resume_anyway", False, "Go on with a run although its configuration has changed."
)
_GAMES = flags.DEFINE_bool(
  "games", False, "List TextArena's games, with what was tried of each, and do nothing else."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "One process of several, which JAX finds: on TPU pods, GKE, SLURM, under MPI.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT where process 0 of several is to listen for the others."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.", 1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; 0 writes.", 0)
_START_TIMEOUT = flags.DEFINE_float(
  "start_timeout", 300.0, "Seconds in which all processes must have been started.", 1.0
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")


def _fail(text: str) -> NoReturn:
  """Ends the process with status 2 and `text` as one line."""
  text = " ".join(text.split())
  print(f"error: {text}", file=sys.stderr, flush=True)
  watch.failed(text)
  sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them or with the configuration's file ends the process
  with one line.
  """
  try:
    rest = flags.FLAGS(argv)
    if _GAMES.value:
      _list_games()
    if _CONFIG.value is None:
      _fail(
        "--config is missing: give the file of a configuration, for example "
        "--config=experiments/NAME.py:SIZE"
      )
    if not _WORKDIR.value and _STAGE.value != "plan":
      _fail("--workdir is missing: give the run's directory; it is made if need be")
    if not isinstance(_CONFIG.value, config_dict.ConfigDict):
      # In place of a file that it could not read, ml_collections has an object that raises on use.
      getattr(_CONFIG.value, "lock", None)
      _fail(
        f"get_config() of the --config file returned {type(_CONFIG.value).__name__}: it must "
        "return an ml_collections.ConfigDict"
      )
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}: flags are written --NAME=VALUE")
    return rest
  except Exception as error:
    if "--debug" in argv:
      raise
    _fail(_flag_error(argv, error))


def _experiments() -> str:
  """Returns the configurations of the folder experiments, each file's sizes and first sentence."""
  lines = []
  for path in sorted((pathlib.Path(__file__).parents[1] / "experiments").glob("*.py")):
    source = path.read_text(encoding="utf-8")
    if "\ndef get_config(" not in source:
      continue
    try:
      about = ast.get_docstring(ast.parse(source)) or ""
      sizes = ", ".join(runpy.run_path(str(path)).get("SIZES", ()))
    except Exception as error:  # of a file that the user is writing
      about, sizes = f"cannot be read: {error!r}", ""
    sentence = " ".join(about.split("\n\n")[0].split())
    lines += [f"  experiments/{path.name}:SIZE  {sentence}"]
    lines += [f"    SIZE: {sizes}"] if sizes else []
  return "\n".join(["", "Configurations:", *lines, ""]) if lines else ""


def _list_games() -> NoReturn:
  from oel_jax.environments import games

  try:
    for line in games.tried():
      print(line, flush=True)
  except BrokenPipeError:  # whoever reads has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
  sys.exit()


def _flag_error(argv: list[str], error: Exception) -> str:
  # ml_collections wraps errors in errors, which quotes them.
  text = str(error).replace("\\n", " ").replace("\\'", "'")
  if isinstance(error, OSError):
    return str(error.__cause__ or error)
  # Names the flag; of an error inside get_config it holds the traceback, whose last line says what.
  if isinstance(error, flags.Error):
    return re.sub(r"Error whilst parsing config file:.*\n(?=\S)", "", text.strip(), flags=re.DOTALL)
  if isinstance(error, SyntaxError):
    return f"{error.filename}:{error.lineno}: {error.msg}"
  frame = traceback.extract_tb(error.__traceback__)[-1]
  if "ml_collections" not in frame.filename:
    place = f"{frame.filename}:{frame.lineno}"
    return f"{place}: {type(error).__name__}: {text} (--debug shows the traceback)"
  name = re.match(r"\W*(\w+)", text)  # the last part only of the field's name
  given = [
    arg.lstrip("-").partition("=")[0] for arg in argv if arg.lstrip("-").startswith("config.")
  ]
  fields = [field for field in given if name and name[1] in field.split(".")]
  return (
    f"{fields[0]}: the configuration has no such field. "
    f"{' '.join(re.findall('Did you mean[^?]*[?]', text))}"
    if fields
    else text
  )


def _is_told_in_one_line(error: Exception) -> bool:
  """True for errors of files, and for those raised in this package, which are about the user's
  input; elsewhere they are bugs.
  """
  # Of the device; where it was raised says nothing about whose it is.
  if isinstance(error, jax.errors.JaxRuntimeError):
    return False
  frame = traceback.extract_tb(error.__traceback__)[-1]
  known = isinstance(error, (OSError, NotFiniteError))
  return known or pathlib.Path(__file__).parent in pathlib.Path(frame.filename).parents


def _unraisable(found: Any) -> None:
  """Passes on what is raised where nobody can catch it, but for the tracebacks of a failed write.

  Where the disk is full, TensorStore tells asyncio of each array that it could not write, when
  Orbax has closed the event loop: dozens of tracebacks, before the error that is raised and says it
  all.
  """
  if str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)


def _is_not_about_a_write(record: Any) -> bool:
  """False for what asyncio logs of a write that failed, for the same reason as in `_unraisable`:
  which of them it is depends on when the tasks are collected.
  """
  said = str(record.exc_info[1]) if record.exc_info else ""
  # "Task exception was never retrieved", and the like of futures that gather tasks.
  return not ("exception was never retrieved" in record.getMessage() and "Error writing" in said)


def _resolve_paths(config: config_dict.ConfigDict) -> None:
  """Makes the configuration's paths absolute: what its file sets is relative to the file's folder,
  what the command line sets to the working directory.
  """
  from oel_jax import config as config_lib
  from oel_jax.runtime import paths

  flag = flags.FLAGS["config"]
  paths.resolve(
    config,
    config_flags.get_config_filename(flag),
    config_flags.get_override_values(flag),
    names=config_lib.POLICIES,
    # One stage, or one side, needs but some of the files.
    needed=_STAGE.value == "run",
  )


def _start() -> None:
  """Makes this process one of several, if the flags say so."""
  distributed.start(
    detect=_DISTRIBUTED.value,
    coordinator=_COORDINATOR.value,
    processes=_PROCESSES.value,
    process=_PROCESS.value,
    timeout=_START_TIMEOUT.value,
  )


def _compare_processes(config: config_dict.ConfigDict) -> None:
  """Raises ValueError unless the processes can do together what is asked for, and have the same
  configuration, flags, code and run directory.
  """
  task = config.get("task")
  if _STAGE.value == "plan" or task not in (None, "distill") and _STAGE.value == "run":
    what = "--stage=plan" if _STAGE.value == "plan" else f"config.task {task!r}"
    raise ValueError(
      f"{what} is done by one process, and this is one of {distributed.count()}: "
      "give the command once, without --distributed, --coordinator_address, --num_processes and "
      "--process_id"
    )
  from oel_jax.runtime import files, workdir

  folder = files.local(_WORKDIR.value, "--workdir").absolute()
  flag = {
    f"--{name}": value
    for name, value in (
      ("workdir", str(folder)),
      ("stage", _STAGE.value),
      ("round", _ROUND.value),
      ("resume_anyway", _RESUME_ANYWAY.value),
    )
  }
  fields = {
    f"config.{name}": value for name, value in workdir.flat(json.loads(config.to_json())).items()
  }
  distributed.compare({"the code": distributed.code_version(), **flag, **fields})
  distributed.compare(
    {f"the content of config.{name}": of for name, of in workdir.file_digests(config).items()},
    "all processes must see the same files",
  )
  if _STAGE.value not in ALONE:
    # Only a run makes the directory.
    distributed.check_shared(folder, make=_STAGE.value != "export")


def _follow(config: config_dict.ConfigDict) -> None:
  """What all processes but the first do."""
  if _STAGE.value in ALONE:
    return
  if _STAGE.value == "export":
    from oel_jax.tasks import export

    export.follow(config, _WORKDIR.value)
  elif _STAGE.value == "run" and config.get("task") == "distill":
    from oel_jax.tasks import distill

    distill.follow(config, _WORKDIR.value)
  else:
    from oel_jax.stages import begin

    begin.follow(config, _WORKDIR.value)


def _run(config: config_dict.ConfigDict) -> None:
  """Does what --stage and config.task ask for; what that needs is imported here alone."""
  workdir, how = _WORKDIR.value, {"resume_anyway": _RESUME_ANYWAY.value}
  if distributed.count() > 1:
    _compare_processes(config)
  if not distributed.is_writer():
    _follow(config)
    return
  if _STAGE.value == "export":
    from oel_jax.tasks import export

    print(export.run(config, workdir, dtype=_DTYPE.value))
  elif _STAGE.value == "report":
    from oel_jax import report
    from oel_jax.runtime import files

    report.write(files.local(workdir, "--workdir"))
    print(pathlib.Path(workdir) / "report" / "index.html")
  elif _STAGE.value == "withdraw":
    from oel_jax.tasks import withdraw

    withdraw.run(config, workdir)
  elif _STAGE.value == "plan":
    from oel_jax.tasks import plan

    plan.run(config, workdir)
  elif _STAGE.value != "run":
    from oel_jax.tasks import stage

    stage.run(config, workdir, stage=_STAGE.value, number=_ROUND.value, **how)
  else:
    from oel_jax import config as config_lib
    from oel_jax.runtime import named

    task = config.get("task", "oel_jax.loop:run")
    named.function(config_lib.TASKS.get(task, task), "config.task")(config, workdir, **how)


def _fail_in_all(error: Exception) -> None:
  """Ends all processes of a run of several, after the traceback; returns in one of one."""
  if distributed.count() == 1:
    return
  if isinstance(error, jax.errors.JaxRuntimeError):
    watch.explain()  # of a collective, perhaps, whose other end has gone
  traceback.print_exception(error)
  watch.failed(f"{type(error).__name__}: {error}".splitlines()[0], status=1)


def main(argv: list[str]) -> None:
  del argv
  sys.unraisablehook = _unraisable
  python_logging.getLogger("asyncio").addFilter(_is_not_about_a_write)
  # The third: the writes that a failed one left unbegun.
  warnings.filterwarnings("ignore", r"coroutine '.*write_fragment' was never awaited")
  config = _CONFIG.value
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
  # Before anything compiles: a resumed or repeated run then starts in seconds.
  jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("OEL_JAX_CACHE") or os.path.expanduser("~/.cache/oel_jax/jax"),
  )
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  if _STAGE.value == "plan":
    jax.config.update("jax_platforms", "cpu")  # it takes nothing of a device that is here
  try:
    _start()
    _resolve_paths(config)
    _run(config)
    distributed.finish()
  except Terminated as stopped:
    advice = "give the same command again to go on from there"
    print(f"stopped by SIGTERM: {stopped}; {advice}", file=sys.stderr)
    distributed.finish()  # it comes in all processes, after the same step
    raise
  except Exception as error:
    known = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    if known and not _DEBUG.value and _is_told_in_one_line(error):
      _fail(str(error))
    _fail_in_all(error)
    raise


if __name__ == "__main__":
  if any(flag.lstrip("-").startswith("help") for flag in sys.argv[1:]):
    __doc__ += _experiments()
  app.run(main, flags_parser=_parse)
