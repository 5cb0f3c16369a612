"""One chunk of tokens for `fused.py`: from hidden states and heads to each token's loss, its
gradient in the logits, and statistics.

The heads' rows, the vocabulary, may be split over axes of a mesh, inside `jax.shard_map`: each
device then has the logits of its own slice, and sums, maxima and the choice of the top k are put
together from [C] and [C, k] numbers. No logits travel.

Shape letters: C tokens, D width, V vocabulary (of this device's slice), k tokens kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from oel_jax.consolidation import losses, online_softmax
from oel_jax.consolidation.divergences import DIVERGENCES
from oel_jax.policy.sampling import token_sampling


class Options(NamedTuple):
  """What is static, and hashable; `fused.linear_divergence` explains each. `kind` may also be
  'imitation'.
  """

  kind: str = "reverse_kl"
  support: str = "full"
  k: int = 256
  temperature: float = 0.7
  chunk: int = 512
  axes: tuple[str, ...] = ()
  statistics: bool = False
  topk_mass: bool = False
  check_vma: bool = True
  one: tuple[int, ...] = ()

  def wants_top_k(self) -> bool:
    """Whether the k likeliest tokens are needed."""
    return self.support != "full" or self.statistics and self.topk_mass

  def names(self) -> tuple[str, ...]:
    """The statistics that are asked for."""
    if self.kind == "imitation":
      return ("nll",) * self.statistics
    mass = self.wants_top_k()
    return (
      ("kl", "student_entropy", "teacher_entropy") + ("topk_mass",) * mass
      if self.statistics
      else ()
    )


Compared = tuple[
  Float32[Array, "C"], dict[str, Float32[Array, "C"]], Callable[[], Float32[Array, "C V"]]
]


def compare(
  options: Options,
  hidden: Float[Array, "C D"],
  reference: Float[Array, "C E"],
  head: Float[Array, "V D"],
  reference_head: Float[Array, "V E"],
) -> Compared:
  """Returns each token's divergence, the statistics of `options.names()`, and a function that forms
  the gradient.

  That gradient is in the student's logits. Raises nothing: `fused.py` checks what it is given.
  """
  sides = (hidden, head), (reference, reference_head)
  # Without the barrier XLA hangs the maximum on the product and, for that, writes and reads the
  # logits once more.
  logits = own, _ = jax.lax.optimization_barrier([_product(*side) for side in sides])
  logits = [losses.as_one(x, options.one, options.temperature) for x in logits]
  totals, found, maxima = _row_statistics(options, *logits)
  s, t = (jnp.maximum(x, losses.FLOOR) for x in logits)
  log_p, log_q = (x / options.temperature - total[:, None] for x, total in zip((s, t), totals))
  divergence = DIVERGENCES[options.kind]
  if divergence.moment is None:
    value = vocabulary_sum(divergence.terms(log_p, log_q).sum(-1), options.axes)
  else:
    value = found["forward_kl" if divergence.moment == "teacher" else "kl"]
  kept = None
  if options.wants_top_k():
    kept, inside = _keep(options, s, t, totals, maxima)
    found["topk_mass"] = kept.sum(jnp.exp(kept.log_p))
  outside = None
  if options.support != "full":
    value = kept.sum(divergence.terms(kept.log_p, kept.log_q))
    if options.support == "topk_tail":
      outside = _log_outside(log_p, inside, options.axes), _log_outside(log_q, inside, options.axes)
      value += divergence.terms(*outside)

  def gradient():
    # With g = ∂D / ∂ log p, the softmax gives ∂D / ∂ logits = (g − p Σ g) / T. The tail bucket adds
    # its own slope, spread over the tokens outside by their share of it, since ∂ log p_tail / ∂ log
    # p_v = p_v / p_tail.
    # Under 'topk' the outcomes hold less than all of the mass: the slope is taken as it is.
    slope_of = divergence.slope if options.support == "topk" else divergence.balanced
    slope = slope_of(log_p, log_q)
    if options.support != "full":
      slope = jnp.where(inside, slope, 0)
      total = kept.sum(slope_of(kept.log_p, kept.log_q))[:, None]
    elif divergence.balanced_sum is None:
      total = vocabulary_sum(slope.sum(-1, keepdims=True), options.axes)
    else:
      total = divergence.balanced_sum(value)[:, None]
    if outside is not None:
      log_p_tail, log_q_tail = (x[:, None] for x in outside)
      tail = slope_of(log_p_tail, log_q_tail)
      total += tail
      # A share of the tail is at most 1; tokens inside would overflow the exponential before they
      # are left out.
      slope = jnp.where(inside, slope, tail * jnp.exp(jnp.minimum(log_p - log_p_tail, 0)))
    return _apart(options, own, (slope - jnp.exp(log_p) * total) / options.temperature)

  return value, {name: found[name] for name in options.names()}, gradient


def _apart(options: Options, logits: Array, gradient: Array) -> Array:
  """The gradient in the logits from that in `losses.as_one` of them: of the first of the tokens
  that are one each has its share.
  """
  if len(options.one) < 2:
    return gradient
  ids = jnp.array(options.one)
  shares = jax.nn.softmax(jnp.maximum(logits[:, ids], losses.FLOOR) / options.temperature)
  return gradient.at[:, ids].set(gradient[:, ids[:1]] * shares)


def imitate(
  options: Options,
  hidden: Float[Array, "C D"],
  ids: Int[Array, "C"],
  head: Float[Array, "V D"],
  _: None,
) -> Compared:
  """`compare` with the sampled tokens in the place of a teacher; at temperature 1. Its statistic is
  the value itself.
  """
  s = jnp.maximum(jax.lax.optimization_barrier(_product(hidden, head)), losses.FLOOR)
  total = _log_add(jax.nn.logsumexp(s, axis=-1), options.axes)
  ids -= _first_id(options, s)
  here = (0 <= ids) & (ids < s.shape[-1])
  chosen = jnp.take_along_axis(s, jnp.where(here, ids, 0)[:, None], axis=-1)[:, 0]
  value = total - vocabulary_sum(jnp.where(here, chosen, 0), options.axes)
  gradient = lambda: jnp.exp(s - total[:, None]) - (jnp.arange(s.shape[-1]) == ids[:, None])
  return value, dict.fromkeys(options.names(), value), gradient


def vocabulary_sum(x: Array, axes: tuple[str, ...]) -> Array:
  """The sum of what each slice of the vocabulary gives."""
  return jax.lax.psum(x, axes) if axes else x


def _log_add(x, axes):
  """The logarithm of the sum of what each slice of the vocabulary gives the logarithm of."""
  if not axes:
    return x
  top = jax.lax.pmax(x, axes)
  return top + jnp.log(jax.lax.psum(jnp.exp(x - top), axes))


def _log_outside(log_p, inside, axes):
  return _log_add(losses.log_outside(log_p, inside), axes)


def _first_id(options, s):
  """The id of this slice's first token."""
  return jax.lax.axis_index(options.axes) * s.shape[-1] if options.axes else 0


