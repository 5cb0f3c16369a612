"""The same losses from hidden states and heads, with no [tokens, vocabulary] array alive at any
time.

16,384 tokens over a vocabulary of 151,936 are 10 GB of float32 logits a side, several times over
once differentiated. Here the tokens that the mask counts go by in chunks: each chunk's logits are
made, compared and turned into the chunk's gradients at once, in the forward pass (the loss is a
sum, so its gradients are known up to one factor, its cotangent); the backward pass only multiplies
by that factor. The loop ends with the last token that counts. Four matrix products, none of them
done twice; beside them, float32 logits are written once and read twice: for the statistics of a
row, all in one pass, and for its gradient (`chunk_loss.py`).

Shape letters: N tokens, D width (student's and teacher's may differ), V vocabulary, G chunks taken
together, C tokens in a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from oel_jax.consolidation import chunk_loss, losses

Scalar = Float32[Array, ""]
# chunks whose gradients, in the type of the products, are kept for one product into that of the
# head
GROUP = 4


def linear_divergence(
  student_hidden: Float[Array, "*tokens D"],
  student_head: Float[Array, "V D"],
  teacher_hidden: Float[Array, "*tokens E"],
  teacher_head: Float[Array, "V E"],
  mask: Shaped[Array, "*tokens"],
  *,
  kind: str = "reverse_kl",
  support: str = "full",
  k: int = 256,
  temperature: float = 0.7,
  chunk: int = 512,
  vocabulary_axes: tuple[str, ...] = (),
  statistics: bool = False,
  topk_mass: bool = False,
  check_vma: bool = True,
  one: tuple[int, ...] = (),
  head_sink: Float32[Array, "V D"] | None = None,
  head_start: Float32[Array, "V D"] | None = None,
) -> tuple[Scalar, Scalar] | tuple[Scalar, Scalar, dict[str, Float32[Array, "*tokens"]]]:
  """Returns `losses.divergence(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T,
  mask, ...)`.

  That is (sum over masked tokens in nats, count), float32 scalars; `kind`, `support`, `k` and
  `temperature` are defined there. Reverse-mode differentiable once, in `student_hidden` and
  `student_head`; the teacher's cotangents are zero. Without differentiation no gradient is
  computed.

  Matrix products run in the dtype of the hidden states and accumulate in float32; logits,
  statistics and the head's running gradient are float32. So bfloat16 hidden states with a float32
  head give bfloat16 products and a head gradient that is not rounded to bfloat16. Largest
  temporaries: two float32 [chunk, V] arrays, one of [4 chunk, V] in the products' dtype, the head's
  gradient, and a copy of the hidden states, those that count first.

  On several devices: shard tokens with `jax.shard_map` and `psum` the two scalars. The head's
  gradient is then summed over the devices once (differentiation does it). The rows of both heads
  may be split there, too, over `vocabulary_axes`: devices along these have the same tokens, and
  give the same numbers as with whole heads.

  With `statistics` a third value is returned, {name: float32 [*tokens]}, 0 where the mask is 0,
  with no gradient; all at `temperature`, in nats, and from the same pass over the logits:
    'kl'               the exact KL(p ‖ q), whichever loss is asked for
    'student_entropy'  −Σ p log p
    'teacher_entropy'  −Σ q log q
    'topk_mass'        the student's mass on its own k likeliest tokens, unless `support` is 'full'
                       and `topk_mass` false

  Args:
    student_hidden: [N, D] or [B, T, D], any float dtype: last hidden states after the final norm.
    student_head: [V, D], the output projection (for tied weights, the embedding table).
    teacher_hidden: [N, E] or [B, T, E]: same tokens, its own width.
    teacher_head: [V, E].
    mask: [N] or [B, T], bool or 0-1; where it is 0 hidden states may hold anything, NaN included,
      and cost nothing.
    kind, support, k, temperature: as in `losses.divergence`; Python values.
    chunk: most tokens handled at once; it need not divide N. Memory grows with it, results do not
      depend on it.
    vocabulary_axes: inside `jax.shard_map`, names of the mesh axes over which the rows of both
      heads are split, in order.
    statistics: also return the statistics above.
    topk_mass: find the top k for their mass alone, too.
    check_vma: inside `jax.shard_map`, what that was given: a GPU's kernel does not say over which
      axes its results differ, so it runs where that is not checked.
    one: as in `losses.divergence`, and for the statistics, too; not with `vocabulary_axes`.
    head_sink: its values do not matter; where it is given, `student_head` is taken as constant, and
      the gradient in it comes out here, not rounded.
    head_start: with head_sink, what its gradient is added to, in the same place: that of batches
      before. For a sum that is differentiated by itself: the cotangent is taken as 1 there.

  Raises:
    ValueError: an option out of range or shapes that do not match; the message names it, its value
      and what is right.
  """
  losses.check_options(kind, support, k, temperature)
  _check_inputs(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk)
  if len(one) > 1 and vocabulary_axes:
    raise ValueError(
      f"one is {one} and vocabulary_axes {vocabulary_axes}: tokens that are one outcome "
      "(config.consolidation.one_end) need whole heads: mesh.tensor and mesh.fsdp must be 1"
    )
  mask = mask.astype(bool)
  options = chunk_loss.Options(
    kind,
    support,
    int(k),
    float(temperature),
    chunk,
    tuple(vocabulary_axes),
    statistics,
    topk_mass,
    check_vma,
    tuple(one),
  )
  trained = student_hidden, student_head, head_sink
  student_hidden, student_head, head_sink = _like_varying(
    trained, student_hidden, teacher_hidden, mask
  )
  total, found = _total(
    options, student_hidden, student_head, teacher_hidden, teacher_head, mask, head_sink, head_start
  )
  return (total, mask.sum(dtype=jnp.float32), *(found,) * statistics)


def linear_imitation(
  student_hidden: Float[Array, "*tokens D"],
  student_head: Float[Array, "V D"],
  tokens: Int[Array, "*tokens"],
  mask: Shaped[Array, "*tokens"],
  *,
  chunk: int = 512,
  vocabulary_axes: tuple[str, ...] = (),
  statistics: bool = False,
  head_sink: Float32[Array, "V D"] | None = None,
  head_start: Float32[Array, "V D"] | None = None,
) -> tuple[Scalar, Scalar] | tuple[Scalar, Scalar, dict[str, Float32[Array, "*tokens"]]]:
  """Returns `losses.imitation(student_hidden @ student_head.T, tokens, mask)`: (sum in nats,
  count), float32 scalars; with `statistics` also {"nll": each token's, float32 [*tokens]}, 0 where
  the mask is 0.

  Gradients, memory, devices, `head_sink`, `head_start` and errors are those of `linear_divergence`.
  """
  _check_inputs(student_hidden, student_head, student_hidden, student_head, mask, chunk)
  mask = mask.astype(bool)
  student_hidden, student_head, head_sink = _like_varying(
    (student_hidden, student_head, head_sink), student_hidden, tokens, mask
  )
  options = chunk_loss.Options(
    "imitation",
    temperature=1.0,
    chunk=chunk,
    axes=tuple(vocabulary_axes),
    statistics=statistics,
  )
  total, found = _total(
    options, student_hidden, student_head, tokens, None, mask, head_sink, head_start
  )
  return (total, mask.sum(dtype=jnp.float32), *(found,) * statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
  options, student_hidden, student_head, teacher_hidden, teacher_head, mask, head_sink, head_start
):
  """(Sum of the divergence, {name: statistic of each token}) of [*tokens, D], [V, D], [*tokens, E],
  [V, E], [*tokens].

  For imitation ids and None take the teacher's place.
  """
  del head_sink, head_start
  heads = _cast(student_head, student_hidden), _cast(teacher_head, teacher_hidden)
  xs, size, _ = _counted_first(options, student_hidden, teacher_hidden, mask)

  def step(i, carry):
    value, found, _ = _compare(options, _slice(xs, i * size, size), heads)
    return carry[0] + value, _write(carry[1], found, i * size)

  zero = _zero(options, xs, heads)
  total, found = jax.lax.fori_loop(
    0, sum(trips(mask.sum(), size, 1)), step, (zero, _room_for(options, xs, zero))
  )
  return total, {name: _put_back(x, mask) for name, x in found.items()}


def _total_forward(
  options, student_hidden, student_head, teacher_hidden, teacher_head, mask, head_sink, head_start
):
  """`_total`, and its gradients in the student's hidden states, head, its sink, and its sink where
  they have begun with `head_start`, for a cotangent of 1.
  """
  heads = _cast(student_head, student_hidden), _cast(teacher_head, teacher_hidden)
  xs, size, group = _counted_first(options, student_hidden, teacher_hidden, mask)

  def compare(first, seen):
    """Adds up the chunk that begins at `first`; returns its gradient in the logits, too, [C, V]."""
    part = _slice(xs, first, size)
    value, found, gradient = _compare(options, part, heads)
    # Rounded as the logits' factors were: a float32 operand would put both products on the slow
    # units.
    d_logits = jnp.where(part[-1][:, None], gradient(), 0).astype(student_hidden.dtype)
    return (seen[0] + value, _write(seen[1], found, first)), d_logits

  def multiply(first, d_logits, gradients):
    """Adds the gradients that come of [G, C, V] of those."""
    (hidden,), (d_hidden, d_head) = _slice(xs[:1], first, len(d_logits) * size), gradients
    slope = jnp.einsum("gcv,vd->gcd", d_logits, heads[0], preferred_element_type=jnp.float32)
    d_hidden = _write(
      d_hidden, chunk_loss.vocabulary_sum(slope, options.axes).astype(d_hidden.dtype), first
    )
    hidden = hidden.reshape(*d_logits.shape[:2], -1)
    return d_hidden, d_head + jnp.einsum(
      "gcv,gcd->vd", d_logits, hidden, preferred_element_type=jnp.float32
    )

  # The head's gradient is read and written at each product: for fewer of them, chunks are taken
  # together, in one place for all groups, which is then cleared only once.
  def together(i, carry):
    seen, d_logits, gradients = carry

    def one(j, inner):
      seen, new = compare((i * group + j) * size, inner[0])
      return seen, jax.lax.dynamic_update_index_in_dim(inner[1], new, j, 0)

    seen, d_logits = jax.lax.fori_loop(0, group, one, (seen, d_logits))
    return seen, d_logits, multiply(i * group * size, d_logits, gradients)

  def alone(i, carry):
    first = (whole * group + i) * size
    seen, d_logits = compare(first, carry[0])
    return seen, multiply(first, d_logits[None], carry[1])

  zero, (whole, rest) = _zero(options, xs, heads), trips(mask.sum(), size, group)
  d_head = jnp.zeros(student_head.shape, jnp.float32) if head_start is None else head_start
  d_head = _like_varying(d_head, xs, heads)
  seen, gradients = (
    (zero, _room_for(options, xs, zero)),
    (jnp.zeros_like(xs[0]) + zero.astype(xs[0].dtype), d_head),
  )
  if group > 1:
    d_logits = _like_varying(
      jnp.zeros((group, size, student_head.shape[0]), xs[0].dtype), xs, heads
    )
    seen, _, gradients = jax.lax.fori_loop(0, whole, together, (seen, d_logits, gradients))
  else:
    whole, rest = 0, whole
  (total, statistics), (d_hidden, d_head) = jax.lax.fori_loop(0, rest, alone, (seen, gradients))
  statistics = {name: _put_back(x, mask) for name, x in statistics.items()}
  if head_sink is None:
    d_heads = d_head.astype(student_head.dtype), None, None
  else:
    d_heads = (None, d_head, None) if head_start is None else (None, None, d_head)
  return (total, statistics), (_put_back(d_hidden, mask), *d_heads)


def _total_backward(options, gradients, cotangents):
  del options
  *gradients, begun = gradients
  d_hidden, d_head, d_sink = jax.tree.map(
    lambda g: (g.astype(jnp.float32) * cotangents[0]).astype(g.dtype), gradients
  )
  d_sink = d_sink if begun is None else begun
  return d_hidden, d_head, None, None, None, d_sink, None  # None is a zero cotangent


_total.defvjp(_total_forward, _total_backward)


def trips(
  count: Int[Array, ""] | int, size: int, group: int
) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
  """How often the loop goes round for `count` tokens that the mask counts, whatever the length of
  the mask.

  Returns (groups of `group` chunks of `size` tokens, single chunks after them). Nothing is done for
  the other tokens.
  """
  chunks = -(-count // size)
  return chunks // group, chunks % group


def _counted_first(options, student, teacher, mask):
  """([*tokens, …] → [N, …] with the tokens that count first, and room for whole chunks; the tokens
  of a chunk; chunks of a group).
  """
  steps = max(1, -(-mask.size // options.chunk))
  groups = -(-steps // GROUP)
  group = -(-steps // groups)  # the same number of chunks in each group
  size = max(1, -(-mask.size // (groups * group)))
  order, room = jnp.argsort(~mask.reshape(-1), stable=True), groups * group * size - mask.size

  def gather(x):
    x = x.reshape(mask.size, *x.shape[mask.ndim :])[order]
    return jnp.pad(x, [(0, room)] + [(0, 0)] * (x.ndim - 1))

  counted = gather(mask)
  return (*(_hide(gather(x), counted) for x in (student, teacher)), counted), size, group


def _put_back(x, mask):
  """Undoes the order of `_counted_first`: [N, …] → [*tokens, …], zeros where the mask is 0."""
  place = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32).reshape(mask.shape) - 1
  return _hide(x[jnp.maximum(place, 0)], mask)


def _compare(options, xs, heads):
  """One chunk: the sum of its divergence, the statistics of its tokens, and a function that forms
  its gradient in the logits.
  """
  *sides, mask = xs
  value, found, gradient = (
    chunk_loss.imitate if options.kind == "imitation" else chunk_loss.compare
  )(options, *sides, *heads)
  return jnp.where(mask, value, 0).sum(), found, gradient


def _zero(options, xs, heads):
  """0, marked as differing between devices wherever a sum over the vocabulary does."""
  return chunk_loss.vocabulary_sum(
    _like_varying(jnp.zeros((), jnp.float32), xs, heads), options.axes
  )


def _room_for(options, xs, zero):
  return {name: jnp.zeros(xs[-1].shape, jnp.float32) + zero for name in options.names()}


def _write(tree, found, first):
  """Puts [G, C, …] or [C, …] into [N, …] at `first`."""
  put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(
    x, new.reshape(-1, *x.shape[1:]), first, 0
  )
  return jax.tree.map(put, tree, found)


def _slice(xs, first, size):
  return tuple(jax.lax.dynamic_slice_in_dim(x, first, size) for x in xs)


def _hide(hidden, mask):
  # Before the products: a NaN row times a zero gradient would still make the head's whole gradient
  # NaN.
  return jnp.where(mask.reshape(mask.shape + (1,) * (hidden.ndim - mask.ndim)), hidden, 0)


def _cast(head, hidden):
  # Once, outside the loop.
  return None if head is None else head.astype(hidden.dtype)


def _like_varying(tree, *like):
  """Under `shard_map`, marks `tree` as differing between devices wherever `like` does.

  A scan's carry must say so from its start, and so must the replicated head, whose cotangent is
  each device's own until the mark's transpose sums it over them. Adds an empty sum of `like`: 0
  whatever the values are, and gone once compiled. (The mark's own interface is not the same in all
  JAX versions supported.)
  """
  zero = sum(x[:0].sum(dtype=jnp.float32) for x in jax.tree.leaves(like))
  return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _check_inputs(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk):
  if not chunk >= 1:
    raise ValueError(
      f"chunk is {chunk!r}; it must be at least 1, the number of tokens handled at once"
    )
  for side, hidden, head in (
    ("student", student_hidden, student_head),
    ("teacher", teacher_hidden, teacher_head),
  ):
    if hidden.ndim not in (2, 3):
      raise ValueError(f"{side}_hidden has shape {hidden.shape}; it must be [N, D] or [B, T, D]")
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
      raise ValueError(
        f"{side}_head has shape {head.shape}; it must be [V, {hidden.shape[-1]}], "
        f"the width of {side}_hidden"
      )
    if mask.shape != hidden.shape[:-1]:
      raise ValueError(
        f"mask has shape {mask.shape}; it must be {hidden.shape[:-1]}, {side}_hidden without its "
        "width"
      )
  if student_head.shape[0] != teacher_head.shape[0]:
    raise ValueError(
      f"teacher_head has {teacher_head.shape[0]} rows; it must have {student_head.shape[0]}, "
      "student_head's: both sides share one vocabulary"
    )
