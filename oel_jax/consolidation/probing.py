"""What is measured at each checkpoint of a round on one fixed batch, the same at every step."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from oel_jax.consolidation import samples, streamed
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.consolidation.task import Task
from oel_jax.policy.sampling.sampler import Policy


def make(
  config: Any,
  task: Task,
  policy: Policy,
  teacher: teacher_lib.Teacher | streamed.Streamed,
  limit: int,
  mesh: Mesh,
  attn_impl: str,
) -> Callable[[Any], dict[str, float]]:
  """Samples the batch; returns parameters → statistics on it: exact KL, entropies, top-k mass,
  named probe_kl and so on, {} where config.log_probe is 0.
  """
  count = min(config.log_probe, len(task.prompts))
  if count == 0:
    return lambda params: {}
  numbers = list(range(count))
  batch, _ = samples.sample_batch(task, policy, policy, numbers, numbers, config, limit, "probe")
  micro_tokens = samples.micro_tokens_of(
    config, task.prompts, limit=limit, samples=count, mesh=mesh
  )
  batch = samples.place(batch, mesh, count, micro_tokens)
  how = dict(micro_tokens=micro_tokens, dtype=policy.dtype, attn_impl=attn_impl)
  teacher, batch = streamed.ahead(teacher, policy.architecture, batch, **how)
  probe = step_lib.make_probe(
    policy.architecture,
    k=config.k,
    temperature=config.temperature,
    chunk=config.chunk,
    micro_tokens=micro_tokens,
    dtype=policy.dtype,
    attn_impl=attn_impl,
    mesh=mesh,
  )
  return lambda params: {
    f"probe_{name}": float(value) for name, value in probe(params, teacher, batch).items()
  }
