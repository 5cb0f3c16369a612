"""A round's knowledge on the disk, and what of it enters prompts.

The texts that the gate leaves out are named in knowledge/left_out.json, which crosses to the server
side with them: whoever has the texts knows which are not to be used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from oel_jax.conversations.schema import EMPTY
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.runtime import files, schema
from oel_jax.stages import withdrawn
from oel_jax.stages.run import KNOWLEDGE, LEFT_OUT, Run

SCHEMA = 1


def read(run: Run, number: int) -> list[knowledge_lib.Knowledge]:
  """The round's K texts; [] if they are not all there.

  Raises:
    ValueError: a file is damaged; or an item came from a conversation that was withdrawn.
  """
  folder = run.round(number) / "knowledge"
  if not (run.round(number) / KNOWLEDGE).exists():
    return []
  found = [knowledge_lib.read(folder, i) for i in range(run.config.extraction.texts)]
  gone = withdrawn.read(run.folder)
  if held := {item.trajectory for text in found for item in text.items} & gone:
    raise ValueError(
      f"{folder}: holds items of {len(held)} conversations that were withdrawn: give "
      f"--stage=withdraw --config.withdraw={','.join(sorted(held)):.200} again, which a kill "
      "cut off, or carry knowledge/ here anew"
    )
  return found


def texts(run: Run, number: int) -> list[str]:
  """The texts that the gate tries in prompts: those that say something, or the empty wrapper where
  that is the point.

  Raises:
    ValueError: none of them says anything; or a file is damaged.
  """
  if run.config.extraction.source == "empty":
    return [EMPTY]
  return [text.text for text in knowledge_lib.nonempty(read(run, number), run.round(number))]


def numbers(run: Run, number: int) -> list[int]:
  """The numbers NN of `texts`, in the same order."""
  if run.config.extraction.source == "empty":
    return [0]
  return [i for i, text in enumerate(read(run, number)) if text.text.strip()]


def kept(run: Run, number: int, given: Sequence[str]) -> list[str]:
  """Those of the round's `texts` that are trained on and evaluated: all that the gate did not leave
  out.

  Raises:
    ValueError: a text that was left out is none of these: the files are of two extractions.
  """
  marked = set(left_out(run, number).values())
  if foreign := marked - set(map(schema.digest, given)):
    raise ValueError(
      f"{run.round(number) / LEFT_OUT}: leaves out {len(foreign)} texts that are none of the "
      f"{len(given)} beside it: carry knowledge/ here anew, or remove the file and gate.json to "
      "have the gate played again"
    )
  return [text for text in given if schema.digest(text) not in marked]


def carried(run: Run, number: int) -> list[knowledge_lib.Knowledge]:
  """The round's K texts as the next one begins with them: empty where the gate left one out."""
  marked = left_out(run, number)
  empty = knowledge_lib.Knowledge()
  return [empty if i in marked else text for i, text in enumerate(read(run, number))]


def left_out(run: Run, number: int) -> dict[int, str]:
  """What the gate left out: the text's number NN → its digest; {} if nothing."""
  path = run.round(number) / LEFT_OUT
  return files.read_json(path, _parse) if path.exists() else {}


def leave_out(run: Run, number: int, marked: Mapping[int, tuple[str, str]]) -> None:
  """Has LEFT_OUT say what the gate leaves out: number NN → (text, why)."""
  path = run.round(number) / LEFT_OUT
  now = {i: schema.digest(text) for i, (text, _) in marked.items()}
  if left_out(run, number) == now:
    return
  files.set_aside(path, "the gate leaves out other texts now")
  entries = [{"text": i, "digest": now[i], "why": why} for i, (_, why) in marked.items()]
  if entries:
    files.write_sealed(path, {"schema": SCHEMA, "left_out": entries})


def _parse(value: Any) -> dict[int, str]:
  get, need = schema.get, schema.need
  need(get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], str(SCHEMA))
  entries = get(value, "left_out", schema.TOP, list)
  where = [f"left_out[{i}]" for i in range(len(entries))]
  return {
    schema.whole(entry, "text", place): get(entry, "digest", place, str)
    for entry, place in zip(entries, where, strict=True)
  }
