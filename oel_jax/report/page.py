"""The page of `report` for a run of rounds.

Whatever a model, a game or a user wrote passes through `escape`; `note` and `section` escape what
they are given.
"""

from oel_jax.conversations.schema import ENDED
from oel_jax.report import appendix
from oel_jax.report.answers import answers
from oel_jax.report.cuts import cuts
from oel_jax.report.games import ENDED_WORDS, games
from oel_jax.report.gates import Gate, GateText
from oel_jax.report.items import items
from oel_jax.report.kept import kept
from oel_jax.report.parts import (
  NONE,
  document,
  escape,
  figure,
  label,
  mean_cell,
  minus,
  note,
  percent_of,
  percent_range,
  section,
  share_cell,
  show_tokens,
  signed,
  table,
)
from oel_jax.report.records import Evaluation, Run

FOOTER = (
  "Shares come with Wilson’s 95% interval, means with a 95% interval. The same numbers, with their "
  "counts, are in results.json beside this page. The page shows games as they were played: treat "
  "it as you treat your users’ data."
)
_DECISIONS = {
  "train": "knowledge helps in context: trained on it",
  "warn": "no clear gain in context: trained on it all the same, with a warning",
  "skip": "no clear gain in context: not trained on it",
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
    section("Rounds", _rounds(run)),
    section("Curves", _plots(run, light, dark)),
    section("Held-out conversations", _held_out(run)),
    section("How games ended", _ended(run)),
    *(section("By category", found) for found in [_categories(run)] if found),
    section("Responses that the limit cut", cuts(run)),
    section("Does the knowledge help in context?", _gates(run)),
    section("Held-out games, before and after", games(run)),
    *(section("Held-out prompts, before and after", found) for found in [answers(run)] if found),
    section("Knowledge", appendix.knowledge(run) + items(run)),
    section("Cost", appendix.costs(run)),
    section("Configuration", appendix.configuration(run)),
  ]
  return document(run.name, subtitle, summary(run), sections, FOOTER)


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
  lines = []
  for number in range(run.rounds + 1):
    name, evaluation = label(number), run.evaluations.get(number)
    if evaluation is None:
      lines.append(
        [
          f"<td>{name}</td>",
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
        f"<td>{name}</td>",
        share_cell(play.passed, main=True),
        *map(share_cell, contexts),
        recovered,
        mean_cell(play.response_tokens, "turns"),
        mean_cell(play.moves, "games"),
        share_cell(play.leaks),
      ]
    )
  return table(head, lines) + _meanings() + kept(run)


def _held_out(run: Run) -> str:
  """How far each round's policy is from its teacher, where nothing was learned."""
  measured = {n: each.held_out for n, each in sorted(run.evaluations.items()) if each.held_out}
  if not measured:
    return note("Measured where logs are learned from (config.logs).")
  lines = [
    [
      f"<td>{label(number)}</td>",
      f"<td>{away.prompts}{_gone(away.withdrawn)}</td>",
      f"<td>{away.kl_before:.4f}</td>",
      f"<td>{away.kl_after:.4f}</td>",
      NONE if away.closer is None else f"<td>{minus(f'{100 * away.closer:.0f}')}%</td>",
      mean_cell(away.response_tokens_before, "answers"),
      mean_cell(away.response_tokens_after, "answers"),
    ]
    for number, away in measured.items()
  ]
  head = ("Round", "Prompts", "KL before", "KL after", "Closer", "Tokens before", "Tokens after")
  return table(head, lines) + note(
    "KL from the model to the one that the round began with and that has the knowledge in its "
    "prompt, in nats a token of the model’s own answers. Closer: the share of it that is gone."
  )


def _gone(withdrawn: int) -> str:
  return f"<small>{withdrawn} withdrawn</small>" if withdrawn else ""


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
  figures = [
    figure(title, about, light.get(name), dark.get(name), kind, absent)
    for name, kind, title, about in plots
  ]
  return f'<div class="plots">{"".join(figures)}</div>'


