"""The plots of `report`, each drawn twice: on paper and, for a page read in the dark, on slate."""

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oel_jax.report.measures import Measure
from oel_jax.report.records import Run

_DPI = 180


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours; `paper` is the page's card colour, so that a plot has no visible frame."""

  paper: str
  ink: str
  dim: str
  grid: str
  without: str
  context: str


LIGHT = Theme("#ffffff", "#1f2430", "#667085", "#e6e8ec", "#1d5fd1", "#c4570a")
DARK = Theme("#1c2027", "#e4e7ec", "#98a2b3", "#323843", "#7fb0ff", "#f2a65a")


def draw(run: Run, theme: Theme) -> dict[str, bytes]:
  """Returns PNG files by name, only those that the run has numbers for: passed, response_tokens,
  accumulation, rounds, consolidation.
  """
  style = {
    "font.size": 9,
    "axes.edgecolor": theme.dim,
    "axes.labelcolor": theme.dim,
    "axes.titlecolor": theme.ink,
    "text.color": theme.ink,
    "xtick.color": theme.dim,
    "ytick.color": theme.dim,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": theme.grid,
    "axes.axisbelow": True,
    "ytick.left": False,
    "figure.facecolor": theme.paper,
    "axes.facecolor": theme.paper,
    "legend.frameon": False,
    "legend.labelcolor": theme.ink,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
  }
  plots = {}
  for name, plot in (
    ("passed", _passed),
    ("response_tokens", _tokens),
    ("accumulation", _accumulation),
    ("rounds", _rounds),
    ("consolidation", _consolidation),
  ):
    # No pyplot: a figure of its own leaves the caller's backend and figures alone.
    with matplotlib.rc_context(style):
      figure = plot(run, theme)
      if figure is not None:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
        plots[name] = file.getvalue()
  return plots


def _figure(height: float = 3.1, width: float = 5.4) -> Figure:
  return Figure(figsize=(width, height), layout="constrained")


def _points(
  axes: Axes, xs: Iterable[float], measures: Iterable[Measure], *, scale: float = 1.0, **style: Any
) -> float:
  """Draws measures with their intervals and returns the highest point reached; those without a
  value are left out.
  """
  points = [(x, measure) for x, measure in zip(xs, measures) if measure.value is not None]
  if not points:
    return 0.0
  values = [scale * measure.value for _, measure in points]
  ends = [
    [scale * end for end in measure.interval] if measure.interval else [value] * 2
    for value, (_, measure) in zip(values, points)
  ]
  # Max: a rounded bound may lie on the wrong side.
  below = [max(value - low, 0.0) for value, (low, _) in zip(values, ends)]
  above = [max(high - value, 0.0) for value, (_, high) in zip(values, ends)]
  axes.errorbar(
    [x for x, _ in points],
    values,
    yerr=[below, above],
    elinewidth=1.4,
    capsize=3,
    linewidth=1.8,
    markersize=6,
    clip_on=False,  # a marker at 100% is whole
    **style,
  )
  return max([*values, *(high for _, high in ends)])


def _legend(axes: Axes) -> None:
  # Above the data, never over it.
  axes.legend(
    loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, handlelength=1.8, columnspacing=1.4
  )


def _round_axis(axes: Axes, last: int) -> None:
  axes.set_xticks(
    range(last + 1),
    ["base", *(f"round {number}" for number in range(1, last + 1))] if last < 8 else None,
  )
  axes.set_xlim(-0.4, last + 0.4)


def _percent_axis(axes: Axes, highest: float) -> None:
  # The last bit: a line at 100 keeps its width.
  axes.set_ylim(0, min(100.0, max(10.0, 1.08 * highest)) * 1.004)
  axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
  axes.set_ylabel("games passed, %")


def _has_games(run: Run) -> bool:
  """Whether any were played without knowledge: from logs alone, none are."""
  return any(evaluation.without.passed.of for evaluation in run.evaluations.values())


