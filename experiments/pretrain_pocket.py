"""Pre-trains an embedded policy; a GPU takes minutes, two CPU cores would take days.

    python -m oel_jax.main --config=experiments/pretrain_pocket.py --workdir=runs/pretrain

The policy that plays Sokoban, too (experiments/new_boards.py) has not been trained yet, so nothing
is known of what it can do. On one NVIDIA GPU, 4.1 or 6.2 million parameters:

    python -m oel_jax.main --config=experiments/pretrain_pocket.py:boards-6m \
        --workdir=runs/boards-6m/0 --config.seed=0 --config.attention=cudnn --config.workers=14
    python -m oel_jax.main --config=experiments/pretrain_pocket.py:boards-4m \
        --workdir=runs/boards-4m/0 --config.seed=0 --config.attention=cudnn --config.workers=14

Cut off, the same command goes on. It measures the gates every 2,000 steps (`metrics.jsonl`) and at
the end, and leaves `pocket.safetensors`, `tokenizer.model` and `gates.json`, whose `passed` says
whether the weights may be used. Where a gate fails, take more steps (`--config.steps=20000`) or
another seed: whether a policy reads its knowledge depends on it.

How long: an estimate, nothing of it measured. 12,000 steps of 51 x 1,024 tokens are 627 million
tokens; at 6 FLOPs a parameter and token that is 2.3e16 (6m) or 1.5e16 (4m). The shipped weights
took 245 s on one H100 for 607 million tokens and 1.55 million parameters, 2.3e13 FLOPs a second.
At that pace it is 17 minutes (6m) or 11 (4m), and the gates come on top.
"""

import ml_collections

# Architecture: what is taught.
SIZES = {
  "pocket": "lake",
  "pocket-tiny": "lake",
  "boards-4m": "boards",
  "boards-6m": "boards",
  "boards-tiny": "boards",
}


def get_config(size: str = "pocket") -> ml_collections.ConfigDict:
  """`size`: "pocket" makes the shipped weights; "boards-4m" and "boards-6m" those of
  experiments/new_boards.py; "pocket-tiny" and "boards-tiny" are for tests.
  """
  if size not in SIZES:
    raise ValueError(
      f"experiments/pretrain_pocket.py has no size {size!r}: it must be one of {', '.join(SIZES)}"
    )
  config = ml_collections.ConfigDict(
    dict(
      task="pretrain",
      architecture=size,
      curriculum=SIZES[size],  # what is taught: a name in `pocket.pretrain.CURRICULA`
      seed=0,
      steps=12000,
      rows=68,  # packed rows a step
      length=768,  # tokens a row
      attention="xla",  # or "cudnn", on an NVIDIA GPU
      decisive=3,  # weight of the response pieces that decide something, against 1 for the rest
      learning_rate=2.5e-3,
      warmup=200,
      workers=4,  # processes that write examples; 0: none
      log_every=100,
      checkpoint_every=1000,
      gates_every=6000,  # a quarter of gate_count, while training
      gate_count=1024,
    )
  )
  if SIZES[size] == "boards":
    config.update(rows=51, length=1024, learning_rate=1.5e-3, gates_every=2000, gate_count=512)
  return config.lock()
