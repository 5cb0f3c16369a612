"""Gives every test eight host devices. XLA reads the flag once, so it must stand before the first import of jax."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def fixture_compile_once(tmp_path_factory):
  """What one test has compiled is loaded by the others: many make the same step anew, each in a jit of its own."""
  jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
