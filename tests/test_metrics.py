"""metrics.jsonl and TensorBoard's files, after kills too; the compile counter; progress; whole
files.
"""

import contextlib
import functools
import json
import os
import re
import resource
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from oel_jax.runtime import files, progress
from oel_jax.runtime.metrics import CompileCounter, Metrics


def lines(directory):
  return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory):
  """Reads the event files by hand (length, checksum, message, checksum): tag → [(step, value)]."""
  found = {}
  for path in sorted(directory.glob("events.out.tfevents*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = struct.unpack_from("<Q", data, at)[0]
      event = Event.FromString(data[at + 12 : at + 12 + size])
      for value in event.summary.value:
        found.setdefault(value.tag, []).append((event.step, value.simple_value))
      at += size + 16
  return found


def test_lines_types_and_tensorboard(tmp_path):
  with Metrics(tmp_path / "new" / "run") as metrics:
    metrics.write(
      "consolidation",
      1,
      round=1,
      loss=jnp.float32(0.5),
      tokens=np.int64(7),
      last=np.bool_(True),
      half=jnp.bfloat16(1.5),
    )
    metrics.write("consolidation", 2, round=1, loss=np.array([0.25]), tokens=8)
    metrics.write("consolidation", 1, round=2, loss=0.125)
  first, second, third = lines(tmp_path / "new" / "run")
  assert abs(first.pop("time") - second["time"]) < 60 and len(first.pop("digest")) == 16
  assert first == {
    "schema": 1,
    "round": 1,
    "stage": "consolidation",
    "step": 1,
    "loss": 0.5,
    "tokens": 7,
    "last": True,
    "half": 1.5,
  }
  assert type(first["tokens"]) is int and type(first["last"]) is bool and second["loss"] == 0.25
  assert (third["round"], third["step"]) == (2, 1)
  curves = events(tmp_path / "new" / "run")
  # Rounds one after the other.
  assert curves["consolidation/loss"] == [
    (1, 0.5),
    (2, 0.25),
    (3, 0.125),
  ]
  assert curves["consolidation/tokens"] == [(1, 7.0), (2, 8.0)]


def test_tensorboard_counts_the_optimizers_steps_through_all_rounds(tmp_path):
  """As consolidation writes them: a line for step 0, then one a step; round 2 in a new process."""
  curves = {}
  for number in (1, 2):
    with Metrics(tmp_path) as metrics:
      for step in range(17):
        metrics.write("consolidate", step, round=number, **({"loss": step} if step else {"kl": 0}))
      metrics.write("gate", 0, round=number, at=number, passed=0.5)
    for name, points in events(tmp_path).items():
      curves[name] = curves.get(name, []) + points
    for path in tmp_path.glob("events*"):
      path.unlink()  # the second one's would have the same name: of this second and this process
  steps = [(begin + step, step) for begin in (0, 16) for step in range(1, 17)]
  assert curves["consolidate/loss"] == steps and curves["consolidate/kl"] == [(0, 0), (16, 0)]
  assert curves["gate/passed"] == [(1, 0.5), (2, 0.5)]


@pytest.mark.parametrize(
  "damage",
  [
    lambda line: line.replace(b"0.5", b"0.7"),
    lambda line: line[:9] + b"\xff" + line[10:],
    lambda line: b"[" * 100_000 + b"\n",
    lambda line: line.replace(b'"step": 1', b'"step": 1e999'),
    lambda line: b'{"round": 1, "stage": [], "step": 0}\n',
  ],
)
def test_a_damaged_line_is_told_and_kept(tmp_path, caplog, damage):
  with Metrics(tmp_path) as metrics:
    for step in (0, 1, 2):
      metrics.write("s", step, round=1, x=0.5)
  path = tmp_path / "metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  lines[1] = damage(lines[1])
  path.write_bytes(b"".join(lines))
  with Metrics(tmp_path) as metrics:
    metrics.drop_after(1, "s", 0)
  assert (
    f"{path}:2: not a line of metrics; kept as it is" in caplog.text
    and path.read_bytes() == b"".join(lines[:2])
  )


def test_not_a_number_is_null_and_the_line_says_which_it_was(tmp_path):
  with Metrics(tmp_path) as metrics:
    metrics.write("s", 3, round=1, a=float("nan"), b=np.float32("inf"), c=1)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert "NaN" not in text and "Infinity" not in text
  [line] = lines(tmp_path)
  assert (line["a"], line["b"], line["c"]) == (None, None, 1)
  assert line["not_finite"] == {"a": "nan", "b": "inf"}
  assert list(events(tmp_path)) == ["s/c"]


@pytest.mark.parametrize(
  "scalars, told",
  [
    (dict(x=np.arange(3)), "x is"),
    (dict(x="high"), "x is 'high'"),
    (dict(x=None), "x is None"),
    (dict(time=1.0), "time"),
  ],
)
def test_refuses_what_is_not_a_number(tmp_path, scalars, told):
  with Metrics(tmp_path) as metrics:
    with pytest.raises(ValueError, match=told):
      metrics.write("s", 1, round=1, **scalars)
  assert lines(tmp_path) == []


def test_resumed_steps_are_not_doubled(tmp_path, caplog):
  with Metrics(tmp_path) as metrics:
    metrics.write("evaluation", 5, round=1, x=1.0)
    for step in range(1, 6):
      metrics.write("consolidation", step, round=1, x=step)
    for step in range(1, 6):
      metrics.write("consolidation", step, round=2, x=step)
  path = tmp_path / "metrics.jsonl"
  # Killed while writing.
  path.write_text(path.read_text() + "not ours\n" + '{"schema": 1, "round": 2, "sta')
  with Metrics(tmp_path) as metrics:
    assert "metrics.jsonl:13: unfinished last line dropped" in caplog.text
    metrics.drop_after(2, "consolidation", 3)
    metrics.write("consolidation", 4, round=2, x=40)
  text = path.read_text().splitlines()
  assert text[9] == "not ours" and "metrics.jsonl:12: not a line of metrics" in caplog.text
  kept = [json.loads(line) for line in text if line != "not ours"]
  again = [
    ("c", round, step, step) for round, last in ((1, 5), (2, 3)) for step in range(1, last + 1)
  ]
  wanted = [("e", 1, 5, 1.0), *again, ("c", 2, 4, 40)]
  assert [(line["stage"][0], line["round"], line["step"], line["x"]) for line in kept] == wanted
  # Where the dropped step 4 of round 2 stood: after 5 steps of round 1.
  assert (9, 40.0) in events(tmp_path)["consolidation/x"]
  with Metrics(tmp_path) as metrics:
    metrics.drop_after(2, "consolidation", -1)
  assert [
    line["round"]
    for line in map(
      json.loads, (line for line in path.read_text().splitlines() if line != "not ours")
    )
  ] == [1] * 6


def test_compile_counter_counts_programs_not_calls(tmp_path):
  inputs = {size: np.ones(size, np.float32) for size in (3, 4, 5)}
  with Metrics(tmp_path) as metrics:
    function = jax.jit(lambda x: x * 2 + 1)
    start = metrics.compiles()
    for _ in range(3):
      jax.block_until_ready(function(inputs[3]))
    assert metrics.compiles() - start == 1
    assert 0 < metrics.compiles.seconds < 60
    for size in (4, 5, 4, 3):
      jax.block_until_ready(function(inputs[size]))
    assert metrics.compiles() - start == 3
    other = CompileCounter()
  jax.block_until_ready(jax.jit(lambda x: x * 3)(inputs[3]))
  assert metrics.compiles() - start == 3 and other() == 1  # a closed one counts no more
  other.close()


def test_progress_in_a_log_file_is_one_line(capsys):
  with progress.bar("round 1: deploy", 5) as advance:
    advance()
    advance(4)
  out = capsys.readouterr().out
  assert (
    out.startswith("round 1: deploy: 5 of 5 in ") and out.endswith(" s\n") and out.count("\n") == 1
  )


def test_a_log_file_is_told_now_and_then_how_long_it_takes(capsys, monkeypatch):
  clock, compiles = [0.0], Compiles()
  monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

  def compile(seconds):
    compiles.tell("step")
    clock[0] += seconds
    compiles.tell("")

  with progress.bar("round 1: consolidate", 600, compiles) as advance:
    compile(48.0)
    clock[0] += 2.0  # the first step is done: no time of a step
    advance(1, "loss 3")
    for i in range(20):
      clock[0] += 6.0
      if i == 10:  # counts in no step's time
        compile(30.0)
      advance(1, f"loss {i}")
  first, *told, last = capsys.readouterr().out.splitlines()
  assert first == "round 1: consolidate: compiling step, then 600 to do"
  assert told[0] == "round 1: consolidate: 1 program compiled in 48 s, 0 of 600"
  assert told[1] == "round 1: consolidate: 3 of 600, loss 1, 6.00 s each, 59:42 left"
  assert told[2] == "round 1: consolidate: 5 of 600, loss 3, 6.00 s each, 59:30 left"
  assert "round 1: consolidate: 2 programs compiled in 78 s, 11 of 600" in told
  assert told[-1] == "round 1: consolidate: 20 of 600, loss 18, 6.00 s each, 58:00 left"
  assert last == "round 1: consolidate: 21 of 600 in 200.0 s"


class Compiles:
  """In place of a `CompileCounter`: tells what a test says that is compiled."""

  tell = None

  @contextlib.contextmanager
  def telling(self, tell):
    self.tell = tell
    yield


def test_a_terminal_sees_the_program_that_is_waited_for_and_then_the_loss(monkeypatch):
  seen = []
  shown = types.SimpleNamespace(
    add_task=lambda name, total: seen.append(name), update=lambda _, **how: seen.append(how)
  )
  monkeypatch.setattr(progress, "_bar", lambda console: contextlib.nullcontext(shown))
  monkeypatch.setattr("rich.console.Console", lambda file: types.SimpleNamespace(is_terminal=True))
  compiles = Compiles()
  with progress.bar("round 1: consolidate", 9, compiles) as advance:
    compiles.tell("")  # of one that another thread began to compile before
    compiles.tell("step")
    compiles.tell("")
    advance(2, "loss 0.5")
    compiles.tell("probe")
    compiles.tell("")
  assert seen[0] == "round 1: consolidate"
  assert [(how["completed"], how["description"]) for how in seen[1:]] == [
    (0, "round 1: consolidate: compiling step"),
    (0, "round 1: consolidate"),
    (2, "round 1: consolidate: loss 0.5"),
    (2, "round 1: consolidate: compiling probe, 1 program so far"),
    (2, "round 1: consolidate: loss 0.5"),
  ]


def test_a_stage_whose_pieces_are_not_counted_says_how_long_it_took(capsys):
  with progress.bar("base: evaluate", 0):
    pass
  assert re.fullmatch(r"base: evaluate: ended after \d+\.\d s\n", capsys.readouterr().out)


def test_programs_are_told_by_name_as_they_are_compiled():
  told, counter = [], CompileCounter()
  with counter.telling(told.append):
    jax.block_until_ready(jax.jit(lambda x: x * 5, inline=False)(np.ones(3, np.float32)))
    double = jax.jit(functools.partial(jnp.multiply, 2))
    jax.block_until_ready(double(np.ones(3, np.float32)))
  jax.block_until_ready(jax.jit(lambda x: x * 7)(np.ones(3, np.float32)))
  counter.close()
  assert told == ["<lambda>", "", "multiply", ""]


def test_table_shows_every_column_and_text_as_it_is(capsys):
  progress.table(
    [{"model": "[bold]a[/bold]", "pass": 0.123456}, {"model": "b", "tokens": 12, "pass": None}],
    "Round 1",
  )
  out = capsys.readouterr().out
  assert all(part in out for part in ("Round 1", "[bold]a[/bold]", "0.1235", "tokens", "12", "–"))


def test_write_text_is_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"old": 0})
  with open(
    path, encoding="utf-8"
  ) as reader:  # a reader that is in the middle of the file keeps the old one, whole
    files.write_json(path, {"é": 1})
    assert reader.read() == '{\n  "old": 0\n}\n'
  assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
  with pytest.raises(ValueError, match="a.json: cannot be written as JSON"):
    files.write_json(path, {"x": float("nan")})
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for a disk that takes no more
    with pytest.raises(OSError, match="could not write.*a.json"):
      files.write_text(path, "x" * 5000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
  assert os.listdir(tmp_path) == ["a.json"]
  with pytest.raises(FileNotFoundError, match="could not write.*nowhere"):
    files.write_text(tmp_path / "nowhere" / "b.txt", "")


def test_a_chunk_that_cannot_be_made_is_not_said_to_be_unwritten(tmp_path):
  (tmp_path / "b.txt").write_text("old")

  def chunks():
    yield b"new"
    yield (tmp_path / "a.txt").read_bytes()

  with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/a.txt'"):
    files.write_chunks(tmp_path / "b.txt", chunks())
  assert os.listdir(tmp_path) == ["b.txt"] and (tmp_path / "b.txt").read_text() == "old"


def test_explained_says_what_to_do_about_a_full_disk():
  told = str(files.explained(OSError(28, "No space left on device"), "run/x.json"))
  assert "disk is full" in told and "run/x.json" in told
