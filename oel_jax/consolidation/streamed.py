"""The frozen teacher with layers in the host's memory: its pass over a whole batch before the
student's, layer by layer, each on its way to the device while the one before it runs.

    host → device   layer 0 │ layer 1 │ layer 2 │ …
    device                  │ layer 0 │ layer 1 │ …

Of the pass only the hidden states at the response positions stay, which are the batch's `target`.
So neither the teacher's matrices nor the knowledge's keys and values take room of the device while
the student's activations do, and each of them comes to the device once a step, however many
micro-batches there are. It hides behind the teacher's products if the link is fast enough: a layer
of Qwen3-4B and ten texts of 8,192 tokens are 0.52 GB.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import micro_batches
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import transformer, unrolled
from oel_jax.policy.architecture import Architecture

# Of a micro-batch at least, if there are as many: the teacher keeps nothing for a backward pass.
TOKENS = 16384


class Layer(NamedTuple):
  """One layer of the teacher: its weights as `unrolled.fuse` makes them, and the knowledge's keys
  and values, [G, K, P, H].
  """

  weights: dict[str, Array]
  keys: Array
  values: Array


class Streamed(NamedTuple):
  """A teacher whose layers lie apart.

  Attributes:
    rest: the teacher without them: its keys and values are of no layers.
    layers: one a layer; of those in the host's memory the norms are on the device all the same.
  """

  rest: teacher_lib.Teacher
  layers: tuple[Layer, ...]


def from_teacher(teacher: teacher_lib.Teacher, share: float) -> Streamed:
  """Puts this share of the layers, one after the other over the depth, into the host's pinned
  memory; the arrays of `teacher` are not kept.

  Args:
    teacher: its layers run without a loop, on one device.
    share: 0 to 1, the part of the layers; those between them give the link time.
  """
  layers, every = [], teacher.params["layers"]
  for i, weights in enumerate(every):
    layer = Layer(weights, *_of_layer(teacher.keys, teacher.values, np.int32(i)))
    if int((i + 1) * share) > int(i * share):
      layer = jax.block_until_ready(put(layer, "pinned_host"))
    layers.append(layer)
  rest = teacher._replace(
    params={**teacher.params, "layers": ()}, keys=teacher.keys[:0], values=teacher.values[:0]
  )
  return Streamed(rest, tuple(layers))


@jax.jit
def _of_layer(keys: Array, values: Array, i: Any) -> tuple[Array, Array]:
  return tuple(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (keys, values))


def put(layer: Layer, memory_kind: str) -> Layer:
  """The layer with what is large in this kind of memory; what lies there stays what it is."""
  matrices = {name: layer.weights[name] for name in unrolled.MATRICES}
  large = matrices, layer.keys, layer.values
  places = jax.tree.map(lambda x: x.sharding.with_memory_kind(memory_kind), large)
  matrices, keys, values = jax.device_put(large, places)
  return Layer({**layer.weights, **matrices}, keys, values)


def ahead(
  teacher: teacher_lib.Teacher | Streamed,
  architecture: Architecture,
  batch: batch_lib.Batch,
  *,
  micro_tokens: int | None,
  dtype: Any,
  attn_impl: str,
) -> tuple[teacher_lib.Teacher, batch_lib.Batch]:
  """What a step, a probe or a choice of samples takes: teacher and batch as they are; or, if the
  teacher is `Streamed`, what is left of it, and the batch with its `target`.

  Arguments are those of `step.make_step`; the batch, any that has the fields of `batch.Batch`, is
  on the device.
  """
  if not isinstance(teacher, Streamed):
    return teacher, batch
  target = hidden(
    teacher, architecture, batch, micro_tokens=micro_tokens, dtype=dtype, attn_impl=attn_impl
  )
  return teacher.rest, batch._replace(target=target)


def hidden(
  teacher: Streamed,
  architecture: Architecture,
  batch: batch_lib.Batch,
  *,
  micro_tokens: int | None,
  dtype: Any,
  attn_impl: str,
) -> Float[Array, "S R D"]:
  """`teacher.teacher_hidden` of the whole batch, zeros in micro-batches of which no token counts.

  Three layers are on the device at most: the one that runs, the next, and the one that comes.
  """
  if micro_tokens is not None:
    micro_tokens = max(micro_tokens, TOKENS)
  count = micro_batches.count_of(*batch.tokens.shape, 1, micro_tokens)
  begin, middle, last = _programs(architecture, count, jnp.dtype(dtype), attn_impl)
  rows, x, y = begin(teacher.rest, _plain(batch))
  coming, before = put(teacher.layers[0], "device"), rows.filled
  for following in teacher.layers[1:]:
    # Asked for before the layer is that it shall come beside: a GPU's copy waits for all that it
    # was given to compute until then, as its room may be taken from that.
    here, coming = coming, put(following, "device")
    x, y, done = middle(teacher.rest, rows, here, x, y)
    jax.block_until_ready(before)
    before = done
  return last(teacher.rest, rows, coming, x, y)


def _plain(batch: Any) -> batch_lib.Batch:
  """The batch alone of one that says more (`selection.Scored`)."""
  return batch_lib.Batch(*(getattr(batch, name) for name in batch_lib.Batch._fields))


class _Rows(NamedTuple):
  """The batch as the teacher reads it, cut into micro-batches, and how many of them are run."""

  parts: batch_lib.Batch
  filled: Array


@functools.lru_cache(maxsize=8)  # a new one would be compiled again in each round
def _programs(
  architecture: Architecture, count: int, dtype: Any, attn_impl: str
) -> tuple[Callable, Callable, Callable]:
  """The jitted programs of a pass: before the layers, for each of them but the last, and for that
  with the last norm.
  """

  def blocks(rest, rows, layer, last):
    """(number of a micro-batch, its x, its y) → what the layer gives."""

    def block(p, x, y):
      part = micro_batches.part_of(rows.parts, p)
      prefix, known = None, None
      if rest.keys.shape[3]:
        prefix = transformer.Prefix(rest.keys, rest.values, rest.length, part.texts, part.slots)
        known = layer.keys, layer.values
      how = dict(remat="none", attn_impl=attn_impl, prefix=prefix)
      run = unrolled.blocks(architecture, part.positions, part.segments, part.at, **how)
      return run(layer.weights, x, y, known, last)

    return block

  @jax.jit
  def begin(rest, batch):
    read, _ = teacher_lib.as_read(rest, batch, attn_impl)
    parts = micro_batches.cut(read, count)
    embed = lambda part: unrolled.embed(rest.params, part.tokens, part.segments, dtype=dtype)
    x = jax.lax.map(embed, parts)
    return _Rows(parts, micro_batches.filled(parts)), x, jnp.zeros_like(x)

  @functools.partial(jax.jit, donate_argnums=(3, 4))
  def middle(rest, rows, layer, x, y):
    block = blocks(rest, rows, layer, False)

    def one(p, both):
      made = block(p, *(micro_batches.part_of(z, p) for z in both))
      put = lambda z, new: jax.lax.dynamic_update_index_in_dim(z, new, p, 0)
      return jax.tree.map(put, both, made)

    x, y = jax.lax.fori_loop(0, rows.filled, one, (x, y))
    return x, y, y[0, 0, 0]  # this last to wait for: x and y are given away

  @jax.jit
  def last(rest, rows, layer, x, y):
    block = blocks(rest, rows, layer, True)

    def one(p, found):
      made = block(p, micro_batches.part_of(x, p), micro_batches.part_of(y, p))
      made = unrolled.last_norm(rest.params, architecture, *made)
      return jax.lax.dynamic_update_index_in_dim(found, made.reshape(found.shape[1:]), p, 0)

    shape = (*rows.parts.at.shape, x.shape[-1])
    found = jax.lax.fori_loop(0, rows.filled, one, jnp.zeros(shape, dtype))
    return found.swapaxes(0, 1).reshape(-1, *shape[2:])

  return begin, middle, last
