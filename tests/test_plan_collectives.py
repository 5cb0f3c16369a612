"""What devices send one another, read from compiled programs: by hand, and by the shapes of what
they gather and add up.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_plan import EMBEDDING, MATRICES, NORMS, planner

from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import plan, plan_collectives

MESH = dict(data=2, fsdp=4, tensor=1)
# As XLA's compilers for GPUs and TPUs write it: what is started apart from its end, computations
# that an operation calls, groups as lists and as a reshaped and transposed range.
TEXT = """
HloModule step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,64]{1,0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%scattered (given: f32[8,64]) -> f32[8,16] {
  %given = f32[8,64]{1,0} parameter(0)
  ROOT %parts = f32[8,16]{1,0} reduce-scatter(%given), replica_groups=[2,4]<=[8], to_apply=%sum
}

%all-reduce-scatter.1 (input: f32[8,64]) -> f32[2,64] {
  %input = f32[8,64]{1,0} parameter(0)
  %summed = f32[8,64]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %part = f32[2,64]{1,0} slice(%summed), slice={[0:2], [0:64]}
}

%body (carried: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %carried = (s32[], f32[8,64]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%carried), index=0
  %whole = f32[8,64]{1,0} get-tuple-element(%carried), index=1
  %start = ((f32[8,64]{1,0}), f32[8,16]{1,0}) async-start(%whole), calls=%scattered
  %part = f32[8,16]{1,0} async-done(%start), calls=%scattered
  %begun = (f32[8,16], f32[8,64]{1,0:T(8,128)}) all-gather-start(%part), replica_groups=[2,4]<=[8]
  %gathered = f32[8,64]{1,0:T(8,128)} all-gather-done(%begun)
  ROOT %next = (s32[], /*index=1*/f32[8,64]{1,0}) tuple(%number, %gathered)
}

%condition (carried: (s32[], f32[8,64])) -> pred[] {
  %carried = (s32[], f32[8,64]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%carried), index=0
  ROOT %less = pred[] compare(%number, %number), direction=LT
}

ENTRY %main (x: f32[8,64], y: bf16[10]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %y = bf16[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,64]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,64]{1,0}) while(%begin), condition=%condition, body=%bodyKNOWN
  %both = (f32[8,64], bf16[10]) all-reduce(%x, %y), replica_groups=[4,2]<=[2,4]T(1,0)
  %few = bf16[10] all-reduce(%y), replica_groups=mesh['a'=4,'c'=2], device_ids=([2,4]T(1,0)) {'a'}
  %all = bf16[10]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %everywhere = bf16[10]{0} all-reduce(%y), replica_groups={}, to_apply=%sum
  %alone = bf16[10]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  %exchanged = f32[8,64]{1,0} all-to-all(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %fused = f32[2,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %moved = f32[8,64]{1,0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}
  ROOT %result = f32[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # fmt: skip
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize("known, loops", [(KNOWN, ()), ("", (5,))])
def test_a_text_by_hand(known, loops):
  found = plan_collectives.by_axis(plan_collectives.read(TEXT.replace("KNOWN", known), MESH, loops))
  whole = 8 * 64 * 4
  assert found == {
    "fsdp": {
      "reduce-scatter": (5 + 1) * whole * 3 / 4,
      "all-gather": 5 * whole / 4 * 3,
      "all-reduce": 2 * 20 * 3 / 4,
      "all-to-all": whole * 3 / 4,
    },
    "data": {"all-reduce": 2 * (whole + 20) * 1 / 2, "collective-permute": whole},
    "data x fsdp": {"all-reduce": 2 * 2 * 20 * 7 / 8},
  }


def test_what_cannot_be_counted_is_told():
  with pytest.raises(ValueError, match="how often the loop loop is run is not known: it sends"):
    plan_collectives.read(TEXT.replace("KNOWN", ""), MESH)
  with pytest.raises(ValueError, match="both: who takes part cannot be read"):
    plan_collectives.read(TEXT.replace("KNOWN", KNOWN).replace("[4,2]<=[2,4]T", "@other"), MESH)
  with pytest.raises(ValueError, match="no compiled program"):
    plan_collectives.read("module @jit_step {}", MESH)


def make_mesh(**sizes):
  return mesh_lib.make_mesh(ml_collections.ConfigDict(sizes), jax.devices()[:8])


def test_a_program_of_ours_by_hand():
  """Compiled for eight devices of this machine."""
  mesh = make_mesh(**MESH)

  def local(x):  # [4, 8] a device
    def turn(_, x):
      whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
      x = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", scatter_dimension=0, tiled=True)
      return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    x = jax.lax.fori_loop(0, 3, turn, x)
    x = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
    return jax.lax.psum(x, "data"), jax.lax.psum(x[0, 0], ("data", "fsdp"))

  rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
  run = jax.shard_map(
    local, mesh=mesh, in_specs=rows, out_specs=(PartitionSpec("fsdp"), whole), check_vma=False
  )
  given = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, rows))
  found = plan_collectives.read(jax.jit(run).lower(given).compile().as_text(), dict(mesh.shape))
  part = 4 * 8 * 4
  assert plan_collectives.by_axis(found) == {
    "fsdp": {
      "all-gather": 3 * part * 3,
      "reduce-scatter": 3 * 4 * part * 3 / 4,
      "all-to-all": part * 3 / 4,
    },
    "data": {"collective-permute": 3 * part, "all-reduce": 2 * part / 2},
    "data x fsdp": {"all-reduce": 2 * 4 * 7 / 8},
  }


@functools.cache
def step_of(data, fsdp):
  """What the fast step sends, of four micro-batches of a row a device, and their number."""
  made = planner(dict(data=data, fsdp=fsdp, tensor=1), 8, unroll="yes", micro_tokens=1, pack=False)
  work = vars(made.work) | dict(samples=32)
  made.work = type(made.work)(**work)
  batch, micro_tokens = made.batch(32)
  return made.step().sent, made.micro_batches(batch, micro_tokens)


def test_the_fast_step_gathers_its_matrices_and_adds_up_their_gradients():
  sent, count = step_of(2, 4)
  assert count == 4
  fsdp = sent["fsdp"]
  # Teacher and student gather each layer's matrices and the head in each micro-batch; gradients are
  # added up as they are split. The compiler for CPUs drops the barrier that has other devices
  # gather the matrices again for the backward pass.
  gathered = 4 * count * (2 * MATRICES + 2 * EMBEDDING) / 4 * 3
  added = 4 * count * (MATRICES + EMBEDDING) * 3 / 4
  # And the ids of tokens.
  assert gathered <= fsdp["all-gather"] < 1.02 * gathered
  assert fsdp["reduce-scatter"] == added
  # Over data, once: a device's part of the gradient.
  assert sent["data"] == {"all-reduce": 2 * 4 * (MATRICES + EMBEDDING) / 4 / 2}
  # Norms lie whole on each device.
  assert 2 * 4 * NORMS * 7 / 8 <= sent["data x fsdp"]["all-reduce"] < 2 * 4 * (NORMS + 100) * 7 / 8


def test_a_program_that_cannot_be_printed_is_planned_all_the_same(caplog):
  class Compiled:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands")

  made = planner(dict(data=2, fsdp=4, tensor=1), 8)
  assert made._sent(*made.batch(4), Compiled()) == {}
  assert "what devices send in a step is not counted: INTERNAL: async-update" in caplog.text


def test_the_table_has_a_line_for_each_axis():
  found = plan.sent_rows(
    {"fsdp": {"all-gather": 3e9, "all-reduce": 1e9}, "data": {"all-reduce": 2e9}}
  )
  assert found == [
    {"GB": "fsdp", "all-gather": 3.0, "all-reduce": 1.0, "total": 4.0},
    {"GB": "data", "all-gather": 0.0, "all-reduce": 2.0, "total": 2.0},
  ]