def _passed(run: Run, theme: Theme) -> Figure | None:
  if not _has_games(run):
    return None
  figure = _figure()
  axes = figure.subplots()
  rounds = sorted(run.evaluations)
  played = [run.evaluations[number].without.passed for number in rounds]
  highest = _points(
    axes, rounds, played, scale=100, color=theme.without, marker="o", label="without knowledge"
  )
  context = {
    number - 0.12: evaluation.in_context.passed
    for number, evaluation in sorted(run.evaluations.items())
    if evaluation.in_context
  }
  if context:  # no line: each is a round's own first weights with that round's own knowledge
    style = dict(
      color=theme.context, marker="D", linestyle="none", label="in context, before the round"
    )
    highest = max(highest, _points(axes, context.keys(), context.values(), scale=100, **style))
  _percent_axis(axes, highest)
  _round_axis(axes, rounds[-1])
  _legend(axes)
  return figure


def _tokens(run: Run, theme: Theme) -> Figure | None:
  if not _has_games(run):
    return None
  figure = _figure()
  axes = figure.subplots()
  rounds = sorted(run.evaluations)
  highest = _points(
    axes,
    rounds,
    [run.evaluations[number].without.response_tokens for number in rounds],
    color=theme.without,
    marker="o",
  )
  axes.set_ylim(0, 1.1 * highest or 1.0)
  axes.set_ylabel("response tokens a turn")
  _round_axis(axes, rounds[-1])
  return figure


def _accumulation(run: Run, theme: Theme) -> Figure | None:
  first = run.evaluations.get(1)
  if first is None or not first.accumulation:
    return None
  figure = _figure(width=10.6)
  axes = figure.subplots()
  points, use = list(first.accumulation), run.config.get("extraction.use")
  if first.in_context and type(use) is int and use > points[-1][0]:
    points.append((use, first.in_context.passed))  # the knowledge that the round used
  highest = _points(
    axes,
    [count for count, _ in points],
    [passed for _, passed in points],
    scale=100,
    color=theme.context,
    marker="D",
    label="base model, knowledge in its prompt",
  )
  base = run.evaluations.get(0)
  lines = [
    ("base model, no knowledge", base, theme.dim, ":"),
    ("after round 1, no knowledge", first, theme.without, "--"),
  ]
  for label, evaluation, color, dashes in lines:
    if evaluation and evaluation.without.passed.value is not None:
      value = 100 * evaluation.without.passed.value
      axes.axhline(value, color=color, linestyle=dashes, linewidth=1.6, label=label)
      highest = max(highest, value)
  _percent_axis(axes, highest)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_xlabel("trajectories the knowledge was drawn from")
  _legend(axes)
  return figure


