"""What a round's training begins with, or goes on with: its optimizer and first state, and the
checkpoints that it has left.
"""

import functools
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from oel_jax.consolidation import id_lists, lora
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import distributed, finite, schema, seeds
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints, Restored
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.manifest import differing

WEIGHTS = "weights"  # beside the checkpoints, where the parameters alone are kept


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm, at a constant rate (OEL, training details) unless
  config.final_rate has it fall. The same numbers give the same one, so that no round compiles again
  what the round before has.
  """
  names = ("clip_norm", "learning_rate", "b1", "b2", "eps", "weight_decay")
  falls = (config.final_rate, config.steps, config.decay) if config.final_rate < 1 else None
  return _adamw(*(getattr(config, name) for name in names), falls)


@functools.lru_cache(maxsize=2)
def _adamw(
  clip_norm, learning_rate, b1, b2, eps, weight_decay, falls
) -> optax.GradientTransformation:
  constant = optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )
  return _falling(constant, *falls) if falls else constant


def _falling(
  constant: optax.GradientTransformation, share: float, steps: int, decay: float
) -> optax.GradientTransformation:
  """The optimizer with its moves shrunk in a line over the last `decay` of so many steps, to
  `share` of them at the last one.

  Its state is that of `constant`, whose count of steps Adam keeps: a run whose rate begins to fall
  still reads the rounds before, and goes on in the middle of one.
  """
  first = steps - max(1, round(decay * steps))  # the last step that has the whole rate
  left = optax.linear_schedule(1.0, share, max(1, steps - 1 - first), first)

  def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    now = left(optax.tree_utils.tree_get(state, "count"))
    moves, state = constant.update(gradients, state, params)
    return jax.tree.map(lambda move: now * move, moves), state

  return optax.GradientTransformation(constant.init, update)


@functools.lru_cache(maxsize=2)
def beginning(
  optimizer: optax.GradientTransformation, rank: int = 0
) -> Callable[..., step_lib.State]:
  """`begin` with this optimizer and rank, the same function each time."""
  return functools.partial(begin, optimizer, rank=rank)


def begin(
  optimizer: optax.GradientTransformation, params: Any, seed: Any = None, *, rank: int = 0
) -> step_lib.State:
  """The state before the first step: of the parameters in float32, or with a rank of their adapters
  (`lora.init`), drawn by `seed`, uint32.
  """
  learned = lora.init(params, rank, jax.random.key(seed)) if rank else in_float32(params)
  return step_lib.init_state(learned, optimizer)


def begins_with(config: Any, task: task_lib.Task, params: Any) -> tuple[Any, ...]:
  """What `beginning` is given besides the optimizer and the rank."""
  if not config.lora_rank:
    return (params,)
  return params, np.uint32(seeds.derive(task.seed, task.round, "adapters"))


def in_float32(params: Any) -> Any:
  """The parameters as they are learned."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def abstract_left(config: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
  """All parameters as a training leaves them, as `mesh.abstract_init` has it: in float32, or with
  adapters in the types that they had.
  """
  left = (lambda params: params) if config.lora_rank else in_float32
  return mesh_lib.abstract_init(left, mesh, params)


def keeps_weights(config: Any) -> bool:
  """Whether a finished training leaves its parameters alone. Of adapters they are the only thing to
  go on from: what is added to them would differ in its last bits from one kind of device to
  another.
  """
  return config.keep == "weights" or config.lora_rank > 0


def inputs(task: task_lib.Task, policy: Policy) -> dict[str, str]:
  """What a training is made from → a digest of it; kept in each checkpoint."""
  return {
    "weights": fingerprint(policy.params),
    "prompts": id_lists.digest(task.prompts),
    "knowledge": schema.digest(task.knowledge),
  }


def beside(config: Any, made_from: dict[str, str]) -> dict[str, Any]:
  """What each checkpoint holds besides its arrays."""
  return {"made_from": made_from} | {name: config[name] for name in ("lora_rank", "lora_alpha")}


def check_inputs(directory: str | os.PathLike, task: task_lib.Task, policy: Policy) -> None:
  """Raises ValueError if the newest checkpoint in `directory` was trained from other weights,
  prompts or knowledge than these.
  """
  if steps_done(directory):
    folder = pathlib.Path(directory)
    with Checkpoints(folder / WEIGHTS if only_weights(folder) else folder) as checkpoints:
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


def check_rank(checkpoints: Checkpoints, rank: int) -> None:
  """Raises ValueError if the newest checkpoint was trained with another config.lora_rank: it holds
  other arrays, or weights in other types.
  """
  before = (checkpoints.extra() or {"lora_rank": rank}).get("lora_rank", 0)
  if before != rank:
    raise ValueError(
      f"{checkpoints.directory}: was trained where config.consolidation.lora_rank was {before}; "
      f"now it is {rank}: set it to {before}, choose another --workdir, or remove the folder to "
      "train the round anew"
    )


def newest(checkpoints: Checkpoints, abstract: Any, rank: int) -> Restored | None:
  """The newest whole checkpoint, or None; `rank` is config.lora_rank.

  Raises:
    ValueError: its numbers are not finite: versions before this check went on with such ones; or as
      `check_rank`.
  """
  check_rank(checkpoints, rank)
  restored = checkpoints.restore(abstract)
  if restored and (broken := finite.not_finite(restored.state)):
    raise ValueError(
      f"{checkpoints.directory / str(restored.step)}: holds numbers that are not finite, in "
      f"{finite.listed(broken)}: training had gone wrong before it was saved; remove that "
      "folder, and the same command goes on from the one before it, or begins the round anew"
    )
  return restored


