"""The fused loss, value and both gradients, beside the PyTorch peer's and the time of its matrix
products alone.

python experiments/benchmarks/loss.py --peer=peer_torch.py --json=loss.json
JAX_PLATFORMS=cpu python experiments/benchmarks/loss.py --tiny
"""

import argparse
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import measure

from oel_jax.consolidation import fused

MAIN = (16384, 2048, 151936)  # tokens, width of Qwen3-1.7B, vocabulary of Qwen3
GROWTH = [(tokens, 2048, 151936) for tokens in (4096, 65536)] + [
  (16384, 2048, vocabulary) for vocabulary in (32768, 65536, 262144)
]


def row(
  shape: tuple[int, int, int], dtype: Any, rate: float, every: int = 1, **options: Any
) -> dict[str, Any]:
  """One measurement, in which one token of `every` counts. The student's head is float32, as in
  training; the teacher's as the products.
  """
  tokens, width, vocabulary = shape
  student, teacher = (measure.random_array(seed, (tokens, width), dtype) for seed in (0, 1))
  heads = [
    measure.random_array(seed, (vocabulary, width), kind, width**-0.5)
    for seed, kind in ((2, jnp.float32), (3, dtype))
  ]

  def mean(*args):
    total, count, *statistics = fused.linear_divergence(*args, **options)
    return total / count, statistics

  # an argument: of a constant the compiler would know how many count
  mask = jnp.arange(tokens) % every == 0
  args = student, heads[0], teacher, heads[1], mask
  loss = jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True)).lower(*args).compile()
  call = lambda: loss(*args)
  counted = int(mask.sum())
  took, limit = measure.seconds(call), 4 * 2 * counted * width * vocabulary / rate
  return {
    "tokens": tokens,
    "counted": counted,
    "vocabulary": vocabulary,
    "support": options.get("support", "full"),
    "statistics": options.get("statistics", False),
    "chunk": options["chunk"],
    "ms": took * 1e3,
    "limit ms": limit * 1e3,
    "of limit": limit / took,
    "GiB over gradients": loss.memory_analysis().temp_size_in_bytes / 2**30,
    "kernels ms": measure.kernels(call),
  }


def run(
  shapes: list[tuple[int, int, int]], chunks: list[int], peer: str | None
) -> list[dict[str, Any]]:
  """The first shape with each chunk, in each support, with statistics, with few tokens that count;
  then the others; and the peer's.
  """
  theirs = measure.peer(peer, f"loss_bench({shapes[0][0]}, {shapes[0][1]})")
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  rate = measure.matrix_rate(dtype)
  rows = [row(shapes[0], dtype, rate, chunk=chunk) for chunk in chunks]
  rows += [
    row(shapes[0], dtype, rate, chunk=chunks[0], support=support)
    for support in ("topk", "topk_tail")
  ]
  rows += [
    row(shapes[0], dtype, rate, chunk=chunks[0], **more)
    for more in ({"statistics": True}, {"every": 4})
  ]
  rows += [row(shape, dtype, rate, chunk=chunks[0]) for shape in shapes[1:]]
  for line in theirs:
    faster = line["ms"] / rows[0]["ms"] if "ms" in line else None
    rows.append(
      {
        "tokens": line.get("T", shapes[0][0]),
        "vocabulary": line.get("V", shapes[0][2]),
        "support": line["name"],
        "ms": line.get("ms"),
        "GiB, gradients included": line.get("peak_gib"),
        "ours is faster by": faster,
      }
    )
  return rows


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--peer", help="path of peer_torch.py")
  parser.add_argument("--json", type=figures_file.to_write, help="where to write the figures")
  parser.add_argument(
    "--chunks", default="512,1024", help="chunks to try; the first one is used for all"
  )
  parser.add_argument(
    "--growth", action="store_true", help="also other numbers of tokens and other vocabularies"
  )
  parser.add_argument(
    "--tiny", action="store_true", help="shapes for a CPU: shows that it runs, measures nothing"
  )
  args = parser.parse_args(argv)
  shapes = [(64, 16, 300), (32, 16, 300)] if args.tiny else [MAIN, *(GROWTH if args.growth else [])]
  chunks = [8, 16] if args.tiny else [int(chunk) for chunk in args.chunks.split(",")]
  measure.report(run(shapes, chunks, args.peer), "fused loss, value and both gradients", args.json)


if __name__ == "__main__":
  main()
