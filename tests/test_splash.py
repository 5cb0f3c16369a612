"""A TPU's attention, interpreted on a CPU, beside the plain form: values, gradients, a step."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import placement
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import attention, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.ops import splash
from oel_jax.policy.sampling import model
from oel_jax.runtime import mesh as mesh_lib

GROUPS = [(16, 8), (12, 2), (14, 2)]  # query and key-value heads of Qwen3 and Qwen2.5
SMALL = Architecture(64, 32, 2, 2, 1, 64, 48)


@pytest.fixture(name="_blocks", autouse=True)
def fixture_blocks(monkeypatch):
  """Rows of these tests have several blocks."""
  monkeypatch.setattr(splash, "BLOCKS", (splash.LANES,))


def _arrays(B, T, heads, kv_heads, dtype=jnp.float32, P=0, H=64):
  shapes = [(B, T, heads, H), *[(B, kv_heads, T, H)] * 2, *[(B, kv_heads, P, H)] * 2]
  rng = np.random.default_rng(heads)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _segments(B, T):
  """Rows of one sample, of two with padding, and so on."""
  segments = np.ones((B, T), np.int32)
  segments[1::2, T // 3 :] = 2
  segments[1::2, T - 40 :] = 0
  return jnp.asarray(segments)


def _with_gradients(run, weight, *arrays):
  def total(*arrays):
    y = run(*arrays)
    return jnp.sum(y * weight), y

  (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
  return y, gradients


@pytest.mark.parametrize("heads, kv_heads", GROUPS)
def test_packed_rows_and_their_gradients(heads, kv_heads):
  B, T = 2, 200  # not whole blocks
  *own, _, _ = _arrays(B, T, heads, kv_heads)
  segments = _segments(B, T)
  weight = np.random.default_rng(1).normal(size=own[0].shape)
  found, wanted = (
    _with_gradients(run, weight, *own)
    for run in (
      functools.partial(splash.attend, segments_BxT=segments, interpret=True),
      lambda q, k, v: attention.attend(q, k, v, attention.segment_mask(segments)),
    )
  )
  # Relative too: of gradients up to 6 some CPUs round the last bits otherwise.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, found, wanted)


def test_prompts_padded_on_the_right_in_bfloat16():
  q, k, v, _, _ = _arrays(1, 130, 2, 1, jnp.bfloat16, H=128)
  found = splash.attend(q, k, v, interpret=True)
  exact = attention.causal(*(x.astype(jnp.float32) for x in (q, k, v)))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02)


def test_texts_before_a_row_of_which_a_token_is_given_one_or_an_empty_one():
  B, T, P, heads, kv_heads = 2, 140, 96, 6, 2
  q, k, v, prefix_k, prefix_v = _arrays(B, T, heads, kv_heads, P=2 * P)
  segments = _segments(B, T)
  prefix = transformer.Prefix(
    jnp.zeros((1, 3, kv_heads, P, 64)),
    jnp.zeros((1, 3, kv_heads, P, 64)),
    jnp.array([P, 20, 0]),
    jnp.array([[0, 1], [1, 2]]),
    jnp.maximum(segments - 1, 0),
  )
  ids, mask = transformer.ids_of(segments, prefix), transformer.mask_of(segments, prefix)
  apart = splash.attend_apart(q, (k, v), (prefix_k, prefix_v), ids, interpret=True)
  found = attention.join(*apart, jnp.bool_(True))
  length = prefix.length[prefix.texts[:, 0]]
  wanted = attention.attend_with_prefix(q, (k, v), (prefix_k, prefix_v), mask, length)
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.fixture(name="interpreted")
def fixture_interpreted(monkeypatch):
  for name in ("attend", "attend_apart"):
    monkeypatch.setattr(splash, name, functools.partial(getattr(splash, name), interpret=True))


def _round(seed=0):
  """Parameters, knowledge texts of which one is empty, and a packed batch."""
  rng = np.random.default_rng(seed)
  draw = lambda count: rng.integers(0, SMALL.vocabulary, count).tolist()
  params = jax.jit(lambda key: transformer.init(SMALL, key))(jax.random.key(seed))
  prompts = [draw(n) for n in (9, 5, 20, 3)]
  batch = batch_lib.assemble(
    [[7, 8, *prompt] for prompt in prompts],
    [0, 1, 0, 1],
    [draw(n) for n in (12, 6, 8, 4)],
    pad_id=0,
    length=48,
    response_length=32,
    texts=2,
  )
  return params, [[7, 8, *draw(30)], []], batch


def _step(attn_impl, mesh=None, remat="dots"):
  """A step's loss and what it made of the parameters."""
  params, knowledge, batch = _round()
  optimizer = optax.sgd(1.0)
  state, shardings, known = step_lib.init_state(params, optimizer), None, None
  if mesh:
    shardings = mesh_lib.state_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    batch = mesh_lib.pad_batch(batch, mesh)
    batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    known = (jax.NamedSharding(mesh, jax.P()),) * 2
  teacher = teacher_lib.prepare(
    jax.tree.map(lambda leaf: 1.1 * leaf, state.params),
    SMALL,
    knowledge,
    dtype=jnp.float32,
    skip=[2, 0],
    attn_impl=attn_impl,
    shardings=known,
  )
  step = step_lib.make_step(
    SMALL, optimizer, attn_impl=attn_impl, remat=remat, chunk=16, shardings=shardings
  )
  state, metrics = step(state, teacher, batch)
  return float(metrics["loss"]), jax.device_get(state.params)


