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
from oel_jax.policy.sampling.driver import Driver, Requests, check_prompt, requests_of
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
  requests = requests_of(prompts, seeds, max_new_tokens, eos_ids, architecture.vocabulary)
  if not prompts:
    return ([], []) if logprobs else []
  mesh = groups.of_params(params, architecture, sample_tensor)
  device = None if mesh else slot_state.device_of(params)
  ready = dict(architecture=architecture, dtype=dtype, mesh=mesh)
  weights = slot_state.committed(model.prepare, device, **ready)(params)
  a = architecture.share(sample_tensor)
  attn_impl = kv_cache.attn_impl(a, dtype)
  how = dict(architecture=a, sampling=sampling, logprobs=logprobs, attn_impl=attn_impl, mesh=mesh)
  common = beginnings.find(prompts, _text_tokens(a, dtype, attn_impl), replies=reply is not None)
  if common.texts:
    how["texts"] = text_cache.read(weights, common, architecture=a, mesh=mesh)
  # Each part has slots, a share of the memory and on a CPU a thread of its own; long and short
  # prompts are dealt out evenly.
  parts = min(_cores(mesh), len(prompts) // MIN_PROMPTS_PER_CORE, slots or len(prompts)) or 1
  split = [common.split(prompt) for prompt in prompts]
  by_length = sorted(range(len(prompts)), key=lambda i: -len(split[i][1]))
  call = _Call(
    weights=weights,
    how=how,
    device=device,
    dtype=dtype,
    common=common,
    split=split,
    requests=requests,
    slots=slots and slots // parts,
    parts=parts,
    pad_id=pad_id,
    reply=reply and _one_at_a_time(reply, architecture.vocabulary),
  )
  stopped, ids, scores = threading.Event(), [[] for _ in prompts], [[] for _ in prompts]

  def work(own: list[int]) -> None:
    driver = call.driver(own)
    while not stopped.is_set() and not driver.scheduler.done:
      driver.advance()
    for k, i in enumerate(own):
      ids[i], scores[i] = driver.scheduler.responses[k], np.float32(driver.scores[k])

  _side_by_side(work, [by_length[part::parts] for part in range(parts)], stopped)
  return (ids, scores) if logprobs else ids


@dataclasses.dataclass(frozen=True)
class _Call:
  """One call of `generate`: what its parts, each of which has some of the prompts, have in common.

  Attributes:
    weights: from `model.prepare`.
    how: the static arguments of the engine's programs, and the texts, if any are kept once.
    device: where all of it lies; None on a mesh.
    dtype: of the activations.
    common: the texts that are kept once.
    split: of each prompt, the number of the text before it, and the rest.
    requests: what is asked for besides the prompts.
    slots: of a part, most sequences side by side; None: as many as there is memory for.
    parts: how many there are.
    pad_id: fills what is not there.
    reply: for one prompt at a time; None: responses are not replied to.
  """

  weights: Any
  how: dict[str, Any]
  device: jax.Device | None
  dtype: Any
  common: beginnings.Beginnings
  split: list[tuple[int, list[int]]]
  requests: Requests
  slots: int | None
  parts: int
  pad_id: int
  reply: Reply | None

  def driver(self, own: list[int]) -> Driver:
    """What takes the prompts of these numbers, a part's, through the engine."""
    requests = Requests(*(array[own] for array in self.requests))
    room = self._room(own, int(requests.limits.max()))
    texts, prompts = zip(*(self.split[i] for i in own), strict=True)
    cpu = target.backend() == "cpu"
    scheduler = scheduling.Scheduler(
      prompts,
      texts=texts,
      slots=room.slots,
      columns=room.columns,
      cache_lengths=room.cache_lengths,
      devices=room.devices,
      cpu=cpu,
      replies=self.reply is not None,
    )
    return Driver(
      self.weights,
      self._empty(room, requests.eos_ids.shape[1]),
      scheduler,
      requests,
      self.how,
      programs=on_cpu if cpu and self.how["mesh"] is None else engine,
      beginnings=self.common,
      indices=own,
      pad_id=self.pad_id,
      reply=self.reply and (lambda k, drawn: self.reply(own[k], drawn)),
    )

  def _room(self, own: list[int], limit: int) -> slot_room.SlotRoom:
    """The slots of a part: as many as are asked for, or as its share of the memory holds, but no
    more than its prompts need, whose responses have at most `limit` tokens.
    """
    mesh, parted = self.how["mesh"], [self.split[i] for i in own]
    cache_tokens = MAX_CACHE_BYTES // token_bytes(self.how["architecture"], self.dtype)
    # A reply may leave its text, and is whole in its slot then.
    whole = max(self.common.length(text) + len(rest) for text, rest in parted)
    replies = slot_room.Replies(whole, cache_tokens // self.parts) if self.reply else None
    return slot_room.slot_room(
      [len(rest) for _, rest in parted],
      limit,
      attn_impl=self.how["attn_impl"],
      devices=mesh_lib.row_shards(mesh) if slot_state.row_axes(mesh) else 1,
      slots=self.slots,
      tokens=(cache_tokens - self.common.tokens) // self.parts,
      replies=replies,
    )

  def _empty(self, room: slot_room.SlotRoom, eos_ids: int) -> slot_state.Slots:
    """Empty slots, on the device or on the mesh."""
    return slot_state.committed(
      slot_state.empty,
      self.device,
      architecture=self.how["architecture"],
      rows=room.devices * room.slots,
      columns=room.columns,
      eos_ids=eos_ids,
      dtype=self.dtype,
      attn_impl=self.how["attn_impl"],
      mesh=self.how["mesh"],
      texts="texts" in self.how,
    )()


def _one_at_a_time(reply: Reply, vocabulary: int) -> Reply:
  """`reply` for several threads; what it returns is checked."""
  lock = threading.Lock()

  def checked(i: int, drawn: list[int]) -> tuple[Sequence[int], int] | None:
    with lock:
      following = reply(i, drawn)
    if following is not None:
      check_prompt(following[0], i, vocabulary)
    return following

  return checked


def _text_tokens(a: Architecture, dtype: Any, attn_impl: str) -> int:
  """Most tokens of texts that are kept once."""
  # In less than float32 XLA may round a query for its text and not for its own tokens.
  if attn_impl == "xla" and jnp.dtype(dtype) != jnp.float32:
    return 0
  return int(MAX_TEXT_SHARE * MAX_CACHE_BYTES / token_bytes(a, dtype))


def token_bytes(a: Architecture, dtype: Any) -> int:
  """Of the keys and values of one token."""
  return 2 * a.layers * a.kv_heads * a.head_size * jnp.dtype(dtype).itemsize


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
