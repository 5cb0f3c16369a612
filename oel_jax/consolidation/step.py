"""One optimizer step of on-policy context distillation (OEL section 3, consolidation)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import fused, teacher
from oel_jax.policy import model
from oel_jax.policy.architecture import Architecture


class State(NamedTuple):
  """What training changes: optimizer steps done (int32), float32 parameters, optimizer state."""

  step: Array
  params: Any
  optimizer: Any


def init_state(params: Any, optimizer: Any) -> State:
  """The state before the first step; `optimizer` is an optax GradientTransformation."""
  return State(jnp.int32(0), params, optimizer.init(params))


def loss_sum(
    params: Any, teacher_params: Any, batch: batch_lib.Batch, *, architecture: Architecture, kind: str, support: str, k: int,
    temperature: float, chunk: int, dtype: Any, remat: str,
) -> tuple[Array, Array]:  # fmt: skip
  """The sum over response tokens of KL(π_θ(·|x, y<t) ‖ π_teacher(·|e, x, y<t)), or of another divergence, and their count; float32.

  Sums, not means: a mean is taken once, over the whole batch, so that how the batch is cut changes nothing (traps, 6).
  `kind` "imitation" is the negative log-likelihood of the response under the student, and needs no teacher.
  """
  rows = batch.response.shape[1]
  hidden = teacher.sequence_hidden(
      params, architecture, batch.student_tokens, batch.student_length, batch.student_start, rows, dtype=dtype, remat=remat
  )
  if kind == "imitation":
    return fused.linear_imitation(hidden, model.head(params), batch.response, batch.mask, chunk=chunk)
  target = teacher.teacher_hidden(teacher_params, architecture, batch, dtype=dtype)
  return fused.linear_divergence(
      hidden, model.head(params), target, jax.lax.stop_gradient(model.head(teacher_params)), batch.mask,
      kind=kind, support=support, k=k, temperature=temperature, chunk=chunk,
  )  # fmt: skip


def make_step(
    architecture: Architecture, optimizer: Any, *, kind: str = "reverse_kl", support: str = "full", k: int = 256, temperature: float = 0.7,
    chunk: int = 512, micro_batch: int | None = None, dtype: Any = jnp.float32, remat: str = "none", shardings: Any = None,
) -> Callable[[State, Any, batch_lib.Batch], tuple[State, dict[str, Array]]]:  # fmt: skip
  """Makes the jitted step(state, teacher, batch) -> (state, metrics). The state is donated, the teacher's parameters are not.

  Args:
    architecture: of student and teacher.
    optimizer: optax GradientTransformation; sees the gradient of the mean over all response tokens.
    kind, support, k, temperature, chunk: as in `fused.linear_divergence`; kind may also be "imitation".
    micro_batch: samples a forward and backward pass; divides the batch. None: all at once. Gradients are summed in float32.
    dtype: of the activations; parameters stay float32.
    remat: what the student's backward pass recomputes (`model.REMAT`).
    shardings: of the state, as `mesh.state_shardings` gives them; None on one device.

  Returns:
    step; its metrics are float32 scalars: loss (nats a token), gradient_norm, tokens.
  """

  def value_and_gradient(params, teacher_params, batch):
    def total(params):
      return loss_sum(
          params, teacher_params, batch, architecture=architecture, kind=kind, support=support, k=k, temperature=temperature, chunk=chunk,
          dtype=dtype, remat=remat,
      )  # fmt: skip

    (value, count), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return value, count, gradient

  def step(state: State, teacher_params: Any, batch: batch_lib.Batch):
    size = batch.mask.shape[0]
    pieces = size // (micro_batch or size)
    if pieces * (micro_batch or size) != size:
      raise ValueError(f"micro_batch is {micro_batch}: it must divide the batch of {size}")
    if pieces == 1:
      value, count, gradient = value_and_gradient(state.params, teacher_params, batch)
    else:
      cut = jax.tree.map(lambda x: x.reshape(pieces, size // pieces, *x.shape[1:]), batch)
      zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
      add = lambda so_far, piece: (jax.tree.map(jnp.add, so_far, value_and_gradient(state.params, teacher_params, piece)), None)
      (value, count, gradient), _ = jax.lax.scan(add, zero, cut)
    count = jnp.maximum(count, 1)
    gradient = jax.tree.map(lambda g: g / count, gradient)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
    return State(state.step + 1, params, optimizer_state), {"loss": value / count, "gradient_norm": norm, "tokens": count}

  return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def make_probe(architecture: Architecture, *, k: int, temperature: float, chunk: int, dtype: Any = jnp.float32):
  """Makes the jitted probe(params, teacher, batch) -> means over the response tokens, as `fused.linear_statistics` names them."""

  @jax.jit
  def probe(params, teacher_params, batch):
    rows = batch.response.shape[1]
    hidden = teacher.sequence_hidden(
        params, architecture, batch.student_tokens, batch.student_length, batch.student_start, rows, dtype=dtype, remat="none"
    )
    target = teacher.teacher_hidden(teacher_params, architecture, batch, dtype=dtype)
    sums = fused.linear_statistics(
        hidden, model.head(params), target, model.head(teacher_params), batch.mask, k=k, temperature=temperature, chunk=chunk
    )
    return {name: value / jnp.maximum(sums["count"], 1) for name, value in sums.items() if name != "count"}

  return probe
