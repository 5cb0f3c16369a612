"""What the configuration left open and this machine decided, told in one line and kept with the
run.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from oel_jax.consolidation import on_mesh, placement
from oel_jax.policy import transformer
from oel_jax.policy.ops import common
from oel_jax.policy.sampling import kv_cache, model
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import files
from oel_jax.runtime import mesh as mesh_lib


def choose(
  config: Any, policy: Policy, mesh: jax.sharding.Mesh, *, texts: int, tokens: int, exact: bool
) -> dict[str, str]:
  """Returns what runs, name → words.

  Args:
    config: of the run.
    policy: as loaded.
    mesh: of the run.
    texts: knowledge texts of a round.
    tokens: of the longest of them, or the most that it may have.
    exact: whether it has so many; if not, where the knowledge lies is known in each round only.
  """
  a, dtype, gib = policy.architecture, jnp.dtype(policy.dtype), config.consolidation.knowledge_gib
  together = config.mesh.sample_tensor
  streams = placement.check_streams(config.consolidation, policy, mesh)
  large = placement.knowledge_bytes(policy, mesh, texts, tokens) > gib * 2**30 and not streams
  on_host = large and exact
  knowledge = "on the host" if on_host else "on the device"
  if large and not exact:
    knowledge += f" up to {gib:g} GiB, more on the host (and then layers scanned)"
  if streams:
    share = config.consolidation.teacher_on_host
    knowledge = f"{share:.0%} of the teacher's layers, on the host, and they with it"
  is_unrolled = placement.unroll(config.consolidation, policy, mesh)
  activation = jax.ShapeDtypeStruct((), dtype)
  kernels = common.supported(activation, a.head_size)
  sampling_kernels = common.supported(activation)
  prefill = model.prefill_attn_impl(a, dtype)
  step = kv_cache.attn_impl(a.share(together), dtype)
  scanned = "scanned"
  if kernels and (wrong := on_mesh.undivided(a, mesh)):
    scanned += f", for mesh.tensor, {mesh.shape['tensor']}, does not divide {', '.join(wrong)}"
  replicated = mesh_lib.undivided(mesh, transformer.abstract(a))
  return {
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    "mesh": ", ".join(f"{axis} {mesh.shape[axis]}" for axis in mesh_lib.AXES),
    "replicated": "; ".join(replicated) or "nothing that its axis should split",
    "compute_dtype": str(dtype),
    "attention": placement.attn_impl(config.consolidation, policy),
    "sampling_attention": f"{prefill} (prompts), {step} (tokens)",
    "layers": "unrolled" if is_unrolled and not on_host else scanned,
    "kernels": "Pallas" if is_unrolled and not on_host and kernels else "plain",
    "sampling_kernels": "Pallas" if sampling_kernels else "plain",
    "sampling_weights": "whole on each device"
    if together == 1
    else f"split over {together} devices, as are texts kept once",
    "knowledge": knowledge,
  }


def tell(folder: pathlib.Path, chosen: dict[str, str]) -> None:
  """Prints one line of what was chosen, and keeps it in choices.json, which `report` reads."""
  print("chosen: " + "; ".join(f"{name} {words}" for name, words in chosen.items()), flush=True)
  # A finished run that is started again changes no file.
  if kept(folder) != chosen:
    files.write_sealed(folder / "choices.json", {"schema": 1, "choices": chosen})


def kept(folder: pathlib.Path) -> dict[str, str]:
  """What was told before; {} where there is nothing, or nothing that can be read."""
  try:
    return dict(files.read_json(folder / "choices.json")["choices"])
  except (OSError, ValueError, KeyError, TypeError):
    return {}
