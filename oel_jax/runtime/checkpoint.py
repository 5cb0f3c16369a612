"""Train states on disk, through Orbax: saved while training goes on, restored onto any number of
devices, whole or not at all.

A checkpoint is DIR/STEP/state (arrays) and DIR/STEP/extra (JSON: iterator state, counters, and a
checksum of each array). Orbax writes it as STEP.orbax-checkpoint-tmp and renames it when whole;
what a killed process left under that name is removed when the directory is next opened.

The checksums (`runtime.checksum`) are taken at save and compared at restore, where the arrays lie:
on a CPU that costs each of the two 1.1 to 1.3 seconds a GiB of the state (12 bytes a parameter:
weights in float32 and two moments), measured on one core of a cloud machine.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from oel_jax.runtime import distributed, schema, watch
from oel_jax.runtime.checksum import checksums

PACKED = 0.9  # what Orbax's compression leaves of random float32 numbers, at least
T = TypeVar("T")
ARRAYS = "arrays"  # the field of `extra` that is ours: path → kind and checksum of each array


class Restored(NamedTuple):
  """A checkpoint as read: its step, its arrays in the shardings asked for, and what was saved
  beside them.
  """

  step: int
  state: Any
  extra: dict[str, Any]


class _Damaged(Exception):
  """A checkpoint is not whole; says why."""


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
  """Named beforehand, so that a process that has not saved anything can read a checkpoint's
  metadata.
  """
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item, handler, args in (
    ("state", ocp.StandardCheckpointHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
    ("extra", ocp.JsonCheckpointHandler(), (ocp.args.JsonSave, ocp.args.JsonRestore)),
  ):
    for arg in args:
      registry.add(item, arg, handler)
  return registry


def _kinds(tree: Any) -> dict[str, str]:
  """Path → type and shape, "float32[30, 20]", of each array. Named tuples and the dicts that Orbax
  makes of them give the same paths.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(
      path, simple=True, separator="/"
    ): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for path, leaf in leaves
  }


