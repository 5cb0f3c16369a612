"""What a row of logits needs to be read for, in one pass: a Pallas kernel for one NVIDIA GPU.

XLA's reduction merges two running sums at every logit, which takes two exponentials: it waits for
these. Here a thread takes `ROWS` logits at a time into each of its sums, which takes one each and
one for the sum; sums of different threads meet at the end only.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float32

ROWS, WIDE = 8, 1024  # logits of a step: so many to a sum, and so many sums
PARTS = 2  # of a row, each a program

Side = tuple[Float32[Array, "C"], tuple[Float32[Array, "C"], ...]]


def sums(
  s: Float32[Array, "C V"],
  t: Float32[Array, "C V"],
  moments: Callable,
  temperature: float,
  floor: float,
  width: int | None,
  *,
  interpret: bool = False,
) -> tuple[tuple[Side, Side], Float32[Array, "C G"] | None]:
  """For x = s and x = t: the row's largest, top, and Σ exp((x − top) / temperature) m for m = 1 and
  each of its moments m.

  An online softmax (Milakov and Gimelshein 2018, algorithm 3). A NaN in a row makes its sums NaN.

  Args:
    s, t: logits; those below `floor` count as that.
    moments: of s and t, in any shape: a tuple for each side.
    temperature: above 0.
    floor: finite.
    width: divides WIDE; None: no maxima.
    interpret: run it without a GPU.

  Returns:
    ((top [C], (sum [C], …)) of each side), all float32; and the largest of each `width` neighbours
    in s, [C, G] float32, of which the last may be fewer, or None.
  """
  C, V = s.shape
  share = -(-V // (PARTS * ROWS * WIDE)) * ROWS * WIDE
  counts = [1 + len(side) for side in jax.eval_shape(moments, s, t)]
  columns, groups = sum(counts) + len(counts), [-(-V // width)] if width else []
  found = pl.pallas_call(
    functools.partial(
      _kernel,
      moments=moments,
      temperature=temperature,
      floor=floor,
      share=share,
      counts=counts,
      width=width,
    ),
    grid=(C, PARTS),
    in_specs=[pl.no_block_spec] * 2,
    out_specs=[pl.no_block_spec for _ in groups]
    + [pl.BlockSpec((None, None), lambda row, part: (row, part))] * columns,
    out_shape=[jax.ShapeDtypeStruct((C, G), jnp.float32) for G in groups]
    + [jax.ShapeDtypeStruct((C, PARTS), jnp.float32)] * columns,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="row_sums",
  )(s, t)
  maxima, found = (found[0], found[1:]) if width else (None, found)
  sides = found[: 1 + counts[0]], found[1 + counts[0] :]
  return tuple(_join(top, parts, temperature) for top, *parts in sides), maxima


def _join(top, parts, temperature):
  """Of a whole row, [C], what is known of its parts, [C, PARTS]."""
  maximum = top.max(-1)
  scale = jnp.exp((top - maximum[:, None]) / temperature)
  return maximum, tuple((part * scale).sum(-1) for part in parts)


def _kernel(s_ref, t_ref, *out_refs, moments, temperature, floor, share, counts, width):
  maxima_ref, out_refs = (out_refs[0], out_refs[1:]) if width else (None, out_refs)
  row, first, V = pl.program_id(0), pl.program_id(1) * share, s_ref.shape[1]
  places = jnp.arange(ROWS)[:, None] * WIDE + jnp.arange(WIDE)[None]

  def step(i, sides):
    at = first + i * (ROWS * WIDE) + places
    there = at < V
    s, t = (triton.load(ref.at[row, at], mask=there, other=floor) for ref in (s_ref, t_ref))
    # A maximum would lose NaN here, as those below do: it must come to the sums.
    s, t = (jnp.where(x < floor, floor, x) for x in (s, t))
    if width:
      largest = s.reshape(ROWS, WIDE // width, width).max(-1)
      group = (
        (first + i * (ROWS * WIDE)) // width
        + jnp.arange(ROWS)[:, None] * (WIDE // width)
        + jnp.arange(WIDE // width)[None]
      )
      triton.store(maxima_ref.at[row, group], largest, mask=group < maxima_ref.shape[1])
    new = []
    for x, side, (top, *before) in zip((s, t), moments(s, t), sides, strict=True):
      maximum = jnp.maximum(top, x.max(0))
      scale, p = (
        jnp.exp((top - maximum) / temperature),
        jnp.where(there, jnp.exp((x - maximum[None]) / temperature), 0),
      )
      new.append(
        (
          maximum,
          *(
            old * scale + term.sum(0)
            for old, term in zip(before, (p, *(p * m for m in side)), strict=True)
          ),
        )
      )
    return tuple(new)

  start = tuple(
    (jnp.full((WIDE,), floor, jnp.float32), *(jnp.zeros((WIDE,), jnp.float32),) * count)
    for count in counts
  )
  sides = jax.lax.fori_loop(0, pl.cdiv(jnp.minimum(share, V - first), ROWS * WIDE), step, start)
  refs = iter(out_refs)
  for top, *parts in sides:
    maximum = top.max()
    next(refs)[()], scale = maximum, jnp.exp((top - maximum) / temperature)
    for part in parts:
      next(refs)[()] = (part * scale).sum()
