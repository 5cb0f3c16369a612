"""The online loop: deploy → extract → gate → consolidate → evaluate, round after round (OEL
section 3).

Each stage leaves whole files or none, a stage found whole is not done again, and every draw is
named by (seed, round, stage, index), or by all but the round for held-out games: a run that is
killed at any moment goes on when the same command is given, and ends with the same bits on one
machine.

What is found is compared with what was written and with what it was made from (`runtime.manifest`):
weights, knowledge, settings. A measurement of other weights or settings than the present ones is
made again, and the old one kept aside; games and knowledge that other weights made are refused, for
whatever was trained on them would have to go, too.
"""

from typing import Any

from oel_jax import config as config_lib
from oel_jax import report
from oel_jax.runtime import progress
from oel_jax.stages import endpoint, knowledge, user_side
from oel_jax.stages.begin import begin
from oel_jax.stages.collect import collect
from oel_jax.stages.consolidate import consolidate
from oel_jax.stages.deploy import deploy
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.extract import extract
from oel_jax.stages.gate import gate


def run(config: Any, workdir: str, *, resume_anyway: bool = False) -> dict[str, Any]:
  """Runs all rounds in `workdir`, going on with what is there, and writes the report.

  Returns what report/results.json holds.

  Raises:
    ValueError: the configuration is wrong or differs from the run's; a file of the run is damaged,
      or was made from something else than this run has; no knowledge came out; or on_no_gain =
      "stop" and there was no gain.
    OSError: another process runs in `workdir`, or it cannot be written.
  """
  config_lib.validate(config)
  deployed = user_side.check(config, workdir)
  endpoint.reach(config, workdir)
  with begin(config, workdir, resume_anyway) as (this, policy):
    evaluate(this, 0, policy, policy, [])
    for number in range(1, config.rounds + 1):
      before = policy
      if config.logs.path:
        collect(this, number, policy)
      else:
        deploy(this, number, policy)
      texts = extract(this, number, policy)
      trains = gate(this, number, policy, texts)
      texts = knowledge.kept(this, number, texts)
      if trains:
        policy = policy.replace(consolidate(this, number, policy, texts))
      evaluate(this, number, policy, before, texts)
    results = report.write(this.folder)
  rounds = f"{config.rounds} round{'s' if config.rounds > 1 else ''}"
  progress.table(report.rows(results), f"{deployed}, {rounds}")
  print(f"report: {this.folder / 'report' / 'index.html'}", flush=True)
  return results
