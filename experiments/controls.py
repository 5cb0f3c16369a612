"""Controls of the Frozen Lake table, one round each: what if the knowledge, the data or the loss
were another?

    python -m oel_jax.main --config=experiments/controls.py:swapped \\
        --workdir=runs/controls/swapped/0 --config.seed=0
"""

import pathlib
import sys

import ml_collections

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import frozen_lake  # noqa: E402

CONTROLS = {
  "own": {},  # the first round of frozen_lake.py:pocket-table, to compare with
  # goal and trap exchanged in every item
  "swapped": {"extraction.edit": "oel_jax.pocket.claims:swap_roles"},
  "empty": {"extraction.source": "empty"},  # the wrapper with nothing in it
  "trajectories": {
    "extraction.source": "trajectories",
    "extraction.max_knowledge_tokens": 480,
  },  # raw transcripts instead of items
  "student-forward_kl": {"consolidation.kind": "forward_kl"},
  "teacher-reverse_kl": {"consolidation.data": "teacher"},  # off-policy
  "teacher-forward_kl": {"consolidation.data": "teacher", "consolidation.kind": "forward_kl"},
  "teacher-imitation": {"consolidation.data": "teacher", "consolidation.kind": "imitation"},
  "topk": {
    "consolidation.support": "topk",
    "consolidation.k": 16,
  },  # the paper's truncation, at a k that matters in this vocabulary
}
SIZES = tuple(CONTROLS)


def get_config(control: str = "own") -> ml_collections.ConfigDict:
  """`control` is a key of CONTROLS."""
  if control not in CONTROLS:
    raise ValueError(
      f"experiments/controls.py has no control {control!r}: it must be one of {', '.join(CONTROLS)}"
    )
  config = frozen_lake.get_config("pocket-table")
  with config.unlocked():
    config.rounds = 1
    config.evaluation.accumulation = ()
    config.consolidation.on_no_gain = "warn"
    config.update_from_flattened_dict(CONTROLS[control])
  return config
