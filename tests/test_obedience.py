"""The form of an answer, by examples; and that no user prompt stands in two lists."""

import importlib.util
import itertools
import json
import pathlib

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
_spec = importlib.util.spec_from_file_location("obedience", EXPERIMENTS / "obedience.py")
obedience = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(obedience)


@pytest.mark.parametrize(
    "answer",
    ["Cats purr when they are content.", "  It takes 1.5 to 2 hours!\n", 'She said "no."', "Why not?", "The U.N.'s seat is in New York.",
     " ".join(["word"] * 25) + "."],
)  # fmt: skip
def test_one_short_sentence(answer):
  assert obedience.one_short_sentence(answer)


@pytest.mark.parametrize(
    "answer",
    ["", "   ", "Cats purr when they are", "Cats purr. They are content.", "Really? Yes.", "1. Boil water.", "Cats purr\nwhen content.",
     "Ask Dr. Smith.", " ".join(["word"] * 26) + ".", "Cats purr. They"],
)  # fmt: skip
def test_anything_else(answer):
  assert not obedience.one_short_sentence(answer)


def test_no_user_prompt_is_used_twice():
  lists = json.loads((EXPERIMENTS / "data" / "user_prompts.json").read_text(encoding="utf-8"))
  assert {name: len(prompts) for name, prompts in lists.items()} == {"search": 60, "train": 300, "held_out": 100, "unrelated": 60}
  prompts = [prompt.strip().lower() for prompt in itertools.chain(*lists.values())]
  assert all(prompts) and len(set(prompts)) == len(prompts)
