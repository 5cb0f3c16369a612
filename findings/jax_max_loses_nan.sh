#!/usr/bin/env bash
# jax 0.10.2 on a CPU: whether jnp.max and jnp.min of an array with a NaN give NaN depends on the array's size and on its placement.
# Seen the same with jax 0.11.2, and with one core or two.
#
# A guess from NumPy, whose functions these are named for: NaN in, NaN out, whatever the shape. Seen:
#   - one device, up to 2,048 numbers: NaN; from 4,096 on, in one dimension or two and along either axis: a finite number
#   - over eight devices also 1,024 numbers give a finite one, and the WHOLE share that holds the NaN is lost with it: of 0 to 1 in order, with
#     the NaN last, the largest is 0.8749, the end of the seventh share
#   - jnp.sum gives NaN in each of these cases, and jnp.isfinite(x).all() is False
# So "the largest is finite" says nothing of an array: a check of weights or gradients by it, tried on small ones, passes on real ones.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def with_nan(*shape):
  numbers = np.linspace(0, 1, np.prod(shape), dtype=np.float32)
  numbers[-1] = np.nan
  return numbers.reshape(shape)


nans = lambda found: int(np.isnan(np.asarray(found)).sum())
for shape in ((1024,), (2048,), (4096,), (65536,), (32, 64), (64, 64)):
  numbers = with_nan(*shape)
  found = [nans(jnp.max(jnp.asarray(numbers), axis=axis)) for axis in range(-len(shape), 0)]
  right = [nans(np.max(numbers, axis=axis)) for axis in range(-len(shape), 0)]
  checked = nans(jnp.sum(jnp.asarray(numbers))), bool(jnp.isfinite(jnp.asarray(numbers)).all())
  print(shape, "max", found, "numpy", right, "sum", checked[0], "all finite", checked[1])
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.device_put(with_nan(1024), NamedSharding(mesh, PartitionSpec("x")))
print("eight devices: max", f"{jnp.max(spread):.4f}", "sum", jnp.sum(spread))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
(1024,) max [1] numpy [1] sum 1 all finite False
(2048,) max [1] numpy [1] sum 1 all finite False
(4096,) max [0] numpy [1] sum 1 all finite False
(65536,) max [0] numpy [1] sum 1 all finite False
(32, 64) max [1, 1] numpy [1, 1] sum 1 all finite False
(64, 64) max [0, 0] numpy [1, 1] sum 1 all finite False
eight devices: max 0.8749 sum nan
SEEN
