"""The forward pass of sampling: the block's mathematics on weights that were made ready for it.

Weights are cast, unstacked and fused once, outside of every loop: slicing stacked weights at every
token is several times slower, and so are three small matrix products instead of a large one. What a
program attends to, the tokens themselves or a cache, it says itself (`attend`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from oel_jax.policy import attention, transformer, unrolled
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import heads, norm, small_matmul, splash
from oel_jax.policy.sampling import groups
from oel_jax.policy.sampling.token_sampling import NOT_FINITE, Sampling, sample_token


@functools.partial(jax.jit, static_argnames=("architecture", "dtype", "mesh"))
def prepare(
  params: Any, *, architecture: Architecture, dtype: Any, mesh: Mesh | None = None
) -> Any:
  """Parameters as sampling wants them: layers apart, the matrices that read the same input fused,
  on a GPU one row an output.

  Matrices and tables are in `dtype`; norms' scales and biases stay what they are, as in training.
  On a mesh, however training has placed them, each device gets what it runs of `architecture`, the
  whole model's: all of it, or with groups of devices (`groups`) its share, as `specs` says.
  """
  a, size = architecture, groups.size_of(mesh)
  params = unrolled.fuse(params, dtype)

  def by_device(layer: Any) -> Any:
    width = len(layer["qkv"])
    qkv = groups.heads_by_device(layer["qkv"].reshape(width, -1, a.head_size), a, size)
    bias = {
      name: groups.heads_by_device(layer[name], a, size) for name in ("qkv_bias",) if name in layer
    }
    gate_up = groups.halves_by_device(layer["gate_up"], size)
    return {**layer, **bias, "qkv": qkv.reshape(width, -1), "gate_up": gate_up}

  def turn(layer: Any) -> Any:
    layer = layer if size == 1 else by_device(layer)
    made = {name: small_matmul.lay_out(layer[name]) for name in unrolled.MATRICES}
    made |= {name: layer[name] for name in ("attention_norm", "feedforward_norm")}
    made |= {"qkv_bias": layer["qkv_bias"]} if a.qkv_bias else {}
    if a.qk_norm:
      made["qk_norm"] = heads.by_head(a.share(size), layer["qk_norm"])
    return made

  params = {**params, "layers": tuple(map(turn, params["layers"]))}
  if mesh is None:
    return params
  places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(mesh, params))
  return jax.lax.with_sharding_constraint(params, places)


def specs(mesh: Mesh, weights: Any) -> Any:
  """How prepared weights lie on the mesh: whole on each device, or split over its group's."""
  axis = groups.axis_of(mesh)

  def one(path, _) -> PartitionSpec:
    name = path[-1].key
    if axis is None:
      return PartitionSpec()
    if path[0].key in unrolled.TABLES or name == "qkv_bias":
      return PartitionSpec(axis)
    if name not in unrolled.MATRICES:
      return PartitionSpec()
    # Not along the width; on a GPU the two dimensions have changed places.
    first = (unrolled.WIDTH[name] == 1) != small_matmul.on_gpu()
    return PartitionSpec(axis) if first else PartitionSpec(None, axis)

  return jax.tree_util.tree_map_with_path(one, weights)


def forward(
  weights: Any,
  a: Architecture,
  tokens_BxT: Int[Array, "B T"],
  split: Callable,
  attend: Callable,
  held: Sequence[Any],
  axis: str | None = None,
) -> tuple[Float[Array, "B T D"], list[Any]]:
  """`transformer.apply` on prepared weights, and what `attend` keeps of each layer.

  `split(layer, qkv)` gets the heads [B, T, N + 2 K, H] as projected; `attend(layer, heads, held)`
  what that gives and the layer's own of `held`, and returns the output and what is to be kept. With
  an `axis`, within `jax.shard_map`, the weights are a device's share, and `a` its architecture.
  """
  B, T = tokens_BxT.shape

  # Python goes through a layer once for all that are alike, not 28 times.
  @jax.jit
  def one(layer, x, y, held):
    kept = []

    def attend_and_keep(layer, own):
      out, new = attend(layer, own, held)
      kept.append(new)
      return out

    run = operations(a, (B, T), split, attend_and_keep, axis)
    return *transformer.block(run, layer, x, y), kept[0]

  x, y = groups.embed(weights["embed"]["embedding"], tokens_BxT, axis).reshape(B * T, -1), None
  kept = []
  for layer, own in zip(weights["layers"], held, strict=True):
    x, y, new = one(layer, x, y, own)
    kept.append(new)
  hidden = norm.add_norm(x, y, weights["norm"]["scale"], a.norm_eps)[1].reshape(B, T, -1)
  return hidden, kept


