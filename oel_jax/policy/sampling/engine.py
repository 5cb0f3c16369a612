"""The sampler's three programs: `prefill_insert` reads prompts and puts them into slots, `decode`
draws ids in all slots at once, `resize` gives them a larger cache or lets some of them go.

A slot is a row of the key-value cache with what is needed to go on drawing. The cache is circular:
each step writes one column, the same for all rows, and a row's tokens are the columns last written.
So sequences come and go while the others stay where they are, and the write is one slice instead of
a scatter. A prompt is inserted so that its last token stands in the column written last:

                                          written last   next step writes here
                                                     |   |
    slot 0, has drawn for long    .  a  a  a  a  a  a   [ ]  .
    slot 1, just inserted         .  .  .  .  b  b  b   [ ]  .
    slot 2, has ended             c  c  c  .  .  .  .   [ ]  c     behind: can be taken over from

Who sits where, and what is taken over from whom, is the scheduler's business. A long text that
many prompts begin with stands before all of this, in no slot (`text_cache`): a row's tokens are
those behind it.

On a mesh each device has rows of its own and the weights whole: nothing is exchanged but how many
rows have not ended. With groups of devices (`groups`) a group takes a device's place, and
`architecture` is what each device of it runs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import groups, kv_cache, model, reading, slot_state, text_cache
from oel_jax.policy.sampling.reading import Shared
from oel_jax.policy.sampling.slot_state import Slots
from oel_jax.policy.sampling.token_sampling import Sampling


@functools.partial(
  jax.jit,
  static_argnames=("architecture", "sampling", "logprobs", "attn_impl", "mesh"),
  donate_argnames="slots",
)
def prefill_insert(
  weights: Any,
  slots: Slots,
  tokens_RxT: Int[Array, "R T"],
  lengths_R: Int[Array, "R"],
  rows_R: Int[Array, "R"],
  requests: Any,
  shared: Shared | None,
  *,
  architecture: Architecture,
  sampling: Sampling,
  logprobs: bool,
  attn_impl: str,
  mesh: Mesh | None = None,
  texts: text_cache.Texts | None = None,
  text_R: Int[Array, "R"] | None = None,
) -> tuple[Slots, tuple[Array, ...]]:
  """Prefills prompts, puts them into slots and draws each one's first id.

  Args:
    weights: from `model.prepare`.
    slots: their cache has room for the longest prompt.
    tokens_RxT, lengths_R: what of the prompts is to be read, padded on the right.
    rows_R: the slot of each; B for those that fill the batch.
    requests: seeds, limits and eos_ids of each, as in `Slots`.
    shared: what stands before tokens_RxT, behind the prompt's text; None: nothing.
    architecture, sampling: as in `generate`.
    logprobs: whether to return the log-probabilities, too.
    attn_impl: the attention implementation of `decode`.
    mesh: where the slots lie. Each device reads its own part of the prompts, for slots and from
      slots of its own, which are counted within its part of them.
    texts, text_R: texts before prompts, and which one is before each, -1 for none.

  Returns:
    The slots, and the ids drawn [R], or NOT_FINITE (with their log-probabilities [R]).
  """
  run = functools.partial(
    _prefill_insert,
    architecture=architecture,
    sampling=sampling,
    logprobs=logprobs,
    attn_impl=attn_impl,
    axis=groups.axis_of(mesh),
  )
  of_rows = slots, tokens_RxT, lengths_R, rows_R, requests, shared, text_R
  return slot_state.by_rows(run, mesh, *_held(weights, texts, mesh), *of_rows)


def _held(weights: Any, texts: text_cache.Texts | None, mesh: Mesh | None) -> tuple[Any, Any]:
  """Weights and texts, and how they lie on the mesh."""
  held = weights, texts
  if mesh is None:
    return held, None
  return held, (model.specs(mesh, weights), texts and text_cache.specs(mesh, texts))


def _prefill_insert(
  held,
  slots,
  tokens_RxT,
  lengths_R,
  rows_R,
  requests,
  shared,
  text_R,
  *,
  architecture,
  sampling,
  logprobs,
  attn_impl,
  axis,
):
  (weights, texts), caches = held, list(zip(slots.keys, slots.values, strict=True))
  given = reading.batch(
    architecture,
    *(lengths_R, rows_R, shared, text_R),
    tokens=tokens_RxT.shape[1],
    columns=slots.values[0].shape[2],
    column=slots.column,
    text_lengths=texts and texts.length,
  )

  def attend(layer, own, held):
    return reading.attend(architecture, own, *held, given, attn_impl)

  with jax.named_scope("prefill"):
    split = model.heads_by(architecture, given.cos_sin)
    each = list(zip(caches, text_cache.by_layer(texts, len(caches)), strict=True))
    hidden, kept = model.forward(weights, architecture, tokens_RxT, split, attend, each, axis)
  last = jnp.take_along_axis(hidden, (lengths_R - 1)[:, None, None], axis=1)[:, 0]
  caches = [
    reading.put(cache, new, given, attn_impl) for cache, new in zip(caches, kept, strict=True)
  ]
  keys, values = map(tuple, zip(*caches, strict=True))
  entering = rows_R < slots.active.shape[0]
  seeds, nothing = requests[0], jnp.zeros_like(requests[1])
  how = sampling, logprobs, axis
  token, scores = model.draw(weights, last, seeds, nothing, entering, *how)
  slots = slots._replace(keys=keys, values=values)
  slots = reading.seat(slots, token, lengths_R, rows_R, requests, shared, text_R)
  return slots, (token, *scores)


@functools.partial(
  jax.jit,
  static_argnames=("architecture", "sampling", "chunk", "logprobs", "attn_impl", "mesh"),
  donate_argnames="slots",
)
def decode(
  weights: Any,
  slots: Slots,
  steps: Int[Array, ""],
  min_active: Int[Array, ""],
  *,
  architecture: Architecture,
  sampling: Sampling,
  chunk: int,
  logprobs: bool,
  attn_impl: str,
  mesh: Mesh | None = None,
  texts: text_cache.Texts | None = None,
) -> tuple[Slots, tuple[Array, ...]]:
  """Draws an id in every active row, over and over.

  Args:
    weights: from `model.prepare`.
    slots: no row has more tokens than the cache has columns, less `steps`.
    steps: most ids a row, at most `chunk`.
    min_active: it stops when fewer rows than this are active; at least 1.
    architecture, sampling, logprobs: as in `prefill_insert`.
    chunk: room for the ids.
    attn_impl: the attention implementation: "xla", or "triton" on NVIDIA GPUs.
    mesh: where the slots lie.
    texts: before the rows' own tokens, as `slots.text` says.

  Returns:
    The slots, and the ids drawn [B, chunk], -1 where none was, or NOT_FINITE (with their
    log-probabilities [B, chunk]).
  """
  run = functools.partial(
    _decode,
    architecture=architecture,
    sampling=sampling,
    chunk=chunk,
    logprobs=logprobs,
    attn_impl=attn_impl,
    axes=slot_state.row_axes(mesh),
    axis=groups.axis_of(mesh),
  )
  held = _held(weights, texts, mesh)
  return slot_state.by_rows(run, mesh, *held, slots, steps, min_active)


def _decode(
  held, slots, steps, min_active, *, architecture, sampling, chunk, logprobs, attn_impl, axes, axis
):
  (weights, texts), B = held, len(slots.active)
  where = None
  if texts:
    group = architecture.heads // architecture.kv_heads
    where = text_cache.blocks(jnp.where(slots.active, slots.text, -1), texts, group)
  drawn = (jnp.full((B, chunk), -1, jnp.int32),)
  if logprobs:
    drawn += (jnp.zeros((B, chunk), jnp.float32),)

  # Counted in all groups, which so stop together.
  left = lambda active: jax.lax.psum(active.sum(), axes)

  def going_on(state):
    i, count, _, _ = state
    return (i < steps) & (count >= min_active)

  def step(state):
    i, _, slots, out = state
    hidden, keys, values = _read_last(weights, slots, architecture, attn_impl, texts, where, axis)
    token, scores = model.draw(
      weights, hidden, slots.seeds, slots.drawn, slots.active, sampling, logprobs, axis
    )
    out = tuple(
      ids.at[:, i].set(jnp.where(slots.active, new, -1))
      for ids, new in zip(out, (token, *scores), strict=True)
    )
    active = slots.active & ~slot_state.ended(token, slots.drawn + 1, slots.limits, slots.eos_ids)
    slots = slots._replace(
      keys=keys,
      values=values,
      column=jnp.mod(slots.column + 1, slots.values[0].shape[2]),
      filled=jnp.where(active, slots.filled + 1, 0),
      token=token,
      drawn=slots.drawn + 1,
      active=active,
    )
    return i + 1, left(active), slots, out

  with jax.named_scope("decode"):
    state = jnp.int32(0), left(slots.active), slots, drawn
    _, _, slots, drawn = jax.lax.while_loop(going_on, step, state)
  return slots, drawn


def _read_last(
  weights: Any,
  slots: Slots,
  a: Architecture,
  attn_impl: str,
  texts: text_cache.Texts | None,
  where: text_cache.Blocks | None,
  axis: str | None,
) -> tuple[Float[Array, "B D"], tuple[Array, ...], tuple[Array, ...]]:
  """Each row's hidden state behind the id drawn last, and the keys and values with its column
  written.
  """
  positions = slots.filled + (text_cache.lengths(texts.length, slots.text) if texts else 0)
  cos_sin = attention.cos_sin(positions, a)
  # The kernel makes queries, keys and values of the projection itself.
  split = (
    (lambda layer, qkv: qkv) if attn_impl == "triton" else model.heads_at(a, positions[:, None])
  )

  def attend(layer, own, held):
    cache, known = held
    if attn_impl == "triton":
      scale, bias = layer.get("qk_norm"), layer.get("qkv_bias")
      how = dict(eps=a.norm_eps, queries=texts is not None)
      given = own[:, 0], bias, scale, cos_sin, *cache, slots.column, slots.filled + 1
      y, *cache, logsumexp, q = kv_cache.step(*given, **how)
    else:
      q, k, v = (x[:, 0] for x in own)
      y, logsumexp = kv_cache.attend(q, k, v, *cache, slots.column, slots.filled)
      # The column waits for y (which is never above infinity): unless it is sure that the cache
      # has been read, XLA writes to a copy.
      column = slots.column + (y[0, 0, 0] > jnp.inf)
      write = lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(
        old, jnp.expand_dims(new, axis), column, axis=axis
      )
      cache = write(cache[0], k, 3), write(cache[1], v, 2)
    if texts:
      factor = 1.0 if attn_impl == "triton" else a.head_size**-0.5
      before_it = text_cache.attend_rows(q, where, known, attn_impl, factor)
      y = text_cache.join((y, logsumexp), before_it, slots.text)
    return y, tuple(cache)

  caches = zip(slots.keys, slots.values, strict=True)
  each = list(zip(caches, text_cache.by_layer(texts, a.layers), strict=True))
  hidden, kept = model.forward(weights, a, slots.token[:, None], split, attend, each, axis)
  keys, values = map(tuple, zip(*kept, strict=True))
  return hidden[:, 0], keys, values
