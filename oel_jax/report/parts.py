"""How the page of `report` looks, and its small parts: the frame, cells, tables, plots, numbers in
words, and `escape`, through which untrusted text goes.
"""

import base64
import html
from collections.abc import Sequence
from typing import Any

from oel_jax.report.measures import Measure

NONE = '<td class="none">–</td>'
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1f2430; --dim: #667085;
  --line: #e3e6eb; --soft: #f3f5f8;
  --blue: #1d5fd1; --orange: #c4570a; --good: #1a7f4b; --bad: #8d95a5; --violet: #7a4fc2; }
@media (prefers-color-scheme: dark) { :root { --page: #13161b; --card: #1c2027; --ink: #e4e7ec;
  --dim: #98a2b3; --line: #323843;
  --soft: #242932; --blue: #7fb0ff; --orange: #f2a65a; --good: #57c98c; --bad: #6c7586;
    --violet: #b79af0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 6px 0; max-width: 96ch; }
.dim, .none, small, dt { color: var(--dim); }
.lead { font-size: 18px; line-height: 1.5; margin: 14px 0 6px; max-width: 66em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin: 18px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0 4px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; font-size: 13px; line-height: 1.3; color: var(--dim); 
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
.left { text-align: left; }
tr.total td { font-weight: 600; }
th small { font-weight: 400; }
tbody tr:last-child td { border-bottom: 0; }
td small { display: block; font-size: 12px; white-space: nowrap; }
td.main { color: var(--blue); font-weight: 600; }
td.main small { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 12px 0 0;
  font-size: 13px; }
dd { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 22px 28px; margin-top: 14px; }
figure { margin: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figcaption small { display: block; font-weight: 400; font-size: 13px; }
.bar { display: flex; gap: 2px; height: 14px; min-width: 220px; margin-top: 5px; }
.bar i { border-radius: 2px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px; }
.passed { background: var(--good); } .lost { background: var(--bad); }
.invalid { background: var(--orange); } .turn_limit { background: var(--violet); }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 99px; padding: 0 9px;
  font-size: 12px; font-weight: 600; }
.pill.good { color: var(--good); } .pill.warn { color: var(--orange); }
.pill.off { color: var(--dim); }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }
.pair.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
@media (max-width: 760px) { .pair, .pair.three { grid-template-columns: 1fr; } }
.game { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.game h4 { margin: 0; font-size: 14px; display: flex; justify-content: space-between; gap: 10px; }
.turn { border-top: 1px solid var(--line); margin-top: 12px; padding-top: 8px; }
.label { font-size: 12px; color: var(--dim); margin: 0; }
pre, .said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; }
pre, .key {
  font: 12px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--soft); border-radius: 6px; padding: 8px 10px; max-height: 24em;
  overflow-y: auto; }
.thinking { color: var(--dim); font-size: 13px; border-left: 2px solid var(--line);
  padding-left: 10px;
  max-height: 11em; overflow-y: auto; }
details { border-top: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
details details { margin-left: 18px; }
details details summary { font-weight: 400; }
details pre { max-height: 34em; }
td.key + td.key { overflow-wrap: anywhere; }
footer { color: var(--dim); font-size: 13px; }
@media print { body { background: none; } section { break-inside: avoid-page;
  } pre, .thinking { max-height: none; } }
"""


def document(name: str, subtitle: str, lead: str, sections: Sequence[str], end: str) -> str:
  """Returns the whole page as HTML; it loads nothing and runs nothing.

  Args:
    name: of the run, its headline.
    subtitle: a few words below it.
    lead: what happened, in a few sentences.
    sections: ready ones, of `section`.
    end: the last words.
  """
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(name)} – oel_jax</title>
<style>{STYLE}</style>
</head>
<body><main>
<header>
<div class="dim">Online Experiential Learning</div>
<h1>{escape(name)}</h1>
<div class="dim">{escape(subtitle)}</div>
<p class="lead">{escape(lead)}</p>
</header>
{"".join(sections)}
<footer>{escape(end)}</footer>
</main></body>
</html>
"""


def section(title: str, body: str) -> str:
  return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def figure(
  title: str, about: str, light: bytes | None, dark: bytes | None, kind: str, absent: str
) -> str:
  """A plot below its title.

  Args:
    title: plain words, and `about` a few more.
    light: PNG file; None: there are no numbers, and `absent` says so.
    dark: the same plot, shown where the reader's system is in dark mode.
    kind: "wide", over the whole page, or "".
    absent: HTML.
  """
  picture = absent
  if light is not None and dark is not None:
    picture = (
      f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
      f'<img alt="{title}: plot of the numbers in this report" src="{_data(light)}"></picture>'
    )
  caption = f"<figcaption>{title}<small>{about}</small></figcaption>"
  return f'<figure class="{kind}">{caption}{picture}</figure>'


def _data(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def table(
  head: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str] = (), total: bool = False
) -> str:
  """A table of ready cells (`<td>…`) under headings; those named in `left` stand left, and `total`
  sets the last line off.
  """
  top = "".join(f"<th{' class=left' if name in left else ''}>{name}</th>" for name in head)
  body = "".join(
    f"<tr{' class=total' if total and line is lines[-1] else ''}>{''.join(line)}</tr>"
    for line in lines
  )
  return (
    f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
  )


def share_cell(measure: Measure | None, main: bool = False) -> str:
  if measure is None or measure.value is None:
    return NONE
  interval = f"<br>{percent_range(measure)}" if measure.interval else ""
  counts = f"<small>{measure.hits} of {measure.of}{interval}</small>"
  return f"<td{' class=main' if main else ''}>{100 * measure.value:.1f}%{counts}</td>"


def mean_cell(measure: Measure, unit: str) -> str:
  if measure.value is None:
    return NONE
  interval = (
    f"<br>{show_tokens(measure.interval[0])}–{show_tokens(measure.interval[1])}"
    if measure.interval
    else ""
  )
  return f"<td>{show_tokens(measure.value)}<small>{measure.of:,} {unit}{interval}</small></td>"


def percent_range(measure: Measure) -> str:
  return f"{100 * measure.interval[0]:.1f}–{100 * measure.interval[1]:.1f}"


def show_tokens(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def show_seconds(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def show_si(value: float) -> str:
  for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:.3g} {name}"
  return f"{value:.3g}"


def percent_of(part: float, whole: float) -> str:
  return f"{100 * part / whole:.0f}%" if whole else "–"


def signed(value: float) -> str:
  return minus(f"{value:+.0f}")


def minus(number: str) -> str:
  return number.replace("-", "−")


def label(number: int) -> str:
  return f"Round {number}" if number else "Base model"


def note(text: str) -> str:
  return f'<p class="dim">{escape(text)}</p>'


def escape(value: Any) -> str:
  """Escapes text for HTML, between tags and in quoted attributes; half a surrogate pair, which
  UTF-8 cannot hold, becomes "?".
  """
  return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))
