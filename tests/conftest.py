"""Gives every test eight host devices, and programs for a CPU that are compiled quickly: most of
the suite's time is compiling. XLA reads its flags once, so they must stand before the first import
of jax.
"""

import importlib.metadata
import os

FLAGS = "--xla_force_host_platform_device_count=8"
if os.environ.get("JAX_PLATFORMS") == "cpu":
  # LLVM's part of compiling alone: which operations XLA fuses is as users have it.
  FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  # A third less to compile. XLA ends the process at a flag that it does not know: later versions
  # may have no other emitters.
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax
import pytest

# Files that take longest. They come first (launch/test.sh has xdist keep the order): a worker that
# gets one last goes on alone.
HEAVY = (
  "test_loop",
  "test_step",
  "test_fused",
  "test_sampler",
  "test_unrolled",
  "test_distill",
  "test_installed",
  "test_huggingface",
  "test_trainer",
  "test_sharded",
  "test_experiments",
  "test_sampler_conversations",
  "test_token_sampling",
  "test_report",
)


@pytest.fixture(scope="session", autouse=True)
def fixture_compile_once(tmp_path_factory):
  """What one test has compiled is loaded by the others: many make the same step anew, each in a jit
  of its own. Both of xdist's workers have the same folder: JAX's keys hang on its name.
  """
  top = tmp_path_factory.getbasetemp()
  folder = (top.parent if os.environ.get("PYTEST_XDIST_WORKER") else top) / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(name="exact")
def fixture_exact():
  """Options of `compile` for a program whose numbers are asked for to the last bit: it is compiled
  as users have it.
  """
  return (
    {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
  )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
  """Runs tests marked gpu only where -m names gpu (-m slow does not), and stops there if JAX finds
  no GPU: nothing tested is no success.
  """
  items.sort(key=lambda item: (*HEAVY, item.path.stem).index(item.path.stem))
  needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
  if needs_gpu and "gpu" not in config.option.markexpr:
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if item not in needs_gpu]
  elif needs_gpu and jax.default_backend() != "gpu":
    raise pytest.UsageError(
      f"{len(needs_gpu)} tests need a GPU (-m {config.option.markexpr}), but JAX finds none: its "
      f"backend is {jax.default_backend()}"
    )
