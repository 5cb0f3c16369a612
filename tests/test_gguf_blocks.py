"""GGUF's blocks on the device against the `gguf` package's, bit for bit."""

import functools

import gguf as package
import jax
import numpy as np
import pytest

from oel_jax.policy.weights import gguf_blocks

# Halves that a scale may be: zeros of both signs, the least and the largest subnormal, the least
# normal, the largest, ordinary ones of both signs.
HALVES = np.array(
  [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x2E66, 0xAE66, 0x3C00], np.uint16
)


def blocks(kind, rows, count, seed=0):
  """Random bytes, [rows, count, bytes of a block], whose scales are one of `HALVES`."""
  rng = np.random.default_rng(seed)
  found = rng.integers(0, 256, (rows, count, package.GGML_QUANT_SIZES[kind][1]), np.uint8)
  for at in gguf_blocks.TYPES[kind][1]:
    found[..., at : at + 2] = rng.choice(HALVES, (rows, count, 1)).view(np.uint8)
  return found


@functools.cache
def decoder(kind):
  return jax.jit(gguf_blocks.decoder(kind))


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", gguf_blocks.TYPES, ids=lambda kind: kind.name)
def test_blocks_have_the_packages_numbers_bit_for_bit(kind, device):
  data = blocks(kind, 64, 12)
  found, finite = decoder(kind)(jax.device_put(data, jax.devices(device)[0]))
  right = package.dequantize(data.reshape(64, -1), kind)
  assert found.dtype == np.float32 and finite and np.isfinite(right).all()
  np.testing.assert_array_equal(
    np.asarray(found).reshape(right.shape).view(np.uint32), right.view(np.uint32)
  )


@pytest.mark.parametrize("kind", gguf_blocks.TYPES, ids=lambda kind: kind.name)
def test_a_scale_that_is_not_finite_is_told(kind):
  for at in gguf_blocks.TYPES[kind][1]:
    for bits in (0x7C00, 0xFC00, 0x7E01):  # both infinities, a NaN
      data = blocks(kind, 64, 12)
      data[1, 1, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
      with np.errstate(all="ignore"):
        assert not np.isfinite(package.dequantize(data.reshape(64, -1), kind)).all()
      assert not decoder(kind)(data)[1]
