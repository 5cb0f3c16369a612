"""Evaluation: held-out maps, the same in every round, without knowledge and with it; what was kept;
and held-out conversations, where logs are learned from.
"""

from collections.abc import Sequence
from typing import Any

from oel_jax.conversations.jsonl import read_conversations
from oel_jax.conversations.schema import Conversation
from oel_jax.evaluation import episodes, statistics, tasks
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.report import records
from oel_jax.runtime import files, schema
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.manifest import differing
from oel_jax.runtime.seeds import derive
from oel_jax.stages import extract, held_out, knowledge, own_answers, play, unrelated
from oel_jax.stages.run import DEPLOYED, EVALUATION, HELD_OUT, PROMPT_GAMES, Run, made_from

TEACHER = "teacher's weights"  # an input of evaluation.json where they are not "weights before"


def evaluate(run: Run, number: int, policy: Policy, before: Policy, texts: Sequence[str]) -> None:
  """Writes evaluation.json; one that was measured with others than these is set aside.

  Args:
    run: the run.
    number: of the round; 0 for the base model.
    policy: what is measured.
    before: the policy that the round began with, which wrote its knowledge.
    texts: the round's knowledge, without what its gate left out.
  """
  path, gate = run.round(number) / EVALUATION, run.gate(number)
  carried = number > 1 and run.config.evaluation.in_context and texts
  first = knowledge.kept(run, 1, knowledge.texts(run, 1)) if carried else []
  base = None
  # Of the round before, whose policy wrote this round's knowledge; not of the run's first.
  if number and run.config.deployment.environment:
    measured = run.round(number - 1) / EVALUATION
    base = records.read_evaluation(measured, number - 1).without.passed.value
  inputs = made_from(policy, texts) | {
    "weights before": fingerprint(before.params),
    "first knowledge": schema.digest(first),
    "gate": schema.digest(gate and gate["decision"]),
    "base": schema.digest(base),
    "settings": play.settings(run.config, all_of_it=True),
  }
  if run.teacher(before) is not before:
    inputs[TEACHER] = fingerprint(run.teacher(before).params)
  if (prompts := run.round(number) / HELD_OUT).exists():
    inputs[HELD_OUT] = files.sha256(prompts)[:16]
  if run.config.evaluation.unrelated or run.config.evaluation.own_answers:
    inputs["base's weights"] = fingerprint(run.base.params)
  if path.exists():
    measured_from = records.read_evaluation(path, number).made_from
    # Earlier versions do not say from which prompts: they stay as they are.
    told = [name for name in inputs if name != HELD_OUT or name in measured_from]
    changed = differing(measured_from, {name: inputs[name] for name in told})
    # A teacher of its own that there was, and is none of now.
    changed += [TEACHER] * (TEACHER in measured_from.keys() - inputs.keys())
    if not changed:
      return
    files.set_aside(path, f"it was measured with other {', '.join(changed)}")
  found = _measure(run, number, policy, before, texts, first)
  # Of a game that has changed since, the round before was measured on another one.
  if number and "in_context" in found and not (number > 1 and _changes(run)):
    rates = [found[name]["passed"]["rate"] for name in ("without", "in_context")]
    found["recovered"] = statistics.recovered(rates[0], base, rates[1])
  _log(run, number, found)
  head = {"schema": 1, "round": number, "made_from": inputs}
  path.parent.mkdir(exist_ok=True)
  files.write_sealed(path, head | found | {"gate": gate})


def _changes(run: Run) -> bool:
  from oel_jax.environments import changes  # here, for who begins from logs may have no game

  return changes(run.config.deployment)


