"""What a run measured: one JSON line a step in metrics.jsonl, the same numbers for TensorBoard and
Weights & Biases, and a count of compilations.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from oel_jax.runtime import boards, files, schema

SCHEMA = 1
RESERVED = ("schema", "round", "stage", "step", "time", "not_finite", schema.DIGEST)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
  """Counts the programs that JAX compiled, or fetched from its compilation cache, since this object
  was made.

  A count that grows at every step shows shapes that change at every step. Call the object for the
  count; `close` stops it.

  Attributes:
    seconds: that the compiler worked on them, or that they took to fetch, all added up.
  """

  def __init__(self):
    self._count, self.seconds = 0, 0.0
    self._listening, self._tell = True, None
    jax.monitoring.register_scalar_listener(self._begin)
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _begin(self, event: str, _: float, *, fun_name: str = "a program", **__: Any) -> None:
    if event == _COMPILE_EVENT and self._tell:
      self._tell(fun_name.removeprefix("jit(").removesuffix(")"))

  def _listen(self, event: str, duration: float, **_: Any) -> None:
    if event == _COMPILE_EVENT:
      self._count += 1
      self.seconds += duration
      if self._tell:
        self._tell("")

  @contextlib.contextmanager
  def telling(self, tell: Callable[[str], None]) -> Iterator[None]:
    """While the `with` block runs, `tell` is given the name of each program as it begins to be
    compiled, and "" as it is there, in the thread that compiles.
    """
    before, self._tell = self._tell, tell
    try:
      yield
    finally:
      self._tell = before

  def __call__(self) -> int:
    return self._count

  def close(self) -> None:
    """Stops counting; the count stays."""
    if self._listening:
      jax.monitoring.unregister_scalar_listener(self._begin)
      jax.monitoring.unregister_event_duration_listener(self._listen)
      self._listening = False


def read_line(line: bytes) -> dict[str, Any]:
  """Returns the record of one line of metrics.jsonl.

  Raises:
    ValueError: the line is damaged, or not one of metrics.
  """
  record = schema.loads(line)
  schema.need(
    type(schema.get(record, "stage", "the line")) is str, "stage", record["stage"], "a stage's name"
  )
  for field in ("round", "step"):
    schema.whole(record, field, "the line")
  return record


def _lines(path: pathlib.Path) -> list[bytes]:
  """The file's lines with their ends, damaged or not."""
  return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _number(name: str, value: Any) -> int | float | bool:
  array = np.asarray(value)
  if array.size != 1 or array.dtype.kind in "OSUMm":
    raise ValueError(f"metrics: {name} is {value!r}: it must be one number")
  if array.dtype.kind in "biu":
    return array.reshape(()).item()
  return float(array.reshape(()))  # kind "V" are ml_dtypes numbers, such as bfloat16


class Metrics:
  """The metrics of one run directory. In a run of several processes only the first one writes.

  Attributes:
    compiles: call it for the number of programs compiled since this object was made.
  """

  def __init__(self, directory: str | os.PathLike, config: Any = None):
    """Opens DIR/metrics.jsonl for appending; a last line that a kill cut off is dropped, with a
    warning.

    Args:
      directory: created if need be; TensorBoard's event files go there too.
      config: of the run, an ml_collections.ConfigDict; W&B gets the numbers, too, if its
        `wandb_project` names a project.

    Raises:
      ImportError, RuntimeError: W&B is asked for and not installed, or does not start.
    """
    self.compiles = CompileCounter()
    self._path = pathlib.Path(directory) / "metrics.jsonl"
    self._last = collections.defaultdict(dict)  # stage → round → its last step
    self._file, self._boards = None, []
    if jax.process_index() != 0:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    lines = _lines(self._path)
    if lines and not lines[-1].endswith(b"\n"):
      logging.warning("%s:%d: unfinished last line dropped", self._path, len(lines))
      files.write_bytes(self._path, b"".join(lines[:-1]))
    self._boards.append(boards.TensorBoard(self._path.parent))
    if config is not None and config.get("wandb_project"):
      fields = json.loads(config.to_json())
      board = boards.WeightsAndBiases(self._path.parent, config.wandb_project, fields)
      self._boards.append(board)
    self._open()

  def _open(self) -> None:
    self._last.clear()
    for _, record in self._read():
      if record:
        self._count(record["stage"], record["round"], record["step"])
    self._file = open(self._path, "ab")

  def _count(self, stage: str, round: int, step: int) -> None:
    self._last[stage][round] = max(step, self._last[stage].get(round, 0))

  def _read(self) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each line as (bytes, record); the record of a line that is damaged or not ours is None, and
    its bytes are kept.
    """
    found = []
    for number, line in enumerate(_lines(self._path), start=1):
      try:
        record = read_line(line)
      except ValueError as error:
        logging.warning(
          "%s:%d: not a line of metrics; kept as it is (%s)", self._path, number, error
        )
        record = None
      found.append((line, record))
    return found

  def write(
    self, stage: str, step: int, *, round: int, at: int | None = None, **scalars: Any
  ) -> None:
    """Appends one line, and one point to each of TensorBoard's "stage/name" curves.

    TensorBoard's horizontal axis counts steps through all rounds: those of the rounds before, then
    this one's.

    Args:
      stage: e.g. "consolidation".
      step: counted within the stage and round.
      round: counted from 1; 0 where there are no rounds.
      at: the place on TensorBoard's axis, where the stage has no steps and each round is one point.
      **scalars: numbers, or arrays (NumPy or JAX) of one element. NaN and infinities,
        which JSON has not, are written as null, and the line's "not_finite" says which each was:
        {"loss": "nan"}. They give TensorBoard no point.

    Raises:
      ValueError: a value is not one number, or its name is one of RESERVED.
      OSError: the line could not be written (disk full).
    """
    if taken := set(scalars) & set(RESERVED):
      raise ValueError(f"metrics: the names {sorted(taken)} are taken")
    values = {name: _number(name, value) for name, value in scalars.items()}
    if self._file is None:
      return
    now = time.time()
    broken = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    values |= dict.fromkeys(broken)
    line = dict(schema=SCHEMA, round=round, stage=stage, step=step, time=now, **values)
    line = schema.sealed(line | ({"not_finite": broken} if broken else {}))
    if at is None:
      at = sum(last for number, last in self._last[stage].items() if number < round) + step
    try:
      self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
      self._file.flush()
      shown = {name: value for name, value in values.items() if value is not None}
      for board in self._boards:
        board.add(stage, at, now, shown)
    except OSError as error:
      raise files.explained(error, self._path) from error
    self._count(stage, round, step)

  def drop_after(self, round: int, stage: str, step: int) -> None:
    """Removes the lines of this round and stage whose step is larger: they are about to be done
    again from a checkpoint at `step`.

    -1 removes all lines of the round and stage. TensorBoard's event files keep the old points; the
    new ones fall on the same places.
    """
    if self._file is None:
      return
    self._file.close()
    kept = [
      line
      for line, record in self._read()
      if not (
        record and record["round"] == round and record["stage"] == stage and record["step"] > step
      )
    ]
    files.write_bytes(self._path, b"".join(kept))
    self._open()

  def close(self, failed: bool = False) -> None:
    """Closes the files and stops counting compilations. Everything is on disk already: each line is
    handed over when it is written. `failed` is what W&B is told of the run.
    """
    if self._file is not None:
      self._file.close()
      for board in self._boards:
        board.close(failed)
      self._file = None
    self.compiles.close()

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    self.close(failed=kind is not None)
