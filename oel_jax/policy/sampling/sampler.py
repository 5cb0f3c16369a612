"""Sampling: prompts in, responses out, through a fixed number of slots that are refilled as
sequences end.

Each sequence draws from its own random stream, keyed by its seed and by the position in the
response, so its tokens do not depend on what shares the slots (up to the rounding of a matrix
product's shape, and of attention in one part or in two). Who shares them follows from the prompts
and the tokens drawn, never from a clock: the same call gives the same bits on one machine. On a CPU
the prompts are shared out among its cores, each with slots of its own: the small products of a
token keep little more than one of them busy.

A long beginning is not read again while a slot still holds it: the turns of a game before, or a
text that others begin with, too. A long text that several of the first prompts begin with is kept
once for all of them (`beginnings`, `text_cache`): a slot then holds only what is its own, so more
slots fit, and a step reads the text once for many of them.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import (
  beginnings,
  engine,
  groups,
  kv_cache,
  model,
  on_cpu,
  slot_room,
  slot_state,
  spread,
  text_cache,
)
from oel_jax.policy.sampling import scheduler as scheduling
from oel_jax.policy.sampling.driver import Driver, Requests
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime import target

# A device's, of the keys and values of the first prompts and their responses; longer replies make
# it more.
MAX_CACHE_BYTES = 16 << 30
MAX_TEXT_SHARE = 0.75  # of these bytes, of texts that are kept once
MIN_PROMPTS_PER_CORE = 8  # of each core of a CPU that has prompts of its own

# Given the number of a prompt and the ids drawn for it: a further prompt and its seed, or None.
Reply = Callable[[int, list[int]], tuple[Sequence[int], int] | None]


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model that can be talked to: architecture, parameters and tokenizer.

  Attributes:
    architecture: its shapes.
    params: as `transformer.init` makes them (layers stacked).
    tokenizer: its text side.
    dtype: of the activations.
    sample_tensor: devices that sample together (`groups`).
  """

  architecture: Architecture
  params: Any
  tokenizer: Any
  dtype: Any = jnp.float32
  sample_tensor: int = 1

  def __post_init__(self):
    if self.tokenizer.vocabulary > self.architecture.vocabulary:
      raise ValueError(
        f"the tokenizer has {self.tokenizer.vocabulary} pieces but the weights only "
        f"{self.architecture.vocabulary}: "
        "they do not belong together"
      )

  def sample(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    logprobs: bool = False,
    reply: Reply | None = None,
  ) -> Any:
    """`generate` with this policy's own parts; where several processes have the parameters,
    `spread.sample`.
    """
    if spread.is_spread(self.params):
      if reply is None:
        asked = list(prompts), list(seeds), sampling, max_new_tokens
        return spread.sample(self, *asked, logprobs=logprobs)
      # What replies is here alone; games are shared out whole, before they come here.
      how = dict(sampling=sampling, max_new_tokens=max_new_tokens, reply=reply)
      return spread.own(self).sample(prompts, seeds, **how)
    return generate(
      self.params,
      self.architecture,
      prompts,
      seeds,
      sampling=sampling,
      max_new_tokens=max_new_tokens,
      eos_ids=self.tokenizer.eos_ids,
      pad_id=self.tokenizer.pad_id,
      dtype=self.dtype,
      logprobs=logprobs,
      reply=reply,
      sample_tensor=self.sample_tensor,
    )

  def replace(self, params: Any) -> "Policy":
    """The same policy with other parameters."""
    return dataclasses.replace(self, params=params)


