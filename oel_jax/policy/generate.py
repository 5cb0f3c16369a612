"""Sampling: jitted prefill and decode.

Each sequence draws from its own random stream, keyed by its seed and by the position in the response, so its tokens do not depend on
what shares the batch (up to the rounding of a matrix product's shape).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oel_jax.policy import model
from oel_jax.policy.architecture import Architecture

BATCHES = (4, 16, 32, 64, 256)  # a few shapes, so that little is compiled (traps, 20)
BATCH_TOKENS = 65536  # prompt tokens of a batch, padding included; the attention scores of more would be what fills a device's memory
LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn: temperature, then the top_k most likely (0: all), then the smallest set of mass top_p."""

  temperature: float
  top_p: float = 1.0
  top_k: int = 0

  def __post_init__(self):
    for name, ok, right in (
        ("temperature", self.temperature > 0, "above 0"),
        ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ("top_k", self.top_k >= 0, "0 (off) or more"),
    ):
      if not ok:
        raise ValueError(f"Sampling.{name} is {getattr(self, name)}: it must be {right}")


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model that can be talked to: architecture, parameters and tokenizer.

  Attributes:
    architecture: its shapes.
    params: as `model.init` makes them (layers stacked).
    tokenizer: its text side.
    dtype: of the activations.
  """

  architecture: Architecture
  params: Any
  tokenizer: Any
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.tokenizer.vocabulary > self.architecture.vocabulary:
      raise ValueError(
          f"the tokenizer has {self.tokenizer.vocabulary} pieces but the weights only {self.architecture.vocabulary}: "
          "they do not belong together"
      )

  def sample(
      self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, sampling: Sampling, max_new_tokens: int
  ) -> list[list[int]]:
    """`generate` with this policy's own parts."""
    return generate(
        self.params, self.architecture, prompts, seeds, sampling=sampling, max_new_tokens=max_new_tokens,
        eos_ids=self.tokenizer.eos_ids, pad_id=self.tokenizer.pad_id, dtype=self.dtype,
    )  # fmt: skip

  def replace(self, params: Any) -> "Policy":
    """The same policy with other parameters."""
    return dataclasses.replace(self, params=params)


