"""Logs of a deployed model in, better weights out: no game, no reward, no environment.

    python -m oel_jax.main --config=experiments/from_logs.py:qwen2.5-1.5b --workdir=runs/logs \\
        --config.policy.weights=FOLDER --config.logs.path=FILE_OR_FOLDER

What is read, left out and redacted is told and stands in round_1/user/logs.json. Deploy what
`--stage=export` writes; the next round's logs go where "{round}" in logs.path says:
--config.logs.path='logs/{round}' --config.rounds=2.

Where people answered in the model's place, say so, or what they said is no knowledge:
--config.logs.people='*', or by the names that such messages have, --config.logs.people=ann,ben.
"""

import pathlib

import ml_collections

from oel_jax import config as config_lib

HERE = pathlib.Path(__file__).parent
SIZES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-1.7b", "qwen3-4b")


def get_config(size: str = "qwen2.5-1.5b") -> ml_collections.ConfigDict:
  """`size`: one of SIZES, whose Hugging Face folder or GGUF file `policy.weights` must name."""
  if size not in SIZES:
    raise ValueError(
      f"experiments/from_logs.py has no size {size!r}: it must be one of {', '.join(SIZES)}"
    )
  config = config_lib.default()
  with config.unlocked():
    config.rounds = 1
    config.policy.thinking = False
    # Conversations whose turns become prompts, and those that each knowledge text reads.
    config.deployment.update(environment="", episodes=512, max_response_tokens=256)
    # Nearly greedy: what a small model writes down at 0.7 is often not what it was told.
    config.extraction.update(
      trajectories=30,
      use=30,
      wording="conversations",
      answered_only=True,
      temperature=0.1,
      # What a policy alone said is no knowledge: after round 1 the logs are full of its own words,
      # wrong ones too, the same way each time. Where people answered, logs.people says so.
      told_by_others=True,
      newest_wins=True,
      repeats=False,
      max_knowledge_tokens=2048,
      max_response_tokens=128,
    )
    # There is nothing to play: whether knowledge helps is for tasks of one's own to say. The rate
    # is the help desk's, where three times as much forgot most of what was not asked for
    # (experiments/README.md).
    config.consolidation.update(gate_episodes=0, learning_rate=3e-6, steps=300, batch_size=32)
    config.consolidation.checkpoint_every = 50
    config.evaluation.update(episodes=64, in_context=False, retention=256)
    config.evaluation.tasks = ("oel_jax.evaluation.instructions:instructions",)
    config.evaluation.unrelated = str(HERE / "data/unrelated.txt")
  return config
