"""Sampling in several processes: each draws the responses of its share of the prompts, with the
weights whole on each of its own devices, or in each group of them (`groups`), and the ids are
gathered.

Between the gathering of the weights and that of the ids no process waits for another, so that
shares may be uneven, or empty; and no step depends on two machines drawing the same bits.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from oel_jax.policy import transformer
from oel_jax.policy.sampling import groups
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import distributed, together
from oel_jax.runtime import mesh as mesh_lib
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
  """The policy with its parameters on the devices of this process, whole on each of them or split
  over each group, matrices and tables in the type of the computation; gathered tensor by tensor.
  """
  size = policy.sample_tensor
  # In the order of the mesh that they were trained on: a program takes no arrays of another.
  every = list(jax.tree.leaves(policy.params)[0].sharding.mesh.devices.flat)
  devices = [device for device in every if device.process_index == jax.process_index()]
  groups.check(policy.architecture, size, len(devices))
  groups.check_processes(every, size)
  here, everywhere = (groups.make_mesh(each, size) for each in (devices, every))

  def one(leaf: jax.Array, place: NamedSharding) -> jax.Array:
    if not (leaf.is_fully_replicated and place.is_fully_replicated):
      leaf = distributed.in_turn(_placed(place)(leaf))
    parts = {shard.device: shard.data for shard in leaf.addressable_shards}
    return jax.make_array_from_single_device_arrays(
      leaf.shape, NamedSharding(here, place.spec), [parts[device] for device in devices]
    )

  # Cast first, as sampling would: half of what travels.
  params = transformer.cast(policy.params, policy.dtype, tables=True)
  return policy.replace(jax.tree.map(one, params, mesh_lib.param_shardings(everywhere, params)))


@functools.cache
def _placed(place: NamedSharding) -> Any:
  return jax.jit(lambda leaf: leaf, out_shardings=place)
