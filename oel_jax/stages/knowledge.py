"""A round's knowledge on the disk, and what of it enters prompts."""

from oel_jax.conversations.schema import EMPTY
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.stages.run import KNOWLEDGE, Run


def read(run: Run, number: int) -> list[knowledge_lib.Knowledge]:
  """The round's K texts; [] if they are not all there."""
  folder = run.round(number) / "knowledge"
  if not (run.round(number) / KNOWLEDGE).exists():
    return []
  return [knowledge_lib.read(folder, i) for i in range(run.config.extraction.texts)]


def texts(run: Run, number: int) -> list[str]:
  """The texts that are put into prompts: those that say something, or the empty wrapper where that
  is the point.

  Raises:
    ValueError: none of them says anything; or a file is damaged.
  """
  if run.config.extraction.source == "empty":
    return [EMPTY]
  return [text.text for text in knowledge_lib.nonempty(read(run, number), run.round(number))]
