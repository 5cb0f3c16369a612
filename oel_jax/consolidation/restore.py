"""What a round's training begins with, or goes on with: its optimizer and first state, and the
checkpoints that it has left.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import optax

from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import finite, schema
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints, Restored
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.manifest import differing


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """AdamW at a constant rate after clipping by the global norm (OEL, training details). The same
  numbers give the same one, so that no round compiles again what the round before has.
  """
  names = ("clip_norm", "learning_rate", "b1", "b2", "eps", "weight_decay")
  return _adamw(*(getattr(config, name) for name in names))


@functools.lru_cache(maxsize=2)
def _adamw(clip_norm, learning_rate, b1, b2, eps, weight_decay) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )


@functools.lru_cache(maxsize=2)
def beginning(optimizer: optax.GradientTransformation) -> Callable[[Any], step_lib.State]:
  """`begin` with this optimizer, the same function each time."""
  return functools.partial(begin, optimizer)


def begin(optimizer: optax.GradientTransformation, params: Any) -> step_lib.State:
  """The state before the first step, its parameters in float32."""
  return step_lib.init_state(jax.tree.map(lambda p: p.astype("float32"), params), optimizer)


def inputs(task: task_lib.Task, policy: Policy) -> dict[str, str]:
  """What a training is made from → a digest of it; kept in each checkpoint."""
  return {
    "weights": fingerprint(policy.params),
    "prompts": schema.digest(task.prompts),
    "knowledge": schema.digest(task.knowledge),
  }


def check_inputs(directory: str | os.PathLike, task: task_lib.Task, policy: Policy) -> None:
  """Raises ValueError if the newest checkpoint in `directory` was trained from other weights,
  prompts or knowledge than these.
  """
  if steps_done(directory):
    with Checkpoints(directory) as checkpoints:
      extra = checkpoints.extra()
    compare_inputs(directory, (extra or {}).get("made_from"), inputs(task, policy))


def compare_inputs(
  directory: str | os.PathLike, before: dict[str, str] | None, now: dict[str, str]
) -> None:
  """Raises ValueError if they differ; an earlier version's checkpoint (None) does not say what it
  was trained from.
  """
  changed = differing(before, now)
  if changed:
    raise ValueError(
      f"{directory}: its checkpoints were trained from other {', '.join(changed)} than this run "
      "has now: restore them, choose "
      "another --workdir, or remove the folder to train anew"
    )


def newest(checkpoints: Checkpoints, abstract: Any) -> Restored | None:
  """The newest whole checkpoint, or None.

  Raises:
    ValueError: its numbers are not finite: versions before this check went on with such ones.
  """
  restored = checkpoints.restore(abstract)
  if restored and (broken := finite.not_finite(restored.state)):
    raise ValueError(
      f"{checkpoints.directory / str(restored.step)}: holds numbers that are not finite, in "
      f"{finite.listed(broken)}: training had gone wrong before it was saved; remove that "
      "folder, and the same command goes on from the one before it, or begins the round anew"
    )
  return restored


def trained_params(
  config: Any, policy: Policy, directory: str | os.PathLike, mesh: jax.sharding.Mesh
) -> Any:
  """The parameters that `consolidate` left in `directory` after config.steps steps; None if it has
  not come so far.
  """
  if not os.path.isdir(directory):
    return None
  with Checkpoints(directory) as checkpoints:
    first_state = beginning(make_optimizer(config))
    restored = newest(checkpoints, mesh_lib.abstract_init(first_state, mesh, policy.params))
  return restored.state.params if restored and restored.step == config.steps else None


def steps_done(directory: str | os.PathLike) -> int:
  """The step of the newest checkpoint in `directory`, whole or not; 0 if there is none. Nothing is
  opened or changed.
  """
  if not os.path.isdir(directory):
    return 0
  return max((int(name) for name in os.listdir(directory) if name.isdigit()), default=0)