def _ended(run: Run) -> str:
  if not run.evaluations:
    return note("Not measured yet.")
  head = [
    "Round",
    "Share of games",
    *(f'<i class="dot {name}"></i>{ENDED_WORDS[name]}' for name in ENDED),
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
    lines.append([f"<td>{label(number)}</td>", f'<td><div class="bar">{bar}</div></td>', *cells])
  return table(head, lines, left=["Share of games"]) + note(
    "Played without knowledge in the prompt."
  )


def _categories(run: Run) -> str:
  """Passed games of each category, "" where no game has one; a category may be a kind of case."""
  ways = {
    "without": "",
    "in_context": ", in context, before",
    "after_in_context": ", in context, after",
  }
  plays = {
    f"{label(number)}{told}": play
    for number, evaluation in sorted(run.evaluations.items())
    for way, told in ways.items()
    if (play := getattr(evaluation, way)) and play.categories
  }
  names = sorted({name for play in plays.values() for name in play.categories})
  lines = [
    [f"<td>{told}</td>", *(share_cell(play.categories.get(name)) for name in names)]
    for told, play in plays.items()
  ]
  head = ("Round", *(escape(name.capitalize()) for name in names))
  return (
    table(head, lines) + note("Held-out games passed, by what the environment calls them.")
    if names
    else ""
  )


def _gates(run: Run) -> str:
  unchecked = (*[NONE] * 4, '<td class="left none">not checked</td>')
  lines = [
    [f"<td>{label(number)}</td>", *(_gate(evaluation.gate) if evaluation.gate else unchecked)]
    for number, evaluation in sorted(run.evaluations.items())
    if number > 0
  ]
  if not lines:
    return note("Not measured yet.")
  about = note(
    "Measured before training, on games of its own: a model that cannot use the advice has nothing "
    "to consolidate."
  )
  head = ("Round", "Without knowledge", "With knowledge", "Cut, without", "Cut, with", "Decision")
  cut = note("Cut: responses that the limit of tokens ended, deployment.max_response_tokens.")
  by_text = "".join(_by_text(run)) + _in_context_by_text(run)
  return about + table(head, lines, left=["Decision"]) + cut + by_text


def _gate(gate: Gate) -> tuple[str, ...]:
  kind = {"train": "good", "warn": "warn", "skip": "off"}[gate.decision]
  pill = f'<span class="pill {kind}">{gate.decision}</span>'
  decision = f'<td class="left">{pill} {_DECISIONS[gate.decision]}</td>'
  with_knowledge = share_cell(gate.kept or gate.with_knowledge)
  cut = share_cell(gate.cut_without), share_cell(gate.cut_with)
  return share_cell(gate.without), with_knowledge, *cut, decision


def _by_text(run: Run) -> list[str]:
  """Each round's knowledge texts one by one, folded; open where one was left out."""
  blocks = []
  for number, evaluation in sorted(run.evaluations.items()):
    texts = evaluation.gate.texts if evaluation.gate else ()
    if not texts:
      continue
    out = [f"{text.number:02d}" for text in texts if text.left_out]
    told = f" · left out: {', '.join(out)}" if out else ""
    rows = [_text_cells(text) for text in texts]
    blocks.append(
      f"<details{' open' if out else ''}><summary>Round {number}, text by text"
      f'<span class="dim">{told}</span></summary>'
      + table(("Text", "With it", "Cut", "p that it hurts", ""), rows, left=[""])
      + "</details>"
    )
  if blocks:
    blocks.append(
      note(
        "Each text’s games against all games without knowledge: p is Fisher’s exact test, "
        "one-sided. A text with p below 5% divided by the number of texts hurts: it is left out "
        "of training and of the round’s share with knowledge."
      )
    )
  return blocks


def _in_context_by_text(run: Run) -> str:
  """The held-out games that each text of a round was given to, folded; with a gate or without."""
  blocks = []
  for number, evaluation in sorted(run.evaluations.items()):
    texts = evaluation.in_context.texts if evaluation.in_context else ()
    rows = [
      [f"<td>{name:02d}</td>", share_cell(passed), share_cell(cut)] for name, passed, cut in texts
    ]
    if rows:
      blocks.append(
        f"<details><summary>Round {number}, text by text, held-out games in context</summary>"
        + table(("Text", "Passed", "Cut"), rows)
        + "</details>"
      )
  return "".join(blocks)


def _text_cells(text: GateText) -> list[str]:
  pill = '<span class="pill off">left out</span>' if text.left_out else ""
  return [
    f"<td>{text.number:02d}</td>",
    share_cell(text.passed),
    share_cell(text.cut),
    f"<td>{text.p:.2g}</td>",
    f'<td class="left">{pill}</td>',
  ]
