"""The page of `report` for a run of rounds.

Whatever a model, a game or a user wrote passes through `escape`; `note` and `section` escape what
they are given.
"""

from oel_jax.conversations.schema import ENDED
from oel_jax.report import appendix
from oel_jax.report.answers import answers
from oel_jax.report.cuts import cuts
from oel_jax.report.divergences import HeldOut
from oel_jax.report.games import ENDED_WORDS, games
from oel_jax.report.in_context import in_context
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
  # From logs alone there is no game to tell of, nor to check the knowledge by.
  with_games = _games_played(run) or (not run.evaluations and own != "")
  gated = with_games or any(each.gate for each in run.evaluations.values())
  away = _held_out(run) if not with_games or _away(run) else ""
  contents = {
    "Rounds": _rounds(run) + kept(run) if with_games else "",
    "Held-out conversations": away if with_games else away + kept(run),
    "Curves": _plots(run, light, dark, with_games),
    "How games ended": _ended(run) if with_games else "",
    "By category": _categories(run),
    "Responses that the limit cut": cuts(run),
    "Does the knowledge help in context?": in_context(run) if gated else "",
    "Held-out games, before and after": games(run) if with_games else "",
    "Held-out prompts, before and after": answers(run),
    "Knowledge": appendix.knowledge(run) + items(run),
    "Cost": appendix.costs(run),
    "Configuration": appendix.configuration(run),
  }
  sections = [section(title, content) for title, content in contents.items() if content]
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
  if not _games_played(run):
    return _summary_of_logs(run, last)
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
  return " ".join([*text, *_missing(run)])


def _games_played(run: Run) -> bool:
  return any(evaluation.without.passed.of for evaluation in run.evaluations.values())


def _summary_of_logs(run: Run, last: int | None) -> str:
  """What happened where no games were played; `last` is the last evaluated round."""
  text, away = ["No games were played."], last and run.evaluations[last].held_out
  if away and away.closer is not None:
    way = "nearer to" if away.closer >= 0 else "farther from"
    text.append(
      f"After round {last}, on {away.prompts} held-out prompts of logs, the model without "
      f"knowledge in its prompt is {100 * abs(away.closer):.0f}% {way} the one that has it there, "
      "than before the round."
    )
  if away and away.response_tokens_before.value and away.response_tokens_after.value is not None:
    sizes = away.response_tokens_before.value, away.response_tokens_after.value
    text.append("An answer went from {} to {} tokens.".format(*map(show_tokens, sizes)))
  return " ".join([*text, *_missing(run)])


def _missing(run: Run) -> list[str]:
  missing = [number for number in range(1, run.rounds + 1) if number not in run.evaluations]
  plural = "s" if len(missing) > 1 else ""
  names = ", ".join(map(str, missing))
  return [f"Not evaluated yet: round{plural} {names}."] if missing else []


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
  return table(head, lines) + _meanings()


def _away(run: Run) -> dict[int, HeldOut]:
  """By round, what was measured on held-out prompts of logs."""
  return {n: each.held_out for n, each in sorted(run.evaluations.items()) if each.held_out}


def _held_out(run: Run) -> str:
  """How far each round's policy is from its teacher, where nothing was learned."""
  if not (measured := _away(run)):
    return note("Not measured yet.")
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


def _plots(run: Run, light: dict[str, bytes], dark: dict[str, bytes], with_games: bool) -> str:
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
      "rounds",
      "wide",
      "Round by round",
      "The consolidated weights, with knowledge in the prompt and without; round 0 is the base.",
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
    # of one round there is nothing to say "round by round"; without games, of training alone
    if name in light or (name != "rounds" if with_games else name == "consolidation")
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
  """Passed games of each category, which may be a kind of case; "" where all games are of one, for
  then the rounds' own table says it.
  """
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
    if len(names) > 1
    else ""
  )
