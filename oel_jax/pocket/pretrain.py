"""Pre-trains the embedded policy on its procedural corpus and measures its gates.

    python -m oel_jax.main --config=experiments/pretrain_pocket.py --workdir=runs/pretrain
"""

import functools
import json
import pathlib
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from oel_jax.pocket import corpus, probes, vocabulary, worlds
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import model, weights
from oel_jax.policy.generate import Policy
from oel_jax.policy.tokenizer import SentencePieceTokenizer
from oel_jax.runtime.seeds import derive


class Examples(grain.transforms.Map):
  """Example i of the corpus as int32 arrays of one length: `tokens` and `targets` are next-token pairs, `weight` is 0 but on the response.

  There the pieces that decide something (letters, "unknown", places, moves) weigh `decisive` times the rest, which is mostly foregone.
  The tokenizer is built in each worker process.
  """

  def __init__(self, seed: int, decisive: int, model_file: bytes):
    self._seed, self._decisive, self._model_file, self._tokenizer = seed, decisive, model_file, None

  def __getstate__(self):
    return {**self.__dict__, "_tokenizer": None}

  def map(self, i: int) -> dict[str, np.ndarray]:
    if self._tokenizer is None:
      self._tokenizer = SentencePieceTokenizer(self._model_file)
      places = (*worlds.PLACES, *(f" {place}" for place in worlds.PLACES))
      words = ("unknown", *worlds.LETTERS, *worlds.ACTIONS, *places)
      self._weights = np.ones(self._tokenizer.vocabulary, np.int32)
      self._weights[[self._tokenizer.encode(word)[0] for word in words]] = self._decisive
    drawn = corpus.example(derive(self._seed, "corpus", int(i)))
    prompt, response = self._tokenizer.chat(drawn.messages), self._tokenizer.response(drawn.thinking, drawn.answer)
    ids = np.asarray(prompt + response, np.int32)
    weight = np.concatenate([np.zeros(len(prompt) - 1, np.int32), self._weights[response]])
    return {"tokens": ids[:-1], "targets": ids[1:], "weight": weight}


def dataset(config: Any, model_file: bytes) -> grain.IterDataset:
  """Batches of packed rows, int32 [rows, length]: `Examples`' arrays, `tokens_segment_ids` (from 1; 0 is padding) and `tokens_positions`.

  An example that does not fit a row goes into another; one longer than a whole row, about 1 in 3,000 at 768 tokens, is left out.
  """
  examples = grain.MapDataset.range(10**9).map(Examples(config.seed, config.decisive, model_file))
  examples = examples.filter(functools.partial(_fits, length=config.length))
  batches = grain.experimental.FirstFitPackIterDataset(
      examples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)),
      length_struct=dict.fromkeys(("tokens", "targets", "weight"), config.length), num_packing_bins=config.rows,
  ).batch(config.rows, drop_remainder=True)  # fmt: skip
  if config.workers:
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=4))
  return batches


def _fits(example: dict[str, np.ndarray], length: int) -> bool:
  return len(example["tokens"]) <= length


def loss(params: Any, batch: dict[str, jax.Array], *, architecture: Any, dtype: Any, path: str) -> jax.Array:
  """Weighted mean cross-entropy over the response tokens of a packed batch, float32."""
  hidden, _ = model.apply(params, architecture, batch["tokens"], batch["tokens_positions"], batch["tokens_segment_ids"], dtype=dtype, path=path)
  losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden, model.head(params)), batch["targets"])
  return jnp.sum(losses * batch["weight"]) / jnp.maximum(batch["weight"].sum(), 1)


def run(config: Any, workdir: str) -> dict[str, Any]:
  """Trains, logs loss and gates, and leaves `pocket.safetensors`, `tokenizer.model` and `gates.json` in `workdir`.

  Returns what gates.json holds: each gate's hits, count and bounds, and `passed`.
  """
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  model_file = vocabulary.build()
  (folder / "tokenizer.model").write_bytes(model_file)
  tokenizer = SentencePieceTokenizer(model_file)
  architecture = architecture_lib.named(config.architecture)
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps, config.learning_rate * 0.02)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, batch):
    value, gradient = jax.value_and_grad(functools.partial(loss, architecture=architecture, dtype=dtype, path=config.attention))(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  params = jax.jit(functools.partial(model.init, architecture))(jax.random.key(config.seed))
  state = optimizer.init(params)
  batches, started, waited, tokens = iter(dataset(config, model_file)), time.time(), 0.0, 0
  with (folder / "metrics.jsonl").open("w") as log:
    for i in range(1, config.steps + 1):
      asked = time.time()
      batch = next(batches)
      waited += time.time() - asked
      tokens += int((batch["tokens_segment_ids"] > 0).sum())
      params, state, value = step(params, state, batch)
      if i % config.log_every == 0 or i == config.steps:
        line = {"schema": 1, "step": i, "loss": float(value), "tokens": tokens, "seconds": round(time.time() - started, 1), "waited_for_data": round(waited, 1)}
        if i % config.gates_every == 0 and i < config.steps:
          weights.save(folder / f"step_{i}.safetensors", params, dtype=np.float16)
          counts = probes.measure_gates(Policy(architecture, params, tokenizer), config.gate_count // 4, seed=i)
          line |= {name: count.rate for name, count in counts.items()}
        logging.info("%s", line)
        print(json.dumps(line), flush=True)
        log.write(json.dumps(line) + "\n")
        log.flush()
  metadata = {"architecture": config.architecture, "tokenizer": tokenizer.digest, "tokens": str(tokens), "seed": str(config.seed)}
  weights.save(folder / "pocket.safetensors", params, dtype=np.float16, metadata=metadata)
  shipped = Policy(architecture, weights.load(folder / "pocket.safetensors", architecture), tokenizer)
  counts = probes.measure_gates(shipped, config.gate_count, seed=0)
  failed = probes.failed_gates(counts)
  result = {"schema": 1, "passed": not failed, "sha256": weights.digest(folder / "pocket.safetensors")}
  result["gates"] = {name: {"hits": c.hits, "of": c.of, "rate": round(c.rate, 4), "bounds": probes.GATES[name]} for name, c in counts.items()}
  (folder / "gates.json").write_text(json.dumps(result, indent=1) + "\n")
  for name, entry in result["gates"].items():
    low, high = entry["bounds"]
    print(f"gate {name:18s} {entry['rate']:.4f} of {entry['of']}  must lie in [{low}, {high}]  {'ok' if low <= entry['rate'] <= high else 'FAILED'}")
  return result
