"""An environment of one's own: guess a number, told whether it is higher or lower.

    python -m oel_jax.main --config=experiments/own_environment.py:qwen3-1.7b \\
        --workdir=runs/number --config.policy.weights=FOLDER

What is played is the class below; `deployment.environment` names it, and `game_args` are its
arguments. The player is not told that the numbers are even: there is something to find out.
"""

import ml_collections

from oel_jax import config as config_lib
from oel_jax.environments import Step

SIZES = ("qwen3-1.7b",)


class EvenNumber:
  """One game: an even number from 2 to `most` is to be guessed."""

  def __init__(self, most: int):
    self.most = most

  def reset(self, seed: int) -> str:
    # Held-out games have odd seeds, all others even: what is hidden must not hang on that.
    self.number = 2 + 2 * (seed // 2 % (self.most // 2))
    return f"A number from 1 to {self.most} is hidden."

  def step(self, action: str) -> Step:
    if not action.isdigit():
      return Step("That is no number.")
    if int(action) == self.number:
      return Step("Right.", done=True, reward=1.0, outcome=f"Right: it was {self.number}.")
    return Step(f"It is {'higher' if int(action) < self.number else 'lower'} than {action}.")


def get_config(size: str = "qwen3-1.7b") -> ml_collections.ConfigDict:
  """`size`: "qwen3-1.7b", whose Hugging Face folder `policy.weights` must name."""
  if size not in SIZES:
    raise ValueError(f"experiments/own_environment.py has no size {size!r}: it must be {SIZES[0]}")
  config = config_lib.default()
  with config.unlocked():
    config.deployment.update(
      environment=f"{__file__}:EvenNumber",
      player="",
      actions="[number], such as [7]",
      action_pattern=r"\[\s*(\d+)\s*\]",
      max_turns=4,
    )
    config.deployment.game_args = ml_collections.ConfigDict(dict(most=20))
  return config
