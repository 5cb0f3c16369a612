"""The page of `report`: one file that loads nothing and runs nothing.

Whatever a model, a game or a user wrote passes through `escape`; `note` and `_section` escape what
they are given.
"""

import base64
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from oel_jax.conversations.schema import ENDED, Conversation, Message
from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.report.parts import (
  NONE,
  STYLE,
  escape,
  mean_cell,
  minus,
  note,
  percent_of,
  percent_range,
  share_cell,
  show_seconds,
  show_si,
  show_tokens,
  signed,
  table,
)
from oel_jax.report.records import Cost, Evaluation, Gate, Run

SHOWN_GAMES = 2
# In the order of a round.
_STAGES = (
  "deploy",
  "extract",
  "prefixes",
  "gate",
  "consolidate",
  "evaluate",
)
_ENDED_WORDS = {
  "passed": "passed",
  "lost": "lost",
  "invalid": "invalid move",
  "turn_limit": "out of turns",
}
_DECISIONS = {
  "train": "knowledge helps in context: trained on it",
  "warn": "no clear gain in context: trained on it all the same, with a warning",
  "skip": "no clear gain in context: not trained on it",
}
_RETENTION_WORDS = {
  "extraction": "writes down what a record shows",
  "worlds": "wins other worlds, told their rules",
  "symmetric": "wins where layout gives no hint",
  "other": "small text tasks, answered exactly",
}


