"""The decoder as one GPU runs it fastest in training: no loop over the layers, and the matrices
that read the same input joined.

A loop over stacked layers copies what each of them keeps for the backward pass into stacks, and the
weights out of them; apart, all of that stays where it was made. It compiles longer.
`transformer.apply` is the reference, and what runs on a mesh.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from oel_jax.policy import attention, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import kernels

MATRICES = ("qkv", "o", "gate_up", "down")
TABLES = ("embed", "head")


def join(params: transformer.Params, dtype: Any) -> Any:
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
  width = params["norm"]["scale"].shape[0]
  tables = {
    name: jax.tree.map(lambda leaf: leaf.astype(dtype), params[name])
    for name in TABLES
    if name in params
  }

  def one(layer):
    attend, feed = layer["attention"], layer["feedforward"]
    cast = lambda part: part["kernel"].astype(dtype)
    made = {
      "qkv": jnp.concatenate([cast(attend[x]).reshape(width, -1) for x in "qkv"], axis=1),
      "o": cast(attend["o"]).reshape(-1, width),
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


def split(weights: Any, architecture: Architecture) -> transformer.Params:
  """Undoes `join`, but for the type: the tree that `transformer.init` makes, each leaf in the type
  that it has in `weights`.
  """
  a = architecture
  cuts = [a.heads, a.heads + a.kv_heads]

  def one(layer):
    parts = jnp.split(layer["qkv"].reshape(a.width, -1, a.head_size), cuts, axis=1)
    attend = {name: {"kernel": part} for name, part in zip("qkv", parts, strict=True)}
    attend["o"] = {"kernel": layer["o"].reshape(a.heads, a.head_size, a.width)}
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


def attach(weights: Any, learned: Any) -> Any:
  """`weights` for `forward`, whose gradient is taken in `learned`: that in a matrix comes out at
  its sink, and is never rounded.

  A gradient has the type of what it belongs to, and the matrices are in that of the products: for
  float32 it must belong to something else. "head_sink" is for the loss (`fused.linear_divergence`);
  what `add_rows` makes of the gradient in "rows" belongs to the embedding.
  """
  beside = lambda layer: {f"{name}_sink": layer[name] for name in MATRICES}
  layers = zip(weights["layers"], learned["layers"], strict=True)
  layers = tuple(
    {**ours, **{n: fixed[n] for n in MATRICES}, **beside(ours)} for fixed, ours in layers
  )
  tables = {name: weights[name] for name in TABLES if name in weights}
  return {**learned, **tables, "head_sink": transformer.head(learned), "layers": layers}


def add_rows(
  gradient: Any, tokens_BxT: Int[Array, "B T"], rows_BxTxD: Float[Array, "B T D"]
) -> Any:
  """Adds the gradient in the tokens' rows of the embedding to that in the embedding, in place: a
  table for each of several batches would have to be cleared and added up.
  """
  return {
    **gradient,
    "embed": {
      "embedding": transformer.add_rows(gradient["embed"]["embedding"], tokens_BxT, rows_BxTxD)
    },
  }


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
  path: str,
  prefix: transformer.Prefix | None = None,
) -> Float[Array, "B R D"]:
  """`transformer.apply` on joined weights, at the positions `at_BxR` of each row: behind the last
  layer's attention, no others are computed.

  Args:
    weights: from `join`, or from `attach` where gradients are wanted in float32.
    architecture: their shapes.
    tokens_BxT, positions_BxT, segments_BxT: int32, as in `transformer.apply`.
    at_BxR: int32, positions in the row.
    dtype: of the activations; that of the matrices.
    remat, path, prefix: as in `transformer.apply`.

  Returns:
    Hidden states behind the last norm, in `dtype`.

  Raises:
    ValueError: another path, or several texts a row on the path "flash".
  """
  a, (B, T) = architecture, tokens_BxT.shape
  x = transformer.embed(weights["embed"]["embedding"], tokens_BxT)
  x = (x + weights["rows"] if "rows" in weights else x).astype(dtype)
  x = jnp.where(segments_BxT[..., None] > 0, x, 0)
  radians = attention.angles(positions_BxT.reshape(-1), a.head_size, a.rope_theta, a.rope_scaling)
  cos_sin = jnp.concatenate([jnp.cos(radians), jnp.sin(radians)], axis=-1)
  mask = attention.segment_mask(segments_BxT)
  mask = mask if prefix is None else jnp.concatenate([prefix.mask(), mask], axis=-1)
  rows = lambda x: jnp.take_along_axis(x.reshape(B, T, -1), at_BxR[..., None], axis=1).reshape(
    -1, x.shape[-1]
  )

  def block(layer, x, y, known, last):
    """From x and y, whose sum the layer reads, to the two that the next one reads: they are added
    where the norm is made.
    """
    matrix = lambda name: (layer[name], layer.get(f"{name}_sink"))
    with jax.named_scope("attention"):
      x, qkv = _norm_product(a.norm_eps, x, y, layer["attention_norm"], *matrix("qkv"))
      qkv = qkv.reshape(B * T, -1, a.head_size)
      made = _heads(
        a.kv_heads, a.norm_eps, qkv, layer.get("qkv_bias"), layer.get("qk_norm"), cos_sin
      )
      q, k, v = (
        checkpoint_name(z.reshape(B, T, -1, a.head_size), transformer.REMAT_SAVED) for z in made
      )
      own = k.swapaxes(1, 2), v.swapaxes(1, 2)
      if known is None:
        y = attention.attend(q, *own, mask, path)
      else:
        texts, length = transformer.of_rows(*known, prefix.length, prefix.texts, path)
        y = attention.attend_with_prefix(q, own, texts, mask, length, path)
      y = y.reshape(B * T, -1)
      x, y = (rows(x), rows(y)) if last else (x, y)
      y = _product(y, *matrix("o"))
    with jax.named_scope("feedforward"):
      x, gate_up = _norm_product(a.norm_eps, x, y, layer["feedforward_norm"], *matrix("gate_up"))
      y = _swiglu_product(gate_up, *matrix("down"))
      # Then a layer's inputs are kept: one is enough.
      return (x + y, None) if remat == "full" else (x, y)

  if remat != "none":
    block = jax.checkpoint(block, policy=transformer.REMAT[remat], static_argnums=4)
  x, y = x.reshape(B * T, -1), None
  for i, layer in enumerate(weights["layers"]):
    x, y = block(
      layer, x, y, None if prefix is None else (prefix.keys[i], prefix.values[i]), i == a.layers - 1
    )
  return _norm(x if y is None else x + y, weights["norm"]["scale"], a.norm_eps).reshape(
    *at_BxR.shape, -1
  )


def add_norm(
  x_MxD: Float[Array, "M D"],
  y: Float[Array, "*P M D"] | None,
  scale_D: Float[Array, "D"],
  eps: float,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
  """x + y (None is 0) and its RMSNorm, as `kernels.add_norm` makes them; y may be in parts where
  kernels run.
  """
  if y is not None and _kernels_fit(x_MxD):
    return tuple(kernels.add_norm(x_MxD, y, scale_D, eps=eps))
  x = x_MxD if y is None else x_MxD + y
  return x, _norm(x, scale_D, eps)


def _norm(x_MxD, scale_D, eps):
  x = x_MxD.astype(jnp.float32)
  return (x * (jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale_D)).astype(
    x_MxD.dtype
  )


def _matrix_gradients(x_MxD, gradient_MxF, matrix, sink) -> tuple:
  """xᵀ gradient: in the matrix's type where it belongs to the matrix itself, in float32 where to
  its sink.
  """
  if sink is None:
    return jnp.einsum("md,mf->df", x_MxD, gradient_MxF).astype(matrix.dtype), None
  return None, jnp.einsum("md,mf->df", x_MxD, gradient_MxF, preferred_element_type=jnp.float32)


def _kernels_fit(x, head_size: int = 2) -> bool:
  """Whether kernels run: they are for NVIDIA GPUs, bfloat16, and heads whose halves are powers of
  two.
  """
  return (
    jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16 and head_size & (head_size - 1) == 0
  )


# A rule's forward pass may not call the function that the rule is for: `jax.checkpoint` would see
# that as one opaque operation, and make the products in it again instead of keeping them.


def _product_forward(x_MxD, matrix_DxF, sink):
  return x_MxD @ matrix_DxF, (x_MxD, matrix_DxF, sink)


def _product_backward(saved, gradient):
  x, matrix, sink = saved
  return gradient @ matrix.T, *_matrix_gradients(x, gradient, matrix, sink)


def _norm_product_forward(eps, x_MxD, y_MxD, scale_D, matrix_DxF, sink):
  """x + y, and its norm times the matrix: so the gradient that comes past the norm is added where
  the norm's own is made.
  """
  x, normed = add_norm(x_MxD, y_MxD, scale_D, eps)
  x = checkpoint_name(x, transformer.REMAT_SAVED)
  added = None if y_MxD is None else ()
  return (x, normed @ matrix_DxF), (x, added, scale_D, matrix_DxF, sink)


def _norm_product_backward(eps, saved, gradients):
  x, added, scale, matrix, sink = saved
  passed, gradient = gradients
  inner = gradient @ matrix.T
  if _kernels_fit(x):
    d_x, y, d_scale = kernels.norm_backward(x, scale.astype(jnp.float32), inner, passed, eps=eps)
  else:
    y, back = jax.vjp(functools.partial(_norm, eps=eps), x, scale)
    d_x, d_scale = back(inner)
    d_x += passed
  return (
    d_x,
    None if added is None else d_x,
    d_scale.astype(scale.dtype),
    *_matrix_gradients(y, gradient, matrix, sink),
  )


def _heads_forward(kv_heads, eps, qkv_MxAxH, bias_AxH, scale_2xH, turns_MxH):
  """`kernels.heads`."""
  given = qkv_MxAxH, bias_AxH, scale_2xH, turns_MxH
  if _kernels_fit(qkv_MxAxH, qkv_MxAxH.shape[2]):
    return tuple(kernels.heads(*given, kv_heads=kv_heads, eps=eps)), given
  return _plain_heads(kv_heads, eps, *given), given


def _plain_heads(kv_heads, eps, qkv, bias, scale, cos_sin):
  N, dtype = qkv.shape[1] - 2 * kv_heads, qkv.dtype
  q, k, v = jnp.split(qkv if bias is None else qkv + bias, [N, N + kv_heads], axis=1)
  if scale is not None:
    q, k = (_norm(x, by, eps).astype(dtype) for x, by in zip((q, k), scale, strict=True))
  q, k = (attention.rotate_by(x, cos_sin[:, None]) for x in (q, k))
  return tuple(x.astype(dtype) for x in (q, k, v))


def _heads_backward(kv_heads, eps, saved, gradients):
  qkv, bias, scale, cos_sin = saved
  if _kernels_fit(qkv, qkv.shape[2]):
    d_qkv, d_scale = kernels.heads_backward(*saved, gradients, eps=eps)
    d_bias = None if bias is None else d_qkv.astype(jnp.float32).sum(0).astype(bias.dtype)
    return d_qkv, d_bias, d_scale, None
  plain = lambda qkv, bias, scale: _plain_heads(kv_heads, eps, qkv, bias, scale, cos_sin)
  return *jax.vjp(plain, qkv, bias, scale)[1](gradients), None


def _swiglu_product_forward(gate_up_MxF2, matrix_FxD, sink):
  """silu(gate) up, times the matrix."""
  return _swiglu(gate_up_MxF2) @ matrix_FxD, (gate_up_MxF2, matrix_FxD, sink)


def _swiglu(gate_up_MxF2):
  gate, up = jnp.split(gate_up_MxF2, 2, axis=-1)
  return jax.nn.silu(gate) * up


def _swiglu_product_backward(saved, gradient):
  gate_up, matrix, sink = saved
  inner = gradient @ matrix.T
  if _kernels_fit(gate_up):
    d_gate_up, y = kernels.swiglu_backward(gate_up, inner)
  else:
    y, back = jax.vjp(_swiglu, gate_up)
    (d_gate_up,) = back(inner)
  return d_gate_up, *_matrix_gradients(y, gradient, matrix, sink)


def _with_rule(forward, backward, static=()):
  """What `forward` returns first, differentiated by `backward`, which gets what it returns
  besides.
  """
  function = jax.custom_vjp(lambda *args: forward(*args)[0], nondiff_argnums=static)
  function.defvjp(forward, backward)
  return function


_product = _with_rule(_product_forward, _product_backward)
_norm_product = _with_rule(_norm_product_forward, _norm_product_backward, (0,))
_heads = _with_rule(_heads_forward, _heads_backward, (0, 1))
_swiglu_product = _with_rule(_swiglu_product_forward, _swiglu_product_backward)
