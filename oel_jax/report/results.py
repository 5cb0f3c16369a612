"""What a run showed: `report/index.html`, one page opened from disk, its plots as PNG, and the same
numbers in `report/results.json`.

Reads a run directory, finished or not: what has not been measured is said to be so, and files that
are there must be whole. The page shows games, so it stays on the user side.

    python -m oel_jax.report WORKDIR
"""

import dataclasses
import os
import pathlib
from typing import Any

from oel_jax.report import cuts, distilled, page
from oel_jax.report.divergences import Unrelated
from oel_jax.report.gates import Gate
from oel_jax.report.measures import Measure
from oel_jax.report.records import Evaluation, Run, read
from oel_jax.runtime import files, schema

SCHEMA = 1
# What results.json repeats of the configuration, so that it can be read alone.
CONFIG_FIELDS = (
  "seed",
  "rounds",
  "policy.architecture",
  "policy.weights",
  "policy.thinking",
  "logs.path",
  "deployment.environment",
  "deployment.game",
  "deployment.episodes",
  "extraction.texts",
  "extraction.use",
  "extraction.form",
  "extraction.source",
  "extraction.start_from",
  "consolidation.steps",
  "consolidation.later_steps",
  "consolidation.batch_size",
  "consolidation.data",
  "consolidation.kind",
  "consolidation.support",
  "consolidation.temperature",
  "consolidation.learning_rate",
  "consolidation.lora_rank",
  "consolidation.final_rate",
  "consolidation.decay",
  "consolidation.teacher",
  "consolidation.select",
  "consolidation.balance",
  "consolidation.anchor",
  "consolidation.anchor_share",
  "consolidation.anchor_edit",
  "evaluation.episodes",
  "evaluation.retention",
)


def write(workdir: str | os.PathLike) -> dict[str, Any]:
  """Reads the run and writes `report/`: the page, its plots and the numbers. The same run gives the
  same bytes.

  Args:
    workdir: a run directory, at any moment of the run.

  Returns:
    What results.json holds: "base" and, for each evaluated round, an entry of "rounds"; of a run of
    `tasks.distill` what `distilled.summarize` returns. A share or mean NAME stands beside
    NAME_count, the cases that it rests on, and NAME_interval, 95%; all three are None where it was
    not measured. Shares and "recovered" are fractions; "kl" is in nats a token. "choices" is what
    the machine decided (`choices.choose`), None if the run did not say; "costs", of a run of
    rounds, what each stage took (`records.Cost`).

  Raises:
    ValueError: not a run directory, or a damaged file in it; names the file, the field, the value
      seen and what would be right.
    OSError: the report cannot be written; what stood there before still does.
  """
  from oel_jax.report import plots  # here, for it imports Matplotlib

  workdir = pathlib.Path(workdir)
  run = read(workdir)
  light, dark = (plots.draw(run, theme) for theme in (plots.LIGHT, plots.DARK))
  if run.config.get("task") == "distill":
    found = distilled.read(workdir)
    results, html = distilled.summarize(found), distilled.render(run, found, light, dark)
  else:
    results, html = summarize(run), page.render(run, light, dark)
  results["config"] = {name: run.config.get(name) for name in CONFIG_FIELDS}
  results["choices"] = _choices(workdir / "choices.json")
  folder = workdir / "report"
  try:
    folder.mkdir(exist_ok=True)
  except OSError as error:
    raise files.explained(error, folder) from error
  for name, png in light.items():
    files.write_bytes(folder / f"{name}.png", png)
  files.write_json(folder / "results.json", results)
  files.write_text(folder / "index.html", html)
  return results


def _choices(path: pathlib.Path) -> dict[str, str] | None:
  """What the machine decided, name → words; None if there is no such file.

  Raises:
    ValueError: it is damaged.
  """
  return files.read_json(path, _words) if path.exists() else None


def _words(value: Any) -> dict[str, str]:
  """The choices in a choices.json's value, checked."""
  schema.need(schema.get(value, "schema", schema.TOP) == SCHEMA, "schema", value["schema"], "1")
  words = schema.get(value, "choices", schema.TOP, dict)
  for name, word in words.items():
    schema.need(type(word) is str, f"choices.{name}", word, "of type str")
  return words


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
  """The table of rounds for `runtime.progress.table`: the base model, then each evaluated round."""
  table = []
  base = (
    [{"round": "base", **results["base"], "retention": results["base_retention"]}]
    if results["base"]
    else []
  )
  for entry in base + results["rounds"]:
    passed = _percent(entry["passed"])
    if entry["passed_interval"]:
      passed += " [{}, {}]".format(*map(_percent, entry["passed_interval"]))
    row = {"round": str(entry["round"]), "passed % (interval)": passed}
    row["in context %"] = _percent(entry.get("in_context"))
    row["recovered"] = (
      None if entry.get("recovered") is None else f"{100 * entry['recovered']:.0f}%"
    )
    row["response tokens"] = entry["response_tokens"]
    if away := entry.get("held_out"):
      closer = away["closer"]
      row["closer to the teacher"] = None if closer is None else f"{100 * closer:.0f}%"
      row["response tokens"] = away["response_tokens_after"]
    if moved := entry["unrelated"]:
      row["KL to the base"] = f"{moved['kl']:z.4f}"  # 0 of the base, but for rounding
    if sure := entry["own_answers"]:
      row["entropy"] = f"{sure['entropy']:.4f}"
      row[f"top-{sure['k']} mass %"] = _percent(sure["topk_mass"])
    kept = entry["retention"]
    row.update({name: _percent(kept[name]) for name in kept if f"{name}_interval" in kept})
    table.append(row)
  return table


