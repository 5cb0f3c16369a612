"""The numbers of GGUF's quantised blocks, computed on the device that they are meant for: bit for
bit what `gguf.dequantize` gives. Ten types are: Q4_0 to Q8_0 and Q2_K to Q6_K; the `gguf` package
decodes the others, on the host.

The scales of a block are halves; what multiplies them are whole numbers of few bits. So each
product is exact in float32 and only the last sum rounds: neither the order of the products nor a
fused multiply-add changes a bit. The layouts are those of ggml's `ggml-common.h`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

try:
  from gguf import GGMLQuantizationType as Type
except ImportError as error:
  raise ImportError(
    f'GGUF files need the extra "hf": pip install "oel_jax[hf]" ({error})'
  ) from error

Blocks = UInt8[Array, "*shape bytes"]
Numbers = Float[Array, "*shape numbers"]


@functools.cache  # one function a type, so that programs of one type are known to be the same
def decoder(kind: Type) -> Callable[[Blocks], tuple[Numbers, Bool[Array, ""]]]:
  """Returns what turns blocks of a type of `TYPES` into float32 numbers, and says whether all of
  them are finite: they are if the scales are.
  """
  decode, places = TYPES[kind]

  def decoded(blocks: Blocks) -> tuple[Numbers, Bool[Array, ""]]:
    scales = [_half(blocks, at) for at in places]
    finite = jnp.stack([jnp.isfinite(scale).all() for scale in scales]).all()
    return decode(blocks, *scales), finite

  return decoded


def _half(blocks: Blocks, at: int) -> Float[Array, "*shape 1"]:
  """The half at a byte of each block, as float32."""
  low, high = (blocks[..., i : i + 1].astype(jnp.uint16) for i in (at, at + 1))
  # Not a bitcast of two bytes, which XLA would not fuse.
  return jax.lax.bitcast_convert_type(low | high << 8, jnp.float16).astype(jnp.float32)


def _fields(packed: Blocks, width: int, bits: int) -> UInt8[Array, "*shape fields"]:
  """Fields of some bits. Of each `width` bytes the lowest fields come first, then the next."""
  shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
  groups = packed.reshape(*packed.shape[:-1], -1, 1, width)
  return (groups >> shifts & (2**bits - 1)).reshape(*packed.shape[:-1], -1)


def _below(fields: UInt8[Array, "..."], zero: int) -> Int[Array, "..."]:
  """Fields that count from a zero of their own."""
  return fields.astype(jnp.int8) - jnp.int8(zero)


def _scaled(
  numbers: Array, scales: Float[Array, "*shape sub"], minima: Float[Array, "*shape sub"] | None
) -> Numbers:
  """Numbers times the scale of their sub-block, less its minimum."""
  parts = numbers.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
  if minima is not None:
    parts = parts - minima[..., None]
  return parts.reshape(numbers.shape)


def _five(high: Blocks, low: Blocks) -> UInt8[Array, "*shape numbers"]:
  """Five-bit fields of blocks of 32: the fifth bits one after the other, the others in halves."""
  return _fields(low, 16, 4) | _fields(high, 1, 1) << 4


def _q4_0(x: Blocks, scale: Array) -> Numbers:
  return scale * _below(_fields(x[..., 2:], 16, 4), 8).astype(jnp.float32)


def _q4_1(x: Blocks, scale: Array, minimum: Array) -> Numbers:
  return scale * _fields(x[..., 4:], 16, 4).astype(jnp.float32) + minimum


def _q5_0(x: Blocks, scale: Array) -> Numbers:
  return scale * _below(_five(x[..., 2:6], x[..., 6:]), 16).astype(jnp.float32)


def _q5_1(x: Blocks, scale: Array, minimum: Array) -> Numbers:
  return scale * _five(x[..., 4:8], x[..., 8:]).astype(jnp.float32) + minimum


def _q8_0(x: Blocks, scale: Array) -> Numbers:
  return scale * jax.lax.bitcast_convert_type(x[..., 2:], jnp.int8).astype(jnp.float32)


def _q2_k(x: Blocks, scale: Array, minimum: Array) -> Numbers:
  scales, minima = (field.astype(jnp.float32) for field in (x[..., :16] & 15, x[..., :16] >> 4))
  return _scaled(_fields(x[..., 16:80], 32, 2), scale * scales, minimum * minima)


def _q3_k(x: Blocks, scale: Array) -> Numbers:
  high, low, packed = x[..., :32], x[..., 32:96], x[..., 96:108]
  scales = _below(_fields(packed[..., :8], 8, 4) | _fields(packed[..., 8:], 4, 2) << 4, 32)
  # The third bit is kept inverted: 4 comes off where it is 0.
  numbers = _below(_fields(low, 32, 2) | _fields(high, 32, 1) << 2, 4)
  return _scaled(numbers, scale * scales.astype(jnp.float32), None)


def _six(packed: Blocks) -> tuple[Float[Array, "*shape 8"], Float[Array, "*shape 8"]]:
  """Eight scales and eight minima of six bits, in twelve bytes: the first four of each in the low
  bits of the first eight bytes; of the others the low four bits in the last four bytes, the high
  two on top of the first eight.
  """
  scales, minima, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
  found = (
    jnp.concatenate([scales & 63, rest & 15 | scales >> 2 & 48], -1),
    jnp.concatenate([minima & 63, rest >> 4 | minima >> 2 & 48], -1),
  )
  return found[0].astype(jnp.float32), found[1].astype(jnp.float32)


def _q4_k(x: Blocks, scale: Array, minimum: Array) -> Numbers:
  scales, minima = _six(x[..., 4:16])
  return _scaled(_fields(x[..., 16:], 32, 4), scale * scales, minimum * minima)


def _q5_k(x: Blocks, scale: Array, minimum: Array) -> Numbers:
  scales, minima = _six(x[..., 4:16])
  numbers = _fields(x[..., 48:], 32, 4) | _fields(x[..., 16:48], 32, 1) << 4
  return _scaled(numbers, scale * scales, minimum * minima)


def _q6_k(x: Blocks, scale: Array) -> Numbers:
  scales = jax.lax.bitcast_convert_type(x[..., 192:208], jnp.int8).astype(jnp.float32)
  numbers = _fields(x[..., :128], 64, 4) | _fields(x[..., 128:192], 32, 2) << 4
  return _scaled(_below(numbers, 32), scale * scales, None)


# Type → how a block is read, and the bytes at which its halves stand: the scale, then the minimum
# if it has one.
TYPES = {
  Type.Q4_0: (_q4_0, (0,)),
  Type.Q4_1: (_q4_1, (0, 2)),
  Type.Q5_0: (_q5_0, (0,)),
  Type.Q5_1: (_q5_1, (0, 2)),
  Type.Q8_0: (_q8_0, (0,)),
  Type.Q2_K: (_q2_k, (80, 82)),
  Type.Q3_K: (_q3_k, (108,)),
  Type.Q4_K: (_q4_k, (0, 2)),
  Type.Q5_K: (_q5_k, (0, 2)),
  Type.Q6_K: (_q6_k, (208,)),
}
