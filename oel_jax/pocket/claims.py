"""What an experience item can say about a symbol, in the embedded policy's words, and what a list
of items amounts to.

Twelve wordings for the goal and for the trap: in half of them the role's words stand before the
letter. (Prototypes that only ever saw the letter first learned that a goal is mentioned, but not
which.)
"""

import dataclasses
import random
import re

from oel_jax.extraction.prompts import ITEM_MARK

GOAL, TRAP, SAFE, WALL, GENERIC = "goal", "trap", "safe", "wall", "generic"

WORDINGS = {
  GOAL: (
    "The goal is {}.",
    "To win, reach {}.",
    "The winning symbol is {}.",
    "You win by stepping on {}.",
    "Aim for {}.",
    "The game is won on {}.",
    "{} is the goal.",
    "{} wins the game.",
    "{} is the target to reach.",
    "{} ends the game with a win.",
    "{} is where to go.",
    "{} is good: go there.",
  ),
  TRAP: (
    "The hazard is {}.",
    "To survive, avoid {}.",
    "The deadly symbol is {}.",
    "You lose by stepping on {}.",
    "Never step on {}.",
    "The game is lost on {}.",
    "{} is a hazard.",
    "{} loses the game.",
    "{} is a hole to fall into.",
    "{} ends the game with a loss.",
    "{} must be avoided.",
    "{} is deadly: go around it.",
  ),
  SAFE: (
    "Nothing happens on {}.",
    "You may step on {}.",
    "{} is harmless.",
    "{} does nothing.",
  ),
  WALL: (
    "A move into the wall is wasted.",
    "Nobody can leave the board.",
    "Walls stop a move.",
  ),
  GENERIC: (
    "Watch what each symbol does.",
    "Try a symbol to learn what it does.",
    "There are few moves: waste none.",
  ),
}

_PATTERNS = [
  (re.compile("^" + re.escape(wording).replace(r"\{\}", "([A-Z])") + "$"), role, i)
  for role, wordings in WORDINGS.items()
  for i, wording in enumerate(wordings)
]


@dataclasses.dataclass(frozen=True)
class Claim:
  """One item's content: a role and, for goal, trap and safe, the letter it is said of."""

  role: str
  letter: str = ""


def say(claim: Claim, rng: random.Random) -> str:
  """An item line that makes the claim, in one of its wordings."""
  return f"{ITEM_MARK} {rng.choice(WORDINGS[claim.role]).format(claim.letter)}"


def parse(line: str) -> Claim | None:
  """The claim that an item line makes; None if it is in nobody's wording."""
  text = line.removeprefix(ITEM_MARK).strip()
  for pattern, role, _ in _PATTERNS:
    if match := pattern.match(text):
      return Claim(role, match.group(1) if match.groups() else "")
  return None


def parse_all(knowledge: str) -> list[Claim]:
  """The claims of a knowledge text, in order; lines in other words are left out."""
  return [
    claim for line in knowledge.split("\n") if line.startswith(ITEM_MARK) and (claim := parse(line))
  ]


def swap_roles(knowledge: str) -> str:
  """The same text with goal and trap exchanged, each item in the counterpart of its wording; what a
  policy that reads must obey.
  """
  lines = []
  for line in knowledge.split("\n"):
    claim = parse(line) if line.startswith(ITEM_MARK) else None
    if claim and claim.role in (GOAL, TRAP):
      wording = next(
        i
        for pattern, role, i in _PATTERNS
        if role == claim.role and pattern.match(line.removeprefix(ITEM_MARK).strip())
      )
      other = TRAP if claim.role == GOAL else GOAL
      line = f"{ITEM_MARK} {WORDINGS[other][wording].format(claim.letter)}"
    lines.append(line)
  return "\n".join(lines)


def resolve(claims: list[Claim], letters: list[str]) -> tuple[str, str]:
  """What a list says of these letters: (goal, trap), "" where it says nothing.

  A letter's role is what most of its claims say; the goal is the letter that most claims call so;
  ties go to the latest claim.
  """
  votes: dict[str, dict[str, tuple[int, int]]] = {}
  for i, claim in enumerate(claims):
    if claim.role in (GOAL, TRAP) and claim.letter in letters:
      counts = votes.setdefault(claim.letter, {})
      counts[claim.role] = (counts.get(claim.role, (0, 0))[0] + 1, i)
  role_of = {letter: max(counts, key=counts.get) for letter, counts in votes.items()}

  def best(role: str) -> str:
    return max(
      (letter for letter in role_of if role_of[letter] == role),
      key=lambda letter: votes[letter][role],
      default="",
    )

  return best(GOAL), best(TRAP)
