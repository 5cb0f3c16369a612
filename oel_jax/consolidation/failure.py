"""What is told when a step gives numbers that are none: which they are, at which prompts, and where
the last good weights lie.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from oel_jax.consolidation import step as step_lib
from oel_jax.runtime import finite
from oel_jax.runtime.checkpoint import Checkpoints


def broken(
  scalars: dict[str, float],
  measured: dict[str, float] | None = None,
  state: step_lib.State | None = None,
) -> str:
  """Returns what is not finite, in words; "" if everything is finite.

  Args:
    scalars: the numbers of a line of metrics.
    measured: all metrics of the step (`step.make_step`); None where there was no step.
    state: after the step; read only if `measured` says that it holds such numbers.
  """
  told = [f"{name} is {value}" for name, value in scalars.items() if not math.isfinite(value)]
  if measured is None:
    return "; ".join(told)
  gradients = [
    name.removeprefix(step_lib.GRADIENT)
    for name, value in measured.items()
    if name.startswith(step_lib.GRADIENT) and not math.isfinite(value)
  ]
  if gradients:
    told.append(f"the gradient is not finite in {finite.listed(gradients)}")
  if measured["not_finite"]:
    parameters = finite.not_finite(state.params)
    where = f"new parameters are not finite in {finite.listed(parameters)}"
    told.append(f"the {where}" if parameters else "the optimizer's state is not finite")
  return "; ".join(told)


def failed(
  what: str,
  *,
  config: Any,
  dtype: Any,
  round: int,
  step: int,
  ids: Iterable[str],
  checkpoints: Checkpoints,
) -> finite.NotFiniteError:
  """Returns the error that ends the run at this step, once what was saved before is on the disk.

  Args:
    what: of `broken`, or the sampler's own words.
    config: config.consolidation.
    dtype: of the computation.
    round, step: where it happened.
    ids: names of the prompts.
    checkpoints: of the round; none of them is touched.
  """
  checkpoints.wait()
  saved = checkpoints.steps()
  names: Sequence[str] = list(dict.fromkeys(ids))
  if saved:
    good = (
      f"step {saved[-1]} in {checkpoints.directory}; it is kept (without its folder, the one "
      "before counts)"
    )
  else:
    good = "none yet; the round begins with its first weights"
  return finite.NotFiniteError(
    f"round {round}, step {step} of consolidation: {what}. Prompts: {finite.listed(names)}. "
    f"Last good checkpoint: {good}. The same command goes on from there, and every draw has its "
    "seed, so it comes to the same end: change what led here, such as "
    f"config.consolidation.learning_rate ({config.learning_rate}) or "
    f"config.policy.compute_dtype ({jnp.dtype(dtype)}), and give --resume_anyway"
  )
