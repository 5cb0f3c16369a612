"""Low-rank training (LoRA: Hu et al., 2021, equation 3): of each layer's matrices W all that is
learned are A and B in W + (alpha / rank) A B.

The step puts the two together and runs as it does where W is learned, by the same kernels; its
gradient in W becomes that in A and B by the chain rule. The sampler does likewise, so who samples
is exactly who is trained. AdamW keeps its two numbers for A and B alone, and of the checkpoints
only what the round leaves holds W.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from oel_jax.policy import parameters

MATRICES = tuple(
  one for one in parameters.PARAMETERS if one.stacked and one.path.endswith("/kernel")
)
_einsum = functools.partial(jnp.einsum, precision="highest")  # or a GPU rounds A and B


def init(params: Any, rank: int, key: Array) -> Any:
  """Returns adapters that change nothing yet: {path: {"a" [L, I, rank], "b" [L, rank, O]}}, nested
  as `params` are, for each of `MATRICES`; float32.

  Args:
    params: as `transformer.init` makes them; of them only shapes are read. A matrix has I inputs
      and O outputs, heads and their sizes flattened.
    rank: of the product.
    key: A is drawn between -1 and 1 over the square root of I, B is 0.
  """
  flat, made = flax.traverse_util.flatten_dict(params, sep="/"), {}
  for number, matrix in enumerate(MATRICES):
    layers, inputs, outputs = _sizes(matrix, flat[matrix.path])
    draw = jax.random.uniform(
      jax.random.fold_in(key, number), (layers, inputs, rank), minval=-1.0, maxval=1.0
    )
    made[f"{matrix.path}/a"] = draw / math.sqrt(inputs)
    made[f"{matrix.path}/b"] = jnp.zeros((layers, rank, outputs))
  return flax.traverse_util.unflatten_dict(made, sep="/")


def merge(params: Any, adapters: Any, scale: float) -> Any:
  """Returns `params` with W + scale A B in the place of each W that has adapters, in W's type."""
  flat, learned = (flax.traverse_util.flatten_dict(x, sep="/") for x in (params, adapters))
  for matrix in MATRICES:
    whole = flat[matrix.path]
    product = _einsum("lir,lro->lio", learned[f"{matrix.path}/a"], learned[f"{matrix.path}/b"])
    flat[matrix.path] = (whole + scale * product.reshape(whole.shape)).astype(whole.dtype)
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def slopes(gradient: Any, adapters: Any, scale: float) -> Any:
  """Returns the gradient in the adapters, given that in all of `merge`'s parameters."""
  flat, learned = (flax.traverse_util.flatten_dict(x, sep="/") for x in (gradient, adapters))
  found = {}
  for matrix in MATRICES:
    slope = flat[matrix.path].reshape(_sizes(matrix, flat[matrix.path]))
    a, b = (learned[f"{matrix.path}/{name}"] for name in "ab")
    found[f"{matrix.path}/a"] = scale * _einsum("lio,lro->lir", slope, b)
    found[f"{matrix.path}/b"] = scale * _einsum("lir,lio->lro", a, slope)
  return flax.traverse_util.unflatten_dict(found, sep="/")


def scale_of(config: Any) -> float:
  """What A B is multiplied by; `config` is config.consolidation, with a rank above 0."""
  return config.lora_alpha / config.lora_rank


def whole(config: Any, params: Any) -> Callable[[Any], Any]:
  """What turns what is learned into all parameters: adapters into `params` with them, placed as
  these are; or, where config.lora_rank is 0, nothing.
  """
  if not config.lora_rank:
    return lambda learned: learned
  places, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, params))
  return functools.partial(_merged(tuple(places), tree, scale_of(config)), params)


@functools.lru_cache(maxsize=2)  # a new one would be compiled again in each round
def _merged(places: tuple[Any, ...], tree: Any, scale: float) -> Callable[..., Any]:
  return jax.jit(functools.partial(merge, scale=scale), out_shardings=tree.unflatten(places))


def _sizes(matrix: parameters.Parameter, leaf: Any) -> tuple[int, int, int]:
  """Layers, inputs and outputs of a stacked matrix."""
  layers, *rest = leaf.shape
  return layers, math.prod(rest[: matrix.inputs]), math.prod(rest[matrix.inputs :])
