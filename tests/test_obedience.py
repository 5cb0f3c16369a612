"""The form of an answer, by examples; and that no user prompt stands in two lists."""

import importlib.util
import itertools
import pathlib

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
_spec = importlib.util.spec_from_file_location("obedience", EXPERIMENTS / "data/obedience.py")
obedience = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(obedience)


WORDS = " ".join(["word"] * 40)


@pytest.mark.parametrize(
  "answer",
  [
    "Cats purr when they are content.",
    "  It takes 1.5 to 2 hours!\n",
    'She said "no."',
    "Really? Yes.",
    "The U.N.'s seat is in New York.",
    "Well... It depends!",
    f"{WORDS}.",
  ],
)
def test_very_short(answer):
  assert obedience.is_very_short(answer)


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "   ",
    "Cats purr when they are",
    "Cats purr. They",
    "Yes. No. Maybe.",
    "Cats purr\nwhen content.",
    "- Milk.\n- Eggs.",
    "Ask Dr. Smith. He knows.",
    f"{WORDS} more.",
  ],
)
def test_anything_else(answer):
  assert not obedience.is_very_short(answer)


def test_the_limits_can_be_others():
  assert not obedience.is_very_short("Really? Yes.", sentences=1) and not obedience.is_very_short(
    "Cats often purr.", words=2
  )


def test_no_user_prompt_is_used_twice():
  names = ("search", "train", "held_out", "unrelated")
  lists = {
    name: (EXPERIMENTS / f"data/{name}.txt").read_text(encoding="utf-8").splitlines()
    for name in names
  }
  assert {name: len(prompts) for name, prompts in lists.items()} == {
    "search": 60,
    "train": 300,
    "held_out": 100,
    "unrelated": 60,
  }
  prompts = [prompt.strip().lower() for prompt in itertools.chain(*lists.values())]
  assert all(prompts) and len(set(prompts)) == len(prompts)
