"""Training on those responses alone over which teacher and student disagree most
(config.consolidation.select).

Whole responses are chosen, for whole rows are what saves work: of a row that is trained on in part
only the products with the heads are saved. What the student thought of its own tokens is known from
their sampling, so a choice costs one pass of the teacher and none of the student.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import micro_batches, samples, sharded, streamed
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.consolidation.task import Task
from oel_jax.policy import unrolled
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import split
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import distributed

Scored = NamedTuple(
  "Scored", [*batch_lib.Batch.__annotations__.items(), ("owners", Array), ("logprobs", Array)]
)
Scored.__doc__ = """A `batch.Batch` with, [S, R] each, the number of the sample that a response
token is of, int32, and the token's log-probability when it was sampled, float32."""


@functools.lru_cache(maxsize=1)  # a new one would be compiled again in each round
def make_scorer(
  architecture: Architecture,
  *,
  samples: int,
  chunk: int,
  micro_tokens: int | None = None,
  dtype: Any = jnp.float32,
  attn_impl: str = "xla",
  mesh: Mesh | None = None,
) -> Callable[[teacher_lib.Teacher, Scored], Float32[Array, "N"]]:
  """Makes the jitted score(teacher, batch) -> Σ_t |log π_θ(y_t|x, y<t) − log π_teacher(y_t|e, x,
  y<t)| of each sample's response y, in nats and at temperature 1, both as they were sampled.

  `samples` is N, the most that a batch has; other arguments are those of `step.make_step`.
  """

  def total(params, teacher, batch, *, mesh=None, axes=split.Axes(), check_vma=True):
    del params, check_vma
    hidden = teacher_lib.teacher_hidden(
      teacher, architecture, batch, dtype=dtype, attn_impl=attn_impl, mesh=mesh, axes=axes
    )
    head = unrolled.head(teacher.params, axes)[0]
    how = dict(chunk=chunk * axes.devices(), vocabulary_axes=axes.vocabulary())
    _, _, found = sharded.linear_imitation(
      mesh, hidden, head, batch.response, batch.mask, statistics=True, **how
    )
    apart_SxR = jnp.where(batch.mask, jnp.abs(batch.logprobs + found["nll"]), 0)
    # No scatter: on a GPU it would not add up in the same order twice.
    own_SxRxN = batch.owners[..., None] == jnp.arange(samples)
    return (jnp.where(own_SxRxN, apart_SxR[..., None], 0).sum((0, 1)),)

  @jax.jit
  def score(teacher, batch):
    zero = lambda: (jnp.zeros(samples, jnp.float32),)
    given = teacher.params, teacher, batch
    return micro_batches.add_up(total, zero, *given, mesh=mesh, micro_tokens=micro_tokens)[0]

  return score


def scored(made: batch_lib.Batch, rows: Sequence[Sequence[int]], drawn: samples.Drawn) -> Scored:
  """The batch that `batch.assemble` made of these samples, `rows` as `batch.rows_of` says."""
  owners, logprobs = np.zeros(made.mask.shape, np.int32), np.zeros(made.mask.shape, np.float32)
  for s, row in enumerate(rows):
    begin = 0
    for i in row:
      here = slice(begin, begin + len(drawn.responses[i]))
      owners[s, here], logprobs[s, here], begin = i, drawn.logprobs[i], here.stop
  return Scored(*made, owners, logprobs)


def choose(scores: Sequence[float], tokens: Sequence[int], share: float) -> list[int]:
  """Numbers of the samples to be trained on, in order: those with the largest score for their
  tokens first, each that still fits into `share` of all tokens; the very first whether or not.
  """
  budget, taken = share * sum(tokens), []
  for i in np.argsort(-np.asarray(scores, np.float64) / np.asarray(tokens), kind="stable"):
    if not taken or tokens[i] <= budget:
      taken.append(int(i))
      budget -= tokens[i]
  return sorted(taken)


@dataclasses.dataclass(frozen=True)
class Selection:
  """What chooses the samples of a round's steps.

  Attributes:
    config: config.consolidation.
    task, policy: of the round.
    limit: most tokens of a response.
    mesh: devices.
    score: from `make_scorer`.
    micro_tokens: most tokens of a micro-batch in it.
    max_samples: most samples of a step.
    attn_impl: the attention implementation.
  """

  config: Any
  task: Task
  policy: Policy
  limit: int
  mesh: Mesh
  score: Callable[[teacher_lib.Teacher, Scored], Float32[Array, "N"]]
  micro_tokens: int
  max_samples: int
  attn_impl: str

  def __call__(
    self, drawn: samples.Drawn, teacher: teacher_lib.Teacher | streamed.Streamed
  ) -> tuple[samples.Drawn, dict[str, float]]:
    """The samples to be trained on, and what the step's line tells: "selected", their share of all
    samples' tokens; "disagreement" and "selected_disagreement", nats a response token of all and of
    these.
    """
    how = self.task, self.policy, drawn, self.config, self.limit
    made = scored(samples.assemble(*how), samples.rows_of(*how), drawn)
    placed = samples.place(made, self.mesh, self.max_samples, self.micro_tokens)
    how = dict(dtype=self.policy.dtype, attn_impl=self.attn_impl)
    given = teacher, self.policy.architecture, placed
    ready = streamed.ahead(*given, micro_tokens=self.micro_tokens, **how)
    found = np.asarray(jax.device_get(self.score(*ready)), np.float64)
    # Of the first process: all must choose the same.
    scores = np.array(distributed.gather(found.tolist(), "scores")[0][: len(drawn.prompts)])
    tokens, sizes = drawn.tokens(), np.array([len(ids) for ids in drawn.responses])
    chosen = choose(scores, tokens, self.config.select)
    return drawn.only(chosen), {
      "selected": sum(tokens[i] for i in chosen) / sum(tokens),
      "disagreement": float(scores.sum() / sizes.sum()),
      "selected_disagreement": float(scores[chosen].sum() / sizes[chosen].sum()),
    }


def prepare(
  config: Any,
  task: Task,
  policy: Policy,
  limit: int,
  mesh: Mesh,
  attn_impl: str,
  max_samples: int,
) -> Selection | None:
  """The selection of a round, whose steps have at most `max_samples`; None if config.select is
  1, and all are trained on.
  """
  if config.select == 1:
    return None
  micro_tokens = samples.micro_tokens_of(
    config, task.prompts, limit=limit, samples=max_samples, mesh=mesh
  )
  score = make_scorer(
    policy.architecture,
    samples=max_samples,
    chunk=config.chunk,
    micro_tokens=micro_tokens,
    dtype=policy.dtype,
    attn_impl=attn_impl,
    mesh=mesh,
  )
  return Selection(config, task, policy, limit, mesh, score, micro_tokens, max_samples, attn_impl)


def trained(config: Any, count: int) -> int:
  """About how many of so many samples are trained on."""
  return max(1, math.ceil(config.select * count))