def _not_a_traceback_of_orbax(record) -> bool:
  """Orbax logs the traceback of one failed write five times over before it raises it; the error
  that is raised says it all.
  """
  return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _first_line(error: Exception, size: int) -> str:
  """The first line of what an error says, up to so many letters; its type if it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:size]


class Checkpoints:
  """The checkpoints of one training run. Use it in a `with` statement: leaving it waits for what is
  still being written.

  In a run of several processes, every process makes the same calls, and `directory` is on storage
  that they share.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    """Opens `directory`, which is created if need be.

    Args:
      directory: holds one folder a step, and nothing else of ours.
      keep: how many of the latest checkpoints stay. With 1, damage to the only one loses the run.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._saving: int | None = None  # the step that may still be on its way to the disk
    logging.get_absl_logger().addFilter(_not_a_traceback_of_orbax)
    with self._explained("open the checkpoints"):
      options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
      self._manager = ocp.CheckpointManager(
        self.directory, options=options, handler_registry=_handlers()
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except Exception as late:
      if error is None:
        raise
      logging.error("%s", late)  # the error that is already under way says more

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, ascending; one that is still being written counts."""
    return sorted(self._manager.all_steps())

  def need_room(self, abstract_state: Any, saves: int) -> None:
    """Looks, before hours of training, whether the disk has room for what is to be saved: one more
    than are kept, for the oldest goes when the newest is whole.

    Args:
      abstract_state: pytree of arrays or ShapeDtypeStructs, as it will be saved.
      saves: how many times.

    Raises:
      OSError: it has not.
    """
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
    count = min(saves, self._keep + 1 - len(self.steps()))
    free = shutil.disk_usage(self.directory).free
    if free < PACKED * count * each:
      told = (
        f"{self.directory}: the disk has {free / 2**30:.1f} GiB free, and {count} more checkpoints "
        f"of up to {each / 2**30:.1f} GiB will stand there at a time: free some space and run the "
        "same command again"
      )
      raise OSError(errno.ENOSPC, told)

  def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
    """Copies the state to the host and writes it in the background; the device buffers may be
    donated right after.

    Args:
      step: larger than every step saved before, or one that is saved already (then nothing happens:
        the same run gives the same state).
      state: pytree of arrays.
      extra: JSON-able; comes back from `restore`.

    Raises:
      ValueError: `extra` is not JSON, or the step is older than the latest.
      OSError: this or the save before it could not be written (disk full); what was whole before
        stays.
    """
    try:
      schema.digest(extra or {})
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{self.directory}: extra of step {step} cannot be written as JSON: {error}"
      ) from error
    steps = self.steps()
    if step in steps:
      return
    if steps and step < steps[-1]:
      raise ValueError(
        f"{self.directory}: cannot save step {step} after step {steps[-1]}: steps must ascend"
      )
    self.wait()
    self._saving = step
    sums = checksums(state)
    arrays = {path: {"kind": kind, "checksum": sums[path]} for path, kind in _kinds(state).items()}
    extra = schema.sealed((extra or {}) | {ARRAYS: arrays})
    with self._explained(f"write the checkpoint of step {step}"):
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)),
        force=True,
      )

  def wait(self) -> None:
    """Returns when everything saved is on disk.

    Raises:
      OSError: it could not be written; names the step. What was whole before stays.
    """
    step, self._saving = self._saving, None
    with self._explained(f"write the checkpoint of step {step}"):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits, as `wait` does, and lets go of the directory."""
    try:
      self.wait()
    finally:
      # What can fail here has failed, and was reported, in wait()
      with contextlib.suppress(Exception):
        self._manager.close()

  def restore(self, abstract_state: Any) -> Restored | None:
    """Reads the latest checkpoint that is whole.

    One that is not is renamed to STEP.damaged-TIME, with a warning, and the one before it is read.

    Args:
      abstract_state: pytree of ShapeDtypeStructs with shardings (`mesh.abstract_init`), on any
        devices.

    Returns:
      The checkpoint, bit for bit what was saved; None if there is none.

    Raises:
      ValueError: a readable checkpoint holds other arrays than `abstract_state`, that is, another
        model or optimizer wrote it.
    """
    self.wait()
    for step in reversed(self.steps()):
      try:
        extra, arrays, saved = self._alike(step, lambda: self._read_what_is_saved(step))
        self._compare(step, saved, _kinds(abstract_state))
        # Not by the manager, whose barrier one that fails never comes to.
        folder, args = (
          self.directory / str(step) / "state",
          ocp.args.StandardRestore(abstract_state),
        )
        read = lambda: ocp.StandardCheckpointHandler().restore(folder, args=args)
        state = self._alike(step, read)
        self._alike(step, lambda: self._verify(step, state, arrays))
      except _Damaged as error:
        self._set_aside(step, str(error))
        continue
      return Restored(step, state, extra)
    return None

  def _alike(self, step: int, work: Callable[[], T]) -> T:
    """What `work` returns, which reads the checkpoint.

    Raises:
      _Damaged: in all processes, if it failed in one of them.
    """
    found, told = None, None
    try:
      found = work()
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
      raise  # says nothing about the file, and ends this process
    # TensorStore and Orbax raise ValueError, OSError, KeyError and bare Exception for damage
    except Exception as error:
      told = f"{type(error).__name__}: {_first_line(error, 300)}"
    all_told = distributed.gather(told, f"the look at {self.directory / str(step)}")
    for process, told in enumerate(all_told):
      if told:
        whose = f"in process {process} of {len(all_told)}, " if len(all_told) > 1 else ""
        raise _Damaged(whose + told)
    return found

  def _read_what_is_saved(self, step: int) -> tuple[dict[str, Any], Any, dict[str, str]]:
    """`_read_extra`, and path → kind of each array."""
    extra, arrays = self._read_extra(step)
    saved = _kinds(self._manager.item_metadata(step).state.tree)
    if arrays is not None:
      saved = {path: array["kind"] for path, array in arrays.items()}
    return extra, arrays, saved

  def extra(self) -> dict[str, Any] | None:
    """What was saved beside the arrays of the latest checkpoint; None if there is none, or it is
    damaged (`restore` sees to that).
    """
    self.wait()
    try:
      return self._read_extra(self.steps()[-1])[0] if self.steps() else None
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      logging.warning("%s: %s", self.directory, _first_line(error, 300))
      return None

  def _read_extra(self, step: int) -> tuple[dict[str, Any], dict[str, dict[str, str]] | None]:
    """What was saved beside the arrays, and what is known of them; None by an earlier version.
    Raises ValueError if it is damaged.
    """
    folder = self.directory / str(step) / "extra"
    read = ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore())
    extra = schema.loads(json.dumps(read).encode())  # compares its digest
    schema.need(isinstance(extra, dict), "extra", extra, "an object")
    extra.pop(schema.DIGEST, None)
    return extra, extra.pop(ARRAYS, None)

  def _verify(self, step: int, state: Any, arrays: dict[str, dict[str, str]] | None) -> None:
    """Raises ValueError if an array is not what was saved."""
    if arrays is None:
      logging.warning(
        "%s: saved without checksums, by an earlier version of oel_jax: restored unchecked",
        self.directory / str(step),
      )
      return
    for path, found in checksums(state).items():
      if found != arrays[path]["checksum"]:
        raise ValueError(
          f"the array {path} is not what was saved: its checksum was {arrays[path]['checksum']} "
          f"and is {found}"
        )

  def _compare(self, step: int, saved: dict[str, str], asked: dict[str, str]) -> None:
    """Separates a wrong config, which is an error, from a damaged file, which is not."""
    for path in sorted(saved.keys() | asked.keys()):
      if saved.get(path) != asked.get(path):
        has, wants = saved.get(path, "nothing"), asked.get(path, "nothing")
        raise ValueError(
          f"{self.directory / str(step)}: holds {has} at {path}, where this run has {wants}: "
          "the checkpoint is of another architecture or optimizer; use another --workdir or the "
          "config it was made with"
        )

  def _set_aside(self, step: int, reason: str) -> None:
    path = self.directory / str(step)
    aside = path.with_name(f"{step}.damaged-{int(time.time())}")
    logging.warning(
      "%s: unfinished or damaged checkpoint skipped, kept as %s (%s)", path, aside.name, reason
    )
    if distributed.is_writer():
      path.rename(aside)
    distributed.barrier(f"set aside {path}")
    self._manager.reload()

  @contextlib.contextmanager
  def _explained(self, what: str) -> Iterator[None]:
    """Orbax and TensorStore pass on a full disk in several types of error and pages of text; this
    makes one line of it.
    """
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise  # of the device, not of the disk
    except Exception as error:
      if "Gloo" in str(error):  # another process has gone, as the other thread will say
        watch.explain()
      full = (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or "No space left" in str(error)
        or "quota" in str(error)
      )
      reason = (
        "the disk is full; free some space and run the same command again"
        if full
        else _first_line(error, 600)
      )
      code = errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO
      raise OSError(
        code, f"could not {what}: {reason}; those before are whole", str(self.directory)
      ) from error