def _product(hidden, head):
  return jnp.einsum("cd,vd->cv", hidden, head, preferred_element_type=jnp.float32)


class _Kept(NamedTuple):
  """The student's likeliest tokens of this slice, [C, k], and which of them are among the k of the
  whole vocabulary.
  """

  log_p: Array
  log_q: Array
  chosen: Array
  axes: tuple[str, ...]

  def sum(self, x):
    return vocabulary_sum(jnp.where(self.chosen, x, 0).sum(-1), self.axes)


def _keep(options, s, t, totals, maxima):
  """(`_Kept`, which tokens of the slice are kept, [C, V])."""
  top, ids = token_sampling.top_k(s, min(options.k, s.shape[-1]), maxima)
  first = _first_id(options, s)
  last, last_id = top[:, -1:], ids[:, -1:]
  if options.axes:
    # In the order of the slices, so that ties go to the lower id here too.
    tops, places = (
      jax.lax.all_gather(x, options.axes, axis=1, tiled=True) for x in (top, ids + first)
    )
    best, at = token_sampling.top_k(
      tops, min(options.k, s.shape[-1] * jax.lax.axis_size(options.axes))
    )
    last, last_id = best[:, -1:], jnp.take_along_axis(places, at[:, -1:], axis=-1)
  kept = lambda logits, ids: (logits > last) | ((logits == last) & (ids + first <= last_id))
  log_p, log_q = (
    jnp.take_along_axis(x, ids, axis=-1) / options.temperature - total[:, None]
    for x, total in zip((s, t), totals)
  )
  return _Kept(log_p, log_q, kept(top, ids), options.axes), kept(s, jnp.arange(s.shape[-1]))


