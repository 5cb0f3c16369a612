"""The decoder as pure functions of its parameters.

Shape letters, here and everywhere: B batch, T tokens, S cached time, D width, N query heads, K
key-value heads, H head size, F feed-forward, L layers, V vocabulary, P knowledge-prefix length.

Parameters are one nested dict (`policy.parameters`), each layer's leaves stacked on a leading L, so
that training scans over layers. Decoding takes them apart once, outside its loop (`unstack`):
slicing stacked weights at every token is several times slower.

The block is written once (`block`). The scanned run here (CPU, heads that a mesh cannot share out
equally), the unrolled one (GPUs, `policy.unrolled`) and sampling (`policy.sampling.model`) call it,
each with its own layout of a layer's weights and its own operations on them, which come from
`policy.ops`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from oel_jax.policy import attention, parameters
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import heads, norm, split
from oel_jax.policy.ops.common import REMAT_SAVED
from oel_jax.policy.ops.embedding import embed
from oel_jax.policy.parameters import abstract, init  # noqa: F401  (named from here, too)

Params = Any


def _costly(primitive: Any, *avals: Any, **params: Any) -> bool:
  """Whether it is a matrix product, cuDNN's attention, a kernel of ours or named REMAT_SAVED."""
  # A kernel that may run again stays in the backward pass with its inputs, even if nothing there
  # reads what it makes.
  kept = (
    primitive.name == "name" and params["name"] == REMAT_SAVED or primitive.name == "pallas_call"
  )
  product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)
  return kept or product or primitive.name.startswith("dot_product_attention_fwd")


REMAT = {
  "none": None,
  "dots": _costly,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Operations(NamedTuple):
  """What a run of the block does in its own way. `matrix` stands for whatever the run's layers hold
  under the name of a matrix: queries', keys' and values' fused or apart, with a sink or without.

  Attributes:
    norm_product: (x, y or None, scale, matrix) → x + y, and its RMSNorm times the matrix.
    heads: (layer, those heads) → queries, keys and values: `ops.heads`; or the heads as they are,
      if `attend` does that, too.
    attend: (layer, what `heads` gives) → attention's output, all heads of a token side by side or
      not, as `product` takes them.
    product: (x, matrix) → x times the matrix; or parts of it, if `norm_product` takes parts.
    norm_swiglu: (x, y, scale, matrix) → x + y, and what `down` reads: SwiGLU of the norm's product
      with gate and up, or that product itself.
    down: (what `norm_swiglu` gives, matrix) → the feed-forward's output, as `product`.

  SwiGLU stands in one of the last two: the product of a few tokens has it in its kernel; in
  training it is made again for the backward pass of the product behind it, not kept.
  """

  norm_product: Callable[..., tuple[Any, Any]]
  heads: Callable[..., Any]
  attend: Callable[..., Any]
  product: Callable[..., Any]
  norm_swiglu: Callable[..., tuple[Any, Any]]
  down: Callable[..., Any]


def block(
  run: Operations,
  layer: Any,
  x: Float[Array, "*M D"],
  y: Float[Array, "..."] | None,
  pick: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "*M D"], Float[Array, "..."]]:
  """One pre-norm layer, from x and y, whose sum it reads, to the two that the next one reads: they
  are added where the norm is made.

  Args:
    run: the operations.
    layer: its weights, by the names "attention_norm", "qkv", "o", "feedforward_norm", "gate_up" and
      "down"; and what `run.heads` reads.
    x, y: hidden states; y is None for 0.
    pick: takes the tokens that go on behind the attention; None: all do.
  """
  with jax.named_scope("attention"):
    x, qkv = run.norm_product(x, y, layer["attention_norm"], layer["qkv"])
    y = run.attend(layer, run.heads(layer, qkv))
    x, y = (x, y) if pick is None else (pick(x), pick(y))
    y = run.product(y, layer["o"])
  with jax.named_scope("feedforward"):
    x, inner = run.norm_swiglu(x, y, layer["feedforward_norm"], layer["gate_up"])
    y = run.down(inner, layer["down"])
  return x, y


