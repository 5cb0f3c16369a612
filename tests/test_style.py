"""The whole tree is as the one formatter leaves it, and no line is longer than 100 columns."""

import pathlib
import subprocess
import sys

import pytest

TOP = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("command", [("format", "--check"), ("check",)], ids=" ".join)
def test_the_tree_is_formatted(command):
  ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "oel_jax", "experiments", "tests"]
  done = subprocess.run(ruff, cwd=TOP, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
