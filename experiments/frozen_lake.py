"""Frozen Lake, 3 × 3 with two holes, on the embedded policy: the whole loop in minutes on two CPU cores.

    python -m oel_jax.main --config=experiments/frozen_lake.py:pocket --workdir=runs/quickstart
    python -m oel_jax.main --config=experiments/frozen_lake.py:pocket-table --workdir=runs/table/0 --config.seed=0
    python -m oel_jax.main --config=experiments/frozen_lake.py:pocket-4x4 --workdir=runs/4x4/0 --config.seed=0
"""

import ml_collections

from oel_jax import config as config_lib

SIZES = ("pocket", "pocket-table", "pocket-4x4")


def get_config(size: str = "pocket") -> ml_collections.ConfigDict:
  """`size`: "pocket" is the quickstart, "pocket-table" has 512 held-out maps, "pocket-4x4" is the same on 4 × 4 with three holes."""
  if size not in SIZES:
    raise ValueError(f"experiments/frozen_lake.py has no size {size!r}: it must be one of {', '.join(SIZES)}")
  config = config_lib.default()
  with config.unlocked():
    config.rounds = 3
    config.policy.update(architecture="pocket", weights="pocket", max_prompt_tokens=1024)
    config.deployment.update(episodes=48, max_response_tokens=96)
    config.extraction.update(
        texts=8, trajectories=16, use=16, start_from="previous_round", max_knowledge_tokens=192, max_response_tokens=32
    )
    config.consolidation.update(
        steps=24, batch_size=16, remat="none", learning_rate=1e-4, on_no_gain="skip", checkpoint_every=8, gate_episodes=32
    )
    config.evaluation.update(episodes=64, retention=32, accumulation=(4,))
    if size == "pocket":  # ten minutes on two cores
      config.rounds = 2
      config.consolidation.steps = 16
    else:
      config.deployment.episodes = 64
      config.consolidation.gate_episodes = 64
      config.evaluation.update(episodes=512, retention=512, accumulation=(1, 2, 4, 8))
    if size == "pocket-4x4":
      config.deployment.max_turns = 8
      config.deployment.game_args.update(size=4, num_holes=3)
  return config