class Prefix(NamedTuple):
  """Keys and values of G texts, computed once, that tokens attend to besides their own row.

  Attributes:
    keys, values: [L, G, K, P, H], on the devices or in their host's memory.
    length: [G] int32, how much of P each text fills.
    texts: [B, M] int32, the texts that a row may attend to.
    slots: [B, T] int32, which of those M a token does.
  """

  keys: Array
  values: Array
  length: Array
  texts: Array
  slots: Array

  def mask(self) -> Bool[Array, "B T MP"]:
    """Which of a row's M texts, one behind the other, each token attends to."""
    M, P = self.texts.shape[1], self.keys.shape[3]
    chosen_BxTxM = self.slots[..., None] == jnp.arange(M)
    filled_BxMxP = jnp.arange(P) < self.length[self.texts][..., None]
    return (chosen_BxTxM[..., None] & filled_BxMxP[:, None]).reshape(*self.slots.shape, M * P)

  def ids(self) -> tuple[Int[Array, "B T"], Int[Array, "B MP"]]:
    """The same as a number, from 1, for each token and for each place of the texts, 0 where none is
    filled: a token attends to the places that have its own.
    """
    M, P = self.texts.shape[1], self.keys.shape[3]
    filled_BxMxP = jnp.arange(P) < self.length[self.texts][..., None]
    places_BxMxP = jnp.where(filled_BxMxP, 1 + jnp.arange(M, dtype=jnp.int32)[:, None], 0)
    return self.slots + 1, places_BxMxP.reshape(-1, M * P)


def of_rows(
  keys_GxKxPxH: Float[Array, "G K P H"],
  values_GxKxPxH: Float[Array, "G K P H"],
  length_G: Int[Array, "G"],
  texts_BxM: Int[Array, "B M"],
  attn_impl: str,
) -> tuple[tuple[Float[Array, "B K MP H"], Float[Array, "B K MP H"]], Int[Array, "B"]]:
  """One layer's keys and values of each row's M texts, one behind the other and in their own type,
  and the length of the first (int32).

  Raises:
    ValueError: several texts a row with the attention "flash".
  """
  # This layer's alone is fetched.
  if jax.typeof(keys_GxKxPxH).memory_space == jax.memory.Space.Host:
    keys_GxKxPxH, values_GxKxPxH = jax.device_put(
      (keys_GxKxPxH, values_GxKxPxH), jax.memory.Space.Device
    )
  G, K, P, H = keys_GxKxPxH.shape
  B, M = texts_BxM.shape
  if attn_impl == "flash" and M > 1:
    raise ValueError(
      f'attention implementation "flash" got rows of {M} knowledge texts: it takes one a row; '
      '"cudnn" and "xla" take several'
    )
  rows = lambda x: x[texts_BxM].swapaxes(1, 2).reshape(B, K, M * P, H)
  return (rows(keys_GxKxPxH), rows(values_GxKxPxH)), length_G[texts_BxM[:, 0]]


