"""Where metrics are drawn while a run goes on. Each board imports its package when it is opened."""

import os
import pathlib


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

  def close(self) -> None:
    """Closes the file; every point is on disk already."""
    self._writer.close()
