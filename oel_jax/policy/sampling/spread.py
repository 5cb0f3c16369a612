"""Sampling in several processes: each draws the responses of its share of the prompts, with the
weights whole on its own devices, and the ids are gathered.

Between the gathering of the weights and that of the ids no process waits for another, so that
shares may be uneven, or empty; and no step depends on two machines drawing the same bits.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oel_jax.policy import transformer
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import distributed, together
from oel_jax.runtime.finite import NotFiniteError

if TYPE_CHECKING:
  from oel_jax.policy.sampling.sampler import Policy


def is_spread(params: Any) -> bool:
  """Whether the parameters lie on the devices of several processes."""
  return any(
    isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    for leaf in jax.tree.leaves(params)[:1]
  )


@together.everywhere
def sample(
  policy: "Policy",
  prompts: Sequence[Sequence[int]],
  seeds: Sequence[int],
  sampling: Sampling,
  max_new_tokens: int,
  logprobs: bool = False,
) -> Any:
  """`Policy.sample` without a reply, where `policy` has spread parameters; the same ids, and
  log-probabilities, in all processes.
  """
  local, first, step = own(policy), distributed.process(), distributed.count()
  how = dict(sampling=sampling, max_new_tokens=max_new_tokens, logprobs=logprobs)

  def work() -> list[list[Any]]:
    try:
      found = local.sample(prompts[first::step], seeds[first::step], **how)
    except NotFiniteError as error:
      raise NotFiniteError(str(error), [first + step * i for i in error.prompts]) from error
    # Each number of float32 is one that JSON has, too.
    return [found[0], [scores.tolist() for scores in found[1]]] if logprobs else [found]

  parts: list[list[Any]] = [[[] for _ in prompts] for _ in range(1 + logprobs)]
  for number, found in enumerate(distributed.gather_done(work, "sampling")):
    for whole, share in zip(parts, found, strict=True):
      whole[number::step] = share
  if not logprobs:
    return parts[0]
  return parts[0], [np.asarray(scores, np.float32) for scores in parts[1]]


@together.everywhere
def own(policy: "Policy") -> "Policy":
  """The policy with its parameters whole on each device of this process, matrices and tables in the
  type of the computation; gathered tensor by tensor.
  """
  devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
  names = ("data", "fsdp", "tensor")
  here = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
  whole = NamedSharding(here, PartitionSpec())

  def one(leaf: jax.Array) -> jax.Array:
    if not leaf.is_fully_replicated:
      leaf = distributed.in_turn(_replicate(leaf.sharding.mesh)(leaf))
    parts = {shard.device: shard.data for shard in leaf.addressable_shards}
    return jax.make_array_from_single_device_arrays(
      leaf.shape, whole, [parts[device] for device in devices.flat]
    )

  # Cast first, as sampling would: half of what travels.
  return policy.replace(
    jax.tree.map(one, transformer.cast(policy.params, policy.dtype, tables=True))
  )


@functools.cache
def _replicate(mesh: Mesh) -> Any:
  return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))
