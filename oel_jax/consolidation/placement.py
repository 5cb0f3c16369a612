"""How a round's training runs here: which attention, layers in a loop or not, and where the
teacher's keys and values of the knowledge lie.
"""

import math
from typing import Any

import jax
import numpy as np

from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.consolidation.task import Task
from oel_jax.policy.ops import splash
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import distributed, target
from oel_jax.runtime import mesh as mesh_lib


def attn_impl(config: Any, policy: Policy) -> str:
  """The attention that config.consolidation.attention asks for: "auto" is the fastest that is
  correct here (`attention.attend`).

  Raises:
    ValueError: rows may hold several samples, and "flash" would not keep them apart; "splash" where
      it does not run.
  """
  splashes = splash.supported(policy.architecture.head_size, policy.dtype)
  if config.attention == "flash" and config.pack:
    raise ValueError(
      'config.consolidation.attention is "flash", which does not keep a row\'s samples apart, and '
      "config.consolidation.pack is True: "
      'it must be False, or the attention "cudnn", "xla" or "auto"'
    )
  if config.attention == "splash" and not splashes:
    raise ValueError(
      'config.consolidation.attention is "splash", which runs on TPUs, in bfloat16 and with heads '
      f"of a multiple of {splash.LANES // 2}; here are a {target.backend()}, "
      f'{np.dtype(policy.dtype)} and heads of {policy.architecture.head_size}: it must be "auto", '
      '"xla" or another that runs here'
    )
  if config.attention != "auto":
    return config.attention
  if splashes:
    return "splash"
  if not _fast(policy):
    return "xla"
  return "cudnn" if config.pack else "flash"


def _fast(policy: Policy) -> bool:
  """Whether cuDNN and the kernels are there: on an NVIDIA GPU, in bfloat16."""
  return target.backend() == "gpu" and np.dtype(policy.dtype) == "bfloat16"


def unroll(config: Any, policy: Policy, mesh: jax.sharding.Mesh) -> bool:
  """Whether the layers run without a loop, as config.consolidation.unroll asks for: on a mesh where
  each device has whole heads, the one-device program runs on each of them (`on_mesh`).

  Raises:
    ValueError: it asks for that where heads are split.
  """
  parts = mesh.shape["tensor"]
  if config.unroll == "yes" and parts > 1:
    raise ValueError(
      f'config.consolidation.unroll is "yes" and config.mesh.tensor {parts}: layers without a loop '
      "run over data and fsdp; config.mesh.tensor must be 1, or config.consolidation.unroll "
      '"auto" or "no"'
    )
  possible = parts == 1 and _fast(policy)
  return possible if config.unroll == "auto" else config.unroll == "yes"


def prepare_teacher(
  config: Any, task: Task, policy: Policy, mesh: jax.sharding.Mesh, attn_impl: str
) -> teacher_lib.Teacher:
  """The round's teacher, its texts read once; heads of keys and values are spread as those of the
  parameters are.

  Where they would take more than config.knowledge_gib of a device, they stay in the host's memory
  (of a run of one process).
  """
  a, longest = policy.architecture, max(map(len, task.knowledge))
  shardings = knowledge_shardings(policy, mesh, len(task.knowledge), longest)[1]
  size = knowledge_bytes(policy, mesh, len(task.knowledge), longest)
  found = teacher_lib.prepare(
    policy.params,
    a,
    task.knowledge,
    skip=task.skip,
    dtype=policy.dtype,
    attn_impl="flash" if attn_impl == "cudnn" else attn_impl,
    unroll=unroll(config, policy, mesh),
    shardings=(shardings["keys"], shardings["values"]),
    on_host=size > config.knowledge_gib * 2**30 and jax.process_count() == 1,
  )
  return distributed.in_turn(found)


def knowledge_shardings(
  policy: Policy, mesh: jax.sharding.Mesh, texts: int, tokens: int
) -> tuple[jax.ShapeDtypeStruct, dict[str, Any]]:
  """The shape of the teacher's keys, and of its values, and how each lies on the mesh."""
  a, P = policy.architecture, teacher_lib.room([range(tokens)])
  shape = jax.ShapeDtypeStruct((a.layers, texts, a.kv_heads, P, a.head_size), policy.dtype)
  names = {"teacher": {"keys": shape, "values": shape}}
  return shape, mesh_lib.param_shardings(mesh, names)["teacher"]


def knowledge_bytes(policy: Policy, mesh: jax.sharding.Mesh, texts: int, tokens: int) -> int:
  """What keys and values of so many texts, the longest of so many tokens, take on a device."""
  shape, shardings = knowledge_shardings(policy, mesh, texts, tokens)
  return 2 * math.prod(shardings["keys"].shard_shape(shape.shape)) * shape.dtype.itemsize
