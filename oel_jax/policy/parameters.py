"""The tree of parameters, written once: of each its path, shape, place on a mesh and first values,
and its name and layout in the files of others.

`runtime.mesh` and the readers and writers in `policy.weights` go by this table. A new parameter is
a new row (`there` says which architectures have it) and its way to the operation: `_apart` in
`transformer`, `fuse` and `unfuse` in `unrolled`, `prepare` and `specs` in `sampling.model`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oel_jax.policy.architecture import Architecture

# The letter of a dimension → the field of `Architecture` that is its size.
LETTERS = {
  "V": "vocabulary",
  "D": "width",
  "L": "layers",
  "N": "heads",
  "K": "kv_heads",
  "H": "head_size",
  "F": "feedforward",
}

_zeros, _ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
_by_inputs = jax.nn.initializers.lecun_normal()  # variance 1 / inputs
_by_width = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter, or one of each layer, stacked on a leading L.

  Attributes:
    path: its keys in the tree, "/" between them.
    shape: the letters of its dimensions, a space between them.
    axes: the mesh axis over which each dimension is split; None for none.
    draw: (key, shape [in, out], or [out] without inputs) → first values, float32.
    huggingface: its name in a Hugging Face folder, {} for the layer.
    gguf: its name in a GGUF file.
    inputs: how many dimensions, L aside, a product sums over. Others' files hold [out, in], each
      flattened; without inputs, [out]. None: they hold the shape as it is here, [V, D].
    rotated: whether the outputs are heads that RoPE turns, whose rows GGUF's "llama" interleaves.
    there: whether an architecture has it.
  """

  path: str
  shape: str
  axes: tuple[str | None, ...]
  draw: Callable[[Array, tuple[int, ...]], Array]
  huggingface: str
  gguf: str
  inputs: int | None = 0
  rotated: bool = False
  there: Callable[[Architecture], bool] = lambda architecture: True

  @property
  def stacked(self) -> bool:
    """Whether each layer has one."""
    return self.shape.startswith("L ")

  def sizes(self, architecture: Architecture) -> tuple[int, ...]:
    """Its shape in the tree, with L."""
    return tuple(getattr(architecture, LETTERS[letter]) for letter in self.shape.split())

  def stored(self, architecture: Architecture) -> tuple[int, ...]:
    """The shape of one layer's tensor, or of the only one, in others' files."""
    each = self._each(architecture)
    if self.inputs is None:
      return each
    inputs, outputs = each[: self.inputs], each[self.inputs :]
    return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)

  def from_stored(self, tensor: np.ndarray, architecture: Architecture) -> np.ndarray:
    """One layer's tensor, or the only one, from others' layout to that of the tree."""
    each = self._each(architecture)
    return tensor if self.inputs is None else tensor.T.reshape(each)

  def to_stored(self, leaf: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Undoes `from_stored`."""
    stored = self.stored(architecture)
    return leaf if self.inputs is None else leaf.reshape(stored[::-1]).T

  def _each(self, architecture: Architecture) -> tuple[int, ...]:
    sizes = self.sizes(architecture)
    return sizes[1:] if self.stacked else sizes


def _attention(x: str, heads: str) -> tuple[Parameter, ...]:
  """Kernel and bias of queries, keys or values."""
  rotated = x in "qk"
  return (
    Parameter(
      f"layers/attention/{x}/kernel", f"L D {heads} H", (None, "fsdp", "tensor", None), _by_inputs,
      f"model.layers.{{}}.self_attn.{x}_proj.weight", f"blk.{{}}.attn_{x}.weight",
      inputs=1, rotated=rotated,
    ),
    Parameter(
      f"layers/attention/{x}/bias", f"L {heads} H", (None, "tensor", None), _zeros,
      f"model.layers.{{}}.self_attn.{x}_proj.bias", f"blk.{{}}.attn_{x}.bias",
      rotated=rotated, there=lambda architecture: architecture.qkv_bias,
    ),
  )  # fmt: skip


PARAMETERS = (
  Parameter(
    "embed/embedding", "V D", ("tensor", "fsdp"), _by_width,
    "model.embed_tokens.weight", "token_embd.weight", inputs=None,
  ),
  *_attention("q", "N"),
  *_attention("k", "K"),
  *_attention("v", "K"),
  *(
    Parameter(
      f"layers/attention/{x}_norm/scale", "L H", (None, None), _ones,
      f"model.layers.{{}}.self_attn.{x}_norm.weight", f"blk.{{}}.attn_{x}_norm.weight",
      there=lambda architecture: architecture.qk_norm,
    )
    for x in "qk"
  ),
  Parameter(
    "layers/attention/o/kernel", "L N H D", (None, "tensor", None, "fsdp"), _by_inputs,
    "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", inputs=2,
  ),
  *(
    Parameter(
      f"layers/feedforward/{x}/kernel", "L D F", (None, "fsdp", "tensor"), _by_inputs,
      f"model.layers.{{}}.mlp.{x}_proj.weight", f"blk.{{}}.ffn_{x}.weight", inputs=1,
    )
    for x in ("gate", "up")
  ),
  Parameter(
    "layers/feedforward/down/kernel", "L F D", (None, "tensor", "fsdp"), _by_inputs,
    "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", inputs=1,
  ),
  Parameter(
    "layers/attention_norm/scale", "L D", (None, None), _ones,
    "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight",
  ),
  Parameter(
    "layers/feedforward_norm/scale", "L D", (None, None), _ones,
    "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight",
  ),
  Parameter(
    "norm/scale", "D", (None,), _ones, "model.norm.weight", "output_norm.weight",
  ),
  Parameter(
    "head/kernel", "V D", ("tensor", "fsdp"), jax.nn.initializers.normal(0.02),
    "lm_head.weight", "output.weight",
    inputs=None, there=lambda architecture: not architecture.tied_head,
  ),
)  # fmt: skip

BY_PATH = {parameter.path: parameter for parameter in PARAMETERS}


def of(architecture: Architecture) -> dict[str, Parameter]:
  """Path → parameter, of those that this architecture has, in the order of the tree's leaves."""
  found = (parameter for parameter in PARAMETERS if parameter.there(architecture))
  return {one.path: one for one in sorted(found, key=lambda one: one.path.split("/"))}


def abstract(architecture: Architecture) -> Any:
  """The tree of `init` as ShapeDtypeStructs; nothing is computed."""
  return _tree(
    {
      path: jax.ShapeDtypeStruct(parameter.sizes(architecture), jnp.float32)
      for path, parameter in of(architecture).items()
    }
  )


def init(architecture: Architecture, key: Array) -> Any:
  """Returns freshly drawn float32 parameters: nested dicts, each layer's stacked on a leading L."""
  return _tree(
    {
      path: _first_values(parameter, architecture, key)
      for path, parameter in of(architecture).items()
    }
  )


def _tree(flat: dict[str, Any]) -> Any:
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _first_values(parameter: Parameter, architecture: Architecture, key: Array) -> Array:
  """Drawn from the keys that Flax's modules would draw from, so that a seed gives what it gave when
  they did: the key's split for the layer, with the module's path and a count folded in.
  """
  shape = parameter.stored(architecture)
  shape = shape if parameter.inputs is None else shape[::-1]
  module = parameter.path.rpartition("/")[0]
  beside = [path for path in of(architecture) if path.rpartition("/")[0] == module]
  # The layers' loop was traced twice, so counted a module's parameters twice; the head was drawn by
  # the decoder itself, whose path is empty.
  count = 1 + len(beside) * parameter.stacked
  names = () if module == "head" else module.split("/")
  draw = lambda key: parameter.draw(_folded(key, *names, count), shape)
  sizes = parameter.sizes(architecture)
  if not parameter.stacked:
    return draw(key).reshape(sizes)
  # In a loop: the random bits of one layer at a time.
  return jax.lax.map(draw, jax.random.split(key, sizes[0])).reshape(sizes)


def _folded(key: Array, *names: str | int) -> Array:
  """The key with the names' hash folded in."""
  written = (name.encode() if isinstance(name, str) else bytes([name]) for name in names)
  digest = hashlib.sha1(b"".join(written)).digest()
  return jax.random.fold_in(key, jnp.uint32(int.from_bytes(digest[:4], "big")))
