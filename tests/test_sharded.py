"""The losses on a mesh against the dense ones, and what the compiled step of a mesh moves and
holds.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import losses, sharded
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import transformer
from oel_jax.runtime import mesh as mesh_lib


def _mesh(*shape):
  return mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(zip(mesh_lib.AXES, shape, strict=True))),
    jax.devices()[: math.prod(shape)],
  )


@pytest.mark.parametrize(
  "shape, vocabulary, axes",
  [
    ((2, 2, 2), 64, ("tensor", "fsdp")),
    ((2, 2, 2), 30, ("tensor",)),
    ((2, 2, 2), 31, ()),
    ((1, 4, 2), 36, ("fsdp",)),
    ((8, 1, 1), 32, ()),
    ((1, 8, 1), 32, ("fsdp",)),
    ((1, 8, 1), 30, ()),
  ],
)
def test_the_vocabulary_is_split_as_far_as_it_can_be_divided(shape, vocabulary, axes):
  assert sharded.vocabulary_axes(_mesh(*shape), vocabulary) == axes


@pytest.mark.parametrize(
  "shape, vocabulary, loss",
  [
    ((8, 1, 1), 32, ("reverse_kl", "full")),
    ((2, 2, 2), 32, ("jsd", "topk")),
    ((1, 8, 1), 32, ("reverse_kl", "topk_tail")),
    ((1, 1, 8), 32, ("forward_kl", "topk")),
    ((4, 2, 1), 32, ("imitation", "")),
    ((2, 2, 2), 30, ("imitation", "")),
    ((2, 2, 2), 30, ("forward_kl", "full")),
    ((2, 2, 2), 31, ("reverse_kl", "topk")),
    ((1, 1, 8), 31, ("jsd", "full")),
    ((1, 1, 1), 31, ("jsd", "topk_tail")),
  ],
)
def test_every_mesh_gives_the_dense_loss_and_its_gradients(shape, vocabulary, loss):
  rng, mesh, (kind, support) = np.random.default_rng(0), _mesh(*shape), loss
  shapes = (8, 5, 16), (vocabulary, 16), (8, 5, 24), (vocabulary, 24)
  hidden, head, target, target_head = (jnp.float32(rng.normal(size=n) / 2) for n in shapes)
  mask = jnp.asarray(rng.random((8, 5)) < 0.6)
  rest, dense = (
    (target, target_head, mask),
    functools.partial(losses.divergence, kind=kind, support=support, k=7),
  )
  fused = functools.partial(
    sharded.linear_divergence, mesh, kind=kind, support=support, k=7, chunk=3
  )
  logits = lambda h, w: (h @ w.T, target @ target_head.T, mask)
  if kind == "imitation":
    rest, dense = (jnp.asarray(rng.integers(0, vocabulary, (8, 5))), mask), losses.imitation
    fused, logits = (
      functools.partial(sharded.linear_imitation, mesh, chunk=3),
      lambda h, w: (h @ w.T, *rest),
    )
  # As a state lies: the head split in both its dimensions.
  place = lambda x, *axes: jax.device_put(
    x, NamedSharding(mesh, mesh_lib._spec(mesh, axes, x.shape))
  )
  rows = lambda x: jax.device_put(x, mesh_lib.batch_sharding(mesh))
  placed = [
    place(x, "tensor", "fsdp")
    if x.ndim == 2 and x.dtype != bool and len(x) == vocabulary
    else rows(x)
    for x in (hidden, head, *rest)
  ]
  mean = lambda total, count, *_: total / count
  found = jax.jit(jax.value_and_grad(lambda h, w: mean(*fused(h, w, *placed[2:])), (0, 1)))(
    *placed[:2]
  )
  expected = jax.jit(jax.value_and_grad(lambda h, w: mean(*dense(*logits(h, w))), (0, 1)))(
    hidden, head
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


V, ROWS, RESPONSE = 8192, 16, 12  # of a vocabulary above `ops.embedding.SMALL_VOCABULARY`


@functools.cache
def _compiled_step(shape, tied, chunk, **how):
  """The program of a step for 16 rows of 12 response tokens, and what is found in it: arrays, and
  the results of its all-gathers.
  """
  architecture = architecture_lib.Architecture(
    V, 16, 2, 4, 2, 8, 24, rope_theta=1e4, tied_head=tied
  )
  mesh, optimizer, abstract = _mesh(*shape), optax.sgd(1.0), transformer.abstract(architecture)
  state = mesh_lib.abstract_init(
    lambda params: step_lib.init_state(params, optimizer), mesh, abstract
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  texts = jax.ShapeDtypeStruct((2, ROWS, 2, 32, 8), jnp.float32)
  texts = mesh_lib.abstract_init(
    lambda: {"teacher": {name: jnp.zeros(texts.shape) for name in ("keys", "values")}}, mesh
  )["teacher"]
  number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  teacher = teacher_lib.Teacher(
    state.params, texts["keys"], texts["values"], number(ROWS), number()
  )
  how_long = dict(length=24, response_length=RESPONSE)
  batch = batch_lib.assemble(
    [[5] * 12] * ROWS, range(ROWS), [[6] * RESPONSE] * ROWS, pad_id=0, pack=False, **how_long
  )
  batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
  step = step_lib.make_step(architecture, optimizer, k=4, chunk=chunk, shardings=shardings, **how)
  compiled = step.lower(state, teacher, batch).compile()
  dimensions = lambda text: [
    [int(n) for n in found.split(",") if n] for found in re.findall(r"\w+\[([\d,]*)\]", text)
  ]
  text = compiled.as_text()
  gathers = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
  return compiled, dimensions(text), [shape for result in gathers for shape in dimensions(result)]


@pytest.mark.parametrize(
  "shape, tied, how",
  [
    ((1, 8, 1), False, {}),
    ((2, 2, 2), True, {"support": "topk"}),
    ((1, 1, 8), False, {"kind": "imitation"}),
  ],
)
def test_no_device_gathers_a_head_or_holds_tokens_by_vocabulary(shape, tied, how):
  _, arrays, gathered = _compiled_step(shape, tied, 1, **how)
  slice_of = V // (shape[1] * shape[2])
  assert not [found for found in gathered if V in found]
  assert any(slice_of in found for found in arrays)
  # A device has the tokens of its place along data, by its slice of the vocabulary.
  assert max(map(math.prod, arrays)) < ROWS // shape[0] * RESPONSE * slice_of


# on the whole program; prompts are as long as responses
def test_no_array_of_a_step_has_tokens_by_vocabulary():
  tokens = ROWS * RESPONSE
  step, arrays, _ = _compiled_step((1, 1, 1), True, 4)
  assert max(map(math.prod, arrays)) < tokens * V / 2
  assert step.memory_analysis().temp_size_in_bytes < tokens * V * 4
  all_at_once, arrays, _ = _compiled_step((1, 1, 1), True, tokens)  # so the two can tell
  assert max(map(math.prod, arrays)) >= tokens * V
  assert all_at_once.memory_analysis().temp_size_in_bytes > tokens * V * 4
