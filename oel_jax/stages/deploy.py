"""Deployment: games whose lessons become knowledge, and games whose prompts cross to the server
side (OEL section 3).
"""

import pathlib

from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.conversations.schema import Conversation
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import files
from oel_jax.runtime.checksum import fingerprint
from oel_jax.stages import play, resume, withdrawn
from oel_jax.stages.run import DEPLOYED, KNOWLEDGE, PROMPT_GAMES, PROMPTS, Run


def deploy(run: Run, number: int, policy: Policy) -> None:
  """Plays the round's games; leaves them on the user side, and prompts.jsonl.

  Raises:
    ValueError: what is there was made by other weights; or the prompts are not those of the games.
  """
  resume.refuse_other_weights(run, number, policy)
  path, games = run.prompts(number), run.round(number) / PROMPT_GAMES
  if path.exists():
    if games.exists():
      _compare_prompts(run, path, games)
    if not any((run.round(number) / name).exists() for name in (KNOWLEDGE, DEPLOYED)):
      play_for_knowledge(run, number, policy)  # they were removed, and are still to be read
    return
  play.log(run, number, "deploy", play_for_knowledge(run, number, policy))
  played = _play_for_prompts(run, number, policy)
  play.log(run, number, "prefixes", played)
  made_from = {"weights": fingerprint(policy.params), PROMPT_GAMES: files.sha256(games)[:16]}
  run.manifest(number).announce(PROMPTS, made_from)
  write_jsonl(path, withdrawn.prompts(run.folder, played))
  run.manifest(number).record([PROMPTS], made_from)


def play_for_knowledge(run: Run, number: int, policy: Policy) -> list[Conversation]:
  """The games that the round's knowledge is drawn from."""
  count = run.config.extraction.trajectories
  sampling = run.sampling("deployment")
  games = play.Games(DEPLOYED, f"r{number}-deploy", "deploy", count, sampling, deployed=True)
  with run.stage(number, "deploy", policy, count) as (meter, advance):
    return play.play(run, number, games, meter, advance)


def _play_for_prompts(run: Run, number: int, policy: Policy) -> list[Conversation]:
  """Games on other maps; the prompts of their turns are all of them that crosses."""
  count = run.config.deployment.episodes
  sampling = run.sampling("deployment")
  games = play.Games(PROMPT_GAMES, f"r{number}-prefix", "prefixes", count, sampling, deployed=True)
  with run.stage(number, "prefixes", policy, count) as (meter, advance):
    return play.play(run, number, games, meter, advance)


def _compare_prompts(run: Run, path: pathlib.Path, games: pathlib.Path) -> None:
  """Raises ValueError unless the prompts are those of the turns of those games, all of them and in
  order, but for games that were withdrawn.
  """
  found = read_prompts(path, max_damaged=0.0)
  played = read_conversations(games, max_damaged=0.0)
  right = withdrawn.prompts(run.folder, played)
  if found == right:
    return
  shorter = min(len(found), len(right))
  place = next((i for i, (a, b) in enumerate(zip(found, right)) if a != b), shorter)
  has, wants = (side[place].id if place < len(side) else "nothing" for side in (found, right))
  raise ValueError(
    f"{path}: its {len(found)} prompts are not the {len(right)} of {games}: number {place + 1} "
    f"is {has}, and must be {wants}; "
    f"restore the file that is wrong, or remove {path.name} to have it made again"
  )
