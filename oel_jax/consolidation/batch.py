"""From prompts, knowledge and sampled ids to the arrays of a step.

Tokens are placed as they were sampled, never decoded and encoded again. The student reads prompt and response; the teacher reads the
knowledge in front of the same ids. Both are padded on the right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Batch(NamedTuple):
  """B samples, R the longest response, T and U the longest student and teacher sequences.

  Attributes:
    student_tokens: [B, T] int32.
    student_length: [B] int32, prompt and response.
    student_start: [B] int32, the row whose next token is the response's first: prompt length - 1.
    teacher_tokens, teacher_length, teacher_start: the same with the knowledge in front, [B, U], [B], [B].
    response: [B, R] int32, the sampled ids.
    mask: [B, R] bool, which of them count: all, the end-of-sequence id too.
  """

  student_tokens: Array
  student_length: Array
  student_start: Array
  teacher_tokens: Array
  teacher_length: Array
  teacher_start: Array
  response: Array
  mask: Array


def assemble(
    prompts: Sequence[Sequence[int]], knowledge: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, pad_id: int,
    student_length: int, teacher_length: int, response_length: int, skip: int = 0,
) -> Batch:  # fmt: skip
  """Lays B samples out as NumPy arrays of fixed lengths.

  Args:
    prompts: ids of the prompt without knowledge, not empty.
    knowledge: ids that the teacher reads before it.
    responses: sampled ids, not empty.
    pad_id: fills the rest; its value changes nothing.
    student_length, teacher_length, response_length: T, U and R.
    skip: so many ids at the beginning of a prompt stand at the beginning of the knowledge already: the teacher reads them once.

  Raises:
    ValueError: a sample does not fit; names the sample and the lengths. Nothing is ever cut off.
  """
  B = len(prompts)
  student, teacher = np.full((B, student_length), pad_id, np.int32), np.full((B, teacher_length), pad_id, np.int32)
  response, mask = np.full((B, response_length), pad_id, np.int32), np.zeros((B, response_length), bool)
  lengths = np.zeros((4, B), np.int32)
  for b, (prompt, known, sampled) in enumerate(zip(prompts, knowledge, responses, strict=True)):
    plain, informed = [*prompt, *sampled], [*known, *prompt[skip:], *sampled]
    if not prompt or not sampled:
      raise ValueError(f"sample {b} has {len(prompt)} prompt and {len(sampled)} response tokens: both need at least one")
    rooms = (("student", plain, student_length), ("teacher", informed, teacher_length), ("response", sampled, response_length))
    for name, ids, room in rooms:
      if len(ids) > room:
        raise ValueError(f"sample {b}: the {name}'s sequence has {len(ids)} tokens, the batch has room for {room}")
    student[b, : len(plain)], teacher[b, : len(informed)] = plain, informed
    response[b, : len(sampled)], mask[b, : len(sampled)] = sampled, True
    lengths[:, b] = len(plain), len(prompt) - 1, len(informed), len(informed) - len(sampled) - 1
  return Batch(student, lengths[0], lengths[1], teacher, lengths[2], lengths[3], response, mask)


def response_rows(hidden_BxTxD: Float[Array, "B T D"], start_B: Int[Array, "B"], rows: int) -> Float[Array, "B R D"]:
  """The hidden states that predict the response: row r of sample b stands at position start_B[b] + r.

  Rows past the end repeat the last position; the mask leaves them out.
  """
  at = start_B[:, None] + jnp.arange(rows)
  return jnp.take_along_axis(hidden_BxTxD, jnp.minimum(at, hidden_BxTxD.shape[1] - 1)[..., None], axis=1)