@pytest.mark.slow
def test_a_step_is_the_plain_ones(interpreted):
  (loss, params), (wanted, expected) = _step("splash"), _step("xla")
  assert loss == pytest.approx(wanted, rel=1e-5) and wanted > 0.01
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, expected)


@pytest.mark.slow
def test_a_step_on_a_mesh_is_the_one_devices(interpreted):
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict(dict(data=2, fsdp=2, tensor=2)))
  (loss, params), (wanted, expected) = _step("splash", mesh), _step("xla")
  assert loss == pytest.approx(wanted, rel=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, expected)


def test_rows_and_heads_are_spread_over_a_mesh_where_they_divide():
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict(dict(data=2, fsdp=2, tensor=2)))
  segments = _segments(4, 60)
  for B, kv_heads in ((4, 2), (1, 1)):  # nothing of the second divides
    *own, _, _ = _arrays(B, 60, 2, kv_heads)
    run = jax.jit(functools.partial(splash.attend, mesh=mesh, interpret=True))
    found = run(*own, segments[:B])
    wanted = attention.attend(*own, attention.segment_mask(segments[:B]))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.addressable_shards[0].data.shape[0] == (1 if B > 1 else B)


def test_the_forward_kernel_runs_once_for_a_gradient(interpreted):
  """What the backward pass needs of it is kept."""
  params, _, batch = _round()

  def total(params):
    rows = batch.tokens, batch.positions, batch.segments
    return transformer.apply(params, SMALL, *rows, remat="dots", attn_impl="splash")[0].sum()

  text = str(jax.make_jaxpr(jax.grad(total))(params))
  assert [text.count(f"name=splash_mha_{part}") for part in ("fwd", "dkv", "dq")] == [1, 1, 1]


def test_a_tpu_is_given_it_in_bfloat16_where_the_heads_fit(monkeypatch):
  small = lambda size: Architecture(64, 32, 2, 2, 1, size, 48)
  chosen = lambda size, dtype: model.prefill_attn_impl(small(size), dtype)
  assert not splash.supported(128, jnp.bfloat16)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert chosen(64, jnp.bfloat16) == chosen(128, jnp.bfloat16) == "splash"
  assert chosen(32, jnp.bfloat16) == chosen(80, jnp.bfloat16) == chosen(64, jnp.float32) == "xla"


def test_it_is_refused_where_it_does_not_run():
  config = ml_collections.ConfigDict(dict(attention="splash", pack=True))
  policy = types.SimpleNamespace(architecture=SMALL, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='"splash", which runs on TPUs, .* here are a cpu, bfloat16'):
    placement.attn_impl(config, policy)
