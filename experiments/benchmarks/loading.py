"""How long it takes to read a Hugging Face folder onto the device, and how much memory of the
host's own that takes.

    python experiments/benchmarks/loading.py --architecture=qwen3-1.7b --json=loading.json

Random weights in bfloat16 are written, and read by a process of its own; "host" is the growth of
its anonymous memory (RssAnon), the file's mapped pages not counted. On a CPU that includes the
parameters, which then lie in the host's memory, too.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import measure

from oel_jax.policy import transformer
from oel_jax.policy.architecture import named
from oel_jax.policy.weights import huggingface


def anonymous() -> int:
  """Bytes of this process's anonymous memory."""
  status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
  return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def read(folder: str) -> dict[str, float]:
  """Reads the folder's parameters in bfloat16; GiB are the highest seen, every 2 ms, over those
  before.
  """
  shape = huggingface.read_architecture(folder)
  jax.block_until_ready(jnp.ones(8) + 1)  # the device's own start is not counted
  before, highest, done = anonymous(), 0, threading.Event()

  def watch() -> None:
    nonlocal highest
    while not done.wait(0.002):
      highest = max(highest, anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    started = time.perf_counter()
    jax.block_until_ready(huggingface.load(folder, shape, dtype=jnp.bfloat16))
    took = time.perf_counter() - started
  finally:
    done.set()
    watcher.join()
  return {"s": took, "host GiB": max(0, highest - before) / 2**30}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--architecture", default="qwen3-1.7b")
  parser.add_argument("--json", help="where to write the figures")
  # To be read: the process that is measured.
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.folder:
    print(json.dumps(read(args.folder)))
    return
  shape = named(args.architecture)
  leaves = flax.traverse_util.flatten_dict(transformer.abstract(shape), sep="/").items()
  sizes = [
    2 * leaf.size // (shape.layers if path.startswith("layers") else 1) for path, leaf in leaves
  ]
  with tempfile.TemporaryDirectory() as folder:
    params: Any = jax.jit(
      lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), transformer.init(shape, key))
    )(jax.random.key(0))
    huggingface.save(folder, params, shape)
    del params
    size = sum(file.stat().st_size for file in pathlib.Path(folder).glob("*.safetensors"))
    # This process has its share of the device already.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
      [sys.executable, __file__, f"--folder={folder}"],
      check=True,
      capture_output=True,
      text=True,
      env=env,
    )
  row = {
    "policy": args.architecture,
    "model GiB": size / 2**30,
    "largest tensor GiB": max(sizes) / 2**30,
  }
  row |= json.loads(done.stdout.splitlines()[-1])
  measure.report([row], "reading a folder", args.json)


if __name__ == "__main__":
  main()
