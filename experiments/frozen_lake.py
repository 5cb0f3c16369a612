"""Frozen Lake, 3 × 3 with two holes: on the embedded policy, the whole loop in minutes on two CPU
cores; and the paper's Qwen3 settings.

    python -m oel_jax.main --config=experiments/frozen_lake.py:pocket --workdir=runs/quickstart
    python -m oel_jax.main --config=experiments/frozen_lake.py:pocket-table \\
        --workdir=runs/table/0 --config.seed=0
    python -m oel_jax.main --config=experiments/frozen_lake.py:pocket-4x4 \\
        --workdir=runs/4x4/0 --config.seed=0
    python -m oel_jax.main --config=experiments/frozen_lake.py:qwen3-1.7b \\
        --workdir=runs/1.7b --config.policy.weights=FOLDER
"""

import ml_collections

from oel_jax import config as config_lib

POCKET = ("pocket", "pocket-table", "pocket-4x4")
# What the embedded policy must not lose.
RETENTION = tuple(
  f"oel_jax.pocket.retention:{task}" for task in ("extraction", "worlds", "symmetric", "other")
)
# OEL, section 4 and appendix: form of the knowledge, trajectories accumulated and used, whether the
# extractor sees what is known, longest knowledge, learning rate, steps a round. What all have in
# common are the defaults of config.py.
PAPER = {
  "qwen3-1.7b": dict(
    form="text",
    trajectories=30,
    use=15,
    see_previous=False,
    max_knowledge_tokens=2048,
    learning_rate=5e-6,
    steps=20,
  ),
  "qwen3-4b": dict(
    form="items",
    trajectories=50,
    use=25,
    see_previous=True,
    max_knowledge_tokens=8192,
    learning_rate=1e-6,
    steps=20,
  ),
  "qwen3-8b": dict(
    form="items",
    trajectories=100,
    use=50,
    see_previous=True,
    max_knowledge_tokens=8192,
    learning_rate=1e-6,
    steps=100,
  ),
}
AS_IT_IS = "-paper"  # behind a key of PAPER: the paper's update, too
SIZES = (*POCKET, *PAPER, *(f"{size}{AS_IT_IS}" for size in PAPER))


def get_config(size: str = "pocket") -> ml_collections.ConfigDict:
  """`size`: "pocket" is the quickstart, "pocket-table" has 512 held-out maps, "pocket-4x4" is the
  same on 4 × 4 with three holes; a key of PAPER has the paper's constants for that model, whose
  Hugging Face folder `policy.weights` must name, with steps of 64 prompts of a round's 64 games and
  the exact divergence; with AS_IT_IS behind it, it has the paper's update (`papers_update`).
  """
  if size in POCKET:
    return _pocket(size)
  if size.removesuffix(AS_IT_IS) in PAPER:
    config = _paper(size.removesuffix(AS_IT_IS))
    return papers_update(config) if size.endswith(AS_IT_IS) else config
  raise ValueError(
    f"experiments/frozen_lake.py has no size {size!r}: it must be one of {', '.join(SIZES)}"
  )


def papers_update(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The configuration with what an update of the paper's is: all the prompts of 64 games, 64 new
  ones each step, and the divergence over the student's top 256 tokens. The prompts' words are ours.
  """
  with config.unlocked():
    config.consolidation.update(games_per_step=64, support="topk", k=256)
    config.deployment.episodes = 64 * config.consolidation.steps
  return config


def _paper(size: str) -> ml_collections.ConfigDict:
  config, values = config_lib.default(), dict(PAPER[size])
  with config.unlocked():
    config.rounds = 2
    config.consolidation.update(
      learning_rate=values.pop("learning_rate"), steps=values.pop("steps")
    )
    config.extraction.update(values)
  return config


def _pocket(size: str) -> ml_collections.ConfigDict:
  config = config_lib.default()
  with config.unlocked():
    config.rounds = 3
    config.policy.update(architecture="pocket", weights="pocket", max_prompt_tokens=1024)
    config.deployment.update(episodes=48, max_response_tokens=96)
    config.extraction.update(
      texts=8,
      trajectories=16,
      use=16,
      start_from="previous_round",
      max_knowledge_tokens=192,
      max_response_tokens=32,
    )
    config.consolidation.update(
      steps=24,
      batch_size=16,
      remat="none",
      learning_rate=1e-4,
      on_no_gain="skip",
      checkpoint_every=8,
      gate_episodes=32,
    )
    config.evaluation.update(episodes=64, tasks=RETENTION, retention=32, accumulation=(4,))
    if size == "pocket":
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
