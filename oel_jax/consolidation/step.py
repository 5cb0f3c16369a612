"""One optimizer step of on-policy context distillation (OEL section 3, consolidation)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import chunk_loss, lora, micro_batches, on_mesh, sharded
from oel_jax.consolidation import metrics as metrics_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import transformer, unrolled
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import split
from oel_jax.runtime import finite, target

GRADIENT = "gradient_norm/"  # begins the name of a metric that is one parameter's


class State(NamedTuple):
  """What training changes: optimizer steps done (int32), float32 parameters, or adapters of them
  (`lora`), optimizer state.
  """

  step: Array
  params: Any
  optimizer: Any


def init_state(params: Any, optimizer: Any) -> State:
  """The state before the first step; `optimizer` is an optax GradientTransformation."""
  return State(jnp.int32(0), params, optimizer.init(params))


def loss_sum(
  params: Any,
  teacher: teacher_lib.Teacher,
  batch: batch_lib.Batch,
  *,
  architecture: Architecture,
  kind: str,
  support: str,
  k: int,
  temperature: float,
  chunk: int,
  dtype: Any,
  remat: str,
  attn_impl: str,
  one: tuple[int, ...] = (),
  mesh: Mesh | None = None,
  axes: split.Axes = split.Axes(),
  check_vma: bool = True,
) -> tuple[Array, tuple[Array, metrics_lib.Sums]]:
  """The sum over response tokens of KL(π_θ(·|x, y<t) ‖ π_teacher(·|e, x, y<t)), or of another
  divergence; their count and `metrics`.

  OEL section 3. Arguments are those of `make_step`; `params` are stacked or fused, as the
  teacher's are; `mesh` is None on one device, and inside `jax.shard_map`, for which `axes` and
  `check_vma` are (`on_mesh.by_rows`). Sums, not means: a mean is taken once, over the whole batch,
  so that how the batch is cut changes nothing. All are float32. `kind` "imitation" is the negative
  log-likelihood of the response under the student, and needs no teacher.
  """
  target = None
  if kind != "imitation":  # the teacher first: of its pass, only these rows stay
    with jax.named_scope("teacher"):
      target = teacher_lib.teacher_hidden(
        teacher, architecture, batch, dtype=dtype, attn_impl=attn_impl, mesh=mesh, axes=axes
      )
  with jax.named_scope("student"):
    hidden = teacher_lib.student_hidden(
      params,
      architecture,
      batch,
      dtype=dtype,
      remat=remat,
      attn_impl=attn_impl,
      mesh=mesh,
      axes=axes,
    )
  # As many logits on each device, of however few rows of the heads.
  how = dict(chunk=chunk * axes.devices(), vocabulary_axes=axes.vocabulary())
  head, sink = unrolled.head(params, axes)  # the sinks are of fused parameters in training
  how |= dict(head_sink=sink, head_start=params.get("head_start"))
  if kind == "imitation":
    total, count, found = sharded.linear_imitation(
      mesh,
      hidden,
      head,
      batch.response,
      batch.mask,
      **how,
    )
  else:
    total, count, found = sharded.linear_divergence(
      mesh,
      hidden,
      head,
      target,
      jax.lax.stop_gradient(unrolled.head(teacher.params, axes)[0]),
      batch.mask,
      kind=kind,
      support=support,
      k=k,
      temperature=temperature,
      check_vma=check_vma,
      one=one,
      **how,
    )
  if attn_impl == "flash":  # it sees no segments: rather no loss and no gradient than a wrong one
    total *= jnp.where(batch.segments.max() > 1, jnp.nan, 1)
  return total, (count, metrics_lib.add_up(found, batch))


def make_step(
  architecture: Architecture,
  optimizer: Any,
  *,
  kind: str = "reverse_kl",
  support: str = "full",
  k: int = 256,
  temperature: float = 0.7,
  chunk: int = 512,
  micro_tokens: int | None = None,
  dtype: Any = jnp.float32,
  remat: str = "none",
  attn_impl: str = "xla",
  one: tuple[int, ...] = (),
  shardings: Any = None,
  anchor: float = 0.0,
  lora_scale: float = 1.0,
) -> Callable[..., tuple[State, dict[str, Array]]]:
  """Makes the jitted step(state, teacher, batch, kept=None, base=None) -> (state, metrics). The
  state is donated, the others are not. `kept`, a batch too, has prompts as they stand, of which the
  teacher reads no other knowledge: on them, the student is held to what the teacher does
  (`anchor`). `base`, parameters as `transformer.init` makes them, says that the state's are
  adapters of these (`lora.init`), which alone are learned.

  Args:
    architecture: of student and teacher.
    optimizer: optax GradientTransformation; sees the gradient of the mean over all response tokens.
    kind, support, k, temperature, chunk, one: as in `fused.linear_divergence`; kind may also be
      "imitation".
    micro_tokens: most tokens, padding included, of a forward and backward pass on one device, but
      at least a row. None: all rows at once. Gradients are summed in float32. Micro-batches behind
      the last of which a token counts are not run.
    dtype: of the activations; parameters stay float32.
    remat: what the student's backward pass recomputes (`transformer.REMAT`).
    attn_impl: the attention implementation; "flash" is for batches of one sample a row
      (`attention.attend`), and makes the loss of others NaN.
    shardings: of the state, as `mesh.state_shardings` gives them; None on one device. A batch's
      rows are a multiple of the mesh's data x fsdp (`mesh.pad_batch`).
    anchor: weight of the mean divergence over the tokens of `kept`, beside that over the batch's.
    lora_scale: what the adapters' product is multiplied by before it is added to `base`.

  Returns:
    step; its metrics are float32 scalars: loss (nats a token), gradient_norm, tokens, and means
    over the tokens: kl (exact and reverse, whatever the loss), the same in each of
    `metrics_lib.BUCKETS`, student_entropy, teacher_entropy, all at `temperature`, and topk_mass
    where the top k are found for the loss. "imitation" has the first three only. Beside them stand
    gradient_norm/PATH of each parameter, anchor (the mean divergence over `kept`, not weighted) if
    there is such a batch, and not_finite (int32): how many arrays of the new
    parameters and of the optimizer's state hold a number that is not finite.
  """
  mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh
  loss = functools.partial(
    loss_sum,
    architecture=architecture,
    kind=kind,
    support=support,
    k=k,
    temperature=temperature,
    chunk=chunk,
    dtype=dtype,
    remat=remat,
    attn_impl=attn_impl,
    one=one,
  )

  def zero(params):
    gradient = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jnp.float32(0), jnp.float32(0), metrics_lib.zeros(kind, support), gradient

  def mean(params, teacher, batch):
    """The mean of the loss over the tokens, their count, sums, and the mean's gradient."""
    run, how = functools.partial(_value_and_gradient, loss), dict(mesh=mesh, gradient=True)
    value, count, sums, gradient = micro_batches.over_rows(
      run, zero, params, teacher, batch, micro_tokens=micro_tokens, **how
    )
    of = jnp.maximum(count, 1)
    if teacher_lib.is_unrolled(teacher):
      gradient = on_mesh.unfuse(gradient, architecture, mesh)
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / of, gradient)
    return value / of, count, sums, gradient

  def step(
    state: State, teacher: teacher_lib.Teacher, batch: batch_lib.Batch, kept=None, base=None
  ):
    whole = state.params if base is None else lora.merge(base, state.params, lora_scale)
    # Cast here, once. The loop's gradients in cast matrices are rounded to their type, as those of
    # the products in it are anyway.
    if teacher_lib.is_unrolled(teacher):
      params = on_mesh.fuse(whole, architecture, dtype, mesh)
    else:
      params = transformer.cast(whole, dtype)
    value, count, sums, gradient = mean(params, teacher, batch)
    more = {}
    if kept is not None:
      more["anchor"], _, _, slope = mean(params, teacher_lib.without_knowledge(teacher), kept)
      gradient = jax.tree.map(lambda g, s: g + anchor * s, gradient, slope)
    if base is not None:
      gradient = lora.slopes(gradient, state.params, lora_scale)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    metrics = {
      "loss": value,
      "tokens": count,
      **_norms(gradient),
      **metrics_lib.means(sums),
      **more,
    }
    broken = [~jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, optimizer_state))]
    metrics["not_finite"] = sum(flag.astype(jnp.int32) for flag in broken)
    return State(state.step + 1, params, optimizer_state), metrics

  placed = None if shardings is None else (shardings, None)
  # On a CPU compiled sooner than at XLA's own level, and faster.
  how = target.optimization(1)
  return jax.jit(step, donate_argnums=0, out_shardings=placed, compiler_options=how)


