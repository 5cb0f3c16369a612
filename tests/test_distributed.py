"""Several real processes on this machine: what they tell each other, how they start and end."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from processes import ROOT, python_path

from oel_jax.runtime import distributed, together


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def launch(arguments, devices: int = 1, **changes: str) -> subprocess.Popen:
  """Starts a Python of its own with so many CPU devices."""
  env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=python_path(ROOT, ROOT / "tests"))
  env["XLA_FLAGS"] = re.sub(r"(device_count)=\d+", rf"\1={devices}", env["XLA_FLAGS"])
  pipe = subprocess.PIPE
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    env=env | changes,
    cwd=ROOT,
    stdout=pipe,
    stderr=pipe,
    text=True,
  )


def finish(processes, statuses=(0, 0)) -> list[tuple[str, str]]:
  """Waits for all; returns what each printed, to stdout and to stderr."""
  try:
    told = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:  # one that waits for ever must not stay
      process.kill()
  found = [process.returncode for process in processes]
  assert found == list(statuses), (found, told)
  return told


def both(code: str, tmp_path, devices: int = 1, statuses=(0, 0)) -> list[tuple[str, str]]:
  """Runs the code in two processes that have come together; `me` there is the process."""
  begin = """
import json, os, pathlib, sys, time
from oel_jax.runtime import distributed, together
port, me, place = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
distributed.start(
  detect=False, coordinator=f"127.0.0.1:{port}", processes=2, process=me, timeout=120
)
"""
  port = free_port()
  started = [launch(["-c", begin + code, port, me, tmp_path], devices) for me in (0, 1)]
  return finish(started, statuses)


def test_processes_tell_each_other_lists_flags_and_failures(tmp_path):
  code = """
say = lambda value: print(json.dumps(value), flush=True)
say(distributed.gather([[7] * n for n in range(3 * me)], "ragged ids"))
say([distributed.anywhere(flag, "a flag") for flag in (me == 1, False)])
say(len(distributed.gather("x" * (20 << 20), "20 MiB")[1 - me]))

def fails():
  if me == 1:
    raise ValueError("the third prompt is empty")
  return "done"

try:
  distributed.gather_done(fails, "work")
except ValueError as error:
  say(str(error))
try:
  distributed.compare({"config.seed": 0, "config.rounds": 3 + me})
except ValueError as error:
  say(str(error))
try:
  distributed.compare({"the content of config.policy.weights": f"{me}f"}, "all must see one file")
except ValueError as error:
  say(str(error))
distributed.check_shared(place / "run")
say([path.name for path in (place / "run").iterdir()])
try:
  distributed.check_shared(place / f"run_of_{me}", patience=0.5)
except ValueError as error:
  say(str(error).replace(str(place), ""))
if me == 0:
  try:
    distributed.gather(0, "games", deadline=0.1)
  except RuntimeError as error:
    say(str(error))
else:
  time.sleep(1)
  distributed.gather(0, "games")
distributed.finish()
"""
  told = [[json.loads(line) for line in out.splitlines()] for out, _ in both(code, tmp_path)]
  for me, found in enumerate(told):
    assert found[:3] == [[[], [[], [7], [7, 7]]], [True, False], 20 << 20]
    assert (
      found[3] == ["process 1 of 2: the third prompt is empty", "the third prompt is empty"][me]
    )
    assert found[4].startswith("config.rounds is 3 in process 0 and 4 in process 1: all processes")
    assert found[5] == (
      "the content of config.policy.weights is '0f' in process 0 and '1f' in process 1: all must "
      "see one file"
    )
    assert me or found[6] == []
    assert found[7].startswith(f"--workdir is '/run_of_{me}', and process 1 does not see what")
  assert told[0][8] == "process 1 of 2 at 'games' has not come for 0.1 s"


# What is wrong with the start.


@pytest.mark.parametrize(
  "changes, told",
  [
    (dict(process=None), "^--process_id must be given, too: .*--distributed alone"),
    (dict(process=2), "^--process_id is 2, and --num_processes 2: it must be from 0 to 1$"),
    (dict(coordinator="here"), "^--coordinator_address is 'here': it must be HOST:PORT$"),
    (
      dict(process=1),
      "^--coordinator_address is .*: nobody has listened there for 0.1 s .*refused",
    ),
  ],
)
def test_a_start_that_cannot_be_is_told_in_one_line(changes, told):
  asked = dict(coordinator=f"127.0.0.1:{free_port()}", processes=2, process=0) | changes
  with pytest.raises((ValueError, RuntimeError), match=told):
    distributed.start(detect=False, timeout=0.1, **asked)
  assert distributed.count() == 1


def test_a_second_process_zero_is_told():
  with socket.create_server(("127.0.0.1", 0)) as first:
    address = f"127.0.0.1:{first.getsockname()[1]}"
    with pytest.raises(RuntimeError, match="^--process_id is 0, and something listens at 127"):
      distributed.start(detect=False, coordinator=address, processes=2, process=0, timeout=1)


def test_a_process_that_never_comes_is_told():
  """JAX aborts the one that waits, in many lines; the last one is ours."""
  code = """
from oel_jax.runtime import distributed
distributed.start(detect=False, coordinator="127.0.0.1:PORT", processes=2, process=0, timeout=1)
"""
  ((_, said),) = finish([launch(["-c", code.replace("PORT", str(free_port()))])], (2,))
  right = "error: process 0 of 2: not all processes have come together in 1 s, or two have one"
  assert said.splitlines()[-1].startswith(right)


def test_one_more_process_of_an_id_is_told():
  """JAX aborts all, as if one had been restarted; the last line is ours and says so."""
  code = f"""
import sys, time
from oel_jax.runtime import distributed
address, me = "127.0.0.1:{free_port()}", int(sys.argv[1])
distributed.start(detect=False, coordinator=address, processes=2, process=me, timeout=60)
print("together", flush=True)
time.sleep(100)
"""
  first = [launch(["-c", code, me]) for me in (0, 1)]
  for each in first:
    while (line := each.stdout.readline()) != "together\n":
      assert line, each.communicate()
  more = launch(["-c", code, 1])
  try:
    for _, said in finish(first, (2, 2)):
      assert "or one more has come with a --process_id of theirs" in said.splitlines()[-1]
  finally:
    more.kill()
    more.communicate()


def test_nothing_is_started_where_nothing_is_asked_for():
  nobody = dict(coordinator=None, processes=None, process=None, timeout=1)
  distributed.start(detect=False, **nobody)
  distributed.start(detect=True, **nobody | {"processes": 1})
  assert distributed.count() == 1 and distributed.is_writer() and not together.leads()
