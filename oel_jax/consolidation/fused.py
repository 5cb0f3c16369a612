"""The same losses from hidden states and heads, with no [tokens, vocabulary] array alive at any time.

16,384 tokens over a vocabulary of 151,936 are 10 GB of float32 logits a side, several times over once differentiated.
Here the tokens that the mask counts go by in chunks: each chunk's logits are made, compared and turned into the chunk's
gradients at once, in the forward pass (the loss is a sum, so its gradients are known up to one factor, its cotangent);
the backward pass only multiplies by that factor. The loop ends with the last token that counts. Four matrix products, none of them done twice; beside them, float32
logits are written once and read twice: for the statistics of a row, all in one pass, and for its gradient.

Shape letters: N tokens, D width (student's and teacher's may differ), V vocabulary, G chunks taken together, C tokens in a chunk.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from oel_jax.consolidation import losses
from oel_jax.policy.sampling import top_k

Scalar = Float32[Array, '']
GROUP = 4  # chunks whose gradients, in the type of the products, are kept for one product into that of the head


def linear_divergence(student_hidden: Float[Array, '*tokens D'], student_head: Float[Array, 'V D'],
                      teacher_hidden: Float[Array, '*tokens E'], teacher_head: Float[Array, 'V E'],
                      mask: Shaped[Array, '*tokens'], *, kind: str = 'reverse_kl', support: str = 'full', k: int = 256,
                      temperature: float = 0.7, chunk: int = 512) -> tuple[Scalar, Scalar]:
  """Returns `losses.divergence(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, mask, ...)`.

  That is (sum over masked tokens in nats, count), float32 scalars; `kind`, `support`, `k` and `temperature` are defined
  there. Reverse-mode differentiable once, in `student_hidden` and `student_head`; the teacher's cotangents are zero.
  Without differentiation no gradient is computed.

  Matrix products run in the dtype of the hidden states and accumulate in float32; logits, statistics and the head's
  running gradient are float32. So bfloat16 hidden states with a float32 head give bfloat16 products and a head
  gradient that is not rounded to bfloat16. Largest temporaries: two float32 [chunk, V] arrays, one of [4 chunk, V] in the
  products' dtype, and the head's gradient.

  On several devices: shard tokens with `jax.shard_map`, heads replicated, and `psum` the two scalars. The head's
  gradient is then summed over the devices once (differentiation does it); left to automatic sharding, XLA may sum it
  at every chunk.

  Args:
    student_hidden: [N, D] or [B, T, D], any float dtype: last hidden states after the final norm.
    student_head: [V, D], the output projection (for tied weights, the embedding table).
    teacher_hidden: [N, E] or [B, T, E]: same tokens, its own width.
    teacher_head: [V, E].
    mask: [N] or [B, T], bool or 0-1; where it is 0 hidden states may hold anything, NaN included, and cost nothing.
    kind, support, k, temperature: as in `losses.divergence`; Python values.
    chunk: most tokens handled at once; it need not divide N. Memory grows with it, results do not depend on it.

  Raises:
    ValueError: an option out of range or shapes that do not match; the message names it, its value and what is right.
  """
  losses.check_options(kind, support, k, temperature)
  _check_inputs(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk)
  mask = mask.astype(bool)
  options = _Options(kind, support, int(k), float(temperature), chunk)
  student_hidden, student_head = _like_varying((student_hidden, student_head), student_hidden, teacher_hidden, mask)
  total = _total(options, student_hidden, student_head, teacher_hidden, teacher_head, mask)
  return total, mask.sum(dtype=jnp.float32)


def linear_statistics(student_hidden: Float[Array, '*tokens D'], student_head: Float[Array, 'V D'],
                      teacher_hidden: Float[Array, '*tokens E'], teacher_head: Float[Array, 'V E'],
                      mask: Shaped[Array, '*tokens'], *, k: int = 256, temperature: float = 0.7,
                      chunk: int = 512) -> dict[str, Scalar]:
  """Returns sums over the masked tokens, as float32 scalars, for the metrics of a probe batch.

    'student_entropy'   −Σ p log p at temperature 1, in nats, whatever `temperature` is
    'teacher_entropy'   −Σ q log q at temperature 1, in nats
    'topk_mass'         the student's mass on its own k likeliest tokens, at `temperature`, as `support='topk'` sees it
    'reverse_kl'        the exact KL(p ‖ q) at `temperature`, in nats, whichever loss is being trained
    'count'             number of masked tokens; divide the others by it
  Not differentiable (gradients are zero). Arguments and errors are those of `linear_divergence`.
  """
  losses.check_options(k=k, temperature=temperature)
  _check_inputs(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk)
  mask = mask.astype(bool)
  heads = _cast(student_head, student_hidden), _cast(teacher_head, teacher_hidden)

  def step(sums, xs):
    hidden, reference, counted = xs
    student, teacher = _logits(hidden, heads[0], counted), _logits(reference, heads[1], counted)
    log_p, log_q = (losses.log_probabilities(logits, temperature) for logits in (student, teacher))
    top, _ = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
    values = {
        'student_entropy': _entropy(student),
        'teacher_entropy': _entropy(teacher),
        'topk_mass': jnp.exp(top).sum(-1),
        'reverse_kl': losses.token_divergence(log_p, log_q, None, 'reverse_kl', 'full'),
        'count': jnp.ones(counted.shape, jnp.float32),
    }
    return {name: sums[name] + jnp.where(counted, values[name], 0).sum() for name in values}, None

  xs = _chunks(student_hidden, mask, chunk), _chunks(teacher_hidden, mask, chunk), _chunks(mask, mask, chunk)
  xs, heads = jax.lax.stop_gradient((xs, heads))
  names = 'student_entropy', 'teacher_entropy', 'topk_mass', 'reverse_kl', 'count'
  zeros = {name: _like_varying(jnp.zeros((), jnp.float32), xs, heads) for name in names}
  return jax.lax.scan(step, zeros, xs)[0]


def linear_imitation(student_hidden: Float[Array, '*tokens D'], student_head: Float[Array, 'V D'],
                     tokens: Int[Array, '*tokens'], mask: Shaped[Array, '*tokens'], *,
                     chunk: int = 512) -> tuple[Scalar, Scalar]:
  """Returns `losses.imitation(student_hidden @ student_head.T, tokens, mask)`: (sum in nats, count), float32 scalars.

  Gradients, memory, devices and errors are those of `linear_divergence`.
  """
  _check_inputs(student_hidden, student_head, student_hidden, student_head, mask, chunk)
  mask = mask.astype(bool)
  student_hidden, student_head = _like_varying((student_hidden, student_head), student_hidden, tokens, mask)
  total = _total(_Options('imitation', 'full', 1, 1.0, chunk), student_hidden, student_head, tokens, None, mask)
  return total, mask.sum(dtype=jnp.float32)


class _Options(NamedTuple):
  """What is static in `_total`, and hashable."""
  kind: str
  support: str
  k: int
  temperature: float
  chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(options, student_hidden, student_head, teacher_hidden, teacher_head, mask):
  """Sum of the divergence over tokens [*tokens, D], [V, D], [*tokens, E], [V, E], [*tokens]; or, for imitation, ids and None."""
  heads = _cast(student_head, student_hidden), _cast(teacher_head, teacher_hidden)
  xs, size, _ = _counted_first(options, student_hidden, teacher_hidden, mask)

  def step(i, total):
    value, _ = _compare(options, *_slice(xs, i * size, size), *heads)
    return total + value

  zero = _like_varying(jnp.zeros((), jnp.float32), xs, heads)
  return jax.lax.fori_loop(0, sum(trips(mask.sum(), size, 1)), step, zero)


def _total_forward(options, student_hidden, student_head, teacher_hidden, teacher_head, mask):
  """`_total`, and its gradients in the student's hidden states and head for a cotangent of 1."""
  heads = _cast(student_head, student_hidden), _cast(teacher_head, teacher_hidden)
  xs, size, group = _counted_first(options, student_hidden, teacher_hidden, mask)

  def chunk(total, xs):
    value, gradient = _compare(options, *xs, *heads)
    d_logits = jnp.where(xs[-1][:, None], gradient(), 0)  # [C, V]
    # Rounded as the logits' factors were: a float32 operand would put both products on the slow units.
    return total + value, d_logits.astype(student_hidden.dtype)

  def step(carry, first, chunks):
    total, d_hidden, d_head = carry
    parts = tuple(x.reshape(chunks, size, *x.shape[1:]) for x in _slice(xs, first, chunks * size))
    total, d_logits = jax.lax.scan(chunk, total, parts)  # [G, C, V]
    found = jnp.einsum('gcv,vd->gcd', d_logits, heads[0], preferred_element_type=jnp.float32).astype(d_hidden.dtype)
    d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, found.reshape(-1, found.shape[-1]), first, 0)
    # The head's gradient is read and written at each product: for fewer of them, chunks are taken together.
    d_head += jnp.einsum('gcv,gcd->vd', d_logits, parts[0], preferred_element_type=jnp.float32)
    return total, d_hidden, d_head

  zeros = jnp.zeros((), jnp.float32), jnp.zeros_like(xs[0]), jnp.zeros(student_head.shape, jnp.float32)
  carry, (whole, rest) = _like_varying(zeros, xs, heads), trips(mask.sum(), size, group)
  carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, i * group * size, group), carry)
  if group > 1:
    carry = jax.lax.fori_loop(0, rest, lambda i, carry: step(carry, (whole * group + i) * size, 1), carry)
  total, d_hidden, d_head = carry
  d_hidden = _put_back(d_hidden, mask).reshape(student_hidden.shape)
  return total, (d_hidden, d_head.astype(student_head.dtype))


