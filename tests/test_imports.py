"""What importing brings along: the losses and the step jax, flax and jaxtyping alone; and packages
that take seconds load where they are used.
"""

import os
import pathlib
import subprocess
import sys

import pytest
from processes import python_path

ROOT = pathlib.Path(__file__).parents[1]
# tensorboardX imports torch where that is installed.
SLOW = {
  "gguf",
  "grain",
  "matplotlib",
  "optax",
  "orbax",
  "tensorboardX",
  "textarena",
  "torch",
  "transformers",
  "wandb",
}
CORE = ("losses", "fused", "divergences", "step", "batch", "teacher")


def loaded(code: str) -> set[str]:
  """Top-level modules that are there when the code has run in an interpreter of its own."""
  code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
  )
  assert done.returncode == 0, done.stderr
  return set(done.stdout.splitlines()[-1].split())


def test_losses_and_step_pull_in_jax_flax_and_jaxtyping_only():
  public = "import jax, jax.experimental.pallas, flax.linen, jaxtyping"
  both = loaded("import " + ", ".join(f"oel_jax.consolidation.{name}" for name in CORE))
  assert both - loaded(public) - set(sys.stdlib_module_names) == {"oel_jax"}


def test_the_losses_alone_do_without_flax():
  assert "flax" not in loaded("import oel_jax.consolidation.losses, oel_jax.consolidation.fused")


@pytest.mark.parametrize(
  "code",
  [
    "import oel_jax, oel_jax.config, oel_jax.conversations.importers, oel_jax.extraction.extract, "
    "oel_jax.policy.architecture, oel_jax.report, oel_jax.runtime.metrics, "
    "oel_jax.runtime.progress; assert 'rich' not in __import__('sys').modules",
    "import oel_jax.policy.sampling.sampler, oel_jax.policy.tokenizers, oel_jax.pocket.load, "
    "oel_jax.policy.weights.huggingface, oel_jax.policy.weights.native",
  ],
  ids=["conversations, metrics, report", "policy"],
)
def test_slow_packages_are_not_loaded_by_importing(code):
  assert not loaded(code) & SLOW


def test_a_run_loads_games_plots_and_boards_where_it_uses_them():
  code = "import oel_jax.loop, oel_jax.environments, oel_jax.tasks.stage, oel_jax.tasks.distill"
  assert loaded(code) & SLOW == {"grain", "optax", "orbax"}


@pytest.mark.parametrize(
  "flag",
  [
    "--help",
    "--config=experiments/frozen_lake.py:pocket",
    "--config=experiments/system_prompt.py:smollm2-135m",
    "--config=experiments/pretrain_pocket.py",
  ],
)
def test_neither_help_nor_a_configuration_loads_slow_packages(flag):
  """A mistake on the command line shows at once."""
  code = f"""
import contextlib, runpy, sys
sys.argv = ["main", "--workdir=x", {flag!r}, "unexpected"]
with contextlib.suppress(SystemExit):
  runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)
from absl import flags
assert {flag!r} == "--help" or flags.FLAGS.config.to_dict()
"""
  assert not loaded(code) & SLOW