def render(run: Run, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
  """Returns the page as HTML.

  Args:
    run: what `run.read` found.
    light: PNG files of `plots.draw` by name.
    dark: the same plots, shown where the reader's system is in dark mode.
  """
  model, own = run.config.get("policy.architecture"), run.config.get("deployment.environment")
  game = run.config.get("deployment.game") if own in (None, "textarena") else own
  subtitle = " · ".join(str(part) for part in (game, model, _planned(run)) if part)
  sections = [
    _section("Rounds", _rounds(run)),
    _section("Curves", _plots(run, light, dark)),
    _section("How games ended", _ended(run)),
    _section("Does the knowledge help in context?", _gates(run)),
    _section("Held-out games, before and after", _games(run)),
    _section("Knowledge", _knowledge(run)),
    _section("Cost", _costs(run)),
    _section("Configuration", _configuration(run)),
  ]
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(run.name)} – oel_jax</title>
<style>{STYLE}</style>
</head>
<body><main>
<header>
<div class="dim">Online Experiential Learning</div>
<h1>{escape(run.name)}</h1>
<div class="dim">{escape(subtitle)}</div>
<p class="lead">{escape(summary(run))}</p>
</header>
{"".join(sections)}
<footer>Shares come with Wilson’s 95% interval, means with a 95% interval. The same
numbers, with their counts, are in results.json beside this page. The page shows games as they were
played: treat it as you treat your users’ data.</footer>
</main></body>
</html>
"""


def summary(run: Run) -> str:
  """What happened, in a few sentences made of the numbers. "After" is the last evaluated round, not
  the best one.
  """
  base, last = (
    run.evaluations.get(0),
    max((number for number in run.evaluations if number > 0), default=None),
  )
  if base is None and last is None:
    return "Nothing has been measured yet: neither the base model nor any round has an evaluation."
  text = []
  if base is not None:
    text.append(f"Without knowledge in its prompt, the base model passed {_spoken(base)}.")
  else:
    text.append("The base model has no evaluation, so there is nothing to compare the rounds with.")
  if last is None:
    return " ".join([*text, "No round has been evaluated yet."])
  after = run.evaluations[last]
  text.append(f"After round {last} the model passed {_spoken(after)}.")
  if base is not None:
    a, b = base.without.passed.interval, after.without.passed.interval
    if a and b and a[0] <= b[1] and b[0] <= a[1]:
      text.append(
        "The two intervals overlap: so many games may not be enough to tell the two apart."
      )
    a, b = base.without.response_tokens.value, after.without.response_tokens.value
    if a and b is not None:
      text.append(
        f"A response went from {show_tokens(a)} to {show_tokens(b)} tokens a turn "
        f"({signed(100 * (b / a - 1))}%)."
      )
  if missing := [number for number in range(1, run.rounds + 1) if number not in run.evaluations]:
    text.append(
      f"Not evaluated yet: round{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}."
    )
  return " ".join(text)


def _planned(run: Run) -> str:
  done = sum(number > 0 for number in run.evaluations)
  return (
    f"{done} of {run.rounds} round{'s' if run.rounds != 1 else ''} evaluated" if run.rounds else ""
  )


def _spoken(evaluation: Evaluation) -> str:
  passed = evaluation.without.passed
  if passed.value is None:
    return "none of 0 held-out games"
  interval = f" (95% interval {percent_range(passed)})" if passed.interval else ""
  return f"{100 * passed.value:.1f}% of {passed.of} held-out games{interval}"


def _section(title: str, body: str) -> str:
  return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _rounds(run: Run) -> str:
  head = (
    "Round",
    "Passed",
    "In context, before",
    "In context, after",
    "Round 1’s knowledge, after",
    "Recovered",
    "Tokens a turn",
    "Turns a game",
    "Leaks",
  )
  lines, retained = [], []
  for number in range(run.rounds + 1):
    label, evaluation = _label(number), run.evaluations.get(number)
    if evaluation is None:
      lines.append(
        [
          f"<td>{label}</td>",
          f'<td class="left none" colspan="{len(head) - 1}">not measured yet</td>',
        ]
      )
      continue
    play = evaluation.without
    contexts = [
      other and other.passed
      for other in (evaluation.in_context, evaluation.after_in_context, evaluation.first_knowledge)
    ]
    recovered = (
      NONE
      if evaluation.recovered is None
      else f"<td>{minus(f'{100 * evaluation.recovered:.0f}')}%</td>"
    )
    lines.append(
      [
        f"<td>{label}</td>",
        share_cell(play.passed, main=True),
        *map(share_cell, contexts),
        recovered,
        mean_cell(play.response_tokens, "turns"),
        mean_cell(play.moves, "games"),
        share_cell(play.leaks),
      ]
    )
    retained.append(
      [f"<td>{label}</td>", *(share_cell(evaluation.retention.get(task)) for task in run.tasks)]
    )
  return (
    table(head, lines)
    + _meanings()
    + "<h3>What else the model can do</h3>"
    + (
      table(
        (
          "Round",
          *(
            f"{task.capitalize()}<br><small>{_RETENTION_WORDS.get(task, '')}</small>"
            for task in run.tasks
          ),
        ),
        retained,
      )
      if run.tasks
      else note("Not measured.")
    )
  )


def _meanings() -> str:
  meanings = {
    "Passed": "held-out games won with no knowledge in the prompt.",
    "In context, before": "the round’s first weights with the round’s knowledge in the prompt: "
    "what there is to consolidate.",
    "In context, after": "the consolidated weights with that knowledge still in the prompt.",
    "Recovered": "gain of the weights as a share of the gain in context; says little where the "
    "gain in context is small.",
    "Leaks": "answers that talk about the knowledge given, though none is there.",
  }
  return (
    "<dl>"
    + "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in meanings.items())
    + "</dl>"
  )


def _plots(run: Run, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
  plots = (
    ("passed", "", "Games passed", "Held-out games, 95% intervals."),
    (
      "response_tokens",
      "",
      "Response length",
      "Thinking and answer, mean over turns, 95% intervals.",
    ),
    (
      "accumulation",
      "wide",
      "More experience in context",
      "Played with round 1’s knowledge after so many trajectories.",
    ),
    (
      "consolidation",
      "wide",
      "Consolidation, step by step",
      "From metrics.jsonl; rounds are marked.",
    ),
  )
  absent = note("Not measured." if 1 in run.evaluations else "Not measured yet.")
  figures = []
  for name, kind, title, about in plots:
    caption = f"<figcaption>{title}<small>{about}</small></figcaption>"
    picture = absent
    if name in light:
      picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark[name])}">'
        f'<img alt="{title}: plot of the numbers in this report" '
        f'src="{_data(light[name])}"></picture>'
      )
    figures.append(f'<figure class="{kind}">{caption}{picture}</figure>')
  return f'<div class="plots">{"".join(figures)}</div>'


def _data(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _ended(run: Run) -> str:
  if not run.evaluations:
    return note("Not measured yet.")
  head = [
    "Round",
    "Share of games",
    *(f'<i class="dot {name}"></i>{_ENDED_WORDS[name]}' for name in ENDED),
  ]
  lines = []
  for number, evaluation in sorted(run.evaluations.items()):
    counts = evaluation.without.ended
    bar = "".join(
      f'<i class="{name}" style="flex:{count}"></i>' for name, count in counts.items() if count
    )
    cells = [
      f"<td>{count}<small>{percent_of(count, sum(counts.values()))}</small></td>"
      for count in counts.values()
    ]
    lines.append([f"<td>{_label(number)}</td>", f'<td><div class="bar">{bar}</div></td>', *cells])
  return table(head, lines, left=["Share of games"]) + note(
    "Played without knowledge in the prompt."
  )


def _gates(run: Run) -> str:
  unchecked = (NONE, NONE, '<td class="left none">not checked</td>')
  lines = [
    [f"<td>{_label(number)}</td>", *(_gate(evaluation.gate) if evaluation.gate else unchecked)]
    for number, evaluation in sorted(run.evaluations.items())
    if number > 0
  ]
  if not lines:
    return note("Not measured yet.")
  about = note(
    "Measured before training, on games of its own: a model that cannot use the advice has nothing "
    "to consolidate."
  )
  return about + table(
    ("Round", "Without knowledge", "With knowledge", "Decision"), lines, left=["Decision"]
  )


def _gate(gate: Gate) -> tuple[str, ...]:
  kind = {"train": "good", "warn": "warn", "skip": "off"}[gate.decision]
  pill = f'<span class="pill {kind}">{gate.decision}</span>'
  decision = f'<td class="left">{pill} {_DECISIONS[gate.decision]}</td>'
  return share_cell(gate.without), share_cell(gate.with_knowledge), decision


def _games(run: Run) -> str:
  # A round that is being played has only some of its games.
  done = sorted(set(run.games) & set(run.evaluations))
  if len(done) < 2 or done[0] != 0:
    return note("Shown once the base model and a round have played the held-out games.")
  pairs = pair_games(run.games[0], run.games[done[-1]])
  gained = [(before, after) for before, after in pairs if after.passed and not before.passed]
  others = [(before, after) for before, after in pairs if before.passed or not after.passed]
  fell, both = (
    sum(before.passed and after.passed == passed for before, after in pairs)
    for passed in (False, True)
  )
  text = (
    f"Of {len(pairs)} maps, after round {done[-1]} against the base model: {len(gained)} newly "
    f"passed, {fell} no longer passed, "
    f"{both} passed both times, {len(others) - fell - both} neither time. "
  )
  text += (
    "Shown, in order of play: the first newly passed"
    if gained
    else "Shown: the first in order of play"
  )
  text += ", then the first of the others." if 0 < len(gained) < SHOWN_GAMES else "."
  blocks = [
    f"<h3>Map {before.source.seed}</h3><div "
    f'class="pair">{_game("Base model", before)}{_game(f"After round {done[-1]}", after)}</div>'
    for before, after in (gained + others)[:SHOWN_GAMES]
  ]
  return note(text) + "".join(blocks)


def pair_games(
  before: Sequence[Conversation], after: Sequence[Conversation]
) -> list[tuple[Conversation, Conversation]]:
  """Games of the same map, in the order of `before`.

  Paired by map and not by line: a damaged line may be missing from one of the files.
  """
  later = defaultdict(list)
  for game in reversed(after):
    later[game.source].append(game)
  return [(game, later[game.source].pop()) for game in before if later[game.source]]


def _game(title: str, game: Conversation) -> str:
  tokens = sum(answer.response_tokens for answer in game.answers)
  pairs = zip(game.messages[::2], game.messages[1::2], strict=True)
  pill = f'<span class="pill {"good" if game.passed else "off"}">{_ENDED_WORDS[game.ended]}</span>'
  turns = "".join(_turn(number, *pair) for number, pair in enumerate(pairs, start=1))
  end = f'<div class="turn"><p class="label">End of game</p><pre>{escape(game.outcome)}</pre></div>'
  facts = f'<p class="label">{len(game.answers)} turns, {tokens:,} response tokens</p>'
  return f'<div class="game"><h4>{title} {pill}</h4>{facts}{turns}{end}</div>'


def _turn(number: int, asked: Message, answer: Message) -> str:
  thinking = (
    f'<div class="said thinking">{escape(answer.thinking.strip())}</div>'
    if answer.thinking.strip()
    else ""
  )
  said = (
    f'<div class="said">{escape(answer.content.strip())}</div>'
    if answer.content.strip()
    else '<div class="dim">no answer</div>'
  )
  action = f"took {escape(answer.action)}" if answer.action else "no valid action"
  facts = f'<p class="label">Turn {number} · {action} · {answer.response_tokens:,} tokens</p>'
  return f'<div class="turn">{facts}<pre>{escape(asked.content)}</pre>{thinking}{said}</div>'


def _knowledge(run: Run) -> str:
  if not run.knowledge:
    return note("No knowledge has been extracted yet.")
  blocks = []
  for number, texts in sorted(run.knowledge.items()):
    inner = "".join(
      f'<details><summary>Text {escape(name)} <span class="dim">· {_size(text)}</span></summary>'
      + (f"<pre>{escape(text)}</pre>" if text.strip() else note("Empty."))
      + "</details>"
      for name, text in texts
    )
    plural = "text" if len(texts) == 1 else "texts"
    blocks.append(
      f'<details><summary>Round {number} <span class="dim">· {len(texts)} '
      f"{plural}</span></summary>{inner}</details>"
    )
  return note("The texts of each round, as they stand in its folder knowledge/.") + "".join(blocks)


def _size(text: str) -> str:
  items = sum(line.startswith(ITEM_MARK) for line in text.split("\n"))
  return (
    f"{items} item{'s' if items != 1 else ''}, " if items else ""
  ) + f"{len(text.split()):,} words"


def _costs(run: Run) -> str:
  if not run.costs:
    return note("Not measured yet.")
  by_stage = {stage: [] for stage in _STAGES} | {cost.stage: [] for cost in run.costs}
  for cost in run.costs:
    by_stage[cost.stage].append(cost)
  head = ("Stage", "Seconds", "Share of time", "Tokens", "Tokens a second", "FLOPs", "FLOP/s")
  whole = sum(cost.seconds for cost in run.costs)
  total = _cost_cells("All rounds", run.costs, whole)
  lines = [_cost_cells(stage, costs, whole) for stage, costs in by_stage.items() if costs]
  each = []
  for number in sorted({cost.round for cost in run.costs}):
    each += [
      _cost_cells(f"{_label(number)}: {cost.stage}", [cost], whole)
      for cost in run.costs
      if cost.round == number
    ]
  return (
    note("Tokens are those sampled or trained on.")
    + table(head, [*lines, total], total=True)
    + f"<details><summary>By round</summary>{table(head, each)}</details>"
  )


def _cost_cells(name: str, costs: Sequence[Cost], whole: float) -> list[str]:
  seconds = sum(cost.seconds for cost in costs)
  cells = [
    f"<td>{escape(name)}</td>",
    f"<td>{show_seconds(seconds)}</td>",
    f"<td>{percent_of(seconds, whole)}</td>",
  ]
  for field in ("tokens", "flops"):
    known = [cost for cost in costs if getattr(cost, field) is not None]
    amount, time_taken = (
      sum(getattr(cost, field) for cost in known),
      sum(cost.seconds for cost in known),
    )
    if not known:
      cells += [NONE, NONE]
      continue
    cells += [
      f"<td>{show_si(amount)}</td>",
      f"<td>{show_si(amount / time_taken)}</td>" if time_taken else NONE,
    ]
  return cells


def _configuration(run: Run) -> str:
  if not run.config:
    return note("config.json is missing.")
  blocks = [_fields("All fields", run.config), _fields("Versions", run.versions)]
  for change in run.changes:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(change["time"]))
    fields = {
      field["field"]: f"{_json(field['was'])} → {_json(field['is'])}" for field in change["fields"]
    }
    items = "".join(
      f"<li><span class=key>{escape(name)}: {escape(values)}</span></li>"
      for name, values in fields.items()
    )
    blocks.append(f"<p>Changed in the middle of the run, {when}:</p><ul>{items}</ul>")
  return "".join(blocks)


def _fields(title: str, values: dict[str, Any]) -> str:
  lines = [
    [f'<td class="key">{escape(name)}</td>', f'<td class="key left">{escape(_json(value))}</td>']
    for name, value in values.items()
  ]
  fields = table(("Field", "Value"), lines, left=["Value"])
  return f"<details><summary>{title}</summary>{fields}</details>"


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)


def _label(number: int) -> str:
  return f"Round {number}" if number else "Base model"
