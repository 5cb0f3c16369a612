"""One stage of a run alone: `python -m oel_jax.main --stage=NAME --round=N ...`.

The user side (deploy, extract, evaluate) and the server side (consolidate) can so be two machines.
From the one to the other go round_N/knowledge and round_N/prompts.jsonl, and nothing else of a run
directory; round_N/checkpoints comes back. The server side imports no environment.
"""

import importlib
from typing import Any

from oel_jax import config as config_lib
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.stages import knowledge, resume
from oel_jax.stages.begin import begin
from oel_jax.stages.consolidate import consolidate
from oel_jax.stages.run import DEPLOYED, EVALUATION, KNOWLEDGE, Run

STAGES = ("deploy", "extract", "consolidate", "evaluate")


def run(config: Any, workdir: str, *, stage: str, number: int, resume_anyway: bool = False) -> None:
  """Runs one of STAGES of round `number` in `workdir`; says what is to be carried where.

  Args:
    config: of the whole run, on both sides.
    workdir: the run's directory, or the server side's part of it.
    stage: "deploy" plays, or reads the logs; "extract" writes the knowledge and plays the gate;
      "consolidate" trains; "evaluate" plays the held-out games.
    number: of the round, from 1; 0 is the base model's, which is only evaluated.
    resume_anyway: as for a whole run.

  Raises:
    ValueError: as `loop.run`; or there is no such round, or what the stage reads is not there, or
      the gate's decision is that the round is not consolidated.
    OSError: as `loop.run`.
  """
  if "task" in config:
    raise ValueError(f"--stage={stage}: only a run of rounds has it, and config.task is set")
  config_lib.validate(config)
  first = 0 if stage == "evaluate" else 1
  if not first <= number <= config.rounds:
    raise ValueError(
      f"--round={number} for --stage={stage}: it must be from {first} to config.rounds "
      f"({config.rounds})"
    )
  if stage != "consolidate":  # here, for it brings environments
    importlib.import_module("oel_jax.stages.user_side").check(config, workdir)
  if stage == "deploy":
    importlib.import_module("oel_jax.stages.endpoint").reach(config, workdir)
  with begin(config, workdir, resume_anyway) as (this, policy):
    {
      "deploy": _deploy,
      "extract": _extract,
      "consolidate": _consolidate,
      "evaluate": _evaluate,
    }[stage](this, number, policy)


def _deploy(run: Run, number: int, policy: Policy) -> None:
  from oel_jax.stages.collect import collect
  from oel_jax.stages.deploy import deploy

  begin_with = collect if run.config.logs.path else deploy
  begin_with(run, number, resume.weights_before(run, number, policy))
  print(f"round {number}: deployed; next is --stage=extract", flush=True)


def _extract(run: Run, number: int, policy: Policy) -> None:
  from oel_jax.stages.extract import extract
  from oel_jax.stages.gate import gate

  if not knowledge.read(run, number):
    _need(run, number, DEPLOYED, "give --stage=deploy first")
  policy = resume.weights_before(run, number, policy)
  texts = extract(run, number, policy)
  told = f"round {number}: not to be consolidated; next is --stage=evaluate"
  if gate(run, number, policy, texts):
    carried = f"{run.round(number)}/knowledge and {run.prompts(number).name}"
    told = f"round {number}: for --stage=consolidate, the server side needs {carried}"
  print(told, flush=True)


def _consolidate(run: Run, number: int, policy: Policy) -> None:
  for name in (KNOWLEDGE, run.prompts(number).name):
    _need(run, number, name, "carry knowledge/ and prompts.jsonl here from the user side")
  gate = run.gate(number)
  if gate and gate["decision"] == "skip":
    raise ValueError(
      f"round {number}: play with the knowledge was worse, and config.consolidation.on_no_gain is "
      '"skip": it is not consolidated; next is --stage=evaluate'
    )
  policy = resume.weights_before(run, number, policy)
  consolidate(run, number, policy, _texts(run, number))
  told = f"{run.round(number)}/checkpoints"
  print(f"round {number}: for --stage=evaluate, the user side needs {told}", flush=True)


def _evaluate(run: Run, number: int, policy: Policy) -> None:
  from oel_jax.stages.evaluate import evaluate

  if number == 0:
    evaluate(run, 0, policy, policy, [])
    return
  _need(run, number - 1, EVALUATION, f"give --stage=evaluate --round={number - 1} first")
  _need(run, number, KNOWLEDGE, "give --stage=extract first")
  before = resume.weights_before(run, number, policy)
  after = resume.weights_before(run, number + 1, policy)
  evaluate(run, number, after, before, _texts(run, number))


def _texts(run: Run, number: int) -> list[str]:
  return knowledge.kept(run, number, knowledge.texts(run, number))


def _need(run: Run, number: int, name: str, advice: str) -> None:
  path = run.round(number) / name
  if not path.exists():
    raise ValueError(f"{path}: is not there, and this stage reads it: {advice}")