def logits(
  weights: Any, hidden_BxD: Float[Array, "B D"], axis: str | None = None
) -> Float[Array, "B V"]:
  """Float32 logits of the whole vocabulary; `axis` as in `forward`."""
  return groups.gather(transformer.logits(hidden_BxD, transformer.head(weights)), axis)


def operations(
  a: Architecture, shape: tuple[int, int], split: Callable, attend: Callable, axis: str | None
) -> transformer.Operations:
  """The block's operations on prepared weights and the tokens of B rows of T."""

  def norm_product(x, y, scale, matrix):
    x, normed = norm.add_norm(x, y, scale, a.norm_eps)
    return x, small_matmul.product(normed, matrix)

  def norm_swiglu(x, y, scale, matrix):
    x, normed = norm.add_norm(x, y, scale, a.norm_eps)
    return x, small_matmul.swiglu(normed, matrix)

  def product(x, matrix):
    made = small_matmul.addend(x, matrix)
    return made if axis is None else groups.add_up(made, x, axis)

  side_by_side = lambda qkv: qkv.reshape(*shape, a.heads + 2 * a.kv_heads, a.head_size)
  return transformer.Operations(
    norm_product=norm_product,
    heads=lambda layer, qkv: split(layer, side_by_side(qkv)),
    attend=lambda layer, own: attend(layer, own).reshape(-1, a.heads * a.head_size),
    product=product,
    norm_swiglu=norm_swiglu,
    down=product,
  )


def draw(
  weights: Any,
  hidden_BxD: Float[Array, "B D"],
  seeds_B: UInt[Array, "B"],
  drawn_B: Int[Array, "B"],
  active_B: Bool[Array, "B"],
  sampling: Sampling,
  logprobs: bool,
  axis: str | None = None,
) -> tuple[Array, tuple[Array, ...]]:
  """Each row's next id, from the stream of its seed and position, and its log-probability under the
  model as it is, if asked for.
  """
  logits_BxV = logits(weights, hidden_BxD, axis)
  token = sample_token(
    logits_BxV,
    jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds_B), drawn_B),
    sampling,
    active_B,
  )
  # `sample_token` takes -inf for a mask; here nothing is masked: it is no number to draw from.
  token = jnp.where(logits_BxV.min(-1) > -jnp.inf, token, NOT_FINITE)
  if not logprobs:
    return token, ()
  scores = jax.nn.log_softmax(logits_BxV)
  return token, (jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0],)


def heads_at(a: Architecture, positions: Int[Array, "B T"]) -> Callable:
  """`ops.heads` as `forward`'s `split`, for tokens at these positions."""
  return heads_by(a, attention.cos_sin(positions, a))


def heads_by(a: Architecture, cos_sin: Float[Array, "B T H"]) -> Callable:
  """The same for tokens whose cosines and sines are known."""
  return lambda layer, qkv: heads.plain(
    a, qkv, layer.get("qkv_bias"), layer.get("qk_norm"), cos_sin
  )


def prefill_attn_impl(architecture: Architecture, dtype: Any) -> str:
  """The attention that reads prompts: in bfloat16 "cudnn" on a GPU and "splash" on a TPU, if it is
  for such heads; or "xla".
  """
  if splash.supported(architecture.head_size, dtype):
    return "splash"
  return "cudnn" if small_matmul.on_gpu() and dtype == jnp.bfloat16 else "xla"
