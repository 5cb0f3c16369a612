"""What a run will take, before anything is paid for: `python -m oel_jax.main --stage=plan
--config.plan.device=h200,8 ...`.

Memory of a device, program by program, whether it fits, and seconds and cost of a round. No weights
are read and nothing runs: the programs are compiled from shapes (`plan_programs`), for devices that
need not be there, by their own compiler. The seconds are arithmetic from measured rates
(`plan_seconds`).
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oel_jax import config as config_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import groups
from oel_jax.policy.weights import huggingface
from oel_jax.runtime import files, progress, target
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import plan_programs, plan_seconds, plan_shapes
from oel_jax.tasks.plan_programs import Program
from oel_jax.tasks.plan_shapes import Work

GIB = 2**30
# Columns of the table → what is added up in them, of `Program.held` and `Program.known`.
COLUMNS = {
  "parameters": ("weights of the run", "weights trained"),
  "optimizer": ("optimizer",),
  "teacher": ("teacher",),
  "prefix cache": ("prefix cache",),
  "sampler": ("sampler's weights", "sampler's weights, gathered"),
  "key-value cache": ("key-value cache", "key-value cache, outgrown"),
  "gradients, casts": ("gradients", "weights cast"),
  "logits": ("logits",),
}
REST = "activations, rest"
# Fields of config.consolidation, with what they may be here. A live teacher reads the knowledge in
# each step by a copy of the student; a teacher's samples have the knowledge in their prompts.
PLAIN = {
  "select": (1.0,),
  "anchor": (0.0,),
  "teacher_on_host": (0.0,),
  "teacher": ("frozen", "first"),
  "data": ("student",),
}


def run(config: Any, workdir: str | None) -> dict[str, Any]:
  """Prints the plan; returns it, and writes it to `workdir`/plan.json if there is one.

  Raises:
    ValueError: the configuration is wrong; config.plan.device is no device that is known, or its
      compiler is not there; the mesh does not divide the devices; or the architecture is not known.
  """
  config_lib.validate(config)
  if "task" in config:
    raise ValueError("--stage=plan: only a run of rounds is planned, and config.task is set")
  if not config.plan.device:
    raise ValueError(
      "config.plan.device is '': for --stage=plan it must name a device and how many, as h200,8"
    )
  for name, plain in PLAIN.items():
    if config.consolidation[name] not in plain:
      raise ValueError(
        f"config.consolidation.{name} is {config.consolidation[name]!r}: --stage=plan knows the "
        f"plain step alone, and it must be {' or '.join(map(repr, plain))} there"
      )
  device, count = target.parse(config.plan.device)
  architecture = _architecture(config)
  # A program for devices that are not here is of no use to what runs here.
  jax.config.update("jax_enable_compilation_cache", False)
  mesh = mesh_lib.make_mesh(config.mesh, target.compile_only(device, count))
  together = config.mesh.sample_tensor
  groups.check(architecture, together, len(groups.local(mesh)))
  work = _work(config)
  with target.compiling_for(device):
    how = dict(narrow=config.consolidation.lora_rank > 0)
    policy = plan_shapes.unread(architecture, mesh, _dtype(config, device), together, **how)
    planner = plan_programs.Planner(config.consolidation, policy, mesh, work)
    programs = _compiled(planner, 5 + bool(work.probe))
  found = _found(device, mesh, together, work, programs)
  found |= _price(config, architecture, device, count, work)
  _tell(found)
  if workdir is not None:
    folder = files.local(workdir, "--workdir").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files.write_sealed(folder / "plan.json", found)
  return found


def _compiled(planner: plan_programs.Planner, count: int) -> list[Program]:
  found = []
  with progress.bar("plan: compiling", count) as advance:
    for program in planner.programs():
      found.append(program)
      advance(1, program.name)
  return found


def _architecture(config: Any) -> Architecture:
  """That of the weights, which are not read."""
  policy = config_lib.policy(config)
  if policy.architecture != "auto":
    return architecture_lib.named(policy.architecture)
  if policy.weights is not None and (path := pathlib.Path(policy.weights).expanduser()).is_dir():
    return huggingface.read_architecture(path)
  raise ValueError(
    'config.policy.architecture is "auto": for --stage=plan it must be one of '
    f"{', '.join(architecture_lib.ARCHITECTURES)}, or config.policy.weights a Hugging Face folder, "
    "of which config.json is read"
  )


def _dtype(config: Any, device: target.Device) -> Any:
  asked = config.policy.compute_dtype
  if asked == "auto":
    asked = "float32" if device.platform == "cpu" else "bfloat16"
  return jnp.dtype(asked)


def _work(config: Any) -> Work:
  return Work(
    prompt=config.plan.prompt_tokens,
    response=config.deployment.max_response_tokens,
    texts=config.extraction.texts,
    knowledge=config.extraction.max_knowledge_tokens,
    samples=config.consolidation.games_per_step * config.deployment.max_turns
    or config.consolidation.batch_size,
    probe=config.consolidation.log_probe,
    copies=1 + (config.rounds > 1),
  )


def _price(
  config: Any, architecture: Architecture, device: target.Device, count: int, work: Work
) -> dict[str, Any]:
  """Seconds and cost of a round, where the device's speed is known and its price is told."""
  if not device.flops:
    return {"stages": [], "seconds": None, "cost": None}
  stages = plan_seconds.stages(config, architecture, device, count, work)
  seconds = sum(stage["seconds"] for stage in stages)
  price = config.plan.price
  return {
    "stages": stages,
    "step seconds": plan_seconds.step_seconds(architecture, device, count, work),
    "seconds": seconds,
    "cost": seconds / 3600 * count * price if price else None,
  }


