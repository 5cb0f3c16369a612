"""The engine's programs as a CPU compiles them sooner: `prefill_insert` as several, one that each
layer runs and small ones before and behind them; and `decode`, by fewer of the compiler's passes.

There are many sizes of batches, and each waits for its program when it first comes. A layer is
compiled sooner than all of them, and what stands behind the layers depends on less: how a first id
is drawn on the number of prompts alone. To start so many programs costs next to nothing beside
reading prompts; beside decoding it would.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from oel_jax.policy import transformer, unrolled
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import norm
from oel_jax.policy.sampling import engine, model, reading, text_cache
from oel_jax.policy.sampling.slot_state import Slots
from oel_jax.policy.sampling.token_sampling import Sampling

# Compiled in four fifths of the time, and as fast.
LEVEL = {"xla_backend_optimization_level": 1}
# XLA's emitters of fusions set up MLIR for each one: without them reading a prompt is compiled in
# two thirds of the time, to the same bits and as fast, but decoding in more. JAX 0.11 always has
# them.
PLAIN = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
_program = functools.partial(jax.jit, compiler_options=LEVEL | PLAIN)
# Of programs that do little: in a third.
_small = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0} | PLAIN)

decode = jax.jit(
  engine.decode.__wrapped__,
  compiler_options=LEVEL,
  static_argnames=("architecture", "sampling", "chunk", "logprobs", "attn_impl", "mesh"),
  donate_argnames="slots",
)


def prefill_insert(
  weights: Any,
  slots: Slots,
  tokens_RxT: Int[Array, "R T"],
  lengths_R: Int[Array, "R"],
  rows_R: Int[Array, "R"],
  requests: Any,
  shared: reading.Shared | None,
  *,
  architecture: Architecture,
  sampling: Sampling,
  logprobs: bool,
  attn_impl: str,
  mesh: None = None,
  texts: text_cache.Texts | None = None,
  text_R: Int[Array, "R"] | None = None,
) -> tuple[Slots, tuple[Array, ...]]:
  """As `engine.prefill_insert`, on one device; the slots that were given are gone."""
  column, columns = slots.column, slots.values[0].shape[2]
  known = text_cache.by_layer(texts, len(weights["layers"]))
  x, y, given = prefill_begin(
    weights["embed"]["embedding"],
    *(tokens_RxT, lengths_R, rows_R, shared, text_R, column, texts and texts.length),
    architecture=architecture,
    columns=columns,
  )
  caches = []
  for number, layer in enumerate(weights["layers"]):
    x, y, *cache = prefill_layer(
      layer,
      x,
      y,
      (slots.keys[number], slots.values[number]),
      given,
      known[number],
      architecture=architecture,
      attn_impl=attn_impl,
    )
    caches.append(cache)
  last = prefill_last(weights["norm"]["scale"], x, y, lengths_R, architecture=architecture)
  tables = {name: weights[name] for name in unrolled.TABLES if name in weights}
  entering = rows_R < slots.active.shape[0]
  token, scores = prefill_draw(
    tables, last, requests[0], entering, sampling=sampling, logprobs=logprobs
  )
  slots = slots._replace(keys=(), values=())
  slots = prefill_seat(slots, token, lengths_R, rows_R, requests, shared, text_R)
  keys, values = map(tuple, zip(*caches, strict=True))
  return slots._replace(keys=keys, values=values), (token, *scores)


@functools.partial(_small, static_argnames=("architecture", "columns"))
def prefill_begin(
  embedding,
  tokens_RxT,
  lengths_R,
  rows_R,
  shared,
  text_R,
  column,
  text_lengths,
  *,
  architecture,
  columns,
):
  """What the first layer reads, rows of the embedding and zeros; and what all layers need."""
  R, T = tokens_RxT.shape
  given = reading.batch(
    architecture,
    *(lengths_R, rows_R, shared, text_R),
    tokens=T,
    columns=columns,
    column=column,
    text_lengths=text_lengths,
  )
  x = embedding[tokens_RxT].reshape(R * T, -1)
  return x, jnp.zeros_like(x), given


@functools.partial(
  _program, static_argnames=("architecture", "attn_impl"), donate_argnames=("x", "y", "cache")
)
def prefill_layer(layer, x, y, cache, given, texts, *, architecture, attn_impl):
  """One layer: what the next one reads, and the layer's keys and values with the prompts."""
  kept = []

  def attend(layer, own):
    z, new = reading.attend(architecture, own, cache, texts, given, attn_impl)
    kept.append(new)
    return z

  split = model.heads_by(architecture, given.cos_sin)
  shape = given.cos_sin.shape[:2]
  x, y = transformer.block(model.operations(architecture, shape, split, attend, None), layer, x, y)
  return x, y, *reading.put(cache, kept[0], given, attn_impl)


@functools.partial(_small, static_argnames="architecture")
def prefill_last(scale, x, y, lengths_R, *, architecture):
  """The hidden state behind each prompt's last token, [R, D]."""
  (R,), D = lengths_R.shape, x.shape[-1]
  at = (lengths_R - 1)[:, None, None]
  x, y = (jnp.take_along_axis(z.reshape(R, -1, D), at, axis=1)[:, 0] for z in (x, y))
  return norm.add_norm(x, y, scale, architecture.norm_eps)[1]


@functools.partial(_small, static_argnames=("sampling", "logprobs"))
def prefill_draw(tables, last, seeds, entering, *, sampling, logprobs):
  """Each prompt's first id, and its log-probability if asked for: as `model.draw`."""
  nothing = jnp.zeros(seeds.shape, jnp.int32)
  return model.draw(tables, last, seeds, nothing, entering, sampling, logprobs)


prefill_seat = _small(reading.seat, donate_argnames="slots")
