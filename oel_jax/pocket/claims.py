"""What an experience item can say about a symbol, in the embedded policies' words, and what a list
of items amounts to.

Twelve wordings for the goal and for the trap, and as many for a push world's target and box: in
half of them the role's words stand before the letter. (Prototypes that only ever saw the letter
first learned that a goal is mentioned, but not which.)
"""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence

from oel_jax.extraction.prompts import ITEM_MARK

GOAL, TRAP, SAFE, WALL, GENERIC = "goal", "trap", "safe", "wall", "generic"
TARGET, BOX = "target", "box"  # of push worlds (`boards/rooms.py`)
LAKE, PUSH = (GOAL, TRAP), (TARGET, BOX)  # the two roles of a game that knowledge must tell
_OTHER = {role: other for pair in (LAKE, PUSH) for role, other in (pair, pair[::-1])}

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
  TARGET: (
    "The box belongs on {}.",
    "To win, fill {}.",
    "The place to fill is {}.",
    "You win by pushing the box onto {}.",
    "Push the box to {}.",
    "The game is won with the box on {}.",
    "{} is the place of the box.",
    "{} must be filled.",
    "{} is where the box belongs.",
    "{} ends the game once the box is there.",
    "{} is where to push the box.",
    "{} is waiting for the box: bring it there.",
  ),
  BOX: (
    "The box is {}.",
    "To win, push {}.",
    "The symbol to push is {}.",
    "You push the box by walking into {}.",
    "Get behind {}.",
    "The thing that moves is {}.",
    "{} is the box.",
    "{} can be pushed.",
    "{} is what to push.",
    "{} moves when you walk into it.",
    "{} has to be pushed.",
    "{} is heavy: push it.",
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
  """The same text with goal and trap exchanged, and target and box, each item in the counterpart of
  its wording; what a policy that reads must obey.
  """
  lines = []
  for line in knowledge.split("\n"):
    claim = parse(line) if line.startswith(ITEM_MARK) else None
    if claim and claim.role in _OTHER:
      wording = next(
        i
        for pattern, role, i in _PATTERNS
        if role == claim.role and pattern.match(line.removeprefix(ITEM_MARK).strip())
      )
      line = f"{ITEM_MARK} {WORDINGS[_OTHER[claim.role]][wording].format(claim.letter)}"
    lines.append(line)
  return "\n".join(lines)


def resolve(
  claims: list[Claim], letters: list[str], roles: tuple[str, str] = LAKE
) -> tuple[str, str]:
  """What a list says of these letters: which has the first role, which the second, "" where it says
  nothing.

  A letter's role is what most of its claims say; the goal is the letter that most claims call so;
  ties go to the latest claim.
  """
  votes: dict[str, dict[str, tuple[int, int]]] = {}
  for i, claim in enumerate(claims):
    if claim.role in roles and claim.letter in letters:
      counts = votes.setdefault(claim.letter, {})
      counts[claim.role] = (counts.get(claim.role, (0, 0))[0] + 1, i)
  role_of = {letter: max(counts, key=counts.get) for letter, counts in votes.items()}

  def best(role: str) -> str:
    return max(
      (letter for letter in role_of if role_of[letter] == role),
      key=lambda letter: votes[letter][role],
      default="",
    )

  return best(roles[0]), best(roles[1])


def draw(
  rng: random.Random,
  truth: Mapping[str, str],
  letters: Sequence[str],
  alphabet: Sequence[str],
  allow_strangers: bool = True,
) -> list[Claim]:
  """Draws the claims of a knowledge text: how many, how skewed, how wrong, and about letters that
  are elsewhere.

  Args:
    rng: all that is drawn comes from here.
    truth: the letter of each role that is to be known.
    letters: all that are on the board.
    alphabet: all that there are.
    allow_strangers: whether claims about letters that are elsewhere may be drawn.
  """
  size = rng.randint(*rng.choices(((1, 4), (5, 12), (13, 34)), (4, 3, 3))[0])
  told = [role for role in truth if rng.random() < 0.8]
  weights = [rng.choice((1, 1, 1, 4, 0.25)) for _ in told]
  wrong = rng.choices((0.0, 0.15, 0.3), (4, 2, 1))[0]
  strangers = rng.choice((0.0, 0.3)) if allow_strangers else 0.0
  filler = rng.choice((0.0, 0.1, 0.4)) if told else 1.0
  elsewhere = rng.sample([letter for letter in alphabet if letter not in letters], 3)
  result = []
  for _ in range(size):
    if rng.random() < strangers:
      result.append(Claim(rng.choice((*truth, SAFE)), rng.choice(elsewhere)))
    elif rng.random() < filler:
      role = rng.choice((SAFE, WALL, GENERIC))
      decoys = [letter for letter in letters if letter not in truth.values()] or elsewhere
      result.append(Claim(role, rng.choice(decoys) if role == SAFE else ""))
    elif rng.random() < wrong:
      result.append(Claim(rng.choice(list(truth)), rng.choice(letters)))
    else:
      role = rng.choices(told, weights)[0]
      result.append(Claim(role, truth[role]))
  missing = [role for role in told if not any(claim.role == role for claim in result)]
  if missing and size > 4 and rng.random() < 0.5:  # a single mention in a long list must count too
    role = rng.choice(missing)
    result[rng.randrange(size)] = Claim(role, truth[role])
  return result
