"""Pre-trains the embedded policy; a GPU takes minutes, two CPU cores would take days.

python -m oel_jax.main --config=experiments/pretrain_pocket.py --workdir=runs/pretrain
"""

import ml_collections

SIZES = ("pocket", "pocket-tiny")


def get_config(size: str = "pocket") -> ml_collections.ConfigDict:
  """`size` is "pocket" (the shipped weights) or "pocket-tiny" (the test fixture)."""
  return ml_collections.ConfigDict(
    dict(
      task="pretrain",
      architecture=size,
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
  ).lock()
