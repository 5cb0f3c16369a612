"""The frozen teacher: the round's first weights, with the knowledge in the prompt."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oel_jax.consolidation import batch as batch_lib
from oel_jax.policy import model
from oel_jax.policy.architecture import Architecture


def sequence_hidden(
    params: Any, architecture: Architecture, tokens_BxT: Array, length_B: Array, start_B: Array, rows: int, *, dtype: Any, remat: str
) -> Float[Array, "B R D"]:
  """Runs right-padded sequences and keeps the rows that predict their responses, in `dtype`."""
  positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32), tokens_BxT.shape)
  segments = (positions < length_B[:, None]).astype(jnp.int32)
  hidden, _ = model.apply(params, architecture, tokens_BxT, positions, segments, dtype=dtype, remat=remat)
  return batch_lib.response_rows(hidden, start_B, rows)


def teacher_hidden(params: Any, architecture: Architecture, batch: batch_lib.Batch, *, dtype: Any) -> Float[Array, "B R D"]:
  """π_teacher's last hidden states at the response positions, given (knowledge, prompt, response); no gradient flows."""
  rows = batch.response.shape[1]
  hidden = sequence_hidden(
      params, architecture, batch.teacher_tokens, batch.teacher_length, batch.teacher_start, rows, dtype=dtype, remat="none"
  )
  return jax.lax.stop_gradient(hidden)
