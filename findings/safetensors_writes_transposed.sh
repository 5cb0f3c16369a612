#!/usr/bin/env bash
# safetensors 0.8.0: a NumPy array that is not in C order is written with its numbers in another order than its shape says; 0.7.0 writes it right.
#
# A guess: `save_file` either copies such an array into C order or refuses it, as safetensors.torch refuses a tensor that is not contiguous. Seen: it writes
# the memory as it lies under the array's own shape, and the file is whole and loads. Weights are hit where they are carried from Flax to a
# Hugging Face folder: a kernel is [in, out], the file wants [out, in], and `.T` of a NumPy array is a view. Where the two sizes are one (a square
# kernel, as of the query and the output projection of Qwen3-8B) the file holds the kernel itself, not its transpose; wide ones and heads that np.transpose
# moved are shuffled. safetensors.flax writes the same for a jax array whose layout is column-major; `.T` of a jax array is a copy,
# and right. So an exporter that was tested under 0.7.0 writes another model under 0.8.0, with no word from either side.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/write.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

version, path = sys.argv[1:]
random = np.random.default_rng(0)
kernel, wide, heads = (random.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4, 6), (4, 2, 3)))
column_major = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))


def tell(name, writer, array):
  given = np.array(array, order="C")
  writer.save_file({"weight": array}, path)
  found = safetensors.numpy.load_file(path)["weight"]
  told = "right" if np.array_equal(found, given) else "wrong"
  if told == "wrong" and given.shape == given.T.shape and np.array_equal(found, given.T):
    told += ", what is read is the transpose of what was given"
  print(f"{version} {name} {found.shape}: {told}")


tell("NumPy, square kernel", safetensors.numpy, kernel)
tell("NumPy, square kernel.T", safetensors.numpy, kernel.T)
tell("NumPy, wide kernel.T", safetensors.numpy, wide.T)
tell("NumPy, heads moved to the front", safetensors.numpy, np.transpose(heads, (1, 2, 0)))
tell("jax, square kernel.T", safetensors.flax, jnp.asarray(kernel).T)
tell("jax, square kernel, column-major", safetensors.flax, jax.jit(lambda x: x * 1, out_shardings=column_major)(kernel))
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.2.6
for version in 0.7.0 0.8.0; do
  "$folder/venv/bin/pip" install -q safetensors==$version
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/write.py" $version "$folder/model.safetensors"
done > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
0.7.0 NumPy, square kernel (4, 4): right
0.7.0 NumPy, square kernel.T (4, 4): right
0.7.0 NumPy, wide kernel.T (6, 4): right
0.7.0 NumPy, heads moved to the front (2, 3, 4): right
0.7.0 jax, square kernel.T (4, 4): right
0.7.0 jax, square kernel, column-major (4, 4): right
0.8.0 NumPy, square kernel (4, 4): right
0.8.0 NumPy, square kernel.T (4, 4): wrong, what is read is the transpose of what was given
0.8.0 NumPy, wide kernel.T (6, 4): wrong
0.8.0 NumPy, heads moved to the front (2, 3, 4): wrong
0.8.0 jax, square kernel.T (4, 4): right
0.8.0 jax, square kernel, column-major (4, 4): wrong, what is read is the transpose of what was given
SEEN
