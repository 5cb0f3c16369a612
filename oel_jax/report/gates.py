"""The gate's record, gate.json, which evaluation.json repeats with its decision."""

import dataclasses
import pathlib
from typing import Any

from oel_jax.report.measures import Measure, read_share
from oel_jax.runtime import files, schema
from oel_jax.runtime.schema import get, need, whole

SCHEMA = 1
DECISIONS = ("train", "warn", "skip")


@dataclasses.dataclass(frozen=True)
class GateText:
  """What the gate says of one knowledge text: `number` NN; games passed with it, responses that the
  limit cut, `p` of Fisher's exact test that it hurts (one-sided), and whether it is left out.
  """

  number: int
  passed: Measure
  cut: Measure
  p: float
  left_out: bool


@dataclasses.dataclass(frozen=True)
class Gate:
  """Whether knowledge in the prompt helped the round's first weights, and what was decided: one of
  DECISIONS.

  Attributes:
    without: games passed without knowledge, and `with_knowledge`.
    cut_without: responses that the limit of tokens cut, and `cut_with`; None by an earlier version.
    texts: one by one; () by an earlier version.
    kept: games passed with the texts that were not left out; None if all were kept.
  """

  without: Measure
  with_knowledge: Measure
  decision: str
  cut_without: Measure | None = None
  cut_with: Measure | None = None
  texts: tuple[GateText, ...] = ()
  kept: Measure | None = None


def read_gate(path: pathlib.Path) -> dict[str, Any]:
  """Returns what gate.json holds: "without" and "with", each a share, and by a version that tells
  them apart "texts".

  Raises:
    ValueError: damaged, or its counts contradict each other; names the file and the field.
    OSError: it cannot be read.
  """
  return files.read_json(path, _checked)


def parse(gate: Any) -> Gate:
  """The "gate" of an evaluation.json; raises ValueError naming the field."""
  need(
    get(gate, "decision", "gate") in DECISIONS,
    "gate.decision",
    gate["decision"],
    "one of " + ", ".join(map(repr, DECISIONS)),
  )
  cut, kept = gate.get("cut"), gate.get("kept")
  return Gate(
    read_share(get(gate, "without", "gate"), "gate.without"),
    read_share(get(gate, "with", "gate"), "gate.with"),
    gate["decision"],
    read_share(get(cut, "without", "gate.cut"), "gate.cut.without") if cut else None,
    read_share(get(cut, "with", "gate.cut"), "gate.cut.with") if cut else None,
    tuple(_text(entry, f"gate.texts[{i}]") for i, entry in enumerate(gate.get("texts", []))),
    read_share(kept, "gate.kept") if kept is not None else None,
  )


def _text(entry: Any, where: str) -> GateText:
  p = get(entry, "p", where)
  need(schema.is_number(p) and 0 <= p <= 1, f"{where}.p", p, "a number from 0 to 1")
  return GateText(
    whole(entry, "text", where),
    read_share(get(entry, "passed", where), f"{where}.passed"),
    read_share(get(entry, "cut", where), f"{where}.cut"),
    p,
    get(entry, "left_out", where, bool),
  )


def _checked(value: Any) -> dict[str, Any]:
  need(get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], str(SCHEMA))
  for name in ("without", "with"):
    schema.share(get(value, name, schema.TOP), name)
    need(value[name]["of"] > 0, f"{name}.of", value[name]["of"], "more than 0")
  need(
    value["with"]["of"] == value["without"]["of"],
    "with.of",
    value["with"]["of"],
    f"without.of ({value['without']['of']})",
  )
  parse(value | {"decision": DECISIONS[0]})
  return value
