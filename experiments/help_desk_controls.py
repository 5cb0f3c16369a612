"""Controls of the help desk's table, one round each: what if the knowledge, its writer, the samples
or the loss were another?

    python -m oel_jax.main --config=experiments/help_desk_controls.py:trajectories \\
        --workdir=runs/desk_controls/trajectories/0 --config.seed=0 \\
        --config.policy.weights=FOLDER_OR_GGUF

`other` has the knowledge written by another model, --config.extraction.weights=FOLDER_OR_GGUF.
"""

import pathlib
import sys

import ml_collections

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import help_desk  # noqa: E402

NO_ITEMS = {  # off, for these are of items alone
  "extraction.min_support": 1,
  "extraction.told_by_others": False,
  "extraction.newest_wins": False,
  "extraction.repeats": True,
}
CONTROLS = {
  # the first round of help_desk.py:desk, and in context what fewer conversations teach (Figure 4)
  "own": {"evaluation.accumulation": (10, 30, 100, 200)},
  "other": {},  # Table 2
  "trajectories": NO_ITEMS | {"extraction.source": "trajectories"},  # Table 1
  "empty": NO_ITEMS | {"extraction.source": "empty"},
  "teacher-reverse_kl": {"consolidation.data": "teacher"},  # off-policy: Figure 6
  "teacher-forward_kl": {"consolidation.data": "teacher", "consolidation.kind": "forward_kl"},
  "teacher-imitation": {"consolidation.data": "teacher", "consolidation.kind": "imitation"},
}
SIZES = tuple(CONTROLS)


def get_config(control: str = "own") -> ml_collections.ConfigDict:
  """`control` is a key of CONTROLS."""
  if control not in CONTROLS:
    known = ", ".join(CONTROLS)
    raise ValueError(
      f"experiments/help_desk_controls.py has no control {control!r}: it must be one of {known}"
    )
  config = help_desk.get_config("desk")
  with config.unlocked():
    config.rounds = 1
    config.update_from_flattened_dict(CONTROLS[control])
  return config