def _value_and_gradient(
  loss: Callable[..., Any],
  params: Any,
  teacher: teacher_lib.Teacher,
  batch: batch_lib.Batch,
  so_far: Any = None,
  **where: Any,
) -> tuple[Array, Array, metrics_lib.Sums, Any]:
  """Value, count, sums and gradient of `loss`, `loss_sum` with what is static: those of the batch,
  added to `so_far`, those of batches before. `where` is as in `micro_batches.over_rows`.
  """
  axes, is_unrolled = where.get("axes", split.Axes()), teacher_lib.is_unrolled(teacher)
  # The head's gradient, the largest, is added where it is made: apart it would have to be cleared,
  # and read and written once more.
  start = None
  if so_far is not None and is_unrolled and axes.width is None:
    start = transformer.head(so_far[-1])
    so_far = *so_far[:-1], unrolled.without_head(so_far[-1])

  def total(learned):
    student = unrolled.attach(params, learned, start) if is_unrolled else learned
    return loss(student, teacher, batch, **where)

  learned = unrolled.sinks(params, batch.tokens) if is_unrolled else params
  (value, (count, sums)), gradient = jax.value_and_grad(total, has_aux=True)(learned)
  rows = gradient.pop("rows") if is_unrolled else None
  found = value, count, sums, gradient
  *found, gradient = found if so_far is None else jax.tree.map(jnp.add, so_far, found)
  if is_unrolled:
    gradient = unrolled.add_rows(gradient, batch.tokens, rows, axes)
  return *found, gradient