def generate(
  params: Any,
  architecture: Architecture,
  prompts: Sequence[Sequence[int]],
  seeds: Sequence[int],
  *,
  sampling: Sampling,
  max_new_tokens: int | Sequence[int],
  eos_ids: Sequence[int] | Sequence[Sequence[int]],
  pad_id: int,
  dtype: Any = jnp.float32,
  slots: int | None = None,
  logprobs: bool = False,
  reply: Reply | None = None,
  sample_tensor: int = 1,
) -> Any:
  """Samples one response a prompt.

  Args:
    params: stacked parameters.
    architecture: their shapes.
    prompts: token ids, one non-empty list a sequence.
    seeds: uint32, one a sequence.
    sampling: temperature above 0, top_p in (0, 1], top_k >= 0, min_p in [0, 1].
    max_new_tokens: limit of a response, at least 1, or one a prompt; a response that reaches it has
      no end-of-sequence id.
    eos_ids: ids any of which ends a response, or one such list a prompt; the id is kept.
    pad_id: fills what is not there.
    dtype: of the activations.
    slots: most sequences side by side, rounded down to one of SLOT_COUNTS; None: as many as fit
      into MAX_CACHE_BYTES beside the texts that are kept once, at most MAX_SLOTS, or MAX_SLOTS_CPU
      of each core of a CPU. Where replies become much longer than the first prompts, fewer must be
      asked for: the slots stay as many. On a mesh of one process all this holds for the share of
      each group of devices, which is one slot at least.
    logprobs: whether to return the log-probabilities of the ids, too: under the model as it is,
      without temperature and filters.
    reply: called as each response ends, with the prompt's index and the ids; may return a prompt to
      go on with and its seed, which takes that index's place. It runs while the device draws for
      others, on a CPU in one of several threads, an index always in the same, never in two at a
      time. A prompt that repeats the one before and goes on is cheap.
    sample_tensor: devices of a mesh that hold the weights together (`groups`).

  Returns:
    The ids sampled (last), in the order of the prompts; with `logprobs` a pair, the second one
    float32 array a prompt.

  Raises:
    ValueError: an empty prompt, an id that the weights have no row for, a limit or slots below 1,
      or not one seed, limit or list a prompt; a reply's prompt is checked when it comes. Or devices
      or weights that do not divide into `sample_tensor` (`groups.check`).
    NotFiniteError: NaN or an infinity is among a prompt's logits, and nothing is drawn from them.
      It names the prompt's index and how many tokens its response had.
  """
  if slots is not None and slots < 1:
    raise ValueError(f"generate got slots {slots}: it must be at least 1, or None")
  requests = _requests(architecture, prompts, seeds, max_new_tokens, eos_ids)
  if not prompts:
    return ([], []) if logprobs else []
  mesh = groups.of_params(params, architecture, sample_tensor)
  device = None if mesh else slot_state.device_of(params)
  ready = dict(architecture=architecture, dtype=dtype, mesh=mesh)
  weights = slot_state.committed(model.prepare, device, **ready)(params)
  share = architecture.share(sample_tensor)
  attn_impl = kv_cache.attn_impl(share, dtype)
  how = dict(
    architecture=share,
    sampling=sampling,
    logprobs=logprobs,
    attn_impl=attn_impl,
    mesh=mesh,
  )
  each = token_bytes(share, dtype)
  max_tokens = int(MAX_TEXT_SHARE * MAX_CACHE_BYTES / each)
  # In less than float32 XLA may round a query for its text and not for its own tokens.
  if attn_impl == "xla" and jnp.dtype(dtype) != jnp.float32:
    max_tokens = 0
  common = beginnings.find(prompts, max_tokens, replies=reply is not None)
  if common.texts:
    how["texts"] = text_cache.read(weights, common, architecture=share, mesh=mesh)
  # Each part has slots, a share of the memory and on a CPU a thread of its own; long and short
  # prompts are dealt out evenly.
  parts = min(_cores(mesh), len(prompts) // MIN_PROMPTS_PER_CORE, slots or len(prompts)) or 1
  split = [common.split(prompt) for prompt in prompts]
  by_length = sorted(range(len(prompts)), key=lambda i: -len(split[i][1]))
  programs = on_cpu if mesh is None and target.backend() == "cpu" else engine
  lock, stopped = threading.Lock(), threading.Event()
  ids, scores = [[] for _ in prompts], [[] for _ in prompts]

  def work(own: list[int]) -> None:
    def answer(k: int, drawn: list[int]) -> tuple[Sequence[int], int] | None:
      with lock:
        following = reply(own[k], drawn)
      if following is not None:
        _check(following[0], own[k], architecture.vocabulary)
      return following

    asked = Requests(*(array[own] for array in requests))
    scheduler, empty = _slots(
      [split[i] for i in own],
      asked,
      how,
      device=device,
      dtype=dtype,
      slots=slots and slots // parts,
      common=common,
      parts=parts,
      replies=reply is not None,
    )
    driver = Driver(
      weights,
      empty,
      scheduler,
      asked,
      how,
      programs=programs,
      beginnings=common,
      indices=own,
      pad_id=pad_id,
      reply=reply and answer,
    )
    while not stopped.is_set() and not scheduler.done:
      driver.advance()
    for k, i in enumerate(own):
      ids[i], scores[i] = scheduler.responses[k], np.float32(driver.scores[k])

  _side_by_side(work, [by_length[part::parts] for part in range(parts)], stopped)
  return (ids, scores) if logprobs else ids


def token_bytes(a: Architecture, dtype: Any) -> int:
  """Of the keys and values of one token."""
  return 2 * a.layers * a.kv_heads * a.head_size * jnp.dtype(dtype).itemsize


def _slots(
  prompts: list[tuple[int, list[int]]],
  requests: Requests,
  how: dict[str, Any],
  *,
  device: jax.Device | None,
  dtype: Any,
  slots: int | None,
  common: beginnings.Beginnings,
  parts: int,
  replies: bool,
) -> tuple[scheduling.Scheduler, slot_state.Slots]:
  """The prompts, each with the number of the text before it, in a scheduler of their own, and empty
  slots, on the device or on the mesh: as many as are asked for, or as this one's share of the
  memory among `parts` holds, but no more than the prompts need.
  """
  a, mesh, attn_impl = how["architecture"], how["mesh"], how["attn_impl"]
  texts, prompts = zip(*prompts, strict=True)
  cache_tokens = MAX_CACHE_BYTES // token_bytes(a, dtype)
  # A reply may leave its text, and is whole in its slot then.
  whole = [common.length(text) + len(own) for text, own in zip(texts, prompts, strict=True)]
  room = slot_room.slot_room(
    list(map(len, prompts)),
    int(requests.limits.max()),
    attn_impl=attn_impl,
    devices=mesh_lib.row_shards(mesh) if slot_state.row_axes(mesh) else 1,
    slots=slots,
    tokens=(cache_tokens - common.tokens) // parts,
    replies=slot_room.Replies(max(whole), cache_tokens // parts) if replies else None,
  )
  scheduler = scheduling.Scheduler(
    prompts,
    texts=texts,
    slots=room.slots,
    columns=room.columns,
    cache_lengths=room.cache_lengths,
    devices=room.devices,
    cpu=target.backend() == "cpu",
    replies=replies,
  )
  empty = slot_state.committed(
    slot_state.empty,
    device,
    architecture=how["architecture"],
    rows=room.devices * room.slots,
    columns=room.columns,
    eos_ids=requests.eos_ids.shape[1],
    dtype=dtype,
    attn_impl=attn_impl,
    mesh=mesh,
    texts="texts" in how,
  )()
  return scheduler, empty


def _cores(mesh: Any) -> int:
  """How many may share out the prompts: the cores of a CPU that this process may use; other devices
  are busy with one batch.
  """
  if mesh is not None or target.backend() != "cpu":
    return 1
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _side_by_side(
  work: Callable[[Any], None], parts: Sequence[Any], stopped: threading.Event
) -> None:
  """Works on all parts, each in a thread of its own if there are several; if one fails, or this
  thread is interrupted, the others stop.
  """
  if len(parts) == 1:
    return work(parts[0])
  with futures.ThreadPoolExecutor(len(parts)) as pool:
    working = [pool.submit(work, part) for part in parts]
    try:
      futures.wait(working, return_when=futures.FIRST_EXCEPTION)
    finally:
      stopped.set()
  for one in working:
    one.result()


def _requests(architecture, prompts, seeds, limits, ends) -> Requests:
  """Checks what `generate` was given, and makes it arrays."""
  n = len(prompts)
  one = lambda value: isinstance(value, (int, np.integer))
  limits = [limits] * n if one(limits) else limits
  ends = [ends] * n if all(map(one, ends)) else ends
  for name, given in (("seeds", seeds), ("limits", limits), ("lists of end ids", ends)):
    if len(given) != n:
      raise ValueError(f"generate got {n} prompts but {len(given)} {name}: one a prompt")
  for i, prompt in enumerate(prompts):
    _check(prompt, i, architecture.vocabulary)
    if limits[i] < 1:
      raise ValueError(
        f"generate got max_new_tokens {limits[i]} for the prompt at index {i}: it must be at least "
        "1"
      )
  # At least one column: XLA (JAX 0.11.2) crashes where an array of no elements is spread over
  # several GPUs.
  padded = np.full((n, max([1, *map(len, ends)])), -1, np.int32)
  for row, ids in zip(padded, ends, strict=True):
    row[: len(ids)] = ids
  return Requests(np.array(seeds, np.uint32), np.asarray(limits, np.int32), padded)


def _check(prompt: Sequence[int], index: int, vocabulary: int) -> None:
  if not prompt:
    raise ValueError(
      f"generate got an empty prompt at index {index}: a prompt has at least one token"
    )
  if not 0 <= min(prompt) <= max(prompt) < vocabulary:
    wrong = next(token for token in prompt if not 0 <= token < vocabulary)
    raise ValueError(
      f"generate got the id {wrong} in the prompt at index {index}: ids are at least 0 and below "
      f"{vocabulary}"
    )
