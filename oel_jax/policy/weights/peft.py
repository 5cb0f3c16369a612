"""What training added to a model's matrices, as an adapter's folder that `peft` reads, and engines
that serve one model with many adapters.
"""

import math
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from oel_jax.policy import parameters
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.weights import fetch
from oel_jax.runtime import files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE = 8  # columns beside the rank, which make sure of its last ones


def save(
  folder: pathlib.Path, base: Any, params: Any, architecture: Architecture, *, rank: int, name: str
) -> float:
  """Writes `params` as an adapter of `base`, in float32. Returns which share of what was added the
  adapter misses, by the norms of all matrices together: what is left of rounding to bfloat16, which
  has no such rank.

  Args:
    folder: made if need be; CONFIG comes last.
    base: tree of `parameters.init`'s shape.
    params: the same; differs from `base` in the layers' matrices alone, in each by a product of
      the rank, but for rounding.
    architecture: of both.
    rank: of the adapter.
    name: where the base lies.

  Raises:
    OSError: a file cannot be written.
  """
  found, modules = {}, []
  added = missed = 0.0  # sums of squares
  for path, matrix in parameters.of(architecture).items():
    if not (matrix.stacked and path.endswith("/kernel")):
      continue
    modules.append(matrix.huggingface.split(".")[-2])
    for layer in range(architecture.layers):
      new, old = (fetch.tensor(tree, path, layer) for tree in (params, base))
      moved = matrix.to_stored(np.float32(new) - np.float32(old), architecture)
      above = "base_model.model." + matrix.huggingface.format(layer).removesuffix(".weight")
      outputs, inputs = factors(moved, rank)
      added += float(np.sum(np.square(moved, dtype=np.float64)))
      missed += float(np.sum(np.square(moved - outputs @ inputs, dtype=np.float64)))
      found |= {f"{above}.lora_B.weight": outputs, f"{above}.lora_A.weight": inputs}
  folder.mkdir(exist_ok=True)
  config = dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    base_model_name_or_path=name,
    r=rank,
    lora_alpha=rank,
    target_modules=sorted(modules),
    bias="none",
    lora_dropout=0.0,
    fan_in_fan_out=False,
    inference_mode=True,
  )
  (folder / CONFIG).unlink(missing_ok=True)
  files.write_bytes(folder / WEIGHTS, safetensors.numpy.save(found, {"format": "pt"}))
  files.write_json(folder / CONFIG, config)
  return math.sqrt(missed / added) if added else 0.0


def factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The two factors [O, rank] and [rank, I], float32, of the nearest product of that rank to a
  matrix [O, I] that is of it but for rounding (Halko et al., 2011, algorithms 4.1 and 5.1).
  """
  draw = np.random.default_rng(0).standard_normal
  most = min(*matrix.shape, rank + MORE)
  span, _ = np.linalg.qr(matrix @ draw((matrix.shape[1], most)))
  left, sizes, right = np.linalg.svd(span.T @ matrix, full_matrices=False)
  root = np.zeros(rank)
  kept = min(rank, len(sizes))
  root[:kept] = np.sqrt(sizes[:kept])
  outputs, inputs = np.zeros((len(matrix), rank)), np.zeros((rank, matrix.shape[1]))
  outputs[:, :kept], inputs[:kept] = (span @ left)[:, :kept], right[:kept]
  return np.float32(outputs * root), np.float32(root[:, None] * inputs)
