#!/usr/bin/env bash
# jax 0.10.2: a jitted function compiles again when an array of the same shape, type and device comes back committed to that device.
# Seen the same with jax 0.11.2.
#
# A guess: what a jitted function is compiled for are shapes, types and places, so a state that it is given and returns, in a loop on one device, is
# compiled for once. Seen, by the event that JAX records for each compilation: a state that a jitted function without arguments made is not
# committed to the device. Beside weights that are (device_put to a device, or to a mesh of one device) the second call, with the state that
# the first returned, compiles the function again. Beside weights that are not committed, or with the state committed first, there is one.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

compiled = []
monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **said: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)
device = jax.devices()[0]
places = {
  "not committed": None,
  "on a device": SingleDeviceSharding(device),
  "on a mesh of one": NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec()),
}


def programs(place, commit_state):
  weights, step = jax.device_put(np.ones(4, np.float32), place), jax.jit(lambda weights, state: state + weights.sum())
  state = jax.jit(lambda: jnp.zeros(4))()
  state = jax.device_put(state, place) if commit_state else state
  found = []
  for _ in range(4):
    before = len(compiled)
    state = jax.block_until_ready(step(weights, state))
    found.append(len(compiled) - before)
  return found


for name, place in places.items():
  print(f"weights {name}, state as made: programs compiled by four calls: {programs(place, False)}")
for name, place in list(places.items())[1:]:
  print(f"weights {name}, state put there first: {programs(place, True)}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
weights not committed, state as made: programs compiled by four calls: [1, 0, 0, 0]
weights on a device, state as made: programs compiled by four calls: [1, 1, 0, 0]
weights on a mesh of one, state as made: programs compiled by four calls: [1, 1, 0, 0]
weights on a device, state put there first: [1, 0, 0, 0]
weights on a mesh of one, state put there first: [1, 0, 0, 0]
SEEN
