"""Shapes in the place of what a run has: a policy without weights, and where its arrays lie."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oel_jax.policy import parameters, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.runtime import mesh as mesh_lib

EOS_IDS = 2  # that end a response, of most models


@dataclasses.dataclass(frozen=True)
class Work:
  """The most that a round's training has to do.

  Attributes:
    prompt: tokens of a prompt.
    response: tokens of a response.
    texts, knowledge: knowledge texts, and tokens of each.
    samples: of a step.
    probe: samples of the probe; 0: none.
    copies: of the float32 weights that the run holds beside the trained ones: those that it began
      with, and from its second round on those that the round began with.
  """

  prompt: int
  response: int
  texts: int
  knowledge: int
  samples: int
  probe: int
  copies: int


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
  vocabulary: int
  pad_id: int = 0
  eos_ids: tuple[int, ...] = (1,) * EOS_IDS


@dataclasses.dataclass(frozen=True)
class Unread:
  """A policy's shapes, in its place: parameters are ShapeDtypeStructs, and every response is as
  long as it may be.
  """

  architecture: Architecture
  params: Any
  dtype: Any
  tokenizer: _Tokenizer
  sample_tensor: int = 1

  def sample(self, prompts: Any, seeds: Any, *, max_new_tokens: int, **how: Any) -> list[list[int]]:
    return [[0] * max_new_tokens for _ in prompts]


def unread(
  architecture: Architecture,
  mesh: Mesh,
  dtype: Any,
  sample_tensor: int = 1,
  *,
  narrow: bool = False,
) -> Unread:
  """The policy of this architecture, its parameters placed as training leaves them; `narrow` as in
  `load.load_policy`.
  """
  params = parameters.abstract(architecture)
  if narrow:
    params = jax.eval_shape(lambda params: transformer.cast(params, dtype, tables=True), params)
  params = placed(params, mesh_lib.param_shardings(mesh, params))
  tokenizer = _Tokenizer(architecture.vocabulary)
  return Unread(architecture, params, jnp.dtype(dtype), tokenizer, sample_tensor)


def placed(tree: Any, shardings: Any) -> Any:
  """The arrays' shapes with where they lie; one sharding for all, or a tree of them."""
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  put = lambda x, place: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=place)
  return jax.tree.map(put, tree, shardings)


def device_bytes(tree: Any) -> int:
  """What the arrays of a tree of ShapeDtypeStructs take of the device that has most of them."""
  sizes = (
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  return sum(sizes)
