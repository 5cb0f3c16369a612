#!/usr/bin/env bash
# jax 0.10.2: multihost_utils.broadcast_one_to_all and process_allgather keep 64-bit numbers in one process, and cut them to 32 bits without a word in two.
#
# A guess: both are for values of the host and take NumPy arrays, so what process 0 gives arrives on the others, or is refused. Seen: with one process
# the value comes back as it is. With two it goes through a jax array, whose types are of 32 bits unless jax_enable_x64 is on: 3,000,000,000 tokens are
# -1,294,967,296, a seed of 2**40 is 0, a float64 loses half its digits; and -0.0 comes out as 0.0, for the value is added to others' zeros. assert_equal
# compares what was so cut with what was given: it fails for the same 64-bit number in all processes. So counters of tokens, seeds, times and
# digests that are right on one host are not on two. (float32, int32 and smaller numbers arrive.)
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
cat > "$folder/processes.py" <<'PYTHON'
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

process, processes, port = map(int, sys.argv[1:])
if processes > 1:
  jax.distributed.initialize(f"localhost:{port}", processes, process)


def tell(name, call):
  try:
    found = call()
    found = "passes" if found is None else f"{found.dtype} {found.ravel().tolist()}"
  except AssertionError:
    found = "AssertionError"
  if process == 0:
    print(f"{processes} process{'es' * (processes > 1)}, {name}: {found}")


tell("broadcast of int64 3000000000", lambda: multihost_utils.broadcast_one_to_all(np.int64(3_000_000_000)))
tell("broadcast of 2**40", lambda: multihost_utils.broadcast_one_to_all(2**40))
tell("broadcast of float64 16777217", lambda: multihost_utils.broadcast_one_to_all(np.float64(16_777_217)))
tell("broadcast of float32 -0.0", lambda: multihost_utils.broadcast_one_to_all(np.float32(-0.0)))
tell("gathering int64 3000000000", lambda: multihost_utils.process_allgather(np.int64(3_000_000_000)))
tell("assert_equal of int64 3000000000 everywhere", lambda: multihost_utils.assert_equal(np.int64(3_000_000_000)))
tell("assert_equal of int64 3 everywhere", lambda: multihost_utils.assert_equal(np.int64(3)))
PYTHON
export JAX_PLATFORMS=cpu
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/python" "$folder/processes.py" 0 1 0 > "$folder/printed"
"$folder/venv/bin/python" "$folder/processes.py" 1 2 "$port" > "$folder/other" 2>&1 &
"$folder/venv/bin/python" "$folder/processes.py" 0 2 "$port" >> "$folder/printed"
wait $!
grep process "$folder/printed" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
1 process, broadcast of int64 3000000000: int64 [3000000000]
1 process, broadcast of 2**40: int64 [1099511627776]
1 process, broadcast of float64 16777217: float64 [16777217.0]
1 process, broadcast of float32 -0.0: float32 [-0.0]
1 process, gathering int64 3000000000: int64 [3000000000]
1 process, assert_equal of int64 3000000000 everywhere: passes
1 process, assert_equal of int64 3 everywhere: passes
2 processes, broadcast of int64 3000000000: int32 [-1294967296]
2 processes, broadcast of 2**40: int32 [0]
2 processes, broadcast of float64 16777217: float32 [16777216.0]
2 processes, broadcast of float32 -0.0: float32 [0.0]
2 processes, gathering int64 3000000000: int32 [-1294967296, -1294967296]
2 processes, assert_equal of int64 3000000000 everywhere: AssertionError
2 processes, assert_equal of int64 3 everywhere: passes
SEEN
