"""The decoder as pure functions of its parameters (Flax Linen; modules hold no arrays).

Shape letters, here and everywhere: B batch, T tokens, S cached time, D width, N query heads, K
key-value heads, H head size, F feed-forward, L layers, V vocabulary, P knowledge-prefix length.

Parameters are one nested dict, each layer's leaves stacked on a leading L, so that training scans
over layers. Decoding takes them apart once, outside its loop (`unstack`): slicing stacked weights
at every token is several times slower.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from oel_jax.policy import attention
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.parameters import abstract, init  # noqa: F401  (named from here, too)

Params = Any

SMALL_VOCABULARY = 4096  # up to it, an embedding's gradient is a matrix product (`embed`)

REMAT_SAVED = "kept"  # the name of what is kept for the backward pass though it is no product


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


@jax.custom_vjp
def embed(
  table_VxD: Float[Array, "V D"], tokens: Int[Array, "*tokens"]
) -> Float[Array, "*tokens D"]:
  """The tokens' rows of the table. The gradient of a small table is a matrix product.

  Adding each token's gradient to its row makes a GPU's threads wait for one another where many
  tokens share few rows: with 52,000 tokens on 576 rows that was 69 of a pre-training step's 89 ms
  on an H100; with the product the whole step takes 19.
  """
  return table_VxD[tokens]


def _embed_forward(table_VxD, tokens):
  return table_VxD[tokens], (tokens, jnp.zeros((table_VxD.shape[0], 0), table_VxD.dtype))


def _embed_backward(saved, gradient):
  tokens, like = saved
  return add_rows(
    jnp.zeros((like.shape[0], gradient.shape[-1]), like.dtype), tokens, gradient
  ), None


def add_rows(
  table_VxD: Float[Array, "V D"], tokens: Int[Array, "*tokens"], rows: Float[Array, "*tokens D"]
) -> Float[Array, "V D"]:
  """Adds a row for each token to the token's row of the table, in the table's type; to a small
  table by a matrix product (`embed`).
  """
  V, D = table_VxD.shape
  if V > SMALL_VOCABULARY:
    return table_VxD.at[tokens].add(rows.astype(table_VxD.dtype))
  ids, rows = tokens.reshape(-1), rows.reshape(-1, D)
  product = jnp.einsum(
    "nv,nd->vd", jax.nn.one_hot(ids, V, dtype=rows.dtype), rows, preferred_element_type=jnp.float32
  )
  return table_VxD + product.astype(table_VxD.dtype)


embed.defvjp(_embed_forward, _embed_backward)


class Projection(nn.Module):
  """Heads [..., heads, size] of a token, in `dtype`; with a bias in float32.

  The bias is added in float32 and the sum not rounded here but behind the rotation: in bfloat16, a
  key with a bias of 350, as Qwen2.5 has them, would be rounded to a multiple of 2 once more.
  """

  heads: int
  size: int
  bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxD):
    D = x_BxTxD.shape[-1]
    draw = lambda key: nn.initializers.lecun_normal()(key, (D, self.heads * self.size)).reshape(
      D, self.heads, self.size
    )
    kernel = self.param("kernel", draw)
    y = jnp.einsum("btd,dnh->btnh", x_BxTxD.astype(self.dtype), kernel.astype(self.dtype))
    if not self.bias:
      return y
    return y + self.param("bias", nn.initializers.zeros_init(), (self.heads, self.size))


class Attention(nn.Module):
  """Grouped-query self-attention. Returns its output and the keys and values attended to."""

  architecture: Architecture
  dtype: Any
  path: str = "xla"

  @nn.compact
  def __call__(self, x_BxTxD, positions_BxT, mask_BxTxS, prefix=None):
    a = self.architecture
    counts = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
    q, k, v = (
      Projection(n, a.head_size, a.qkv_bias, self.dtype, name=name)(x_BxTxD)
      for name, n in counts.items()
    )
    if a.qk_norm:
      q = nn.RMSNorm(a.norm_eps, dtype=self.dtype, name="q_norm")(q)
      k = nn.RMSNorm(a.norm_eps, dtype=self.dtype, name="k_norm")(k)
    q, k = (attention.rotate(x, positions_BxT, a.rope_theta, a.rope_scaling) for x in (q, k))
    q, k, v = (x.astype(self.dtype) for x in (q, k, v))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    if prefix is None:
      y = attention.attend(q, k, v, mask_BxTxS, self.path)
    else:
      known, length_B = of_rows(*prefix, self.path)
      y = attention.attend_with_prefix(q, (k, v), known, mask_BxTxS, length_B, self.path)
    return nn.DenseGeneral(a.width, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="o")(y), (
      k,
      v,
    )


def of_rows(
  keys_GxKxPxH: Float[Array, "G K P H"],
  values_GxKxPxH: Float[Array, "G K P H"],
  length_G: Int[Array, "G"],
  texts_BxM: Int[Array, "B M"],
  path: str,
) -> tuple[tuple[Float[Array, "B K MP H"], Float[Array, "B K MP H"]], Int[Array, "B"]]:
  """One layer's keys and values of each row's M texts, one behind the other and in their own type,
  and the length of the first (int32).

  Raises:
    ValueError: several texts a row on the path "flash".
  """
  # This layer's alone is fetched.
  if jax.typeof(keys_GxKxPxH).memory_space == jax.memory.Space.Host:
    keys_GxKxPxH, values_GxKxPxH = jax.device_put(
      (keys_GxKxPxH, values_GxKxPxH), jax.memory.Space.Device
    )
  G, K, P, H = keys_GxKxPxH.shape
  B, M = texts_BxM.shape
  if path == "flash" and M > 1:
    raise ValueError(
      f'attention path "flash" got rows of {M} knowledge texts: it takes one a row; "cudnn" and '
      '"xla" take several'
    )
  rows = lambda x: x[texts_BxM].swapaxes(1, 2).reshape(B, K, M * P, H)
  return (rows(keys_GxKxPxH), rows(values_GxKxPxH)), length_G[texts_BxM[:, 0]]


class Feedforward(nn.Module):
  """SwiGLU."""

  architecture: Architecture
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxD):
    dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
    gate = dense(self.architecture.feedforward, name="gate")(x_BxTxD)
    up = dense(self.architecture.feedforward, name="up")(x_BxTxD)
    return dense(self.architecture.width, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
  """One pre-norm layer, in the (carry, output) form that `nn.scan` wants."""

  architecture: Architecture
  dtype: Any
  path: str = "xla"

  @nn.compact
  def __call__(self, x_BxTxD, positions_BxT, mask_BxTxS, prefix=None):
    a = self.architecture
    norm = functools.partial(nn.RMSNorm, a.norm_eps, dtype=self.dtype)
    with jax.named_scope("attention"):
      x = norm(name="attention_norm")(x_BxTxD)
      y, kv = Attention(a, self.dtype, self.path, name="attention")(
        x, positions_BxT, mask_BxTxS, prefix
      )
    x_BxTxD = checkpoint_name(x_BxTxD + y, REMAT_SAVED)
    with jax.named_scope("feedforward"):
      y = Feedforward(a, self.dtype, name="feedforward")(norm(name="feedforward_norm")(x_BxTxD))
    return x_BxTxD + y, kv


class Decoder(nn.Module):
  """Embedding, scanned blocks, last norm. The head stays apart (`head`): most rows never need
  logits.
  """

  architecture: Architecture
  dtype: Any = jnp.float32
  remat: str = "none"
  path: str = "xla"

  @nn.compact
  def __call__(self, tokens_BxT, positions_BxT, segments_BxT, keep_cache=False, prefix=None):
    a = self.architecture
    # Cast after the rows are taken: the table's gradient is then summed in float32, and most of the
    # table never cast.
    x = embed(nn.Embed(a.vocabulary, a.width, name="embed").embedding, tokens_BxT).astype(
      self.dtype
    )
    # A masked NaN is still a NaN: 0 x NaN
    x = jnp.where(segments_BxT[..., None] > 0, x, 0)
    if not a.tied_head:
      self.param(
        "head", lambda key: {"kernel": nn.initializers.normal(0.02)(key, (a.vocabulary, a.width))}
      )
    block = (
      Block
      if self.remat == "none"
      else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
    )
    mask, read, once = attention.segment_mask(segments_BxT), None, nn.broadcast
    if prefix is not None:
      mask = jnp.concatenate([prefix.mask(), mask], axis=-1)
      read = prefix.keys, prefix.values, prefix.length, prefix.texts
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=a.layers,
      in_axes=(once, once, once if prefix is None else (0, 0, once, once)),
    )(a, self.dtype, self.path, name="layers")
    x, kv = layers(x, positions_BxT, mask, read)
    return nn.RMSNorm(a.norm_eps, dtype=self.dtype, name="norm")(x), (kv if keep_cache else None)


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
  path: str = "xla",
  prefix: Prefix | None = None,
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
    path: of the attention, "xla", "cudnn" or "flash" (`attention.attend`).
    prefix: texts to attend to as well; positions then count from the text's beginning.
    keep_cache: also return the keys and values, each [L, B, K, T, H].

  Returns:
    Hidden states [B, T, D] in `dtype`, and keys and values (or None).
  """
  return Decoder(architecture, dtype, remat, path).apply(
    {"params": params}, tokens_BxT, positions_BxT, segments_BxT, keep_cache, prefix
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
