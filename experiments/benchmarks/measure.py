"""What the benchmarks share: times, the machine's own limit, kernels by kind, the peer's figures, a
table and its JSON.
"""

import collections
import glob
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from oel_jax.runtime import progress

KINDS = {  # of kernels, by a part of their name; the first that fits
  "communication": ("nccl",),
  "attention": ("sdpa", "flash", "fmha", "cudnn"),
  "matrix products": ("nvjet", "gemm", "cutlass", "dot"),
  "scatter": ("scatter",),
  "copies": ("memcpy", "memset", "copy"),
  "elementwise and reductions": ("",),
}


def seconds(function: Callable[..., Any], *args: Any, repeats: int = 5) -> float:
  """The median time of a call, after one that warms up."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - started)
  return statistics.median(times)


def matrix_rate(dtype: Any) -> float:
  """FLOP/s of a large matrix product: what the limits are computed from. Known for two GPUs, so
  that figures compare; else measured.
  """
  if (
    any(name in jax.devices()[0].device_kind for name in ("H100", "H200")) and dtype == jnp.bfloat16
  ):
    return 790e12
  size = 8192 if jax.default_backend() == "gpu" else 256
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  return 2 * size**3 / seconds(jax.jit(lambda a: a @ a), a)


def kernels(function: Callable[[], Any]) -> dict[str, float]:
  """Milliseconds on a GPU, the mean of those that are used, by kind of kernel, and "idle" for the
  rest of the call's time: less than it is by what runs at once. {} elsewhere.
  """
  if jax.default_backend() != "gpu":
    return {}
  spent, used = collections.Counter(), 1
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      started = time.perf_counter()
      jax.block_until_ready(function())
      whole = (time.perf_counter() - started) * 1e3
    for path in glob.glob(folder + "/**/*.xplane.pb", recursive=True):
      planes = [
        plane
        for plane in jax.profiler.ProfileData.from_file(path).planes
        if "/device:GPU" in plane.name
        and any(len(list(line.events)) for line in plane.lines if "Stream" in line.name)
      ]
      used = max(1, len(planes))
      for event in (
        event
        for plane in planes
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
      ):
        kind = next(
          kind for kind, parts in KINDS.items() if any(part in event.name.lower() for part in parts)
        )
        spent[kind] += event.duration_ns / 1e6
  spent = {kind: ms / used for kind, ms in spent.most_common()}
  return {
    **{kind: round(ms, 1) for kind, ms in spent.items()},
    "idle": round(whole - sum(spent.values()), 1),
  }


def gib(memory: Any) -> float:
  """What a compiled program needs, arguments and all, by its `memory_analysis`."""
  size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return (size - memory.alias_size_in_bytes) / 2**30


def link(tree: Any, put: Callable[[Any, str], Any]) -> dict[str, float]:
  """How fast arrays in the host's pinned memory come to the device by `put(arrays, "device")`."""
  size = sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e9
  took = seconds(put, tree, "device")
  return {"GB": size, "ms": took * 1e3, "GB/s": size / took}


def peer(path: str | None, call: str) -> list[dict[str, Any]]:
  """Runs one function of the PyTorch peer in a process of its own, which must be over before JAX
  takes the memory; [] without a path.
  """
  if path is None:
    return []
  code = f"import peer_torch; peer_torch.{call}"
  folder = str(pathlib.Path(path).resolve().parent)
  search = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
  env = os.environ | {"PYTHONPATH": search}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
  if done.returncode:
    print(f"the peer failed: {done.stderr[-300:]}", file=sys.stderr)
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def report(rows: list[dict[str, Any]], title: str, path: str | None) -> None:
  """Prints the table, and writes it with the machine's name as JSON."""
  device = jax.devices()[0].device_kind
  progress.table(
    [{name: value for name, value in row.items() if not isinstance(value, dict)} for row in rows],
    f"{title} on {device}",
  )
  if path:
    pathlib.Path(path).write_text(
      json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=1)
    )


def random_array(seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
  """Normal numbers, made on the device."""
  return jax.jit(lambda key: (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype))(
    jax.random.key(seed)
  )
