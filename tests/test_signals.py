"""SIGTERM and Ctrl-C: one line and the status that shells expect, and no step of training is
lost.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest
from processes import python_path

from oel_jax.runtime import signals

# A process that waits for its signal inside a thread pool, as sampling on a CPU does.
WAITING = """
import multiprocessing, sys, threading, time
from concurrent import futures
from oel_jax.runtime import signals
signals.install()
with futures.ThreadPoolExecutor(2) as pool:
  work = [pool.submit(time.sleep, 60) for _ in range(2)]
  print("ready", flush=True)
  futures.wait(work)
"""

TRAINING = """
import time
from oel_jax.runtime import signals
signals.install()
with signals.deferred() as came:
  print("ready", flush=True)
  while not came() or {endless}:
    time.sleep(0.01)
  print("saved", flush=True)
  {last}
print("not reached")
"""


def _sent(script, *numbers):
  """(status, standard output, standard error) of the script, which gets the signals once it is
  ready.
  """
  process = subprocess.Popen(
    [sys.executable, "-c", script],
    env=dict(os.environ, PYTHONPATH=python_path()),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  try:
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
      process.send_signal(number)
      threading.Event().wait(0.2)
    out, err = process.communicate(timeout=20)
  finally:
    process.kill()
  return process.returncode, out, err


@pytest.mark.parametrize(
  "number, status, name",
  [
    (signal.SIGTERM, 143, "SIGTERM"),
    (signal.SIGINT, 130, "Ctrl-C"),
  ],
)
def test_a_signal_ends_the_process_at_once_with_one_line(number, status, name):
  """The threads would sleep for a minute."""
  told = f"stopped by {name}: give the same command again to go on from what is written\n"
  assert _sent(WAITING, number) == (status, "", told)


def test_sigterm_waits_for_the_end_of_a_step_and_a_second_does_not():
  last = 'raise signals.Terminated("step 3 is saved")'
  script = TRAINING.format(endless=False, last=last)
  assert _sent(script, signal.SIGTERM) == (143, "saved\n", "")
  status, out, err = _sent(TRAINING.format(endless=True, last="pass"), *[signal.SIGTERM] * 2)
  assert (
    (status, out) == (143, "") and err.startswith("stopped by SIGTERM") and err.count("\n") == 1
  )


def test_a_sigterm_after_the_last_look_is_not_lost():
  status, out, err = _sent(TRAINING.format(endless=False, last="pass"), signal.SIGTERM)
  assert (status, out) == (143, "saved\n") and err.startswith("stopped by SIGTERM")


def test_ctrl_c_does_not_wait_for_a_step():
  status, out, err = _sent(TRAINING.format(endless=True, last="pass"), signal.SIGINT)
  assert (status, out) == (130, "") and err.startswith("stopped by Ctrl-C") and err.count("\n") == 1


def test_the_handler_before_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with signals.deferred() as came:
    assert not came() and signal.getsignal(signal.SIGTERM) is not before
  with pytest.raises(KeyError), signals.deferred() as came:
    signal.raise_signal(signal.SIGTERM)
    assert came() and signal.getsignal(signal.SIGTERM) is before
    raise KeyError
  assert signal.getsignal(signal.SIGTERM) is before


def test_in_a_thread_nothing_is_deferred():
  found = []

  def work():
    with signals.deferred() as came:
      found.append(came())

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False]
