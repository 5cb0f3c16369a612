#!/usr/bin/env bash
# jax 0.10.2: jnp.asarray and jnp.array of a NumPy array compile an XLA program for each new shape and type; jax.device_put does not.
# Seen the same with jax 0.11.2.
#
# A guess: moving an array of the host to the device is a copy, and nothing is compiled for it. Seen, by the event that JAX records for each
# compilation: one program for a shape's first jnp.asarray or jnp.array, none for jax.device_put of the same. So code that hands
# arrays of many shapes to the device (a model's parameters, batches of varying length) compiles once a shape before its own programs are.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

programs = []
monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **said: programs.append(said.get("fun_name", "")) if event == "/jax/core/compile/backend_compile_duration" else None
)


def compiled_by(move, numbers):
  before = len(programs)
  jax.block_until_ready(move(numbers))
  return len(programs) - before


for name, move, rows in (("device_put", jax.device_put, 10), ("jnp.asarray", jnp.asarray, 20), ("jnp.array", jnp.array, 30)):
  arrays = [np.zeros((rows + n, 4), kind) for n in range(3) for kind in (np.float32, np.int32)]
  print(name, "six arrays:", [compiled_by(move, numbers) for numbers in arrays], "again:", [compiled_by(move, numbers) for numbers in arrays])
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
device_put six arrays: [0, 0, 0, 0, 0, 0] again: [0, 0, 0, 0, 0, 0]
jnp.asarray six arrays: [1, 1, 1, 1, 1, 1] again: [0, 0, 0, 0, 0, 0]
jnp.array six arrays: [1, 1, 1, 1, 1, 1] again: [0, 0, 0, 0, 0, 0]
SEEN
