"""How long it takes to read a Hugging Face folder or a GGUF file onto the device, and how much
memory of the host's own that takes.

    python experiments/benchmarks/loading.py --architecture=qwen3-1.7b --json=loading.json
    python experiments/benchmarks/loading.py --weights=MODEL.gguf --against=OLDER_CHECKOUT

Without --weights random ones are written, in bfloat16. They are read as a run reads them, into
float32, by a process of its own that has nothing compiled; figures are medians of --repeats such
processes, the file in the page cache. "of plain" compares with a plain read of the files, in pieces
of 64 MiB that are each copied to the device. "host" is the growth of the process's anonymous memory
(RssAnon), the file's mapped pages not counted. On a CPU that includes the parameters, which then
lie in the host's memory, too. --against reads by another checkout's code, in turn with ours.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import numpy as np

PIECE = 64 * 2**20  # bytes
HERE = pathlib.Path(__file__).resolve().parents[2]


def anonymous() -> int:
  """Bytes of this process's anonymous memory."""
  status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
  return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def reader(path: pathlib.Path) -> Callable[[], Any]:
  """What reads the parameters, also by an older checkout, which has no folder `weights`."""
  name = "gguf" if path.suffix == ".gguf" else "huggingface"
  folder = "oel_jax.policy.weights"
  try:
    module = importlib.import_module(f"{folder}.{name}")
  except ModuleNotFoundError as error:
    if error.name not in (folder, f"{folder}.{name}"):
      raise
    module = importlib.import_module(f"oel_jax.policy.{name}")
  source = module.read(path) if path.suffix == ".gguf" else path
  shape = module.read_architecture(source)
  return lambda: module.load(source, shape)


def plainly(path: pathlib.Path) -> None:
  """Copies the bytes of the weights to the device."""
  for file in files(path):
    with file.open("rb", buffering=0) as opened:
      while (piece := np.fromfile(opened, np.uint8, PIECE)).size:
        jax.block_until_ready(jax.device_put(piece))


def files(path: pathlib.Path) -> list[pathlib.Path]:
  """Those that hold the weights."""
  return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def measured(call: Callable[[], Any]) -> dict[str, float]:
  """Seconds of a call, and the highest GiB seen, every 2 ms, over those before."""
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
    jax.block_until_ready(call())
    took = time.perf_counter() - started
  finally:
    done.set()
    watcher.join()
  return {"s": took, "host GiB": max(0, highest - before) / 2**30}


def in_a_process(path: pathlib.Path, how: str, checkout: pathlib.Path) -> dict[str, float]:
  """What `measured` gives in a new process that has the code of a checkout."""
  env = os.environ | {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has its share of the device already
    "PYTHONPATH": os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH")))),
  }
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, __file__, f"--weights={path}", f"--only={how}"]
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  if done.returncode:
    raise RuntimeError(f"{how} with {checkout} failed: {done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def compared(path: pathlib.Path, against: str | None, repeats: int) -> dict[str, float]:
  """The medians: ours, a plain read and the other checkout in turn."""
  found: dict[str, list[dict[str, float]]] = {"load": [], "plain": [], "against": []}
  for _ in range(repeats):
    found["plain"].append(in_a_process(path, "plain", HERE))
    found["load"].append(in_a_process(path, "load", HERE))
    if against is not None:
      found["against"].append(in_a_process(path, "load", pathlib.Path(against).resolve()))
  middle = lambda how, name: statistics.median(one[name] for one in found[how])
  ours, plain = middle("load", "s"), middle("plain", "s")
  row = {"s": ours, "host GiB": middle("load", "host GiB"), "plain s": plain}
  row["of plain"] = plain / ours
  if against is not None:
    before = middle("against", "s")
    row |= {"against s": before, "against host GiB": middle("against", "host GiB")}
    row["faster"] = before / ours
  return row


def write_folder(folder: str, name: str) -> dict[str, float]:
  """Writes random weights of a named architecture."""
  import flax

  from oel_jax.policy import transformer
  from oel_jax.policy.architecture import named
  from oel_jax.policy.weights import huggingface

  shape = named(name)
  params: Any = jax.jit(
    lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), transformer.init(shape, key))
  )(jax.random.key(0))
  huggingface.save(folder, params, shape)
  leaves = flax.traverse_util.flatten_dict(transformer.abstract(shape), sep="/").items()
  sizes = [
    2 * leaf.size // (shape.layers if path.startswith("layers") else 1) for path, leaf in leaves
  ]
  return {"largest tensor GiB": max(sizes) / 2**30}


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
  """Ends the program at an architecture, weights or a checkout that are none."""
  from oel_jax.policy.architecture import ARCHITECTURES

  if args.architecture not in ARCHITECTURES:
    names = ", ".join(ARCHITECTURES)
    parser.error(f"--architecture is {args.architecture!r}: it must be one of {names}")
  if args.weights and not pathlib.Path(args.weights).exists():
    parser.error(f"--weights is {args.weights!r}: there is no such file or folder")
  if args.against and not (pathlib.Path(args.against) / "oel_jax").is_dir():
    parser.error(f"--against is {args.against!r}: it must be a checkout, which holds oel_jax/")


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--architecture", default="qwen3-1.7b")
  parser.add_argument("--weights", help="a Hugging Face folder or a GGUF file, instead")
  parser.add_argument("--against", metavar="CHECKOUT", help="whose code reads them, too")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  # What is to be done with them: the process that is measured.
  parser.add_argument("--only", choices=("load", "plain"), help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.only:
    path = pathlib.Path(args.weights)
    call = reader(path) if args.only == "load" else lambda: plainly(path)
    print(json.dumps(measured(call)))
    return
  _check(parser, args)
  with tempfile.TemporaryDirectory() as folder:
    row: dict[str, Any] = {"weights": args.weights or args.architecture}
    if args.weights is None:
      row |= write_folder(folder, args.architecture)
    path = pathlib.Path(args.weights or folder).resolve()
    row["model GiB"] = sum(file.stat().st_size for file in files(path)) / 2**30
    row |= compared(path, args.against, args.repeats)
  import measure  # which an older checkout's code would not let a measured process import

  measure.report([row], "reading weights", args.json)


if __name__ == "__main__":
  main()
