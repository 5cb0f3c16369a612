"""The decoder as GPUs run it fastest in training: no loop over the layers, and the matrices that
read the same input fused.

A loop over stacked layers copies what each of them keeps for the backward pass into stacks, and the
weights out of them; apart, all of that stays where it was made. It compiles longer.
`transformer.apply` is the reference. On a mesh, each device runs this on its own rows and heads,
inside `jax.shard_map`; over one axis heads, feed-forward and vocabulary are split, over another
matrices and tables along their width, which are gathered layer by layer (`ops.split`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from oel_jax.policy import attention, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import common, embedding, heads, norm, products, split

MATRICES = ("qkv", "o", "gate_up", "down")
TABLES = ("embed", "head")
WIDTH = {"qkv": 0, "o": 1, "gate_up": 0, "down": 1}  # which of a matrix's dimensions has size D


def fuse(params: transformer.Params, dtype: Any) -> Any:
  """Parameters as `forward` takes them.

  Args:
    params: as `transformer.init` makes them, layers stacked.
    dtype: of the products.

  Returns:
    The tree of `params`, embedding and head in `dtype`, but for "layers", which is a tuple of
    dicts: matrices "qkv" [D, (N + 2 K) H], "o" [N H, D], "gate_up" [D, 2 F] and "down" [F, D] in
    `dtype`; "qkv_bias" [N + 2 K, H] and "qk_norm" [2, H], if the architecture has them,
    "attention_norm" and "feedforward_norm" [D] as they were.
  """
  tables = {
    name: jax.tree.map(lambda leaf: leaf.astype(dtype), params[name])
    for name in TABLES
    if name in params
  }

  def one(layer):
    attend, feed = layer["attention"], layer["feedforward"]
    cast = lambda part: part["kernel"].astype(dtype)
    made = {
      "qkv": jnp.concatenate([jax.lax.collapse(cast(attend[x]), 1) for x in "qkv"], axis=1),
      "o": jax.lax.collapse(cast(attend["o"]), 0, 2),
      "gate_up": jnp.concatenate([cast(feed["gate"]), cast(feed["up"])], axis=1),
      "down": cast(feed["down"]),
      **{name: layer[name]["scale"] for name in ("attention_norm", "feedforward_norm")},
    }
    if "bias" in attend["q"]:
      made["qkv_bias"] = jnp.concatenate([attend[x]["bias"] for x in "qkv"])
    if "q_norm" in attend:
      made["qk_norm"] = jnp.stack([attend[f"{x}_norm"]["scale"] for x in "qk"])
    return made

  return {**params, **tables, "layers": tuple(map(one, transformer.unstack(params)["layers"]))}


def unfuse(weights: Any, architecture: Architecture) -> transformer.Params:
  """Undoes `fuse`, but for the type: the tree that `transformer.init` makes, each leaf in the type
  that it has in `weights`.
  """
  a = architecture
  cuts = [a.heads, a.heads + a.kv_heads]

  def one(layer):
    parts = jnp.split(layer["qkv"].reshape(len(layer["qkv"]), -1, a.head_size), cuts, axis=1)
    attend = {name: {"kernel": part} for name, part in zip("qkv", parts, strict=True)}
    attend["o"] = {"kernel": layer["o"].reshape(a.heads, a.head_size, -1)}
    if a.qkv_bias:
      for name, bias in zip("qkv", jnp.split(layer["qkv_bias"], cuts), strict=True):
        attend[name]["bias"] = bias
    if a.qk_norm:
      attend |= {
        f"{name}_norm": {"scale": scale} for name, scale in zip("qk", layer["qk_norm"], strict=True)
      }
    gate, up = jnp.split(layer["gate_up"], 2, axis=1)
    feed = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": layer["down"]}}
    norms = {name: {"scale": layer[name]} for name in ("attention_norm", "feedforward_norm")}
    return {"attention": attend, "feedforward": feed, **norms}

  layers = [one(layer) for layer in weights["layers"]]
  return {**weights, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def specs(weights: Any, axes: split.Axes) -> Any:
  """How weights from `fuse`, and their gradients, lie on a mesh: matrices and tables are split over
  `axes.width` along their width and over `axes.heads` along the other dimension, biases over that
  one; the rest is whole.
  """

  def one(path, _):
    name = path[-1].key
    if path[0].key in TABLES or WIDTH.get(name) == 1:
      return PartitionSpec(axes.heads, axes.width)
    if name in WIDTH:
      return PartitionSpec(axes.width, axes.heads)
    return PartitionSpec(axes.heads) if name == "qkv_bias" else PartitionSpec()

  return jax.tree_util.tree_map_with_path(one, weights)


def sinks(weights: Any, tokens_BxT: Int[Array, "B T"]) -> Any:
  """What `attach` takes: `weights` with float32 zeros for matrices and tables, and "rows" [B, T,
  D], for what the tokens take from the embedding. Of the zeros only these are read, and nothing is
  left of adding them once compiled: none are made.
  """
  zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)
  layers = tuple(
    {**layer, **zeros({name: layer[name] for name in MATRICES})} for layer in weights["layers"]
  )
  tables = zeros({name: weights[name] for name in TABLES if name in weights})
  return {
    **weights,
    **tables,
    "layers": layers,
    "rows": jnp.zeros((*tokens_BxT.shape, weights["norm"]["scale"].shape[0]), jnp.float32),
  }


def attach(weights: Any, learned: Any, head_start: Float[Array, "V D"] | None = None) -> Any:
  """`weights` for `forward`, whose gradient is taken in `learned`: that in a matrix comes out at
  its sink, and is never rounded.

  A gradient has the type of what it belongs to, and the matrices are in that of the products: for
  float32 it must belong to something else. "head_sink" is for the loss (`fused.linear_divergence`),
  and so is "head_start", the gradient in the head of the batches before or None;
  what `add_rows` makes of the gradient in "rows" belongs to the embedding.
  """
  beside = lambda layer: {f"{name}_sink": layer[name] for name in MATRICES}
  layers = zip(weights["layers"], learned["layers"], strict=True)
  layers = tuple(
    {**ours, **{n: fixed[n] for n in MATRICES}, **beside(ours)} for fixed, ours in layers
  )
  tables = {name: weights[name] for name in TABLES if name in weights}
  sinks = {"head_sink": transformer.head(learned), "head_start": head_start}
  return {**learned, **tables, **sinks, "layers": layers}


def add_rows(
  gradient: Any,
  tokens_BxT: Int[Array, "B T"],
  rows_BxTxD: Float[Array, "B T D"],
  axes: split.Axes = split.Axes(),
) -> Any:
  """Adds the gradient in the tokens' rows of the embedding to that in the embedding, in place: a
  table for each of several batches would have to be cleared and added up. `axes` as in `forward`.
  """
  table = gradient["embed"]["embedding"]
  table = split.add_rows(table, tokens_BxT, rows_BxTxD, axes)
  return {**gradient, "embed": {"embedding": table}}


def without_head(gradient: Any) -> Any:
  """The tree with 0 in the place of the gradient in the output matrix."""
  name = "head" if "head" in gradient else "embed"
  return {**gradient, name: jax.tree.map(lambda _: jnp.float32(0), gradient[name])}


def head(
  weights: Any, axes: split.Axes = split.Axes()
) -> tuple[Float[Array, "V D"], Float[Array, "V D"] | None]:
  """The output matrix and its sink, None where gradients are not taken; `axes` as in `forward`: of
  the vocabulary each device has its part.
  """
  matrix, sink = transformer.head(weights), weights.get("head_sink")
  if axes.width is None:
    return matrix, sink
  parts = split.Parts(1, axes.width)
  return split.whole(matrix, parts), None if sink is None else split.whole_sink(sink, parts)


def forward(
  weights: Any,
  architecture: Architecture,
  tokens_BxT: Int[Array, "B T"],
  positions_BxT: Int[Array, "B T"],
  segments_BxT: Int[Array, "B T"],
  at_BxR: Int[Array, "B R"],
  *,
  dtype: Any,
  remat: str,
  attn_impl: str,
  prefix: transformer.Prefix | None = None,
  axes: split.Axes = split.Axes(),
) -> Float[Array, "B R D"]:
  """`transformer.apply` on fused weights, at the positions `at_BxR` of each row: behind the last
  layer's attention, no others are computed.

  Args:
    weights: from `fuse`, or from `attach` where gradients are wanted in float32.
    architecture: their shapes.
    tokens_BxT, positions_BxT, segments_BxT: int32, as in `transformer.apply`.
    at_BxR: int32, positions in the row.
    dtype: of the activations; that of the matrices.
    remat, attn_impl, prefix: as in `transformer.apply`.
    axes: inside `jax.shard_map`, over which weights are split (`specs`): with `axes.heads`, weights
      and prefix are those of `Architecture.share`.

  Returns:
    Hidden states behind the last norm, in `dtype`.

  Raises:
    ValueError: another attention implementation, or several texts a row with the attention "flash".
  """
  a = architecture
  x = embed(weights, tokens_BxT, segments_BxT, dtype=dtype, axes=axes)
  how = dict(remat=remat, attn_impl=attn_impl, prefix=prefix, axes=axes)
  block = blocks(a, positions_BxT, segments_BxT, at_BxR, **how)
  y, tickets = None, {}
  for i, layer in enumerate(weights["layers"]):
    if i in tickets:
      sinks = {name: layer[name] for name in layer if name.endswith("_sink")}
      layer = {**layer, **split.redeemed(sinks, tickets.pop(i))}
    x, y = block(
      layer, x, y, None if prefix is None else (prefix.keys[i], prefix.values[i]), i == a.layers - 1
    )
    if axes.width is not None and "rows" in weights and i + 2 < a.layers:
      # While a layer goes backward, the gradients of the one behind it are added up.
      x, tickets[i + 2] = split.ticket(x)
  return last_norm(weights, a, x, y).reshape(*at_BxR.shape, -1)


def embed(
  weights: Any,
  tokens_BxT: Int[Array, "B T"],
  segments_BxT: Int[Array, "B T"],
  *,
  dtype: Any,
  axes: split.Axes = split.Axes(),
) -> Float[Array, "BT D"]:
  """What the first layer reads, in `dtype`; arguments as in `forward`."""
  table, whole = weights["embed"]["embedding"], axes == split.Axes()
  x = embedding.embed(table, tokens_BxT) if whole else split.embed(table, tokens_BxT, axes)
  x = (x + weights["rows"] if "rows" in weights else x).astype(dtype)
  x = jnp.where(segments_BxT[..., None] > 0, x, 0)
  return x.reshape(-1, x.shape[-1])


def last_norm(
  weights: Any, architecture: Architecture, x_MxD: Float[Array, "M D"], y_MxD: Float[Array, "M D"]
) -> Float[Array, "M D"]:
  """The hidden states behind the last norm, from the x and y that the last layer gives."""
  return norm.add_norm_plain(x_MxD, y_MxD, weights["norm"]["scale"], architecture.norm_eps)[1]


def blocks(
  architecture: Architecture,
  positions_BxT: Int[Array, "B T"],
  segments_BxT: Int[Array, "B T"],
  at_BxR: Int[Array, "B R"],
  *,
  remat: str,
  attn_impl: str,
  prefix: transformer.Prefix | None,
  axes: split.Axes = split.Axes(),
) -> Callable[..., tuple[Array, Array | None]]:
  """The layers of `forward` for these rows, one at a time: (its weights, x and y [B T, D], its keys
  and values of the prefix or None, whether it is the last) → the x and y that the next one reads,
  whose sum the hidden states are; y may be None for 0, and the last gives the positions `at_BxR`
  alone. Arguments as in `forward`; of the prefix no keys and values are read.
  """
  a, (B, T) = architecture.share(axes.devices()), positions_BxT.shape
  cos_sin = attention.cos_sin(positions_BxT.reshape(-1), a)
  mask, ids = transformer.mask_of(segments_BxT, prefix), transformer.ids_of(segments_BxT, prefix)
  pick = lambda x: jnp.take_along_axis(x.reshape(B, T, -1), at_BxR[..., None], axis=1).reshape(
    -1, x.shape[-1]
  )

  def block(layer, x, y, known, last):
    def attend(layer, own):
      own = (checkpoint_name(z.reshape(B, T, -1, a.head_size), common.REMAT_SAVED) for z in own)
      y, _ = transformer.attend_rows(tuple(own), known, prefix, mask, ids, attn_impl)
      return y.reshape(B * T, -1)

    run = _operations(a, cos_sin, attend)
    x, y = transformer.block(run, _with_sinks(layer, axes), x, y, pick if last else None)
    # Then a layer's inputs are kept: one is enough.
    return (x + y, None) if remat == "full" else (x, y)

  if remat == "none":
    return jax.jit(block, static_argnums=4)  # Python goes through layers that are alike once
  return jax.checkpoint(block, policy=transformer.REMAT[remat], static_argnums=4)


def _with_sinks(layer: dict[str, Array], axes: split.Axes) -> dict[str, Any]:
  """The layer with (how it is split, matrix, its sink or None) under a matrix's name."""
  parts = lambda name: None if axes == split.Axes() else split.Parts(WIDTH[name], *axes)
  held = {name: (parts(name), layer[name], layer.get(f"{name}_sink")) for name in MATRICES}
  return {**layer, **held}


def _operations(a: Architecture, cos_sin: Array, attend: Callable) -> transformer.Operations:
  """The block's operations with kernels and gradient rules of their own; a matrix is (how it is
  split, matrix, its sink or None).
  """

  def norm_product(x, y, scale, held):
    parts, *matrix = held
    return products.norm_product(parts, a.norm_eps, x, y, scale, *matrix)

  def split_heads(layer, qkv):
    qkv = qkv.reshape(qkv.shape[0], -1, a.head_size)
    return heads.heads(a, qkv, layer.get("qkv_bias"), layer.get("qk_norm"), cos_sin)

  return transformer.Operations(
    norm_product=norm_product,
    heads=split_heads,
    attend=attend,
    product=lambda y, held: products.product(held[0], y, *held[1:]),
    norm_swiglu=norm_product,
    down=lambda gate_up, held: products.swiglu_product(held[0], gate_up, *held[1:]),
  )