def bucket(size: int, sizes: Sequence[int]) -> int:
  """The smallest of `sizes` that holds `size`; beyond the largest, the next multiple of it."""
  return next((s for s in sizes if s >= size), -(-size // sizes[-1]) * sizes[-1])


def generate(
    params: Any, architecture: Architecture, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, sampling: Sampling,
    max_new_tokens: int, eos_ids: tuple[int, ...], pad_id: int, dtype: Any = jnp.float32,
) -> list[list[int]]:  # fmt: skip
  """Samples one response a prompt.

  Args:
    params: stacked parameters.
    architecture: their shapes.
    prompts: token ids, one non-empty list a sequence.
    seeds: uint32, one a sequence.
    sampling: temperature above 0, top_p in (0, 1], top_k >= 0.
    max_new_tokens: limit of a response; one that reaches it has no end-of-sequence id.
    eos_ids: ids any of which ends a response; the id is kept.
    pad_id: fills what is not there.
    dtype: of the activations.

  Returns:
    The sampled ids, in the order of the prompts.

  Raises:
    ValueError: an empty prompt, an id that the weights have no row for, or not one seed a prompt.
  """
  if len(prompts) != len(seeds):
    raise ValueError(f"generate got {len(prompts)} prompts but {len(seeds)} seeds: one seed a prompt")
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f"generate got an empty prompt at index {i}: a prompt has at least one token")
    if not 0 <= min(prompt) <= max(prompt) < architecture.vocabulary:
      wrong = next(token for token in prompt if not 0 <= token < architecture.vocabulary)
      raise ValueError(f"generate got the id {wrong} in the prompt at index {i}: ids are at least 0 and below {architecture.vocabulary}")
  if not prompts:
    return []
  length = bucket(max(map(len, prompts)), LENGTHS)
  rows = min(bucket(len(prompts), BATCHES), max((b for b in BATCHES if b * length <= BATCH_TOKENS), default=BATCHES[0]))
  if len(prompts) > rows:  # more than one batch: the long prompts together, so that the others' padding is short
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    result: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
      part = order[start : start + rows]
      sampled = generate(
          params, architecture, [prompts[i] for i in part], [seeds[i] for i in part], sampling=sampling,
          max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id, dtype=dtype,
      )  # fmt: skip
      for i, ids in zip(part, sampled, strict=True):
        result[i] = ids
    return result
  tokens, lengths = pad_right(prompts, rows, length, pad_id)
  seed_row = np.zeros((rows,), np.uint32)
  seed_row[: len(seeds)] = seeds
  how = dict(architecture=architecture, sampling=sampling, limit=max_new_tokens, eos_ids=eos_ids, dtype=dtype)
  sampled, counts = jax.device_get(_generate(params, tokens, lengths, seed_row, **how))
  return [sampled[i, : counts[i]].tolist() for i in range(len(prompts))]


def pad_right(sequences: Sequence[Sequence[int]], rows: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 tokens [rows, length], padded on the right, and int32 lengths [rows]; rows beyond the sequences have length 0."""
  tokens = np.full((rows, length), pad_id, np.int32)
  lengths = np.zeros((rows,), np.int32)
  for i, sequence in enumerate(sequences):
    tokens[i, : len(sequence)] = sequence
    lengths[i] = len(sequence)
  return tokens, lengths


@functools.partial(jax.jit, static_argnames=("architecture", "sampling", "limit", "eos_ids", "dtype"))
def _generate(params, tokens_BxT, lengths_B, seeds_B, *, architecture, sampling, limit, eos_ids, dtype):
  """Prefill, then decode until every row has ended. Returns ids [B, limit] and how many of them count [B]."""
  B, T = tokens_BxT.shape
  params = jax.tree.map(lambda p: p.astype(dtype), params)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  real = positions < lengths_B[:, None]
  with jax.named_scope("prefill"):
    hidden, (keys, values) = model.apply(params, architecture, tokens_BxT, positions, real.astype(jnp.int32), dtype=dtype, keep_cache=True)
  last = jnp.take_along_axis(hidden, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]  # [B, D]
  room = ((0, 0), (0, 0), (0, limit), (0, 0))
  cache = model.Cache(
      keys=tuple(jnp.pad(k, room) for k in keys),
      values=tuple(jnp.pad(v, room) for v in values),
      filled=jnp.pad(real, ((0, 0), (0, limit))),
      index=jnp.int32(T),
  )
  layers, head = model.unstack(params), model.head(params)
  random = jax.vmap(jax.random.key)(seeds_B)

  def draw(hidden_BxD, t):
    return sample_token(model.logits(hidden_BxD, head), jax.vmap(jax.random.fold_in, (0, None))(random, t), sampling)

  def going_on(state):
    t, _, _, done, _, _ = state
    return (t < limit) & ~done.all()

  def step(state):
    t, token, out, done, counts, cache = state
    out = out.at[:, t].set(token)
    counts = counts + ~done
    done = done | jnp.isin(token, jnp.asarray(eos_ids))
    hidden, cache = model.apply(layers, architecture, token[:, None], (lengths_B + t)[:, None], None, cache, dtype=dtype)
    return t + 1, draw(hidden[:, 0], t + 1), out, done, counts, cache

  with jax.named_scope("decode"):
    first = (jnp.int32(0), draw(last, 0), jnp.zeros((B, limit), jnp.int32), lengths_B == 0, jnp.zeros((B,), jnp.int32), cache)
    _, _, out, _, counts, _ = jax.lax.while_loop(going_on, step, first)
  return out, counts


def sample_token(logits_BxV: Float[Array, "B V"], keys_B: Array, sampling: Sampling) -> Int[Array, "B"]:
  """Draws one id a row: logits / temperature, top-k, top-p (in the order and with the ties of `transformers`), then softmax."""
  return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BxV, sampling)).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """The float32 logits of the distribution that is sampled from: -inf outside the support."""
  logits = logits.astype(jnp.float32) / sampling.temperature
  V = logits.shape[-1]
  if 0 < sampling.top_k < V:
    kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampling.top_p < 1:
    # Ascending, as transformers does: a token goes if it and all less likely ones together hold at most 1 - top_p.
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    gone = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampling.top_p
    gone = gone.at[..., -1].set(False)
    gone = jnp.put_along_axis(jnp.zeros_like(gone), order, gone, axis=-1, inplace=False)
    logits = jnp.where(gone, -jnp.inf, logits)
  return logits
