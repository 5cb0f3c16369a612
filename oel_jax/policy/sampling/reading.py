"""How prompts are read into slots: what all layers need of a batch, what each does, and what is
done behind the last. `engine` makes one program of all that, `on_cpu` several.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import kv_cache, model, slot_state, text_cache
from oel_jax.policy.sampling.slot_state import Slots


class Shared(NamedTuple):
  """What prompts begin with and the cache holds: of prompt r the first count[r] tokens are those of
  row source[r], which begins back[r] columns before the one to be written next. All [R] int32.
  """

  source: Array
  back: Array
  count: Array


class Batch(NamedTuple):
  """R prompts of which T tokens are read at most, for slots of S columns.

  Attributes:
    cos_sin: [R, T, H] float32, of the tokens' positions.
    seen: [R, T, S + T] bool, which of the source's columns, and of the tokens read, each of these
      attends to; None: those up to itself, and there is no source.
    index: [R, S] int32, what each column of a slot gets of its prompt (`_index`).
    source: [R] int32, the slot that holds what the prompt begins with; None: none is looked at.
    rows: [R] int32, its own slot.
    text: [R] int32, the text before it, -1 for none; None: there are no texts.
  """

  cos_sin: Float[Array, "R T H"]
  seen: Bool[Array, "R T ST"] | None
  index: Int[Array, "R S"]
  source: Int[Array, "R"] | None
  rows: Int[Array, "R"]
  text: Int[Array, "R"] | None


def batch(
  a: Architecture,
  lengths_R: Int[Array, "R"],
  rows_R: Int[Array, "R"],
  shared: Shared | None,
  text_R: Int[Array, "R"] | None,
  *,
  tokens: int,
  columns: int,
  column: Int[Array, ""],
  text_lengths: Int[Array, "n"] | None,
) -> Batch:
  """The batch in which `tokens` of each prompt are read at most, for slots of so many columns, of
  which `column` is written next; the other arguments are as in `engine.prefill_insert`.
  """
  (R,), T, S = lengths_R.shape, tokens, columns
  count = shared.count if shared else jnp.zeros_like(lengths_R)
  positions = count[:, None] + jnp.arange(T, dtype=jnp.int32)
  if text_lengths is not None:
    positions += text_cache.lengths(text_lengths, text_R)[:, None]
  seen = None
  if shared:
    # Of the source's columns, which token of the prompt each one holds; from `count` on, none.
    place = jnp.mod(jnp.arange(S) - column + shared.back[:, None], S)
    taken = jnp.broadcast_to((place < count[:, None])[:, None], (R, T, S))
    own = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (R, T, T))
    seen = jnp.concatenate([taken, own], axis=-1)
  return Batch(
    cos_sin=attention.cos_sin(positions, a),
    seen=seen,
    index=_index(lengths_R, shared, column, S, T),
    source=shared.source if shared else None,
    rows=rows_R,
    text=text_R,
  )


def attend(
  a: Architecture,
  own: tuple[Array, Array, Array],
  cache: tuple[Array, Array],
  texts: text_cache.LayerTexts | None,
  given: Batch,
  attn_impl: str,
) -> tuple[Float[Array, "R T N H"], tuple[Array, Array]]:
  """One layer's attention of the tokens read, to these, to what their sources hold and to texts.

  Args:
    own: queries [R, T, N, H], keys and values [R, T, K, H].
    cache: the layer's keys and values of all slots.
    texts: the layer's keys and values of the texts.
    given: the batch.
    attn_impl: the attention implementation of `decode`.

  Returns:
    The output, and what `put` puts into the slots: keys and values [R, K, T, H], or with a source
    [R, K, S + T, H], its columns first, in the cache's order.
  """
  q, *new = own
  new = [x.swapaxes(1, 2) for x in new]
  if given.source is not None:
    there = [kept[given.source] for kept in cache]
    if slot_state.column_axis(attn_impl) == 3:
      there[0] = there[0].swapaxes(2, 3)
    new = [jnp.concatenate(pair, axis=2) for pair in zip(there, new, strict=True)]
  # One array for both: two fusions might round it differently (see `text_cache`).
  q = jax.lax.optimization_barrier(q) if texts else q
  prompt_impl = model.prefill_attn_impl(a, q.dtype)
  if texts:
    before_it = text_cache.attend(q, given.text, texts, attn_impl, a.head_size**-0.5)
    y = text_cache.attend_own(q, *new, given.seen, prompt_impl)
    y = text_cache.join(y, before_it, given.text)
  elif given.source is None and prompt_impl != "xla":
    y = attention.causal(q, *new, prompt_impl)
  elif prompt_impl == "cudnn":
    y = attention.attend(q, *new, given.seen, "cudnn")
  else:
    # Splash attention has no mask for columns that wrap round the end of the cache.
    T = q.shape[1]
    seen = jnp.tril(jnp.ones((1, T, T), bool)) if given.seen is None else given.seen
    y = kv_cache.attend_many(q, *new, seen)[0]
  return y, tuple(new)


def put(
  cache: tuple[Array, Array], new: tuple[Array, Array], given: Batch, attn_impl: str
) -> tuple[Array, Array]:
  """A layer's keys and values of all slots, with those that `attend` returned."""
  axes = slot_state.column_axis(attn_impl), 2
  return tuple(
    slot_state.put(old, given.rows, given.index, x, axis)
    for old, x, axis in zip(cache, new, axes, strict=True)
  )


def seat(
  slots: Slots,
  token_R: Int[Array, "R"],
  lengths_R: Int[Array, "R"],
  rows_R: Int[Array, "R"],
  requests: Any,
  shared: Shared | None,
  text_R: Int[Array, "R"] | None,
) -> Slots:
  """The slots with what they hold of the prompts besides the cache; `token_R` are the first ids."""
  seeds, limits, eos_ids = requests
  active = ~slot_state.ended(token_R, 1, limits, eos_ids)
  filled = lengths_R + (shared.count if shared else 0)
  return slot_state.enter(
    slots,
    rows_R,
    filled=jnp.where(active, filled, 0),
    token=token_R,
    drawn=jnp.ones_like(limits),
    active=active,
    seeds=seeds,
    limits=limits,
    eos_ids=eos_ids,
    **({} if slots.text is None else dict(text=text_R)),
  )


def _index(
  lengths_R: Int[Array, "R"], shared: Shared | None, column: Int[Array, ""], S: int, T: int
) -> Int[Array, "R S"]:
  """What each of a slot's S columns gets of a prompt: a place in what was read of it, `lengths_R`
  of T tokens, or with `shared` in its source's S columns with those T behind them.

  The prompt's last token goes to the column written last, `column - 1`, so token t of n to column
  column - n + t, round the end. Columns that get no token are not filled: there, any will do.
  """
  columns = jnp.arange(S)
  if shared is None:
    return jnp.minimum(jnp.mod(columns - column + lengths_R[:, None], S), T - 1)
  whole = lengths_R + shared.count
  token = jnp.mod(columns - column + whole[:, None], S)
  # In its source, token t stands in column - back + t.
  taken = jnp.mod(columns + (whole - shared.back)[:, None], S)
  own = token - shared.count[:, None]
  return jnp.minimum(jnp.where(own < 0, taken, own + S), S + T - 1)
