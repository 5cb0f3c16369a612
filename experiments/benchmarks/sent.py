"""What devices send one another in an optimizer's step, on paper: bytes by axis of the mesh, from
the program that XLA compiles for devices that need not be there, beside what their links carry.

    export JAX_PLATFORMS=cpu
    python experiments/benchmarks/sent.py qwen3-8b h200,64 --fsdp=8 --json=sent.json
    python experiments/benchmarks/sent.py qwen3-8b v5p,64 --fsdp=16 --json=sent.json

It needs the compiler of the device (`jax[cuda13]` or `jax[tpu]`). Nothing is run. Samples have
prompts of 600 tokens and responses of 1,024, and ten texts of 2,048 are known. "GB" is what each
device sends (`oel_jax.tasks.plan_collectives`), "at the links' rate, s" that over what its maker
says its links carry in one direction; "step, s" is the step's arithmetic alone, as `--stage=plan`
has it. With `--layers` a model of so many layers and one of a layer less are compiled, and each of
the others is taken to send what the last of these does.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import measure
import numpy as np

from oel_jax import config as config_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime import target
from oel_jax.tasks import plan_programs, plan_seconds, plan_shapes

# Bytes a second in one direction. NVLink of a Hopper: 900 GB/s in both (nvidia.com, Hopper
# architecture); to other machines each GPU of a DGX H200 has a port of 400 Gb/s (its user guide).
NVLINK, PORT = 450e9, 50e9
# A v5p: 1,200 GB/s in both (cloud.google.com, TPU v5p), over the six links of a three-dimensional
# torus: two along each of its dimensions.
TORUS = 1200e9 / 2 / 3


def rate(mesh: jax.sharding.Mesh, axes: Sequence[str]) -> float | None:
  """Bytes a second that a device's links carry to those that it meets along these axes; None where
  it has none.
  """
  place = tuple(slice(None) if axis in axes else 0 for axis in mesh_lib.AXES)
  members = list(mesh.devices[place].flat)
  if members[0].platform == "tpu":
    coordinates = np.array([member.coords for member in members])
    return TORUS * int((coordinates != coordinates[0]).any(0).sum())
  if members[0].platform == "cpu":
    return None
  hosts = {member.process_index for member in members}
  return NVLINK if len(hosts) == 1 else PORT


def sent(
  a: Any, device: target.Device, mesh: jax.sharding.Mesh, work: plan_shapes.Work
) -> tuple[dict[str, dict[str, float]], int]:
  """What a device sends in a step, and its micro-batches."""
  config = config_lib.default().consolidation
  config.unroll = "yes"
  with target.compiling_for(device):
    policy = plan_shapes.unread(a, mesh, jnp.bfloat16)
    planner = plan_programs.Planner(config, policy, mesh, work)
    program = planner.step()
    count = planner.micro_batches(*planner.batch(work.samples))
  if not program.sent:
    raise RuntimeError(program.failed or "nothing could be counted, for the reason logged above")
  return program.sent, count


def scaled(
  one: dict[str, dict[str, float]], two: dict[str, dict[str, float]], times: int
) -> dict[str, dict[str, float]]:
  """`two` and so many times what it has beyond `one`."""
  grown = lambda axis, name, size: size + times * (size - one.get(axis, {}).get(name, 0.0))
  return {
    axis: {name: grown(axis, name, size) for name, size in each.items()}
    for axis, each in two.items()
  }


def lines(
  found: dict[str, dict[str, float]], mesh: jax.sharding.Mesh, first: dict[str, Any], step: float
) -> list[dict[str, Any]]:
  """The table's lines for a step, one an axis; `first` begins each."""
  names = sorted({name for each in found.values() for name in each})
  made = []
  for axis, each in found.items():
    total, speed = sum(each.values()), rate(mesh, axis.split(" x "))
    sizes = {f"{name} GB": each.get(name, 0.0) / 1e9 for name in names}
    line = first | {"along": axis} | sizes | {"GB": total / 1e9}
    made.append(line | {"at the links' rate, s": speed and total / speed, "step, s": step})
  return made


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("architecture", choices=list(architecture_lib.ARCHITECTURES))
  parser.add_argument("device", help="which, and how many: h200,64")
  parser.add_argument("--fsdp", type=int, required=True, help="data takes the others")
  parser.add_argument("--samples", type=int, nargs="+", default=[64, 512], help="of a step")
  parser.add_argument("--layers", type=int, help="compiled; default: all")
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  given = parser.parse_args(argv)
  device, count = target.parse(given.device)
  jax.config.update("jax_enable_compilation_cache", False)
  sizes = dict(data=count // given.fsdp, fsdp=given.fsdp, tensor=1)
  mesh = mesh_lib.make_mesh(sizes, target.compile_only(device, count))
  whole = architecture_lib.named(given.architecture)
  rows = []
  for samples in given.samples:
    work = plan_shapes.Work(600, 1024, 10, 2048, samples, 0, 1)
    cut = min(given.layers or whole.layers, whole.layers)
    found, micro_batches = sent(dataclasses.replace(whole, layers=cut), device, mesh, work)
    if cut < whole.layers:
      fewer, _ = sent(dataclasses.replace(whole, layers=cut - 1), device, mesh, work)
      found = scaled(fewer, found, whole.layers - cut)
    seconds = plan_seconds.step_seconds(whole, device, count, work) if device.flops else 0.0
    rows += lines(found, mesh, {"samples": samples, "micro-batches": micro_batches}, seconds)
  title = f"sent in a step, {given.architecture} on {given.device}, {sizes}"
  measure.report(rows, title, given.json)


if __name__ == "__main__":
  main()
