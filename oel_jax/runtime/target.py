"""The kind of device that programs are made for: this process's own, or one that they are only
compiled for, by its own compiler, on a machine that has none (`compiling_for`).

The compilers come with JAX's packages for the devices: `jax[cuda13]` for NVIDIA GPUs, `jax[tpu]`
for TPUs. Both are for Linux and need no device to compile.
"""

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
  """A kind of device.

  Attributes:
    name: as it is asked for.
    platform: "gpu", "tpu" or "cpu", as `jax.default_backend` says.
    memory: bytes that programs may use: of a GPU 95% of what it has
      (XLA_PYTHON_CLIENT_MEM_FRACTION=.95), of a CPU this machine's.
    flops: bfloat16 products a second, dense, as its maker says; 0: not known.
    bandwidth: bytes a second of its memory, likewise.
    per_host: devices of one process.
  """

  name: str
  platform: str
  memory: float
  flops: float = 0.0
  bandwidth: float = 0.0
  per_host: int = 8


DEVICES = {
  device.name: device
  for device in (
    Device("h100", "gpu", 0.95 * 79 * GIB, 989.5e12, 3.35e12),
    Device("h200", "gpu", 0.95 * 139.8 * GIB, 989.5e12, 4.8e12),
    Device("v5e", "tpu", 15.75 * GIB, 197e12, 0.819e12, per_host=4),
    Device("v5p", "tpu", 95.0 * GIB, 459e12, 2.765e12, per_host=4),
    Device("cpu", "cpu", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
  )
}
# Chips → the shape of a slice that Google rents out.
SLICES = {
  "v5e": {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
  "v5p": {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
  },
}
# What XLA asks of a GPU that is not there: a Hopper's. Its memory and bandwidth are filled in.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  l2_cache_size: 52428800  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name}"
"""

_ASKED: contextvars.ContextVar[Device | None] = contextvars.ContextVar("asked", default=None)


def backend() -> str:
  """The platform of the devices that programs are made for, as `jax.default_backend` names it."""
  asked = _ASKED.get()
  return asked.platform if asked else jax.default_backend()


def compute_capability() -> str:
  """That of the GPU that programs are made for, as "9.0"; "" of other devices."""
  asked = _ASKED.get()
  if asked:
    return "9.0" if asked.platform == "gpu" else ""
  return getattr(jax.devices()[0], "compute_capability", "")


def optimization(level: int) -> dict[str, int]:
  """The compiler's options for a program that LLVM is to make for a CPU at this level, 0 to 3; none
  for other devices, and where XLA_FLAGS names a level for all programs.
  """
  name = "xla_backend_optimization_level"
  here = backend() == "cpu" and name not in os.environ.get("XLA_FLAGS", "")
  return {name: level} if here else {}


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[None]:
  """Within, what is traced is made for this kind of device."""
  token = _ASKED.set(device)
  try:
    with _known_to_kernels(device):
      yield
  finally:
    _ASKED.reset(token)


def _known_to_kernels(device: Device) -> contextlib.AbstractContextManager[Any]:
  """From JAX 0.11 on, Pallas asks the mesh of the context which GPU a kernel is for."""
  if device.platform != "gpu":
    return contextlib.nullcontext()
  kind = jax.sharding.AbstractDevice(f"NVIDIA {device.name.upper()}", None, "gpu")
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))


def parse(text: str) -> tuple[Device, int]:
  """The device and the count of "h200,4"; without a count, one.

  Raises:
    ValueError: no such device, no such count, or a TPU slice of so many chips is not to be had.
  """
  field = f"config.plan.device is {text!r}"
  name, _, written = text.partition(",")
  if name not in DEVICES:
    raise ValueError(
      f'{field}: it must be one of {", ".join(DEVICES)}, and how many of them: "h200,8"'
    )
  if not (written or "1").isdecimal() or int(written or 1) < 1:
    raise ValueError(f'{field}: behind the comma must be a number of devices, as in "{name},8"')
  count = int(written or 1)
  if name in SLICES and count not in SLICES[name]:
    sizes = ", ".join(map(str, SLICES[name]))
    raise ValueError(f"{field}: slices of {name} have one of {sizes} chips")
  device = DEVICES[name]
  if device.platform == "cpu":  # they share this machine's memory
    device = dataclasses.replace(device, memory=device.memory / count)
  return device, count


def compile_only(device: Device, count: int) -> list[Any]:
  """So many devices of this kind to compile for, which need not be there; of "cpu", this machine's.

  Before it, nothing may have asked JAX for the devices, unless it was told to use the CPU alone.

  Raises:
    ValueError: what compiles for them is not installed, or JAX has not as many CPU devices.
  """
  from jax.experimental import topologies

  here = jax.devices("cpu")  # before libtpu, which ends the process at a flag of another compiler
  if device.platform == "cpu":
    if len(here) < count:
      raise ValueError(
        f"config.plan.device asks for {count} CPU devices, and JAX has {len(here)}: begin the "
        f'command with XLA_FLAGS="--xla_force_host_platform_device_count={count}"'
      )
    return here[:count]
  try:
    if device.platform == "gpu":
      hosts = -(-count // device.per_host)
      fields = dict(name=device.name.upper(), memory=device.memory, bandwidth=device.bandwidth)
      topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=device.name,
        topology=f"1x{hosts}x{min(count, device.per_host)}",
        target_config=HOPPER.format(**fields),
      )
    else:
      os.environ.pop("XLA_FLAGS", None)
      for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
      shape = f"{device.name}:{SLICES[device.name][count]}"
      topology = topologies.get_topology_desc(platform="tpu", topology_name=shape)
  except (NotImplementedError, RuntimeError) as error:
    package = {"gpu": "jax[cuda13]", "tpu": "jax[tpu]"}[device.platform]
    raise ValueError(
      f"config.plan.device is {device.name}, and XLA's compiler for it cannot be had: {error}; "
      f"pip install '{package}' brings it (for Linux), without the device"
    ) from error
  return list(topology.devices)[:count]