def _total_backward(options, gradients, cotangent):
  del options
  d_hidden, d_head = ((g.astype(jnp.float32) * cotangent).astype(g.dtype) for g in gradients)
  return d_hidden, d_head, None, None, None  # None is a zero cotangent


_total.defvjp(_total_forward, _total_backward)


def trips(count: Int[Array, ''] | int, size: int, group: int) -> tuple[Int[Array, ''] | int, Int[Array, ''] | int]:
  """How often the loop goes round for `count` tokens that the mask counts, whatever the length of the mask.

  Returns (groups of `group` chunks of `size` tokens, single chunks after them). Nothing is done for the other tokens.
  """
  chunks = -(-count // size)
  return chunks // group, chunks % group


def _counted_first(options, student, teacher, mask):
  """([*tokens, …] → [N, …] with the tokens that count first, and room for whole chunks; the tokens of a chunk; chunks of a group)."""
  steps = max(1, -(-mask.size // options.chunk))
  groups = -(-steps // GROUP)
  group = -(-steps // groups)  # the same number of chunks in each group
  size = max(1, -(-mask.size // (groups * group)))
  order, room = jnp.argsort(~mask.reshape(-1), stable=True), groups * group * size - mask.size

  def gather(x):
    x = x.reshape(mask.size, *x.shape[mask.ndim:])[order]
    return jnp.pad(x, [(0, room)] + [(0, 0)] * (x.ndim - 1))

  counted = gather(mask)
  return (*(_hide(gather(x), counted) for x in (student, teacher)), counted), size, group


def _put_back(x, mask):
  """Undoes the order of `_counted_first` in [N, …]; zeros where the mask is 0."""
  mask = mask.reshape(-1)
  place = jnp.cumsum(mask, dtype=jnp.int32) - 1
  return _hide(x[jnp.maximum(place, 0)], mask)


def _slice(xs, first, size):
  return tuple(jax.lax.dynamic_slice_in_dim(x, first, size) for x in xs)


class _Compared(NamedTuple):
  """What a chunk's gradient is formed from.

  Attributes:
    log_p, log_q: [C, V].
    value: [C], the divergence of each token.
    inside: [C, V], which tokens `support` keeps; None for all.
    kept: (log p, log q) of those, [C, k] each.
    outside: (log p, log q) of all the others together, [C] each; None without a tail.
  """
  log_p: Array
  log_q: Array
  value: Array
  inside: Array | None = None
  kept: tuple[Array, Array] | None = None
  outside: tuple[Array, Array] | None = None


def _compare(options, student_hidden, teacher_hidden, mask, student_head, teacher_head):
  """One chunk: the sum of its divergence, and a function that gives its gradient in the student's logits, [C, V] float32."""
  if options.kind == 'imitation':
    return _imitate(student_hidden, teacher_hidden, mask, student_head)
  sides = (student_hidden, student_head), (teacher_hidden, teacher_head)
  # Without the barrier XLA hangs the maximum on the product and, for that, writes and reads the logits once more.
  s, t = (jnp.maximum(logits, losses.FLOOR) for logits in jax.lax.optimization_barrier([_product(*side) for side in sides]))
  swapped = options.kind == 'forward_kl'
  *totals, value = _row_statistics(*((t, s) if swapped else (s, t)), options.temperature)
  totals = totals[::-1] if swapped else totals
  log_p, log_q = (x / options.temperature - total[:, None] for x, total in zip((s, t), totals))
  if options.support == 'full':
    if options.kind == 'jsd':
      value = losses.token_divergence(log_p, log_q, None, options.kind, options.support)
    found = _Compared(log_p, log_q, value)
  else:
    top, ids = top_k(s, min(options.k, s.shape[-1]))
    last, last_id = top[:, -1:], ids[:, -1:]
    inside = (s > last) | ((s == last) & (jnp.arange(s.shape[-1]) <= last_id))
    kept = tuple(jnp.take_along_axis(x, ids, axis=-1) / options.temperature - total[:, None] for x, total in zip((s, t), totals))
    value, outside = losses.divergence_terms(*kept, options.kind).sum(-1), None
    if options.support == 'topk_tail':
      outside = losses.log_outside(log_p, inside), losses.log_outside(log_q, inside)
      value += losses.divergence_terms(*outside, options.kind)
    found = _Compared(log_p, log_q, value, inside, kept, outside)
  return jnp.where(mask, found.value, 0).sum(), functools.partial(_logit_gradient, options, found)


def _imitate(hidden, ids, mask, head):
  """`_compare` with the sampled tokens in the place of a teacher."""
  s = jnp.maximum(jax.lax.optimization_barrier(_product(hidden, head)), losses.FLOOR)
  total = jax.nn.logsumexp(s, axis=-1)
  value = total - jnp.take_along_axis(s, ids[:, None], axis=-1)[:, 0]
  gradient = lambda: jnp.exp(s - total[:, None]) - (jnp.arange(s.shape[-1]) == ids[:, None])
  return jnp.where(mask, value, 0).sum(), gradient


def _row_statistics(s, t, temperature):
  """(log Σ exp s/T, log Σ exp t/T, KL(softmax s/T ‖ softmax t/T)) of each row of two [C, V] arrays.

  A GPU waits for memory here, so it reads each logit once; a CPU waits for exponentials, of which `_one_pass` has more.
  """
  how = {name: functools.partial(f, temperature=temperature) for name, f in (('one', _one_pass), ('two', _two_passes))}
  return jax.lax.platform_dependent(s, t, cuda=how['one'], rocm=how['one'], default=how['two'])


def _two_passes(s, t, temperature):
  top_s, top_t = s.max(-1, keepdims=True), t.max(-1, keepdims=True)
  p, q = jnp.exp((s - top_s) / temperature), jnp.exp((t - top_t) / temperature)
  return _finish(top_s[:, 0], p.sum(-1), (p * (s - t)).sum(-1), top_t[:, 0], q.sum(-1), temperature)


def _one_pass(s, t, temperature):
  """Sums that are scaled again whenever a larger logit turns up, as in an online softmax."""

  def merge(one, other):
    (m, z, w, n, y), (m_, z_, w_, n_, y_) = one, other
    top_s, top_t = jnp.maximum(m, m_), jnp.maximum(n, n_)
    scales = [jnp.exp((old - top) / temperature) for old, top in ((m, top_s), (m_, top_s), (n, top_t), (n_, top_t))]
    return top_s, z * scales[0] + z_ * scales[1], w * scales[0] + w_ * scales[1], top_t, y * scales[2] + y_ * scales[3]

  none, zero, ones = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0), jnp.ones_like(s)
  sums = jax.lax.reduce((s, ones, s - t, t, ones), (none, zero, zero, none, zero), merge, (1,))
  return _finish(*sums, temperature)


def _finish(top_s, sum_s, weighted, top_t, sum_t, temperature):
  # Differences of logits are taken before the division: a multiplication fused into one of them alone would leave a
  # rounding error where student and teacher are the same.
  log_sums = jnp.log(sum_s), jnp.log(sum_t)
  value = (weighted / sum_s - (top_s - top_t)) / temperature - (log_sums[0] - log_sums[1])
  return top_s / temperature + log_sums[0], top_t / temperature + log_sums[1], value


def _logit_gradient(options, found):
  """The divergence's gradient in the student's logits, [C, V] float32.

  With g = ∂D / ∂ log p, the softmax gives ∂D / ∂ logits = (g − p Σ g) / T. The tail bucket adds its own slope, spread
  over the tokens outside by their share of it, since ∂ log p_tail / ∂ log p_v = p_v / p_tail.
  """
  slope = _slope(found.log_p, found.log_q, options)
  if options.support != 'full':
    slope, total = jnp.where(found.inside, slope, 0), _slope(*found.kept, options).sum(-1, keepdims=True)
  elif options.kind == 'jsd':
    total = slope.sum(-1, keepdims=True)
  else:
    # Known: KL(p ‖ q) itself, or Σ p − Σ q. Nothing to read the logits for once more.
    total = found.value[:, None] if options.kind == 'reverse_kl' else 0
  if found.outside is not None:
    log_p_tail, log_q_tail = (x[:, None] for x in found.outside)
    tail = _slope(log_p_tail, log_q_tail, options)
    total += tail
    # A share of the tail is at most 1; tokens inside would overflow the exponential before they are left out.
    slope = jnp.where(found.inside, slope, tail * jnp.exp(jnp.minimum(found.log_p - log_p_tail, 0)))
  return (slope - jnp.exp(found.log_p) * total) / options.temperature


def _slope(log_p, log_q, options):
  """∂ divergence_terms / ∂ log p, up to a multiple of p.

  Where the outcomes are all there is, a multiple of p changes nothing, as p − p Σ p = 0: it is chosen so that the
  slope is exactly 0 where p = q. Under 'topk' the outcomes hold less than all of the mass, and the derivative is taken
  as it is.
  """
  p, whole = jnp.exp(log_p), options.support != 'topk'
  if options.kind == 'reverse_kl':
    return p * (log_p - log_q) if whole else p * (log_p - log_q + 1)
  if options.kind == 'forward_kl':
    return p - jnp.exp(log_q) if whole else -jnp.exp(log_q)
  return -0.5 * p * losses.log_mean_ratio(log_q - log_p)


def _logits(hidden, head, mask):
  return _product(_hide(hidden, mask), head)


def _product(hidden, head):
  return jnp.einsum('cd,vd->cv', hidden, head, preferred_element_type=jnp.float32)


def _hide(hidden, mask):
  # Before the products: a NaN row times a zero gradient would still make the head's whole gradient NaN.
  return jnp.where(mask.reshape(mask.shape + (1,) * (hidden.ndim - mask.ndim)), hidden, 0)


def _entropy(logits):
  log_p = losses.log_probabilities(logits, 1.0)
  return -(jnp.exp(log_p) * log_p).sum(-1)


def _cast(head, hidden):
  # Once, outside the loop.
  return None if head is None else head.astype(hidden.dtype)


def _chunks(x, mask, chunk):
  """[*tokens, ...] → [S, C, ...] with C ≤ chunk, padded with zeros (in the mask: not counted).

  Chunk s holds tokens s, s + S, s + 2S…: when tokens are sharded over devices, every device then has its part of
  every chunk. Consecutive tokens would put each chunk on one device and leave the others to wait.
  """
  x = x.reshape(mask.size, *x.shape[mask.ndim:])
  steps = max(1, -(-mask.size // chunk))
  groups = -(-steps // GROUP)
  steps = -(-steps // groups) * groups  # the same number of chunks in each group: none is all padding
  size = -(-mask.size // steps)
  x = jnp.pad(x, [(0, steps * size - mask.size)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(size, steps, *x.shape[1:]).swapaxes(0, 1)


def _like_varying(tree, *like):
  """Under `shard_map`, marks `tree` as differing between devices wherever `like` does.

  A scan's carry must say so from its start, and so must the replicated head, whose cotangent is each device's own
  until the mark's transpose sums it over them. Adds an empty sum of `like`: 0 whatever the values are, and gone once
  compiled. (The mark's own interface is not the same in all JAX versions supported.)
  """
  zero = sum(x[:0].sum(dtype=jnp.float32) for x in jax.tree.leaves(like))
  return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _check_inputs(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk):
  if not chunk >= 1:
    raise ValueError(f'chunk is {chunk!r}; it must be at least 1, the number of tokens handled at once')
  for side, hidden, head in (('student', student_hidden, student_head), ('teacher', teacher_hidden, teacher_head)):
    if hidden.ndim not in (2, 3):
      raise ValueError(f'{side}_hidden has shape {hidden.shape}; it must be [N, D] or [B, T, D]')
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
      raise ValueError(f'{side}_head has shape {head.shape}; it must be [V, {hidden.shape[-1]}], '
                       f'the width of {side}_hidden')
    if mask.shape != hidden.shape[:-1]:
      raise ValueError(f'mask has shape {mask.shape}; it must be {hidden.shape[:-1]}, {side}_hidden without its width')
  if student_head.shape[0] != teacher_head.shape[0]:
    raise ValueError(f'teacher_head has {teacher_head.shape[0]} rows; it must have {student_head.shape[0]}, '
                     "student_head's: both sides share one vocabulary")