def _rounds(run: Run, theme: Theme) -> Figure | None:
  """What is held to from round to round: play with knowledge in the prompt of what each round made,
  tasks, and how sure it is of its own answers. None of a run with fewer than two rounds, or where
  nothing of this was measured.
  """
  found = sorted(run.evaluations.items())
  if sum(number > 0 for number, _ in found) < 2:
    return None
  share = lambda measure: measure and measure.value is not None and 100 * measure.value
  passed = {
    "no knowledge": lambda one: share(one.without.passed),
    "that round’s": lambda one: share(one.after_in_context and one.after_in_context.passed),
    "round 1’s": lambda one: share(one.first_knowledge and one.first_knowledge.passed),
  }
  kept = {task: lambda one, task=task: share(one.retention.get(task)) for task in run.tasks}
  sure = {
    "entropy": {"": lambda one: one.own_answers and one.own_answers.entropy},
    "mass": {"": lambda one: one.own_answers and 100 * one.own_answers.topk_mass},
  }
  panels = [
    (title, unit, curves)
    for title, unit, values in (
      ("Passed, by knowledge in the prompt", "games, %", passed),
      ("What else it can do", "right, %", kept),
      ("Entropy of its own answers", "nats a token", sure["entropy"]),
      ("Mass on the likeliest tokens", "%", sure["mass"]),
    )
    if (curves := _by_round(found, values))
  ]
  if not panels:
    return None
  figure = _figure(2.6 * -(-len(panels) // 2), 10.6)
  every = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
  colors = (theme.without, theme.context, theme.dim, theme.ink)
  for axes, (title, unit, curves) in zip(every, panels):
    for i, (name, points) in enumerate(curves.items()):
      style = dict(marker="o", markersize=3, linewidth=1.5, linestyle=("-", "--")[i // 4 % 2])
      axes.plot(*zip(*points), color=colors[i % 4], label=name, **style)
    axes.set_ylabel(unit)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, pad=20 if len(curves) > 1 else None)
    if len(curves) > 1:
      axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=4, handlelength=1.2)
  for axes in every[len(panels) :]:
    axes.set_visible(False)
  return figure


def _by_round(found: Sequence[tuple[int, Any]], values: dict[str, Any]) -> dict[str, list]:
  """Name → (round, value) where there is one, of the names that have any."""
  curves = {}
  for name, value in values.items():
    points = [(number, y) for number, one in found if type(y := value(one)) in (int, float)]
    if points:
      curves[name] = points
  return curves


def _consolidation(run: Run, theme: Theme) -> Figure | None:
  """Loss, response length and entropy over the optimizer steps of all rounds."""
  if not run.steps:
    return None
  panels = [
    (title, unit, [curve for curve in curves if any(math.isfinite(y) for _, y in curve[1])])
    for title, unit, curves in (
      ("Loss", "nats a token", [("", _curve(run.steps, "loss"), theme.without)]),
      ("Response length", "tokens", [("", _curve(run.steps, "response_tokens"), theme.without)]),
      (
        "Entropy at the loss's temperature",
        "nats a token",
        [
          ("student", _curve(run.steps, "student_entropy"), theme.without),
          ("teacher", _curve(run.steps, "teacher_entropy"), theme.context),
        ],
      ),
    )
  ]
  panels = [panel for panel in panels if panel[2]]
  if not panels:
    return None
  figure = _figure(1.75 * len(panels) + 0.5, 10.6)
  for axes, (title, unit, curves) in zip(
    figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels
  ):
    for label, points, color in curves:
      # few, or probed every few steps: a line alone would not show them
      marker = "o" if len(points) <= 60 else ""
      axes.plot(*zip(*points), color=color, linewidth=1.5, marker=marker, markersize=3, label=label)
    if title == "Loss":
      # A divergence means something only against zero.
      axes.axhline(0, color=theme.dim, linewidth=0.8)
    axes.set_title(title)
    axes.set_ylabel(unit)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # room for the rounds' names
    if any(label for label, _, _ in curves):
      axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2, handlelength=1.6)
    _mark_rounds(axes, run.steps, theme)
    # Half a step to the left is where a round's name begins: outside, it would push the plot away.
    axes.set_xlim(0.5, sum(_counts(run.steps).values()) + 0.5)
  axes.set_xlabel("optimizer step, all rounds")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  return figure


def _mark_rounds(axes: Axes, steps: Sequence[dict[str, Any]], theme: Theme) -> None:
  for index, (number, begin) in enumerate(_begins(steps).items()):
    if index:
      axes.axvline(begin + 0.5, color=theme.dim, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
      f"round {number}",
      (begin + 0.5, 1),
      xycoords=("data", "axes fraction"),
      xytext=(5, -2),
      textcoords="offset points",
      va="top",
      color=theme.dim,
      fontsize=8,
    )


def _begins(steps: Sequence[dict[str, Any]]) -> dict[int, int]:
  """Round → the optimizer's steps in the rounds before it."""
  begins, total = {}, 0
  for number, count in _counts(steps).items():
    begins[number] = total
    total += count
  return begins


def _counts(steps: Sequence[dict[str, Any]]) -> dict[int, int]:
  """Round → how many steps it has; they are in order of round and step."""
  return {step["round"]: step["step"] for step in steps}


def _curve(steps: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
  """(step, value) of the steps that have such a number, counted through all rounds; NaN, which is
  drawn as a gap, between rounds.
  """
  points, begins = [], _begins(steps)
  for index, step in enumerate(steps):
    begin = begins[step["round"]]
    if index and step["round"] != steps[index - 1]["round"]:
      points.append((begin + 0.5, math.nan))
    if type(step.get(name)) in (int, float) and math.isfinite(step[name]):
      points.append((begin + step["step"], step[name]))
  return points