def attend_rows(
  own: tuple[Array, Array, Array],
  known: tuple[Array, Array] | None,
  prefix: Prefix | None,
  mask_BxTxS: Bool[Array, "B T S"],
  ids: tuple[Array, ...],
  attn_impl: str,
  mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T N H"], tuple[Array, Array]]:
  """One layer's attention of whole rows: to their own tokens and, if there is one, to the prefix.

  Args:
    own: queries [B, T, N, H], keys and values [B, T, K, H].
    known: this layer's keys and values of the prefix, [G, K, P, H].
    prefix: says which of them a row attends to.
    mask_BxTxS: for both, the prefix first.
    ids: what the mask says, as `ids_of` says it.
    attn_impl: the attention implementation.
    mesh: where the rows lie; None on one device.

  Returns:
    The output, and the rows' own keys and values, [B, K, T, H].
  """
  q, k, v = own
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  if prefix is None:
    return attention.attend(q, k, v, mask_BxTxS, attn_impl, *ids, mesh), (k, v)
  texts, length_B = of_rows(*known, prefix.length, prefix.texts, attn_impl)
  y = attention.attend_with_prefix(q, (k, v), texts, mask_BxTxS, length_B, attn_impl, ids, mesh)
  return y, (k, v)


def mask_of(segments_BxT: Int[Array, "B T"], prefix: Prefix | None) -> Bool[Array, "B T S"]:
  """Which tokens of its row each token sees, behind those of the prefix."""
  own = attention.segment_mask(segments_BxT)
  return own if prefix is None else jnp.concatenate([prefix.mask(), own], axis=-1)


def ids_of(segments_BxT: Int[Array, "B T"], prefix: Prefix | None) -> tuple[Array, ...]:
  """The same without an array of tokens by tokens, for `ops.splash`: the segments and, with a
  prefix, its `Prefix.ids`.
  """
  return (segments_BxT,) if prefix is None else (segments_BxT, *prefix.ids())


def head(params: Params) -> Float[Array, "V D"]:
  """The output matrix: the embedding where the two are tied."""
  return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"]


def apply(
  params: Params,
  architecture: Architecture,
  tokens_BxT: Int[Array, "B T"],
  positions_BxT: Int[Array, "B T"],
  segments_BxT: Int[Array, "B T"],
  *,
  dtype: Any = jnp.float32,
  remat: str = "none",
  keep_cache: bool = False,
  attn_impl: str = "xla",
  prefix: Prefix | None = None,
  mesh: Mesh | None = None,
  axis: str | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
  """Runs the decoder up to its last norm.

  Args:
    params: as `init` makes them.
    tokens_BxT: int32.
    positions_BxT: int32, position of each token in its own sequence.
    segments_BxT: int32, tokens attend within their segment; 0 is padding.
    dtype: of the activations; parameters are cast to it where they are used.
    remat: what the backward pass recomputes: "none" keeps all, "dots" keeps products and attention,
      "full" keeps layer inputs only.
    attn_impl: the attention implementation, "xla", "cudnn", "flash" or "splash"
      (`attention.attend`).
    prefix: texts to attend to as well; positions then count from the text's beginning.
    keep_cache: also return the keys and values, each [L, B, K, T, H].
    mesh: where the rows lie, which "splash" must know; None on one device.
    axis: inside `jax.shard_map`, the axis over which the parameters are split where their table
      says "fsdp"; None: they are whole. Not differentiable then.

  Returns:
    Hidden states [B, T, D] in `dtype`, and keys and values (or None).
  """
  a, dtype = architecture, jnp.dtype(dtype)
  # Cast after the rows are taken: the table's gradient is then summed in float32, and most of the
  # table never cast.
  table = params["embed"]["embedding"]
  axes = split.Axes(axis)
  x = embed(table, tokens_BxT) if axis is None else split.embed(table, tokens_BxT, axes)
  x = x.astype(dtype)
  # A masked NaN is still a NaN: 0 x NaN
  x = jnp.where(segments_BxT[..., None] > 0, x, 0)
  mask, ids = mask_of(segments_BxT, prefix), ids_of(segments_BxT, prefix)
  cos_sin = attention.cos_sin(positions_BxT, a)

  def layer(x, given):
    params, known = given
    params = params if axis is None else _gathered(params, axis)
    kept = []

    def attend(layer, own):
      y, kv = attend_rows(own, known, prefix, mask, ids, attn_impl, mesh)
      kept.append(kv)
      return y

    x, y = block(_scanned(a, dtype, cos_sin, attend), _apart(params), x, None)
    return x + y, kept[0] if keep_cache else None

  if remat != "none":
    layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
  known = None if prefix is None else (prefix.keys, prefix.values)
  x, kv = jax.lax.scan(layer, x, (params["layers"], known), length=a.layers)
  return norm.rms(x, params["norm"]["scale"], a.norm_eps), kv


def _gathered(layer: Params, axis: str) -> Params:
  """A layer of the tree, split over `axis` where the table of parameters says "fsdp", whole."""

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = parameters.BY_PATH[f"layers/{name}"].axes[1:]
    return split.whole(leaf, split.Parts(axes.index("fsdp"), axis)) if "fsdp" in axes else leaf

  return jax.tree_util.tree_map_with_path(one, layer)


def _apart(layer: Params) -> dict[str, Any]:
  """A layer of the tree, by the names that `block` reads. What reads the same input stays apart: on
  a mesh, joining queries and keys along their split axis would move them.
  """
  attend, feed = layer["attention"], layer["feedforward"]
  projections = [attend[name] for name in "qkv"]
  return {
    "attention_norm": layer["attention_norm"]["scale"],
    "qkv": tuple(one["kernel"] for one in projections),
    "qkv_bias": tuple(one["bias"] for one in projections) if "bias" in attend["q"] else None,
    "qk_norm": tuple(attend[f"{x}_norm"]["scale"] for x in "qk") if "q_norm" in attend else None,
    "o": attend["o"]["kernel"],
    "feedforward_norm": layer["feedforward_norm"]["scale"],
    "gate_up": (feed["gate"]["kernel"], feed["up"]["kernel"]),
    "down": feed["down"]["kernel"],
  }


def _scanned(a: Architecture, dtype: Any, cos_sin: Array, attend: Callable) -> Operations:
  """The plain operations: gradients are left to JAX, and cutting over a mesh to XLA, which cannot
  cut a kernel.
  """

  def norm_product(x, y, scale, kernels):
    x, normed = norm.add_norm_plain(x, y, scale, a.norm_eps)
    x = x if y is None else checkpoint_name(x, REMAT_SAVED)
    return x, tuple(jnp.einsum("btd,d...->bt...", normed, one.astype(dtype)) for one in kernels)

  def norm_swiglu(x, y, scale, kernels):
    x, (gate, up) = norm_product(x, y, scale, kernels)
    return x, jax.nn.silu(gate) * up

  return Operations(
    norm_product=norm_product,
    heads=lambda layer, qkv: heads.plain(a, qkv, layer["qkv_bias"], layer["qk_norm"], cos_sin),
    attend=attend,
    product=lambda y, kernel: jnp.einsum("btnh,nhd->btd", y, kernel.astype(dtype)),
    norm_swiglu=norm_swiglu,
    down=lambda inner, kernel: inner @ kernel.astype(dtype),
  )


def cast(params: Params, dtype: Any, *, tables: bool = False) -> Params:
  """The same parameters with the layers' matrices in `dtype`, as the layers use them, and with
  `tables` embedding and head, too.

  Scales of norms and biases stay what they are: they are used in float32.
  """

  def one(path, leaf):
    table = path[0].key in ("embed", "head")
    matrix = path[0].key == "layers" and path[-1].key == "kernel"
    return leaf.astype(dtype) if matrix or table and tables else leaf

  return jax.tree_util.tree_map_with_path(one, params)


def unstack(params: Params) -> Params:
  """Takes the stacked layers apart into a tuple of L dicts."""
  layers = params["layers"]
  length = jax.tree.leaves(layers)[0].shape[0]
  return {
    **params,
    "layers": tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(length)),
  }


def logits(hidden: Float[Array, "... D"], head_VxD: Float[Array, "V D"]) -> Float[Array, "... V"]:
  """Float32 logits, whatever the type of hidden states and head."""
  return jnp.einsum(
    "...d,vd->...v", hidden, head_VxD.astype(hidden.dtype), preferred_element_type=jnp.float32
  )