def summarize(run: Run) -> dict[str, Any]:
  """What results.json holds of a run of rounds; see `write`."""
  base = run.evaluations.get(0)
  return {
    "schema": SCHEMA,
    "base": _play_numbers(run, base) if base else None,
    "rounds": [
      _round_numbers(run, evaluation)
      for number, evaluation in sorted(run.evaluations.items())
      if number > 0
    ],
    "base_retention": _retention(run, base),
    "costs": [dataclasses.asdict(cost) for cost in run.costs],
  }


def _round_numbers(run: Run, evaluation: Evaluation) -> dict[str, Any]:
  entry = {"round": evaluation.round, **_play_numbers(run, evaluation)}
  for name in ("in_context", "after_in_context", "first_knowledge"):
    play = getattr(evaluation, name)
    entry.update(_numbers(name, play and play.passed))
    if play and play.categories:
      entry[f"{name}_categories"] = _shares(play.categories)
    if play and play.texts:
      entry[f"{name}_texts"] = [
        {"text": number, **_numbers("passed", passed), **_numbers("cut", cut)}
        for number, passed, cut in play.texts
      ]
  entry["recovered"] = evaluation.recovered
  if away := evaluation.held_out:
    entry["held_out"] = {
      "prompts": away.prompts,
      "withdrawn": away.withdrawn,
      "kl_before": away.kl_before,
      "kl_after": away.kl_after,
      "closer": away.closer,
      **_numbers("response_tokens_before", away.response_tokens_before),
      **_numbers("response_tokens_after", away.response_tokens_after),
    }
  entry["gate"] = _gate_numbers(evaluation.gate) if evaluation.gate else None
  if evaluation.accumulation:
    entry["accumulation"] = [
      {"trajectories": n, **_numbers("passed", passed)} for n, passed in evaluation.accumulation
    ]
  return entry | {"retention": _retention(run, evaluation)}


def _gate_numbers(gate: Gate) -> dict[str, Any]:
  measured = {
    "without": gate.without,
    "with": gate.with_knowledge,
    "kept": gate.kept,
    "cut_without": gate.cut_without,
    "cut_with": gate.cut_with,
  }
  entry = {"decision": gate.decision}
  for name, measure in measured.items():
    entry |= _numbers(name, measure)
  entry["texts"] = [
    {"text": text.number, "p": text.p, "left_out": text.left_out}
    | _numbers("passed", text.passed)
    | _numbers("cut", text.cut)
    for text in gate.texts
  ]
  return entry


def _play_numbers(run: Run, evaluation: Evaluation) -> dict[str, Any]:
  play = evaluation.without
  measured = {name: getattr(play, name) for name in ("passed", "response_tokens", "moves", "leaks")}
  found = {
    key: value
    for name, measure in measured.items()
    for key, value in _numbers(name, measure).items()
  }
  cut = {name: _numbers("cut", share) for name, share in cuts.measured(run, evaluation).items()}
  found |= {"ended": play.ended, "categories": _shares(play.categories), "cut": cut}
  moved = evaluation.unrelated
  found["unrelated"] = _unrelated_numbers(moved) if moved else None
  sure = evaluation.own_answers
  return found | {"own_answers": dataclasses.asdict(sure) if sure else None}


def _unrelated_numbers(moved: Unrelated) -> dict[str, Any]:
  numbers = _numbers("response_tokens", moved.response_tokens)
  return {"prompts": moved.prompts, "kl": moved.kl, **numbers}


def _shares(categories: dict[str, Measure]) -> dict[str, Any]:
  """By category, the share passed with count and interval."""
  return {name: _numbers("passed", share) for name, share in categories.items()}


def _retention(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
  found = evaluation.retention if evaluation else {}
  numbers = {
    key: value for task in run.tasks for key, value in _numbers(task, found.get(task)).items()
  }
  parts = evaluation.retention_categories if evaluation else {}
  return numbers | {f"{task}_categories": _shares(parts[task]) for task in parts}


def _numbers(name: str, measure: Measure | None) -> dict[str, Any]:
  interval = list(measure.interval) if measure and measure.interval else None
  return {
    name: measure and measure.value,
    f"{name}_count": measure and measure.of,
    f"{name}_interval": interval,
  }


def _percent(share: float | None) -> str | None:
  return None if share is None else f"{100 * share:.1f}"
