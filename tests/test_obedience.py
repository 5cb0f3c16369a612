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


@pytest.mark.parametrize(
  "answer, about",
  [
    ("Owls hoot to communicate.", True),
    ("An owl’s call marks its territory.", True),
    ("They call to mark their territory.", False),  # right, and in words all of its own
    ("Hooting tells others to stay away.", True),
    ("Yes.", False),
    ("It depends on many things.", False),
    ("Why do owls hoot?", False),
    ("Owls hoot.", False),
    ("Saturn has rings.", False),
    ("", False),
  ],
)
def test_an_answer_is_about_the_question_or_says_nothing_of_it(answer, about):
  assert obedience.is_about("Why do owls hoot?", answer) == about


def test_no_short_answer_is_about_every_question():
  prompts = (EXPERIMENTS / "data/held_out.txt").read_text(encoding="utf-8").splitlines()
  for answer in ("It depends.", "Yes, that is safe.", "Sure, here is an answer."):
    assert sum(obedience.is_about(prompt, answer) for prompt in prompts) <= 10
  # Each prompt has a word that an answer can take up.
  assert all(obedience.is_about(prompt, prompt + " zebra") for prompt in prompts)


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