def _measure(
  run: Run,
  number: int,
  policy: Policy,
  before: Policy,
  texts: Sequence[str],
  first: Sequence[str],
) -> dict[str, Any]:
  """The games of every kind, and the tasks."""
  config = run.config.evaluation
  # What is played: a name, by whom, and with which knowledge in the prompt.
  plays = {"without": (policy, [])} if run.config.deployment.environment else {}
  if plays and config.in_context and texts:
    plays |= {"in_context": (run.teacher(before), texts), "after_in_context": (policy, texts)}
    plays |= {"first_knowledge": (policy, first)} if first else {}
  steps = config.accumulation if 1 <= number <= config.accumulation_rounds else ()
  curve = {step: extract.texts_after(run, number, step, before) for step in steps}
  kept = tasks.read_tasks(config.tasks)
  total = config.episodes * (len(plays) + len(curve)) + config.retention * len(kept)
  limit = run.config.deployment.max_response_tokens
  found = {"without": episodes.play_summary([], limit)}  # what no environment can say
  without: list[Conversation] = []
  with run.stage(number, "evaluate", policy, total) as (meter, advance):

    def summary(name: str, player: Policy, given: Sequence[str]) -> dict[str, Any]:
      meter.policy = player
      games = play.held_out(run, number, name, given)
      played = play.play(run, number, games, meter, advance)
      result = episodes.play_summary(played, limit)
      without.extend(played if name == "without" else ())
      if name == "in_context":
        result["texts"] = _by_text(run, number, play.by_text(run, number, games, played))
      return result

    for name, (player, given) in plays.items():
      found[name] = summary(name, player, given)
    meter.policy = policy
    if number and run.config.logs.path:
      found["held_out"] = held_out.measure(run, number, policy, before, texts, meter)
    found["unrelated"] = unrelated.measure(run, policy, meter)
    found["own_answers"] = own_answers.measure(run, policy, without, meter)
    found["accumulation"] = [
      {
        "trajectories": step,
        "passed": summary(f"after_{step:03d}_trajectories", run.teacher(before), given)["passed"],
      }
      for step, given in curve.items()
    ]
    meter.policy = policy
    thinking = run.config.policy.thinking
    examinee = tasks.Examinee(meter, run.sampling("evaluation"), limit, thinking)
    seed = derive(run.config.seed, "retention")
    found["retention"] = tasks.measure(kept, examinee, config.retention, seed=seed, advance=advance)
  found["deployed_cut"] = _deployed_cut(run, number)
  return found


def _by_text(
  run: Run, number: int, groups: Sequence[Sequence[Conversation]]
) -> list[dict[str, Any]]:
  """What each text's games show, by its number; of those that were played at all."""
  out, limit = knowledge.left_out(run, number), run.config.deployment.max_response_tokens
  names = [name for name in knowledge.numbers(run, number) if name not in out]
  return [
    {
      "text": name,
      "passed": statistics.count(sum(bool(game.passed) for game in games), len(games)),
      "cut": episodes.cut(games, limit),
    }
    for name, games in zip(names, groups, strict=True)
    if games
  ]


def _deployed_cut(run: Run, number: int) -> dict[str, Any]:
  """The share of responses that the limit cut of the games that the round deployed; of logs nobody
  knows it.
  """
  names = {} if run.config.logs.path else {"knowledge": DEPLOYED, "prompts": PROMPT_GAMES}
  found, limit = {}, run.config.deployment.max_response_tokens
  for what, name in names.items():
    if (path := run.round(number) / name).exists():
      found[what] = episodes.cut(read_conversations(path, max_damaged=0.0), limit)
  return found


def _log(run: Run, number: int, found: dict[str, Any]) -> None:
  ways = ("without", "in_context", "after_in_context", "first_knowledge")
  played = [name for name in ways if name in found and found[name]["passed"]["of"]]
  scalars = {f"passed_{name}": found[name]["passed"]["rate"] for name in played}
  scalars |= {f"retention_{name}": share["rate"] for name, share in found["retention"].items()}
  if played:
    scalars["response_tokens"] = found["without"]["response_tokens"]["mean"]
    scalars["cut"] = found["without"]["cut"]["rate"]
  if away := found.get("held_out"):
    scalars |= {f"held_out_{name}": away[name] for name in ("kl_before", "kl_after")}
    scalars |= {f"held_out_{name}": away[name]["rate"] for name in ("cut_before", "cut_after")}
  if moved := found["unrelated"]:
    scalars["unrelated_kl"] = moved["kl"]
  if sure := found["own_answers"]:
    scalars |= {f"own_{name}": sure[name] for name in ("entropy", "topk_mass", "kl")}
  # A task that had no examples has no share.
  scalars = {name: value for name, value in scalars.items() if value is not None}
  if scalars:
    run.log(number, "evaluate", **scalars)
