"""The list of games: what was tried of each, and why those that are not played are not."""

import os
import subprocess
import sys

import pytest
import textarena
from textarena.envs.registration import ENV_REGISTRY, register

from oel_jax.environments import games


class Mute(textarena.Env):
  """A game that says its rules and nothing else; or asks for what is not there."""

  def __init__(self, error=None):
    self.error = error

  def reset(self, num_players, seed=None):
    print("reset")
    if self.error:
      print("[nltk_data] no such host", file=sys.__stderr__)
      raise self.error
    self.state = textarena.SinglePlayerState(num_players=num_players, seed=seed)
    rules = "Say [yes] or [no]."
    self.state.reset(game_state={}, player_prompt_function=lambda player_id, game_state: rules)

  def step(self, action):
    return self.state.step()


NLTK = LookupError(
  "\n****\n Resource 'words' not found.\n >>> import nltk\n >>> nltk.download('words')"
)


@pytest.fixture(name="own_games")
def fixture_own_games():
  own = {
    "Mute-v0": None,
    "Words-v0": NLTK,
    "Key-v0": ValueError("no key:\n  set KEY"),
    "Two-v0": ValueError("it takes 2 players"),
  }
  for name, error in own.items():
    register(name, Mute, error=error)
  yield list(own)
  for name in own:
    del ENV_REGISTRY[name]


def test_each_game_is_told_with_what_was_tried_of_it(own_games, capfd):
  real = ["FrozenLake-v0-raw", "GuessTheNumber-v0-raw", "Blackjack-v0-raw"]
  lines = [line.split(maxsplit=1) for line in games.tried([*own_games, *real])]
  assert lines[-1] == ["(1", "more games need several players.)"]
  assert [name for name, _ in lines[:-1]] == sorted({*own_games, *real} - {"Two-v0"})
  told = dict(lines)
  assert told["Mute-v0"] == "refused: shows the player nothing, whatever is played"
  assert told["Words-v0"].startswith("cannot be tried here: it needs words of NLTK (python -m nltk")
  assert told["Key-v0"] == "cannot be tried here: ValueError: no key: set KEY"
  assert told["FrozenLake-v0-raw"].startswith("shows its state; actions such as [up] [down] [left]")
  assert told["GuessTheNumber-v0-raw"].startswith("shows nothing before the first move; actions")
  assert told["Blackjack-v0-raw"].endswith("actions such as [Hit] [Stand]")
  assert capfd.readouterr() == ("", "")


# With a registry of one game, as all take a minute.
LISTED = (
  "import runpy, sys\n"
  "from textarena.envs import registration\n"
  "for name in set(registration.ENV_REGISTRY) - {'Secretary-v0-raw', 'Secretary-v0'}:\n"
  "  del registration.ENV_REGISTRY[name]\n"
  "sys.argv = ['main', '--games']\n"
  "runpy.run_module('oel_jax.main', run_name='__main__', alter_sys=True)\n"
)


def test_a_reader_that_has_enough_ends_the_list_in_silence():
  reads, writes = os.pipe()
  os.close(reads)
  done = subprocess.run([sys.executable, "-c", LISTED], stdout=writes, stderr=subprocess.PIPE)
  os.close(writes)
  assert (done.returncode, done.stderr) == (0, b"")


def test_the_command_lists_them():
  """Without a configuration."""
  done = subprocess.run([sys.executable, "-c", LISTED], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  first, last = done.stdout.splitlines()
  assert first.split() == [
    "Secretary-v0-raw",
    *"shows its state; actions such as".split(),
    "[accept]",
    "[continue]",
  ]
  assert last == "(0 more games need several players.)"
