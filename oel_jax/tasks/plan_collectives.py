"""What the devices of a mesh send one another in a program, by axis of the mesh: read from the text
of the compiled program, where collectives stand as XLA's partitioner and scheduler left them.

What an operation sends is arithmetic on its operands: of n devices, each with s bytes, an
all-gather has each send s (n - 1), a reduce-scatter and an all-to-all s (n - 1) / n, an all-reduce,
which is the last two of these in turn, 2 s (n - 1) / n, and a permutation s. No algorithm of a ring
or tree of devices sends less.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# Operation → bytes that each of n devices sends, over those of its operands.
SENT = {
  "all-gather": lambda n: n - 1,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
_BITS = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
# "ROOT %name = shape operation(operands), attributes"; a shape may be a tuple of them.
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
  r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_BODY, _TRIPS = re.compile(r"body=%?([\w.-]+)"), re.compile(r'known_trip_count[^\d]*"?(\d+)')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# A mesh of the program's own, its devices' order if they are not in that of their numbers, axes.
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\],?"
  r"(?: device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One operation of the program.

  Attributes:
    operation: of SENT.
    axes: of the mesh, those along which devices send to one another.
    devices: that take part in it together.
    operands: bytes of a device.
    times: that it is run.
  """

  operation: str
  axes: tuple[str, ...]
  devices: int
  operands: int
  times: int

  @property
  def sent(self) -> float:
    """Bytes that each device sends, all times together."""
    return self.times * self.operands * SENT[self.operation](self.devices)


def read(text: str, mesh: Mapping[str, int], loops: Sequence[int] = ()) -> list[Collective]:
  """The collectives of a compiled program, those of one device's groups left out.

  Args:
    text: of the optimized program (`compiled.as_text()`).
    mesh: axes and their sizes, in the order in which the program numbers its devices.
    loops: how often a loop is run whose count the program does not hold: the outermost such loop,
      the one within it, and so on.

  Raises:
    ValueError: there is a collective in such a loop that `loops` says nothing of, or one whose
      groups cannot be read.
  """
  computations, entry = _computations(text)
  found: list[Collective] = []

  def walk(name: str, times: int, unknown: int) -> bool:
    """Whether anything is sent in it."""
    sends = False
    for line in computations[name].values():
      if line.operation.endswith(("-done", "-update")):  # of what is counted where it starts
        continue
      if line.operation in SENT:
        if name.startswith("all-reduce-scatter"):  # XLA's for TPUs: of the sum each keeps a part
          line = dataclasses.replace(line, operation="reduce-scatter")
        one = _collective(line, computations[name], mesh, times)
        sends |= one is not None
        found.extend([one] if one else [])
        continue
      body = _BODY.search(line.rest) if line.operation == "while" else None
      known = _TRIPS.search(line.rest)
      for called in _called(line.rest):
        if not body or called != body[1]:
          sends |= walk(called, times, unknown)
        elif known:
          sends |= walk(called, times * int(known[1]), unknown)
        elif unknown < len(loops):
          sends |= walk(called, times * loops[unknown], unknown + 1)
        elif walk(called, times, unknown):
          raise ValueError(f"how often the loop {line.name} is run is not known: it sends")
    return sends

  walk(entry, 1, 0)
  return found


def by_axis(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
  """Bytes that each device sends: axes ("fsdp", "data x fsdp") → operation → bytes."""
  sums: dict[str, dict[str, float]] = {}
  for one in found:
    row = sums.setdefault(" x ".join(one.axes), {})
    row[one.operation] = row.get(one.operation, 0.0) + one.sent
  return sums


@dataclasses.dataclass(frozen=True)
class _Line:
  """An instruction: its name, its result's shape as written, operation and what stands behind."""

  name: str
  shape: str
  operation: str
  rest: str


def _computations(text: str) -> tuple[dict[str, dict[str, _Line]], str]:
  """The program's computations, their instructions by name, and the name of the one that is run."""
  found: dict[str, dict[str, _Line]] = {}
  entry, lines = "", None
  for written in text.splitlines():
    if head := _COMPUTATION.match(written):
      lines = found.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif lines is not None and (line := _LINE.match(written)):
      operation = line[3].removesuffix("-start")
      lines[line[1]] = _Line(line[1], line[2], operation, line[4])
  if not entry:
    raise ValueError("this is no compiled program: it has no ENTRY")
  return found, entry


def _called(rest: str) -> Iterator[str]:
  for one, several in _CALLED.findall(rest):
    yield from [one] if one else re.findall(r"[\w.-]+", several)


def _collective(
  line: _Line, among: Mapping[str, _Line], mesh: Mapping[str, int], times: int
) -> Collective | None:
  """The collective of an instruction; None if no device sends to another."""
  groups = _groups(line)
  coordinates = np.array(list(itertools.product(*map(range, mesh.values()))))
  size = math.prod(mesh.values())
  groups = groups or [list(range(size))]
  apart = lambda group: (coordinates[group] != coordinates[group[0]]).any(0)
  varies = np.any([apart(group) for group in groups], axis=0)
  if not varies.any():
    return None
  axes = tuple(axis for axis, is_apart in zip(mesh, varies, strict=True) if is_apart)
  devices = max(map(len, groups))
  return Collective(line.operation, axes, devices, _operand_bytes(line, among), times)


def _groups(line: _Line) -> list[list[int]]:
  """The devices that take part together, by number; [] for all."""
  if found := _IOTA.search(line.rest):
    shape, *order = found.groups()
    return _ordered(*order).reshape(_numbers(shape)).tolist()
  if found := _LISTED.search(line.rest):
    return [_numbers(group) for group in found[1].split("}")[:-1]]
  if found := _MESH.search(line.rest):
    written, *order, axes = found.groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", written))
    shape, names = [int(size) for size in sizes.values()], list(sizes)
    devices = _ordered(*order) if order[0] else np.arange(math.prod(shape))
    across = [names.index(axis) for axis in re.findall(r"'(\w+)'", axes)]
    last = np.moveaxis(devices.reshape(shape), across, range(-len(across), 0))
    return last.reshape(-1, math.prod(shape[axis] for axis in across)).tolist()
  if "replica_groups={}" in line.rest:
    return []
  raise ValueError(f"{line.name}: who takes part cannot be read: {line.rest[-300:]}")


def _ordered(sizes: str, order: str | None) -> np.ndarray:
  """The numbers from 0 in an array of these sizes, its dimensions then in this order."""
  found = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return found.transpose(_numbers(order)) if order else found


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _operand_bytes(line: _Line, among: Mapping[str, _Line]) -> int:
  """Bytes of a device's operands, whose shapes stand where they are made."""
  names = re.findall(r"%([\w.-]+)", line.rest[: _end(line.rest)])
  return sum(_bytes(among[name].shape) for name in names)


def _end(rest: str) -> int:
  """Where the operands end: at the parenthesis that closes the operation's."""
  depth = 1
  for place, sign in enumerate(rest):
    depth += (sign == "(") - (sign == ")")
    if not depth:
      return place
  return len(rest)


def _bytes(shape: str) -> int:
  """Of a shape or a tuple of them as the program writes it: "f32[8,4]{1,0}"."""
  total = 0.0
  for kind, dimensions in _SHAPE.findall(shape):
    size = math.prod(int(n) for n in dimensions.split(",") if n)
    total += size * (1 if kind == "pred" else int(_BITS.match(kind)[1]) / 8)
  return int(total)
