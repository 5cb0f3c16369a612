"""Runs of a study as processes, JOBS of them at a time, on DEVICES GPUs: each once, and all ended
when the study is.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from oel_jax.runtime import files

HERE = pathlib.Path(__file__).parent
_devices: queue.SimpleQueue[int] = queue.SimpleQueue()  # those that no run has now
_processes: set[subprocess.Popen] = set()


def give_devices() -> None:
  """Has JOBS runs share the devices from now on."""
  while not _devices.empty():
    _devices.get()
  for job in range(_number("JOBS")):
    _devices.put(job % _number("DEVICES"))


def at_a_time(calls: Sequence[tuple[Any, ...]]) -> list[bool]:
  """What the calls (function, argument, …) return, JOBS of them at a time."""
  with concurrent.futures.ThreadPoolExecutor(_number("JOBS")) as pool:
    try:
      return list(pool.map(lambda call: call[0](*call[1:]), calls))
    except KeyboardInterrupt:
      pool.shutdown(cancel_futures=True)
      raise


def _number(name: str) -> int:
  """The environment's variable of this name, 1 if it is not set; ends the process if it is none."""
  value = os.environ.get(name) or "1"
  if not value.isdigit() or not int(value):
    sys.exit(f"error: {name} is {value!r}: it must be a whole number from 1")
  return int(value)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
  """Has SIGTERM and Ctrl-C end the runs that go on inside the `with` block, which save what they
  have, and then this process, with a line and status 143 or 130. A second one does not wait.
  """

  def stop(number: int, frame: object) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)
    for process in list(_processes):
      process.terminate()
    raise KeyboardInterrupt(number)

  before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  except KeyboardInterrupt as stopped:
    number = stopped.args[0]
    told = f"stopped by {signal.Signals(number).name}: the same command goes on"
    print(told, file=sys.stderr, flush=True)
    sys.exit(128 + number)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def run(folder: pathlib.Path, command: Sequence[str]) -> bool:
  """Runs oel_jax.main with these flags, whose --workdir is `folder`, unless the same have come to
  their end there; its words go to FOLDER.log. Returns whether all went well.

  Raises:
    ValueError: FOLDER.done, which holds the commands that came to their end, is damaged.
    OSError: the folder cannot be made or written.
  """
  done = folder.with_name(f"{folder.name}.done")
  ended = files.read_json(done, advice="remove it") if done.exists() else []
  if command in ended and (folder / "config.json").exists():
    return True
  folder.parent.mkdir(parents=True, exist_ok=True)
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
  device, log = _devices.get(), folder.with_name(f"{folder.name}.log")
  if os.environ.get("DEVICES"):
    environment["CUDA_VISIBLE_DEVICES"] = str(device)
  try:
    status = _status([sys.executable, "-m", "oel_jax.main", *command], environment, log)
  finally:
    _devices.put(device)
  if status:
    print(f"error: {folder} ended with status {status}: see {log}", file=sys.stderr, flush=True)
    return False
  files.write_json(done, [*ended, command])
  return True


def _status(command: Sequence[str], environment: dict[str, str], log: pathlib.Path) -> int:
  """What a process ends with; it has ended when this does, however it does."""
  with open(log, "ab") as out:
    process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
  _processes.add(process)
  try:
    return process.wait()
  finally:
    process.wait()
    _processes.discard(process)


def copy(begun: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes a run directory of what was begun, without its configuration; one that is there stays."""
  if folder.exists():
    return
  partial = folder.with_name(f"{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for path in [*begun.glob("round_*"), *begun.glob("metrics.jsonl")]:
    take = shutil.copytree if path.is_dir() else shutil.copy2
    take(path, partial / path.name)
  partial.rename(folder)