def _found(
  device: target.Device, mesh: Any, together: int, work: Work, programs: Sequence[Program]
) -> dict[str, Any]:
  """The plan as plan.json holds it; sizes in bytes."""
  peak = max(programs, key=lambda program: program.total)
  return {
    "schema": 1,
    "device": device.name,
    "count": mesh.size,
    "mesh": {axis: mesh.shape[axis] for axis in mesh_lib.AXES} | {"sample_tensor": together},
    "work": vars(work),
    "memory": device.memory,
    "programs": [
      {
        "name": program.name,
        "held": program.held,
        "kept": program.kept,
        "temporaries": program.temporaries,
        "known": program.known,
        "total": program.total,
        "too large": program.too_large,
        "failed": program.failed,
        "sent": program.sent,
      }
      for program in programs
    ],
    "peak": peak.total,
    "peak of": peak.name,
    "fits": peak.total <= device.memory and not any(one.too_large for one in programs),
    "compiles": not any(one.failed for one in programs),
    "jax": jax.__version__,
  }


def row(program: dict[str, Any]) -> dict[str, Any]:
  """The line of the table for an entry of "programs": GiB by column."""
  left = program["temporaries"]
  sizes = dict(program["held"])
  for name, size in program["known"].items():  # never more than there is: XLA may do without
    sizes[name] = min(size, left)
    left -= sizes[name]
  columns = {
    name: sum(sizes.get(part, 0) for part in parts) / GIB for name, parts in COLUMNS.items()
  }
  total = program["total"] / GIB
  return {"GiB": program["name"], **columns, REST: total - sum(columns.values()), "total": total}


def _tell(found: dict[str, Any]) -> None:
  work, sizes = found["work"], found["mesh"]
  print(
    f"{found['count']} x {found['device']} (mesh: "
    + ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    + f"), {work['samples']} samples a step of {work['prompt']} + {work['response']} tokens, "
    f"{work['texts']} knowledge texts of {work['knowledge']}; GiB of a device:",
    flush=True,
  )
  for line in markdown([row(program) for program in found["programs"]]):
    print(line)
  for program in found["programs"]:
    if program["failed"]:
      print(f"{program['name']}: XLA cannot compile it: {program['failed']}")
    if program["too large"]:
      print(f"{program['name']}: XLA gave it up for its size, which it says")
  verdict = "fits" if found["fits"] else "does not fit"
  if not found["compiles"]:
    verdict += ", as far as it compiles"
  print(
    f"{verdict}: the largest, {found['peak of']}, takes {_cell(found['peak'] / GIB)} of "
    f"{_cell(found['memory'] / GIB)} GiB",
    flush=True,
  )
  _tell_sent(found["programs"][-1]["sent"])
  _tell_price(found)


def sent_rows(sent: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
  """The lines of the table of what a device sends in a step: GB by axis of the mesh."""
  names = sorted({name for each in sent.values() for name in each})
  cells = lambda each: {name: each.get(name, 0.0) / 1e9 for name in names}
  return [
    {"GB": axis, **cells(each), "total": sum(each.values()) / 1e9} for axis, each in sent.items()
  ]


def _tell_sent(sent: dict[str, dict[str, float]]) -> None:
  if sent:
    print("what a device sends others in a step, by the axis of the mesh along which it does:")
    for line in markdown(sent_rows(sent)):
      print(line)


def _tell_price(found: dict[str, Any]) -> None:
  if found["seconds"] is None:
    print(f"how fast a {found['device']} is is not known: no seconds", flush=True)
    return
  for line in markdown(found["stages"]):
    print(line)
  measured = "" if found["device"] == "h200" else f" (a {found['device']} was not measured)"
  cost = ""
  if found["cost"] is not None:
    cost = f", which costs {found['cost']:.2f}"
  print(
    f"a round takes {found['seconds'] / 3600:.2g} h at the most, a step "
    f"{found['step seconds']:.2g} s without its sampling{cost}: by an H200's measured shares of "
    f"its peak{measured}; every game to its last turn, every response as long as it may be; "
    "without compiling and what devices exchange",
    flush=True,
  )


def _cell(value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  if value == 0:
    return "–"
  return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
  """The rows as the lines of a table in Markdown; 0 is a dash."""

  names = list(rows[0])
  lines = [names, ["---"] * len(names), *([_cell(one[name]) for name in names] for one in rows)]
  return ["| " + " | ".join(line) + " |" for line in lines]
