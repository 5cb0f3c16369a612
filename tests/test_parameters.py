"""The table of parameters against Flax's own modules and loops over single numbers; the names in
others' files are tested with those files.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oel_jax.policy import parameters
from oel_jax.policy.architecture import ARCHITECTURES, Architecture, named

BIASED = Architecture(20, 12, 3, 4, 2, 6, 10, qk_norm=False, qkv_bias=True, tied_head=False)
NORMED = dataclasses.replace(BIASED, qk_norm=True, qkv_bias=False, tied_head=True)


class _Projection(nn.Module):
  """A module as the decoder's were when they drew the parameters."""

  heads: int
  size: int
  bias: bool

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.heads * self.size
    self.param("kernel", nn.initializers.lecun_normal(), shape)
    if self.bias:
      self.param("bias", nn.initializers.zeros_init(), (self.heads, self.size))
    return x


class _Attention(nn.Module):
  a: Architecture

  @nn.compact
  def __call__(self, x):
    for name, heads in (("q", self.a.heads), ("k", self.a.kv_heads), ("v", self.a.kv_heads)):
      _Projection(heads, self.a.head_size, self.a.qkv_bias, name=name)(x)
    y = jnp.zeros((1, self.a.heads, self.a.head_size))
    return nn.DenseGeneral(self.a.width, axis=(-2, -1), use_bias=False, name="o")(y)


class _Layer(nn.Module):
  a: Architecture

  @nn.compact
  def __call__(self, x, _):
    x = x + _Attention(self.a, name="attention")(x)
    return nn.Dense(self.a.width, use_bias=False, name="out")(x), None


class _Decoder(nn.Module):
  a: Architecture

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(self.a.vocabulary, self.a.width, name="embed")(tokens)
    shape = self.a.vocabulary, self.a.width
    self.param("head", lambda key: {"kernel": nn.initializers.normal(0.02)(key, shape)})
    layers = nn.scan(
      _Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.a.layers
    )
    return layers(self.a, name="layers")(x, None)


def test_a_seed_gives_the_numbers_that_flax_modules_draw():
  a, tokens = BIASED, jnp.zeros((1,), jnp.int32)
  wanted = jax.jit(lambda key: _Decoder(a).init(key, tokens)["params"])(jax.random.key(5))
  found = jax.jit(lambda key: parameters.init(a, key))(jax.random.key(5))
  # The same draws; XLA may round their scaling in another way.
  same = lambda x, y: np.testing.assert_allclose(x, np.reshape(y, x.shape), rtol=1e-5, atol=1e-7)
  same(found["embed"]["embedding"], wanted["embed"]["embedding"])
  same(found["head"]["kernel"], wanted["head"]["kernel"])
  for name in "qkvo":
    ours, flaxs = (tree["layers"]["attention"][name]["kernel"] for tree in (found, wanted))
    same(ours, flaxs)
  assert not any(found["layers"]["attention"][name]["bias"].any() for name in "qkv")


def test_norms_begin_as_ones():
  params = jax.jit(lambda: parameters.init(NORMED, jax.random.key(0)))()
  layers = params["layers"]
  norms = [params["norm"], layers["attention_norm"], layers["feedforward_norm"]]
  norms += [layers["attention"][f"{x}_norm"] for x in "qk"]
  assert all((norm["scale"] == 1).all() for norm in norms)


def test_the_order_is_that_of_the_trees_leaves():
  for a in map(named, ARCHITECTURES):
    leaves = jax.tree_util.tree_leaves_with_path(parameters.abstract(a))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert list(parameters.of(a)) == paths


@pytest.mark.parametrize("name", ["huggingface", "gguf"])
def test_no_two_have_one_name(name):
  names = [getattr(parameter, name) for parameter in parameters.PARAMETERS]
  assert len(set(names)) == len(names) == len(parameters.BY_PATH)
  assert all(("{}" in one) is p.stacked for one, p in zip(names, parameters.PARAMETERS))


def test_a_matrix_is_stored_with_one_row_an_output():
  a, rng = BIASED, np.random.default_rng(0)
  D, N, H = a.width, a.heads, a.head_size
  q, o = (parameters.BY_PATH[f"layers/attention/{x}/kernel"] for x in "qo")
  theirs = {q: rng.normal(size=(N * H, D)), o: rng.normal(size=(D, N * H))}
  ours = {one: one.from_stored(tensor, a) for one, tensor in theirs.items()}
  for d, n, h in np.ndindex(D, N, H):
    assert ours[q][d, n, h] == theirs[q][n * H + h, d]
    assert ours[o][n, h, d] == theirs[o][d, n * H + h]
  for one, tensor in theirs.items():
    assert one.stored(a) == tensor.shape
    np.testing.assert_array_equal(one.to_stored(ours[one], a), tensor)
  bias = parameters.BY_PATH["layers/attention/k/bias"]
  assert bias.stored(a) == (a.kv_heads * H,) and bias.sizes(a) == (3, a.kv_heads, H)
  head = parameters.BY_PATH["head/kernel"]
  assert head.stored(a) == head.sizes(a) == (a.vocabulary, D)
