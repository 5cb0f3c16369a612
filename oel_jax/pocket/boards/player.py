"""The taught player of push worlds: what it thinks and does, from what a board shows and what the
knowledge tells.
"""

import random
from collections.abc import Set

from oel_jax.pocket.boards import plans
from oel_jax.pocket.worlds import ACTIONS, Cell


def respond(
  rng: random.Random,
  view: plans.View,
  target: str,
  box: str,
  harmless: Set[str] = frozenset(),
  *,
  guess: float,
) -> tuple[str, str]:
  """The taught thinking and action of one turn; target and box are "" where the knowledge does not
  tell.

  As in Frozen Lake (`corpus.respond`) the thinking opens with two slots, target then box; an
  unknown one is guessed with probability `guess`, and not knowing costs words. Then it says, cell
  by cell, which way the box goes and which way the player, up to the first push.
  """
  unclaimed = [
    letter for letter in view.letters() if letter not in (box, target) and letter not in harmless
  ]
  if not target and unclaimed and rng.random() < guess:
    target = rng.choice(unclaimed)
    unclaimed.remove(target)
  if not box and unclaimed and rng.random() < guess:
    box = rng.choice(unclaimed)
    unclaimed.remove(box)
  words = f"Goal: {_located(view, target)}. Box: {_located(view, box)}."
  if not target or not box:
    words += "".join(
      f" Nobody told me what {letter} does. It may be what to push, or it may be where to push it, "
      "or it may do nothing."
      for letter in unclaimed[:2]
    )
  words += f" I am at {_place(view.at)}."
  found = known_plan(view, target, box)
  if found:
    return f"{words} {_ways(view, box, found)} Next: {found[0]}.", found[0]
  words += " There is no way." if target and box else ""
  free = free_actions(view, target, box)
  closed = [name for name in ACTIONS if name not in free]
  words += f" Not {', '.join(closed)}." if closed else ""
  action = rng.choice(free or list(ACTIONS))
  return f"{words} Next: {action}.", action


def known_plan(view: plans.View, target: str, box: str) -> list[str] | None:
  """The shortest solution, if target and box are known; None if there is none."""
  target_at, box_at = (view.find(letter) if letter else None for letter in (target, box))
  if box_at is None or not target:
    return None
  # What is not shown lies under the player.
  return plans.plan(view.open(), (view.at, box_at), target_at or view.at)


def free_actions(view: plans.View, target: str, box: str) -> list[str]:
  """The moves that no wall stops and that do not lead onto the target, as far as the two are
  known.
  """
  target_at, box_at = (view.find(letter) if letter else None for letter in (target, box))
  after = {name: plans.moved(view.open(), (view.at, box_at), name) for name in ACTIONS}
  return [name for name, state in after.items() if state and state[0] != target_at]


def _ways(view: plans.View, box: str, found: list[str]) -> str:
  """The cells that the box comes to, and those that the player walks to before its first push."""
  player, where = view.at, view.find(box)
  walked: list[Cell] = []
  pushed: list[Cell] = []
  for action in found:
    player, after = plans.moved(view.open(), (player, where), action)
    if after != where:
      pushed.append(after)
    elif not pushed:
      walked.append(player)
    where = after
  own = f" I go {_places(walked)}." if walked else " I push."
  return f"{box} goes {_places(pushed)}.{own}"


def _place(cell: Cell) -> str:
  return f"({cell[0]}, {cell[1]})"


def _places(cells: list[Cell]) -> str:
  return " ".join(map(_place, cells))


def _located(view: plans.View, letter: str) -> str:
  """The letter and where it is; what is not shown lies under the player."""
  return f"{letter} at {_place(view.find(letter) or view.at)}" if letter else "unknown"