def _row_statistics(options, s, t):
  """((log Σ exp s/T, log Σ exp t/T), {name: [C]}, maxima) of two [C, V] arrays: those of 'kl',
  'forward_kl' and the entropies that are needed, and for the top k, if they are looked for by
  groups, the largest of each group in s.

  A GPU waits for memory here, so it reads each logit once; a CPU waits for exponentials, of which
  that takes more.
  """
  how = {
    name: functools.partial(f, options)
    for name, f in (("kernel", _kernel_pass), ("one", _one_pass), ("two", _two_passes))
  }
  # The kernel does not say over which axes of a mesh its results differ, as `jax.shard_map` wants
  # to know where it checks that.
  checked = options.check_vma and not jax.sharding.get_abstract_mesh().empty
  cuda = how["one" if checked else "kernel"]
  sides, maxima = jax.lax.platform_dependent(s, t, cuda=cuda, rocm=how["one"], default=how["two"])
  return *_finish(options, _join_slices(options, sides)), maxima


def _kernel_pass(options, s, t, **how):
  width = token_sampling.group_width(s.shape[-1], options.k)
  width = width if options.wants_top_k() and width == token_sampling.GROUP else None
  sides, maxima = online_softmax.sums(
    s, t, functools.partial(_moments, options), options.temperature, losses.FLOOR, width, **how
  )
  return sides, _maxima(options, s) if maxima is None else maxima


def _maxima(options, s):
  by_groups = options.wants_top_k() and token_sampling.group_width(s.shape[-1], options.k) >= 2
  return token_sampling.group_maxima(jnp.maximum(s, losses.FLOOR), options.k) if by_groups else None


def _moments(options, s, t):
  """What is averaged over each side's distribution, besides 1: for its divergence from the other,
  and for its entropy.
  """
  forward = DIVERGENCES[options.kind].moment == "teacher"
  entropy = options.statistics
  return (s - t,) * (not forward or entropy) + (s,) * entropy, (t - s,) * forward + (t,) * entropy


def _two_passes(options, s, t):
  s, t = (jnp.maximum(x, losses.FLOOR) for x in (s, t))

  def side(x, moments):
    top = x.max(-1, keepdims=True)
    p = jnp.exp((x - top) / options.temperature)
    return top[:, 0], (p.sum(-1), *((p * moment).sum(-1) for moment in moments))

  return tuple(map(side, (s, t), _moments(options, s, t))), _maxima(options, s)


def _one_pass(options, s, t):
  """Sums that are scaled again whenever a larger logit turns up, as in an online softmax."""
  s, t = (jnp.maximum(x, losses.FLOOR) for x in (s, t))

  def merge(one, other):
    (m, x), (m_, x_) = one, other
    top = jnp.maximum(m, m_)
    scale, scale_ = (jnp.exp((old - top) / options.temperature) for old in (m, m_))
    return top, tuple(a * scale + b * scale_ for a, b in zip(x, x_))

  sides = tuple(
    (x, (jnp.ones_like(x), *moments)) for x, moments in zip((s, t), _moments(options, s, t))
  )
  none, zero = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
  start = tuple((none, (zero,) * len(sums)) for _, sums in sides)
  flat, tree = jax.tree.flatten(sides)
  both = lambda one, other: tuple(
    map(merge, jax.tree.unflatten(tree, one), jax.tree.unflatten(tree, other))
  )
  combine = lambda one, other: tuple(jax.tree.leaves(both(one, other)))
  return jax.tree.unflatten(
    tree, jax.lax.reduce(tuple(flat), tuple(jax.tree.leaves(start)), combine, (1,))
  ), _maxima(options, s)


def _join_slices(options, sides):
  """The sides of the whole vocabulary from those of each slice."""
  if not options.axes:
    return sides
  tops = jax.lax.pmax([top for top, _ in sides], options.axes)
  scaled = [
    tuple(x * jnp.exp((own - top) / options.temperature) for x in sums)
    for (own, sums), top in zip(sides, tops)
  ]
  return tuple(zip(tops, jax.lax.psum(scaled, options.axes)))


def _finish(options, sides):
  (top_s, (sum_s, *means_s)), (top_t, (sum_t, *means_t)) = sides
  means_s, means_t = [x / sum_s for x in means_s], [x / sum_t for x in means_t]
  log_s, log_t, T, found = jnp.log(sum_s), jnp.log(sum_t), options.temperature, {}
  if options.statistics:
    found["student_entropy"] = (top_s - means_s.pop()) / T + log_s
    found["teacher_entropy"] = (top_t - means_t.pop()) / T + log_t
  # Differences of logits are taken before the division: a multiplication fused into one of them
  # alone would leave a rounding error where student and teacher are the same.
  if means_s:
    found["kl"] = (means_s[0] - (top_s - top_t)) / T - (log_s - log_t)
  if means_t:
    found["forward_kl"] = (means_t[0] - (top_t - top_s)) / T - (log_t - log_s)
  return (top_s / T + log_s, top_t / T + log_t), found
