"""Gives every test eight host devices. XLA reads the flag once, so it must stand before the first import of jax."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
