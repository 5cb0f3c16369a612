"""Items: every wording is understood, nobody's words are another's, roles are exchanged and counted
right.
"""

import random

import pytest

from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.pocket import claims, worlds
from oel_jax.pocket.claims import (
  BOX,
  GENERIC,
  GOAL,
  PUSH,
  SAFE,
  TARGET,
  TRAP,
  WALL,
  WORDINGS,
  Claim,
)


def every_item():
  for role, wordings in WORDINGS.items():
    for wording in wordings:
      for letter in worlds.LETTERS if "{}" in wording else ("",):
        yield Claim(role, letter), f"- EXPERIENCE ITEM: {wording.format(letter)}"


def test_every_wording_of_every_letter_is_understood_and_is_nobody_elses():
  said = {}
  for claim, line in every_item():
    assert claims.parse(line) == claim
    assert said.setdefault(line, claim) == claim, line  # no sentence has two meanings
  assert len(said) == 25 * (4 * 12 + 4) + 3 + 3
  rng = random.Random(0)
  for claim in (Claim(GOAL, "A"), Claim(TRAP, "I"), Claim(SAFE, "Z"), Claim(WALL), Claim(GENERIC)):
    lines = {claims.say(claim, rng) for _ in range(400)}
    assert len(lines) == len(WORDINGS[claim.role]) and {claims.parse(line) for line in lines} == {
      claim
    }


@pytest.mark.parametrize("role", [GOAL, TRAP, TARGET, BOX])
def test_half_of_the_wordings_say_the_role_before_the_letter(role):
  assert len(set(WORDINGS[role])) == 12
  assert all(wording.count("{}") == 1 for wording in WORDINGS[role])
  assert sum(wording.startswith("{}") for wording in WORDINGS[role]) == 6


def test_other_words_make_no_claim():
  for line in (
    "",
    "The goal is GG.",
    "The goal is g.",
    "the goal is G.",
    "The goal is G. Really.",
    "G is the goal",
  ):
    assert claims.parse(f"{ITEM_MARK} {line}") is None
  text = (
    f"G is the goal.\n{ITEM_MARK} G is the goal.\nnoise {ITEM_MARK} H is deadly.\n"
    f"{ITEM_MARK} something else\n{ITEM_MARK}Aim for Q.  "
  )
  assert claims.parse_all(text) == [Claim(GOAL, "G"), Claim(GOAL, "Q")]


def test_swapping_twice_is_the_identity_and_once_exchanges_exactly_the_roles():
  rng = random.Random(1)
  lines = [line for _, line in every_item()]
  other = {GOAL: TRAP, TRAP: GOAL, TARGET: BOX, BOX: TARGET}
  for _ in range(300):
    parts = rng.sample(lines, 8) + rng.sample(
      ["", "G is the goal.", f"{ITEM_MARK} Never mind G.", "  two  spaces ", "Record: H"], 3
    )
    text = "\n".join(rng.sample(parts, len(parts)) + ["last"])
    swapped = claims.swap_roles(text)
    assert claims.swap_roles(swapped) == text
    assert claims.parse_all(swapped) == [
      Claim(other.get(claim.role, claim.role), claim.letter) for claim in claims.parse_all(text)
    ]
    for before, after in zip(text.split("\n"), swapped.split("\n"), strict=True):
      claim = claims.parse(before) if before.startswith(ITEM_MARK) else None
      assert (before != after) == (claim is not None and claim.role in other)


def test_swapping_exchanges_letter_first_with_letter_first():
  for claim, line in every_item():
    if claim.role in (GOAL, TRAP, TARGET, BOX):
      swapped = claims.swap_roles(line)
      assert (
        swapped.index(f" {claim.letter}") == line.index(f" {claim.letter}")
        or line.split()[3] != claim.letter != swapped.split()[3]
      )


ITEM = f"{ITEM_MARK} G wins the game."


@pytest.mark.parametrize(
  "text", ["", "\n", f"{ITEM}\n", f"{ITEM}\n\n", "free\x0ctext", "a\r\nb", "a\u2028b"]
)
def test_swapping_keeps_everything_else_of_a_text(text):
  assert claims.swap_roles(claims.swap_roles(text)) == text


def resolved(said: list[Claim], letters) -> tuple[str, str]:
  """Majority by counting, ties to the latest: written without the module's data structures."""
  said = [claim for claim in said if claim.role in (GOAL, TRAP) and claim.letter in letters]

  def count(letter, role):
    return sum(claim == Claim(role, letter) for claim in said)

  def latest(letter, role):
    return max((i for i, claim in enumerate(said) if claim == Claim(role, letter)), default=-1)

  result = []
  for role, against in ((GOAL, TRAP), (TRAP, GOAL)):
    mine = [
      x
      for x in letters
      if (count(x, role), latest(x, role)) > (count(x, against), latest(x, against))
    ]
    result.append(max(mine, key=lambda x: (count(x, role), latest(x, role)), default=""))
  return tuple(result)


def test_what_a_list_amounts_to_is_its_majority():
  rng = random.Random(2)
  for _ in range(3000):
    letters = rng.sample(worlds.LETTERS, rng.randint(2, 4))
    said = [
      Claim(rng.choice((GOAL, TRAP, SAFE, WALL)), rng.choice(letters + ["Q"]))
      for _ in range(rng.randint(0, 9))
    ]
    assert claims.resolve(said, letters) == resolved(said, letters)


@pytest.mark.parametrize(
  "said,expected",
  [
    ("", ("", "")),
    ("gA", ("A", "")),
    ("gA tB", ("A", "B")),
    ("gA tA", ("", "A")),  # a tie: the latest
    ("tA gA", ("A", "")),
    ("tA gA tA gB", ("B", "A")),
    ("gA gB", ("B", "")),
    ("gA gB gA", ("A", "")),
    ("gA gA tA tA tA gB", ("B", "A")),
    ("gQ tQ", ("", "")),  # not on this board
  ],
)
def test_resolve_by_hand(said, expected):
  parsed = [Claim({"g": GOAL, "t": TRAP}[part[0]], part[1]) for part in said.split()]
  assert claims.resolve(parsed, ["A", "B"]) == expected


def test_a_push_worlds_roles_are_resolved_by_themselves():
  said = [Claim(TARGET, "A"), Claim(GOAL, "B"), Claim(BOX, "C"), Claim(TRAP, "A"), Claim(BOX, "C")]
  assert claims.resolve(said, ["A", "B", "C"], PUSH) == ("A", "C")
  assert claims.resolve(said, ["A", "B", "C"]) == ("B", "A")
  as_lake = {TARGET: GOAL, BOX: TRAP}
  rng = random.Random(3)
  for _ in range(500):
    said = [Claim(rng.choice(PUSH), rng.choice("ABQ")) for _ in range(rng.randint(0, 9))]
    same = [Claim(as_lake[claim.role], claim.letter) for claim in said]
    assert claims.resolve(said, ["A", "B"], PUSH) == resolved(same, ["A", "B"])
