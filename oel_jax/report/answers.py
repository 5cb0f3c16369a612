"""Held-out prompts of logs on the page: what the base model answered, and each later round."""

from collections.abc import Sequence

from oel_jax.conversations.schema import Conversation, Message
from oel_jax.extraction import provenance
from oel_jax.report.parts import escape, note
from oel_jax.report.records import Run

SHOWN_PROMPTS = 8
MAX_CHARACTERS = 1500  # of a message

# (which model, the prompt with its answer), in the order of rounds.
Case = list[tuple[str, Conversation]]


def answers(run: Run) -> str:
  """HTML of a few prompts with the answers that were kept, "" where there are none."""
  found = cases(run)
  if not found:
    return ""
  # Those that most rounds answered come first: rounds with logs of their own share no prompts.
  shown = sorted(found, key=lambda case: -len(case))[:SHOWN_PROMPTS]
  about = (
    f"The first prompt of {len(shown)} held-out conversations, each answered with no knowledge in "
    "the prompt and with the same random stream. Nothing was learned from them."
  )
  return note(about) + "".join(_case(run, case) for case in shown)


def cases(run: Run) -> list[Case]:
  """Answers to the same prompt, from before its first round to the last that has it."""
  found: dict[tuple[str, tuple[Message, ...]], Case] = {}
  for number, (before, after) in sorted(run.answers.items()):
    name = f"Before round {number}" if number > 1 else "Base model"
    for said in before:
      found.setdefault(_asked(said), [(name, said)])
    for said in after:
      found.setdefault(_asked(said), []).append((f"After round {number}", said))
  return list(found.values())


def _asked(said: Conversation) -> tuple[str, tuple[Message, ...]]:
  """What tells a prompt from others: two logs may both have a conversation of the same id."""
  return said.id, said.messages[:-1]


def _case(run: Run, case: Case) -> str:
  said = case[-1][1]
  *earlier, last = said.messages[:-1]
  before = "".join(map(_message, earlier))
  if earlier:
    count = f"{len(earlier)} earlier message{'s' if len(earlier) > 1 else ''}"
    before = f"<details><summary>{count}</summary>{before}</details>"
  columns = "pair three" if len(case) in (3, 5, 6) else "pair"
  side_by_side = "".join(_answer(run, name, each.messages[-1]) for name, each in case)
  return (
    f"<h3>{escape(said.id)}</h3>{before}{_message(last)}"
    f'<div class="{columns}">{side_by_side}</div>{_item(run, last.content)}'
  )


def _message(message: Message) -> str:
  return f'<p class="label">{escape(message.role)}</p><pre>{escape(_short(_text(message)))}</pre>'


def _text(message: Message) -> str:
  calls = [f"{call.name}({call.arguments})" for call in message.tool_calls]
  return "\n".join(filter(None, [message.content.strip(), *calls]))


def _answer(run: Run, name: str, answer: Message) -> str:
  limit, tokens = run.config.get("deployment.max_response_tokens"), answer.response_tokens or 0
  pill = ' <span class="pill off">cut</span>' if limit and tokens >= limit else ""
  thinking = answer.thinking.strip()
  thought = f'<div class="said thinking">{escape(_short(thinking))}</div>' if thinking else ""
  content = _text(answer)
  said = f'<div class="said">{escape(_short(content))}</div>' if content else note("no answer")
  facts = f'<p class="label">{tokens:,} tokens</p>'
  return f'<div class="game"><h4>{name}{pill}</h4>{facts}{thought}{said}</div>'


def _item(run: Run, asked: str) -> str:
  """The item of the last round's knowledge that has most in common with what was asked."""
  items: Sequence[provenance.Origin] = run.items[max(run.items)] if run.items else ()
  item = provenance.related([origin for origin in items if origin.texts], asked)
  return note(f"Of the knowledge, most words in common: {item.text}") if item else ""


def _short(text: str) -> str:
  return text[:MAX_CHARACTERS] + "…" * (len(text) > MAX_CHARACTERS)
