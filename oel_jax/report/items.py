"""Items of knowledge on the page: what stands behind each, and what was said where it came from."""

from oel_jax.extraction.provenance import Origin, Sighting
from oel_jax.report.parts import escape, note
from oel_jax.report.records import Run

MAX_ITEMS = 20  # shown of a round, those that most conversations gave first
MAX_CONVERSATIONS = 3  # shown of an item
MAX_CHARACTERS = 600  # of a message
LEFT_OUT = {
  "support": "left out: of too few conversations",
  "own words": "left out: in too few conversations did others say it",
  "newer item": "left out: a newer item took its place",
  "limit": "left out: the oldest items go, to keep to the limit of tokens",
}


def items(run: Run) -> str:
  """HTML of each round's items, folded, with the messages that share their words."""
  blocks = []
  for number, origins in sorted(run.items.items()):
    first = sorted(origins, key=lambda origin: -origin.support)[:MAX_ITEMS]
    shown = "".join(_item(run, origin) for origin in first)
    size = f"{len(first)} of {len(origins)} items" if len(first) < len(origins) else len(origins)
    blocks.append(
      f'<details><summary>Round {number} <span class="dim">· items: {size}</span></summary>'
      f"{shown}</details>"
    )
  if not blocks:
    return ""
  about = (
    "The conversations that gave each item, most often seen first, and in them the messages that "
    "share its words. The extractor read the whole conversation and does not say what it drew on."
  )
  return "<h3>Where items came from</h3>" + note(about) + "".join(blocks)


def _item(run: Run, origin: Origin) -> str:
  plural = "conversation" if origin.support == 1 else "conversations"
  facts = [f"{origin.support} {plural}", origin.kind, LEFT_OUT.get(origin.left_out, "")]
  facts += [f"texts {', '.join(f'{n:02d}' for n in origin.texts)}" if origin.texts else ""]
  told = " · ".join(filter(None, facts))
  newer = note(f"Newer: {origin.superseded_by}") if origin.superseded_by else ""
  seen = "".join(_sighting(run, one) for one in origin.seen[:MAX_CONVERSATIONS])
  more = len(origin.seen) - MAX_CONVERSATIONS
  rest = note(f"and {more} more") if more > 0 else ""
  return (
    f'<details><summary>{escape(origin.text)} <span class="dim">· {escape(told)}</span></summary>'
    f"{newer}{seen}{rest}</details>"
  )


def _sighting(run: Run, sighting: Sighting) -> str:
  name = f"{sighting.conversation}, round {sighting.round}"
  said = run.said.get(sighting.conversation)
  blocks = []
  for number in sighting.messages if said else ():
    if number <= len(said.messages):
      message = said.messages[number - 1]
      text = message.content[:MAX_CHARACTERS]
      cut = "…" if len(message.content) > MAX_CHARACTERS else ""
      label = f'<p class="label">Message {number} · {escape(message.role)}</p>'
      blocks.append(f"{label}<pre>{escape(text + cut)}</pre>")
  return f'<div class="turn"><p class="label">{escape(name)}</p>{"".join(blocks)}</div>'
