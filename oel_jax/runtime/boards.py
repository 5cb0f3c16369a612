"""Where metrics are drawn while a run goes on. Each board imports its package when it is opened.

A board has `add(stage, at, time, values)` and `close(failed)`.
"""

import os
import pathlib
import secrets
from typing import Any

from absl import logging

from oel_jax.runtime import files, schema

SCHEMA = 1
WANDB_RUN = "wandb.json"  # in a run directory: which run of W&B it is


class TensorBoard:
  """TensorBoard's event files of one run directory."""

  def __init__(self, directory: pathlib.Path):
    # Seconds where PyTorch is installed, which tensorboardX imports then.
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

    self._summary, self._event = summary, Event
    # SummaryWriter's thread dies of a full disk without a word, and then blocks the run when its
    # queue is full; this one writes at once.
    self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")

  def add(self, stage: str, at: int, time: float, values: dict[str, float]) -> None:
    """Adds a point to each of the curves "stage/name".

    Args:
      stage: e.g. "consolidate".
      at: the place on the horizontal axis.
      time: seconds since 1970.
      values: finite numbers by name.

    Raises:
      OSError: the disk is full, or the like.
    """
    for name, value in values.items():
      point = self._summary.scalar(f"{stage}/{name}", value)
      self._writer.write_event(self._event(step=at, wall_time=time, summary=point))
    self._writer.flush()

  def close(self, failed: bool) -> None:
    """Closes the file; every point is on disk already."""
    del failed
    self._writer.close()


class WeightsAndBiases:
  """The run of Weights & Biases that belongs to one run directory: of what is in it, W&B gets the
  numbers and the configuration.

  DIR/wandb.json holds the run's id, so that going on with the directory goes on with the run. Steps
  that are done again after a kill are sent again.
  """

  def __init__(self, directory: pathlib.Path, project: str, config: dict[str, Any]):
    """Begins the run, or goes on with it.

    Args:
      directory: the run directory; its name becomes the run's.
      project: of W&B; another one than before gets a run of its own.
      config: what W&B shows as the run's configuration.

    Raises:
      ImportError: the package wandb is not installed.
      RuntimeError: W&B refuses, e.g. because nobody is logged in.
    """
    wandb = import_wandb(project)
    path = directory / WANDB_RUN
    known = files.read_json(path, _parse) if path.exists() else {}
    if known.get("project") != project:
      known = {"schema": SCHEMA, "project": project, "id": secrets.token_hex(6)}
      files.write_json(path, known)
    # By itself it would also take what is printed, and the source's changes since the last commit.
    silent = dict(console="off", disable_git=True, save_code=False)
    try:
      self._run = wandb.init(
        project=project,
        id=known["id"],
        resume="allow",
        name=directory.name,
        dir=str(directory),
        config=config,
        allow_val_change=True,
        settings=wandb.Settings(**silent),
      )
    except Exception as error:  # of several bases, of which not all are public
      raise RuntimeError(
        f"config.wandb_project is {project!r}, but Weights & Biases does not start "
        f"({type(error).__name__}: {error}): run `wandb login`, set WANDB_MODE=offline, or leave "
        'the field ""'
      ) from error
    self._stages = set()

  def add(self, stage: str, at: int, time: float, values: dict[str, float]) -> None:
    """Adds a point to each of the curves "stage/name" over "stage/step"; as TensorBoard.add, but
    that a failure ends the curves and not the run.
    """
    del time
    if self._run is None:
      return
    try:
      if stage not in self._stages:
        # Its own count of steps goes through all stages.
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._stages.add(stage)
      points = {f"{stage}/{name}": value for name, value in values.items()}
      self._run.log(points | {f"{stage}/step": at})
    except Exception as error:
      logging.warning("Weights & Biases gets no more points (%r); metrics.jsonl has all", error)
      self._run = None

  def close(self, failed: bool) -> None:
    """Sends what is left and ends the run; a failure is told, and ends nothing of ours."""
    if self._run is None:
      return
    try:
      self._run.finish(exit_code=int(failed))
    except Exception as error:
      told = "Weights & Biases was not told of the end (%r); metrics.jsonl has all points"
      logging.warning(told, error)
    self._run = None


def import_wandb(project: str) -> Any:
  """Returns the module wandb.

  Raises:
    ImportError: it, or what it needs, is not installed; `project` is for the error.
  """
  try:
    import wandb

    wandb.init  # a folder of that name can be imported, too
  except (ImportError, AttributeError) as error:
    raise ImportError(
      f"config.wandb_project is {project!r}, but Weights & Biases cannot be imported: pip install "
      f'wandb, or leave the field "" ({error})'
    ) from error
  return wandb


def _parse(value: Any) -> dict[str, Any]:
  """The value of wandb.json, checked; raises ValueError naming the field."""
  schema.need(schema.get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], "1")
  for field in ("project", "id"):
    schema.get(value, field, schema.TOP, str)
  return value
