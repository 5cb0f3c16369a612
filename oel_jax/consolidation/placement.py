"""How a round's training runs here: which attention, layers in a loop or not, and where the
teacher's keys and values of the knowledge lie.
"""

import math
from typing import Any

import jax
import numpy as np
from absl import logging

from oel_jax.consolidation import on_mesh, streamed
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
  """Whether the layers run without a loop, as config.consolidation.unroll asks for: on a mesh whose
  devices along "tensor" have equal shares, each runs the program of one (`on_mesh`).

  Raises:
    ValueError: it asks for that where they have not.
  """
  wrong = on_mesh.undivided(policy.architecture, mesh)
  if config.unroll == "yes" and wrong:
    raise ValueError(
      f'config.consolidation.unroll is "yes" and config.mesh.tensor {mesh.shape["tensor"]}, which '
      f"does not divide the weights' {', '.join(wrong)}: config.mesh.tensor must, or "
      'config.consolidation.unroll be "auto" or "no"'
    )
  possible = not wrong and _fast(policy)
  return possible if config.unroll == "auto" else config.unroll == "yes"


def prepare_teacher(
  config: Any, task: Task, policy: Policy, mesh: jax.sharding.Mesh, attn_impl: str
) -> teacher_lib.Teacher | streamed.Streamed:
  """The round's teacher, its texts read once; heads of keys and values are spread as those of the
  parameters are.

  Where they would take more than config.knowledge_gib of a device, they stay in the host's memory
  (of a run of one process). With config.teacher_on_host, layers of the teacher do with theirs.

  Raises:
    ValueError: config.teacher_on_host is not 0 where layers run in a loop or on several devices.
  """
  a, longest = policy.architecture, max(map(len, task.knowledge))
  shardings = knowledge_shardings(policy, mesh, len(task.knowledge), longest)[1]
  size = knowledge_bytes(policy, mesh, len(task.knowledge), longest)
  streams = check_streams(config, policy, mesh)
  large = size > config.knowledge_gib * 2**30 and jax.process_count() == 1
  found = teacher_lib.prepare(
    policy.params,
    a,
    task.knowledge,
    skip=task.skip,
    dtype=policy.dtype,
    attn_impl="flash" if attn_impl == "cudnn" else attn_impl,
    unroll=unroll(config, policy, mesh),
    shardings=(shardings["keys"], shardings["values"]),
    on_host=large and not streams,
  )
  found = distributed.in_turn(found)
  return streamed.from_teacher(found, config.teacher_on_host) if streams else found


def check_streams(config: Any, policy: Policy, mesh: jax.sharding.Mesh) -> bool:
  """Whether layers of the teacher lie in the host's memory, as config.consolidation.teacher_on_host
  asks for.

  Raises:
    ValueError: it asks for that where layers run in a loop or on several devices.
  """
  share = config.teacher_on_host
  if not share:
    return False
  if mesh.size > 1:
    raise ValueError(
      f"config.consolidation.teacher_on_host is {share:g}, and the mesh has {mesh.size} devices: "
      "layers come from the host to one device alone; it must be 0, or config.mesh one device"
    )
  if not unroll(config, policy, mesh):
    raise ValueError(
      f"config.consolidation.teacher_on_host is {share:g}, and layers run in a loop here: it must "
      'be 0, or config.consolidation.unroll "yes"'
    )
  return True


def tell_if_on_host(config: Any, task: Task, teacher: Any) -> None:
  """Warns of knowledge that stays on the host though the configuration did not ask for that."""
  if isinstance(teacher, streamed.Streamed):
    return
  if teacher.keys.sharding.memory_kind == "pinned_host":
    logging.warning(
      "round %d: keys and values of the knowledge are more than %g GiB, as "
      "config.consolidation.knowledge_gib says: they stay on the host, layers run in a loop",
      task.round,
      config.knowledge_gib,
    )


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
