"""Pre-trains an embedded policy on its procedural corpus and measures its gates.

python -m oel_jax.main --config=experiments/pretrain_pocket.py --workdir=runs/pretrain
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from oel_jax import config_checks
from oel_jax.consolidation import failure
from oel_jax.pocket import corpus, load, probes, vocabulary
from oel_jax.pocket.boards import corpus as boards_corpus
from oel_jax.pocket.boards import probes as boards_probes
from oel_jax.pocket.boards import vocabulary as boards_vocabulary
from oel_jax.policy import architecture, transformer
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import SentencePieceTokenizer
from oel_jax.policy.weights import native
from oel_jax.runtime import files, finite, mesh, progress, signals
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive
from oel_jax.runtime.workdir import opened


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """What a policy is taught and held to.

  Attributes:
    example: of a seed.
    model_file: returns the SentencePiece model.
    deciding: texts of one piece each that decide something in a response.
    probes: the module that has GATES and measure_gates.
  """

  example: Callable[[int], corpus.Example]
  model_file: Callable[[], bytes]
  deciding: tuple[str, ...]
  probes: Any


CURRICULA = {
  "lake": Curriculum(corpus.example, vocabulary.build, vocabulary.DECIDING, probes),
  "boards": Curriculum(
    boards_corpus.example, boards_vocabulary.frozen, boards_vocabulary.DECIDING, boards_probes
  ),
}


def curriculum(name: str) -> Curriculum:
  """The curriculum of this name; ValueError lists the known ones."""
  if name not in CURRICULA:
    raise ValueError(f"config.curriculum is {name!r}: it must be one of {', '.join(CURRICULA)}")
  return CURRICULA[name]


class Examples(grain.transforms.Map):
  """Example i of the corpus as int32 arrays of one length: `tokens` and `targets` are next-token
  pairs, `weight` is 0 but on the response.

  There the pieces that decide something (letters, "unknown", places, moves) weigh `decisive` times
  the rest, which is mostly foregone. The tokenizer is built in each worker process.
  """

  def __init__(self, name: str, seed: int, decisive: int, model_file: bytes):
    self._name, self._seed, self._decisive = name, seed, decisive
    self._model_file, self._tokenizer = model_file, None

  def __getstate__(self):
    return {**self.__dict__, "_tokenizer": None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    # Ctrl-C reaches the workers, too: the process that started them ends them, without tracebacks.
    if multiprocessing.parent_process() is not None:
      signal.signal(signal.SIGINT, signal.SIG_IGN)

  def map(self, i: int) -> dict[str, np.ndarray]:
    taught = curriculum(self._name)
    if self._tokenizer is None:
      self._tokenizer = SentencePieceTokenizer(self._model_file)
      self._weights = np.ones(self._tokenizer.vocabulary, np.int32)
      deciding = [self._tokenizer.encode(text)[0] for text in taught.deciding]
      self._weights[deciding] = self._decisive
    drawn = taught.example(derive(self._seed, "corpus", int(i)))
    prompt, response = (
      self._tokenizer.chat(drawn.messages),
      self._tokenizer.response(drawn.thinking, drawn.answer),
    )
    ids = np.asarray(prompt + response, np.int32)
    weight = np.concatenate([np.zeros(len(prompt) - 1, np.int32), self._weights[response]])
    return {"tokens": ids[:-1], "targets": ids[1:], "weight": weight}


def dataset(config: Any, model_file: bytes) -> grain.IterDataset:
  """Batches of packed rows, int32 [rows, length]: `Examples`' arrays, `tokens_segment_ids` (from 1;
  0 is padding) and `tokens_positions`.

  An example that does not fit a row goes into another; one longer than a whole row, rare at 768
  tokens, is left out.
  """
  drawn = Examples(config.curriculum, config.seed, config.decisive, model_file)
  examples = grain.MapDataset.range(10**9).map(drawn)
  examples = examples.filter(functools.partial(_fits, length=config.length))
  batches = grain.experimental.FirstFitPackIterDataset(
    examples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)),
    length_struct=dict.fromkeys(("tokens", "targets", "weight"), config.length),
    num_packing_bins=config.rows,
  ).batch(config.rows, drop_remainder=True)
  if config.workers:
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=4)
    )
  return batches


def _fits(example: dict[str, np.ndarray], length: int) -> bool:
  return len(example["tokens"]) <= length


def loss(
  params: Any, batch: dict[str, jax.Array], *, shape: Any, dtype: Any, attn_impl: str
) -> jax.Array:
  """Weighted mean cross-entropy over the response tokens, float32, in nats; `batch` is one of
  `dataset`'s, `shape` the architecture.
  """
  hidden, _ = transformer.apply(
    params,
    shape,
    batch["tokens"],
    batch["tokens_positions"],
    batch["tokens_segment_ids"],
    dtype=dtype,
    attn_impl=attn_impl,
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(
    transformer.logits(hidden, transformer.head(params)), batch["targets"]
  )
  return jnp.sum(losses * batch["weight"]) / jnp.maximum(batch["weight"].sum(), 1)


def run(config: Any, workdir: str, *, resume_anyway: bool = False) -> dict[str, Any]:
  """Trains, logs, and measures the gates; goes on from the last checkpoint when called again.

  Leaves what `pocket.load` reads (`pocket.safetensors`, `tokenizer.model`, `sha256sums`) and
  `gates.json` in `workdir`.

  Returns what gates.json holds: each gate's hits, count, rate and bounds, and `passed`.

  Raises:
    ValueError: the architecture or the curriculum is unknown, or `workdir` belongs to another
      configuration.
    NotFiniteError, Terminated: as in `train`.
  """
  config_checks.check_finite(config)
  shape, taught = architecture.named(config.architecture), curriculum(config.curriculum)
  model_file = taught.model_file()
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(opened(config, workdir, resume_anyway))
    files.write_bytes(folder / load.TOKENIZER, model_file)
    metrics, checkpoints = (
      stack.enter_context(Metrics(folder)),
      stack.enter_context(Checkpoints(folder / "checkpoints")),
    )
    params, tokens = train(config, shape, model_file, metrics, checkpoints)
  digest = SentencePieceTokenizer(model_file).digest
  header = {
    "architecture": config.architecture,
    "tokenizer": digest,
    "tokens": str(tokens),
    "seed": str(config.seed),
  }
  native.save(folder / load.WEIGHTS, params, dtype=np.float16, metadata=header)
  sums = [f"{native.digest(folder / name)}  {name}\n" for name in (load.WEIGHTS, load.TOKENIZER)]
  files.write_text(folder / load.SUMS, "".join(sums))
  counts = taught.probes.measure_gates(load.load(folder=folder), config.gate_count, seed=0)
  bounds = taught.probes.GATES
  gates = {
    name: {"hits": c.hits, "of": c.of, "rate": round(c.rate, 4), "bounds": bounds[name]}
    for name, c in counts.items()
  }
  fits = {name: probes.passes(bounds[name], count) for name, count in counts.items()}
  passed = all(fits.values())
  result = {
    "schema": 1,
    "passed": passed,
    "sha256": native.digest(folder / load.WEIGHTS),
    "gates": gates,
  }
  files.write_json(folder / "gates.json", result)
  seen = lambda name, gate: {
    "gate": name,
    **gate,
    "bounds": str(gate["bounds"]),
    "passed": fits[name],
  }
  progress.table([seen(name, gate) for name, gate in gates.items()], "gates")
  return result


def _optimizer(config: Any) -> optax.GradientTransformation:
  """AdamW after clipping, its rate warmed up and then taken down to a fiftieth along a cosine."""
  rate = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.warmup, config.steps, config.learning_rate * 0.02
  )
  adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _make_step(config: Any, shape: Any, optimizer: optax.GradientTransformation) -> Any:
  """The jitted step: ((params, moments), batch) -> (the same after it, metrics)."""
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  objective = functools.partial(loss, shape=shape, dtype=dtype, attn_impl=config.attention)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    params, moments = state
    value, gradient = jax.value_and_grad(objective)(params, batch)
    updates, moments = optimizer.update(gradient, moments, params)
    params = optax.apply_updates(params, updates)
    sizes = {"gradient_norm": gradient, "parameter_norm": params}
    norms = {name: optax.global_norm(tree) for name, tree in sizes.items()}
    return (params, moments), {"loss": value} | norms

  return step


def _not_finite(
  config: Any, step: int, broken: str, checkpoints: Checkpoints
) -> finite.NotFiniteError:
  """The error of a step whose numbers are not finite, `broken` in words; every checkpoint is
  whole.
  """
  checkpoints.wait()
  saved = [f"step {number} in {checkpoints.directory}, kept" for number in checkpoints.steps()]
  return finite.NotFiniteError(
    f"step {step} of pre-training: {broken}. Last good checkpoint: "
    f"{saved[-1] if saved else 'none yet'}. The same command goes on from there, and comes "
    "to the same end: change what led here, such as config.learning_rate "
    f"({config.learning_rate}), and give --resume_anyway"
  )


def train(
  config: Any, shape: Any, model_file: bytes, metrics: Metrics, checkpoints: Checkpoints
) -> tuple[Any, int]:
  """The training loop: returns the parameters and the number of real tokens seen.

  Raises:
    NotFiniteError: a loss, a gradient or a parameter is not finite; the last checkpoint stays.
    Terminated: SIGTERM came. A checkpoint of the step that was under way is written.
  """
  optimizer = _optimizer(config)
  step = _make_step(config, shape, optimizer)
  devices = mesh.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1]
  )

  def begin(key):
    params = transformer.init(shape, key)
    return params, optimizer.init(params)

  key = jax.random.key(config.seed)
  restored = checkpoints.restore(mesh.abstract_init(begin, devices, key))
  state = restored.state if restored else mesh.sharded_init(begin, devices, key)
  first, tokens = (restored.step, restored.extra["tokens"]) if restored else (0, 0)
  batches = iter(dataset(config, model_file))
  if restored:
    batches.set_state(restored.extra["iterator"])
  for stage in ("pretrain", "gates"):
    metrics.drop_after(0, stage, first if restored else -1)
  started = time.time()
  bar = progress.bar("pretrain", config.steps, metrics.compiles)
  with contextlib.closing(batches), bar as advance, signals.deferred() as terminated:
    if first:
      advance(first)
    for i in range(first + 1, config.steps + 1):
      batch = next(batches)
      tokens += int((batch["tokens_segment_ids"] > 0).sum())
      state, measured = step(state, batch)
      measured = {name: float(value) for name, value in jax.device_get(measured).items()}
      broken = failure.broken(measured)
      if i % config.log_every == 0 or i == config.steps or broken:
        spent = {"tokens": tokens, "seconds": time.time() - started}
        metrics.write("pretrain", i, round=0, **measured, **spent)
      if broken:
        raise _not_finite(config, i, broken, checkpoints)
      if i % config.gates_every == 0 and i < config.steps:
        counts = curriculum(config.curriculum).probes.measure_gates(
          Policy(shape, state[0], SentencePieceTokenizer(model_file)),
          config.gate_count // 4,
          seed=i,
        )
        metrics.write("gates", i, round=0, **{name: count.rate for name, count in counts.items()})
      ending = terminated()
      if i % config.checkpoint_every == 0 or i == config.steps or ending:
        checkpoints.save(i, state, {"iterator": batches.get_state(), "tokens": tokens})
      advance(1, f"loss {measured['loss']:.4g}")
      if ending:
        checkpoints.wait()
        raise signals.Terminated(f"step {i} of {config.steps} is saved in {checkpoints.directory}")
  return state[0], tokens