def go_on(
  restored: Restored,
  batches: Any,
  config: Any,
  task: task_lib.Task,
  made_from: dict[str, str],
  directory: str | os.PathLike,
) -> int:
  """Returns the step of the round's last whole checkpoint, and sets the batches to what follows it.

  Raises:
    ValueError: it was trained from something else, with another config.lora_alpha, or for more
      steps than the configuration says.
  """
  compare_inputs(directory, restored.extra.get("made_from"), made_from)
  alpha = restored.extra.get("lora_alpha", config.lora_alpha)
  if alpha != config.lora_alpha:
    raise ValueError(
      f"{directory}: its adapters are learned with config.consolidation.lora_alpha {alpha}, which "
      f"is {config.lora_alpha} now: set it to {alpha}, choose another --workdir, or remove the "
      "folder to train the round anew"
    )
  batches.set_state(restored.extra["iterator"])
  if restored.step < config.steps:
    logging.warning("round %d: consolidation goes on after step %d", task.round, restored.step)
  if restored.step > config.steps:
    raise ValueError(
      f"{directory}: holds step {restored.step}, but config.consolidation.steps or later_steps is "
      f"{config.steps}: it must be at least that"
    )
  return restored.step


def keep_weights(
  config: Any, directory: str | os.PathLike, params: Any, made_from: dict[str, str]
) -> None:
  """Leaves of a finished training its parameters alone, in `directory`/WEIGHTS; its checkpoints go
  once these are whole. All processes call it.

  Raises:
    OSError: they could not be written; then the checkpoints stay.
  """
  with Checkpoints(pathlib.Path(directory) / WEIGHTS, keep=1) as kept:
    kept.save(config.steps, params, beside(config, made_from))
  drop_checkpoints(directory)


def drop_checkpoints(directory: str | os.PathLike) -> None:
  """Removes the checkpoints beside WEIGHTS. All processes call it."""
  if distributed.is_writer():
    for name in _steps(directory):
      shutil.rmtree(pathlib.Path(directory) / str(name))
  distributed.barrier(f"the checkpoints of {directory}")


def need_room(
  checkpoints: Checkpoints, config: Any, abstract: Any, params: Any, first: int
) -> None:
  """Raises OSError unless the disk has room for what is saved after step `first`: states, and in
  the end maybe all the parameters.
  """
  left = config.steps - first
  if keeps_weights(config):
    checkpoints.need_room(abstract, (left - 1) // config.checkpoint_every)
    checkpoints.need_room(params, 1)
  else:
    checkpoints.need_room(abstract, -(-left // config.checkpoint_every))


def weights(
  config: Any,
  directory: str | os.PathLike,
  abstract: Any,
  made_from: dict[str, str] | None = None,
) -> Any:
  """The parameters that `keep_weights` left, None if there are none, or none that are whole.

  Args:
    config: config.consolidation.
    directory: of the round's checkpoints.
    abstract: of the parameters, as `newest` takes it of the state.
    made_from: what the training has now; None: not compared.

  Raises:
    ValueError: they were trained from something else, with another rank or for another number of
      steps; or are not finite.
  """
  folder = pathlib.Path(directory) / WEIGHTS
  if not _steps(folder):
    return None
  with Checkpoints(folder, keep=1) as kept:
    restored = newest(kept, abstract, config.lora_rank)
  if restored is None:
    return None
  compare_inputs(directory, restored.extra.get("made_from"), made_from or {})
  if restored.step != config.steps:
    raise ValueError(weights_only(folder, restored.step, config.steps))
  return restored.state


def weights_only(folder: str | os.PathLike, done: int, planned: int) -> str:
  """That a training cannot go on for more steps."""
  return (
    f"{folder}: holds the weights after step {done} alone, as config.consolidation.keep or "
    f"lora_rank says, but config.consolidation.steps or later_steps is {planned}: set it to "
    f"{done}, or remove the folder to train the round anew"
  )


def trained_params(
  config: Any, policy: Policy, directory: str | os.PathLike, mesh: jax.sharding.Mesh
) -> Any:
  """The parameters that `consolidate` left in `directory` after config.steps steps; None if it has
  not come so far.

  Raises:
    ValueError: as `weights`.
  """
  if not os.path.isdir(directory):
    return None
  params = weights(config, directory, abstract_left(config, policy.params, mesh))
  if params is not None:
    return params
  with Checkpoints(directory) as checkpoints:
    if config.lora_rank:
      check_rank(checkpoints, config.lora_rank)
      return None
    abstract = mesh_lib.abstract_init(beginning(make_optimizer(config)), mesh, policy.params)
    restored = newest(checkpoints, abstract, 0)
  return restored.state.params if restored and restored.step == config.steps else None


def steps_done(directory: str | os.PathLike) -> int:
  """The step of the newest checkpoint in `directory`, whole or not, or of the weights that alone
  are kept; 0 if there is none. Nothing is opened or changed.
  """
  return max([*_steps(directory), *_steps(pathlib.Path(directory) / WEIGHTS)], default=0)


def only_weights(directory: str | os.PathLike) -> bool:
  """Whether of the training in `directory` its weights alone are left."""
  return bool(_steps(pathlib.Path(directory) / WEIGHTS))


def _steps(directory: str | os.PathLike) -> list[int]:
  there = os.path.isdir(directory)
  return [int(name) for name in os.listdir(directory) if name.isdigit()] if there else []
