"""What is found in a run directory, compared with what the run now has, before anything is built on
it.
"""

from typing import Any

from oel_jax.consolidation import restore
from oel_jax.extraction import state as extraction_state
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.report import records
from oel_jax.runtime import files, schema, together
from oel_jax.runtime.checksum import fingerprint
from oel_jax.stages import knowledge
from oel_jax.stages.run import (
  CHECKPOINTS,
  DEPLOYED,
  EVALUATION,
  GATE,
  OLD_PROMPTS,
  PROMPT_GAMES,
  PROMPTS,
  Run,
)


def check(run: Run, policy: Policy) -> None:
  """Compares what is in the directory with what was written, before any work is done; `policy` is
  the one that the run begins with.

  Raises:
    ValueError: a file is damaged; or a round was built on weights that the run no longer has, or
      that would now be trained further.
  """
  records.read(run.folder)
  for path in run.folder.glob("round_*/user/extraction.jsonl"):
    extraction_state.check(path)
  for path in run.folder.glob("round_*/user/extraction.json"):  # an earlier version's
    files.read_json(
      path, advice="restore it from a copy, or delete it to extract anew where that has not ended"
    )
  refuse_other_weights(run, 1, policy)
  for number in range(1, run.config.rounds + 1):
    _check_steps(run, number)


def weights_before(run: Run, number: int, policy: Policy) -> Policy:
  """Returns the policy that round `number` begins with: `policy`, the run's first, with the weights
  of the newest round before that was consolidated.

  Raises:
    ValueError: the round before was neither consolidated to the end nor skipped by its gate.
  """
  for earlier in range(number - 1, 0, -1):
    gate = run.gate(earlier)
    if gate and gate["decision"] == "skip":
      continue
    params = _trained(run, earlier, policy)
    if params is None:
      folder, steps = run.round(earlier) / CHECKPOINTS, run.consolidation(earlier).steps
      raise ValueError(
        f"{folder}: must hold step {steps}, for what is asked needs the weights of round "
        f"{earlier}: give --stage=consolidate --round={earlier} where its prompts are, or carry "
        f"that folder here (or {GATE}, if it says that the round is not consolidated)"
      )
    return policy.replace(params)
  return policy


@together.everywhere
def _trained(run: Run, number: int, policy: Policy) -> Any:
  """The parameters that round `number` ended with; None if it has not come so far."""
  folder = run.round(number) / CHECKPOINTS
  params = restore.trained_params(run.consolidation(number), policy, folder, run.mesh)
  if params is not None:
    together.share(f"{together.WEIGHTS} {number}", params)
  return params


def _check_steps(run: Run, number: int) -> None:
  """A round that would now be trained further has its evaluation set aside, and is refused if the
  next one was built on it.
  """
  steps = restore.steps_done(run.round(number) / CHECKPOINTS)
  trained = run.manifest(number).made_from(CHECKPOINTS)  # by an earlier version, unknown
  steps, planned = int(trained["steps"]) if trained else steps, run.consolidation(number).steps
  if not 0 < steps < planned:
    return
  if restore.only_weights(run.round(number) / CHECKPOINTS):
    folder = run.round(number) / CHECKPOINTS / restore.WEIGHTS
    raise ValueError(restore.weights_only(folder, steps, planned))
  why = (
    f"config.consolidation.steps or later_steps is {planned}, round {number} has been trained for "
    f"{steps}"
  )
  if any(run.round(number + 1).rglob("*.jsonl")):
    raise ValueError(
      f"{why}, and round {number + 1} was built on those weights: set it to {steps}, choose "
      f"another --workdir, or remove the folders round_{number + 1} and later ones to have "
      "these rounds done again"
    )
  files.set_aside(run.round(number) / EVALUATION, why)


def refuse_other_weights(run: Run, number: int, policy: Policy) -> None:
  """Raises ValueError if the round's games or knowledge were made by, or from, something else than
  the run now has.
  """
  folder, manifest, weights = run.round(number), run.manifest(number), fingerprint(policy.params)
  for name in (DEPLOYED, PROMPT_GAMES, PROMPTS, OLD_PROMPTS, "knowledge/00.jsonl"):
    made_from = manifest.made_from(name)
    if made_from is None:
      continue
    now = {"weights": weights} if "weights" in made_from else {}  # of logs, nobody knows whose
    now |= {
      file: files.sha256(folder / file)[:16] for file in made_from if (folder / file).is_file()
    }
    if number > 1 and "previous knowledge" in made_from:
      before = [text.text for text in knowledge.carried(run, number - 1)]
      now["previous knowledge"] = schema.digest(before)
    changed = manifest.changed(name, made_from | now)
    if changed:
      raise ValueError(
        f"{folder / name}: made from other {', '.join(changed)} than round {number} "
        "has now: give the configuration that it "
        f"was made with, choose another --workdir, or remove the folders round_{number} and "
        "later ones to have these rounds done again"
      )