def _norms(gradient: Any) -> dict[str, Array]:
  """ "gradient_norm", of all parameters, and each one's own by GRADIENT and its path."""
  squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), gradient)
  found = {"gradient_norm": jnp.sqrt(sum(jax.tree.leaves(squares)))}
  for path, square in jax.tree_util.tree_leaves_with_path(squares):
    found[GRADIENT + finite.path(path)] = jnp.sqrt(square)
  return found


@functools.lru_cache(maxsize=4)  # a new one would be compiled again in each round
def make_probe(
  architecture: Architecture,
  *,
  k: int,
  temperature: float,
  chunk: int,
  micro_tokens: int | None = None,
  dtype: Any = jnp.float32,
  attn_impl: str = "xla",
  mesh: Mesh | None = None,
) -> Callable[[Any, teacher_lib.Teacher, batch_lib.Batch], dict[str, Array]]:
  """Makes the jitted probe(params, teacher, batch) -> means over the response tokens of the
  statistics of `fused.linear_divergence`.

  Arguments are those of `make_step`; `mesh` is None on one device. The means are float32 scalars,
  in nats but for topk_mass.
  """

  def total(params, teacher, batch, *, mesh=None, axes=split.Axes(), check_vma=True):
    how = dict(dtype=dtype, attn_impl=attn_impl, mesh=mesh, axes=axes)
    hidden = teacher_lib.student_hidden(params, architecture, batch, remat="none", **how)
    target = teacher_lib.teacher_hidden(teacher, architecture, batch, **how)
    _, count, found = sharded.linear_divergence(
      mesh,
      hidden,
      unrolled.head(params, axes)[0],
      target,
      unrolled.head(teacher.params, axes)[0],
      batch.mask,
      k=k,
      temperature=temperature,
      chunk=chunk * axes.devices(),
      vocabulary_axes=axes.vocabulary(),
      topk_mass=True,
      check_vma=check_vma,
    )
    return count, {name: value.sum() for name, value in found.items()}

  @jax.jit
  def probe(params, teacher, batch):
    names = chunk_loss.Options(statistics=True, topk_mass=True).names()
    zero = lambda: (jnp.float32(0), dict.fromkeys(names, jnp.float32(0)))
    if teacher_lib.is_unrolled(teacher):
      params = on_mesh.fuse(params, architecture, dtype, mesh)
    given = params, teacher, batch
    count, sums = micro_batches.add_up(total, zero, *given, mesh=mesh, micro_tokens=micro_tokens)
    return {name: value / jnp.maximum(count, 1) for name, value in sums.items()}

  return probe
