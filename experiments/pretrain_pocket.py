"""Pre-trains an embedded policy; a GPU takes minutes, two CPU cores would take days.

    python -m oel_jax.main --config=experiments/pretrain_pocket.py --workdir=runs/pretrain

The policy that plays Sokoban, too (experiments/new_boards.py) has not been trained to the end yet.
On one NVIDIA GPU, 4.1 or 6.2 million parameters:

    python -m oel_jax.main --config=experiments/pretrain_pocket.py:boards-6m \
        --workdir=runs/boards-6m/0 --config.seed=0 --config.attention=cudnn --config.workers=14
    python -m oel_jax.main --config=experiments/pretrain_pocket.py:boards-4m \
        --workdir=runs/boards-4m/0 --config.seed=0 --config.attention=cudnn --config.workers=14

Cut off, the same command goes on. It measures the gates every 2,000 steps (`metrics.jsonl`) and at
the end, and leaves `pocket.safetensors`, `tokenizer.model` and `gates.json`, whose `passed` says
whether the weights may be used. Where a gate fails, take more steps (`--config.steps=20000`) or
another seed: whether a policy reads its knowledge depends on it.

How long: on one H200, with workers=8 and gates_every=6000, boards-4m took 0.055 s a step, which
makes 11 minutes of 12,000, and 188 s for the first gates, which compile; those of 512 examples at
the end come on top. It was cut off at step 10,800. At step 6,000 it told the roles apart (wrong 0
of 128, misled at most 1%), wrote down what games reveal (98%), and won without knowledge 14, 8 and
2% (Sokoban, lakes of 4 x 4, of 5 x 5), but with full knowledge only 84, 79 and 48%: it knew where
to go and did not yet find the way. So lakes now are larger and more of them as the game draws them,
and the cells on the way to the goal are spelled out as those of a push are; with that, and to the
end, nothing has been run, nor has boards-6m.
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
