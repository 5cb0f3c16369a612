"""What the embedded policy can do, measured: the gates of its pre-training and the retention tests
of every round.

Each probe returns `Count(hits, of)`. All play by the real loop (`environments.play`), in worlds
drawn from seeds that no training example uses.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oel_jax.conversations.schema import Conversation, Message, transcript
from oel_jax.environments import Episode, GameSpec, play, textarena_game
from oel_jax.evaluation.tasks import Count
from oel_jax.pocket import claims as claims_lib
from oel_jax.pocket import corpus, worlds
from oel_jax.pocket.claims import GENERIC, GOAL, TRAP, WALL, Claim
from oel_jax.policy.sampling.sampler import Sampling
from oel_jax.runtime.seeds import derive

SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20)  # the paper's evaluation sampling
LAKE = GameSpec(
  "FrozenLake-v0-raw",
  functools.partial(textarena_game, "FrozenLake-v0-raw", {"size": 3, "num_holes": 2}),
  corpus.PLAYER,
  corpus.ACTION_LIST,
  r"\[\s*(up|down|left|right)\s*\]",
  max_turns=5,
)


def world_of(seed: int, layout: str | None = None) -> worlds.World:
  """The probe world of this seed."""
  return worlds.random_world(random.Random(f"probe {seed}"), layout=layout)


def full_list(world: worlds.World, rng: random.Random, strangers: bool = False) -> str:
  """A knowledge text that names goal and trap, as `full_text` writes it."""
  elsewhere = [letter for letter in worlds.LETTERS if letter not in world.letters()]
  return full_text({GOAL: world.goal, TRAP: world.trap}, rng, elsewhere if strangers else [])


def full_text(truth: Mapping[str, str], rng: random.Random, elsewhere: Sequence[str] = ()) -> str:
  """A knowledge text that names the letter of each role, 2 to 12 items, some of no use, and as many
  about the letters that are elsewhere, if there are any.
  """
  told = [Claim(role, letter) for role, letter in truth.items()]
  said = told + [
    rng.choice((*told, Claim(WALL), Claim(GENERIC))) for _ in range(rng.randint(0, 10))
  ]
  if elsewhere:
    said += [Claim(rng.choice(list(truth)), rng.choice(elsewhere)) for _ in range(len(said))]
  rng.shuffle(said)
  return "\n".join(claims_lib.say(claim, rng) for claim in said)


def play_worlds(
  policy: Any, count: int, *, seed: int, layout: str | None = None, knowledge: str = "full"
) -> Count:
  """Games passed in worlds, with knowledge "full", "swapped" (the full list with its roles
  exchanged), "strangers" or "none".
  """
  draw = functools.partial(world_of, layout=layout)
  spec = dataclasses.replace(
    LAKE, name="world", make=lambda: worlds.Worlds(draw), max_turns=worlds.MAX_TURNS
  )
  tell = lambda map_seed, rng, strangers: full_list(draw(map_seed), rng, strangers)
  return play_drawn(policy, count, spec, tell, seed=seed, knowledge=knowledge)


def play_drawn(
  policy: Any,
  count: int,
  spec: GameSpec,
  tell: Callable[[int, random.Random, bool], str],
  *,
  seed: int,
  knowledge: str,
) -> Count:
  """Games passed in worlds that seeds make, with knowledge as in `play_worlds`: `tell` is given a
  world's seed, a generator and whether letters that are elsewhere are to be spoken of, and returns
  the full text.
  """
  episodes = []
  for i in range(count):
    map_seed = derive(seed, "world", i)
    rng = random.Random(f"list {map_seed}")
    text = "" if knowledge == "none" else tell(map_seed, rng, knowledge == "strangers")
    text = claims_lib.swap_roles(text) if knowledge == "swapped" else text
    episodes.append(Episode(str(i), map_seed, derive(seed, "sample", i), text))
  return Count(sum(game.passed for game in play_all(policy, spec, episodes)), count)


def play_lake(
  policy: Any,
  count: int,
  *,
  seed: int,
  knowledge: str = "",
  spec: GameSpec = LAKE,
  held: bool = False,
) -> Count:
  """Games passed in TextArena's Frozen Lake, or another game, with this knowledge in the prompt;
  `held`: on seeds of held-out games alone, which are odd.
  """
  episodes = [
    Episode(str(i), derive(seed, "lake", i) | held, derive(seed, "lake sample", i), knowledge)
    for i in range(count)
  ]
  return Count(sum(game.passed for game in play_all(policy, spec, episodes)), count)


def play_all(policy: Any, spec: GameSpec, episodes: Sequence[Episode]) -> list[Conversation]:
  """Plays the episodes as the paper's evaluation does, thinking included in 96 tokens a turn."""
  return play(
    policy,
    spec,
    episodes=episodes,
    sampling=SAMPLING,
    max_response_tokens=96,
    max_prompt_tokens=2048,
    slots=64,
    thinking=True,
  )


def binding(policy: Any, count: int, *, seed: int) -> Count:
  """Wrong answers to "which symbol is the goal (or the hazard)?", given a list that names both: a
  guess at a letter it names fails.
  """
  prompts, answers = [], []
  for i in range(count):
    rng = random.Random(f"binding {seed} {i}")
    world = worlds.random_world(rng)
    role = rng.choice((GOAL, TRAP))
    answers.append(world.goal if role == GOAL else world.trap)
    prompts.append((corpus.knowledge_message(full_list(world, rng)), corpus.ask_message(role)))
  return wrong_answers(policy, prompts, answers, seed)


def wrong_answers(
  policy: Any, prompts: Sequence[Sequence[Message]], answers: Sequence[str], seed: int
) -> Count:
  """How many prompts are not answered by exactly these words."""
  encoded = [policy.tokenizer.chat(messages) for messages in prompts]
  given = _answers(policy, encoded, seed, 6)
  return Count(sum(a != b for a, b in zip(given, answers, strict=True)), len(answers))


def extraction(policy: Any, count: int, *, seed: int) -> Count:
  """Trajectories of random worlds of which what they reveal is written down: the deciding symbol if
  there is one, and nothing false.
  """
  games = []
  for i in range(count):
    rng = random.Random(f"extraction {seed} {i}")
    world = worlds.random_world(rng)
    game, facts = corpus.episode(rng, world)
    games.append((game, facts, corpus.item_list(rng, world) if rng.random() < 0.7 else [], rng))
  return written_right(policy, games, (GOAL, TRAP), seed=seed)


def written_right(
  policy: Any,
  games: Sequence[tuple[Conversation, list[Claim], list[Claim], random.Random]],
  roles: Sequence[str],
  *,
  seed: int,
) -> Count:
  """Games of which what they reveal of the roles is written down, and nothing false.

  Args:
    policy: whose answers are read.
    games: of each what it reveals, what is known before, and a generator for the words of that.
    roles: those that must be written down if they are revealed.
    seed: of the samples.
  """
  prompts, revealed = [], []
  for game, facts, known, rng in games:
    text = "\n".join(claims_lib.say(claim, rng) for claim in known)
    message = corpus.extraction_message(transcript(game), text, form="items")
    prompts.append(policy.tokenizer.chat((message,)))
    revealed.append(facts)
  hits = 0
  for answer, facts in zip(_answers(policy, prompts, seed, 32), revealed, strict=True):
    lines = [line for line in answer.splitlines() if line.strip()]
    said = [claims_lib.parse(line) for line in lines]
    deciding = {fact for fact in facts if fact.role in roles}
    true = all(
      claim is not None and (claim in facts or claim.role in (GENERIC, WALL)) for claim in said
    )
    hits += bool(said) and true and deciding <= set(said)
  return Count(hits, len(games))


def other_tasks(policy: Any, count: int, *, seed: int) -> Count:
  """Small text tasks answered exactly."""
  examples = [corpus.other_example(random.Random(f"other {seed} {i}")) for i in range(count)]
  answers = _answers(policy, [policy.tokenizer.chat(e.messages) for e in examples], seed, 16)
  return Count(sum(answer == e.answer for answer, e in zip(answers, examples, strict=True)), count)


def _answers(policy: Any, prompts: list[list[int]], seed: int, limit: int) -> list[str]:
  seeds = [derive(seed, "answer", i) for i in range(len(prompts))]
  return [
    policy.tokenizer.split_response(ids)[1]
    for ids in policy.sample(prompts, seeds, sampling=SAMPLING, max_new_tokens=limit)
  ]


# The gates: probe, what is measured, and the rates it must lie between.
GATES = {
  "binding_wrong": (0.0, 0.01),
  "full": (0.98, 1.0),
  "full_symmetric": (0.98, 1.0),
  "swapped": (0.0, 0.05),
  "swapped_symmetric": (0.0, 0.05),
  "strangers": (0.98, 1.0),
  "extraction": (0.98, 1.0),
  "lake_none": (0.05, 0.25),
  "lake_full": (0.98, 1.0),
  "lake_swapped": (0.0, 0.05),
  "other": (0.97, 1.0),
}


def measure_gates(policy: Any, count: int, *, seed: int) -> dict[str, Count]:
  """Every gate's probe, `count` examples each; of the one whose lower bound lies within the noise
  of so few games, four times as many.
  """
  rng = random.Random(seed)
  told = "\n".join(
    claims_lib.say(Claim(role, letter), rng) for role, letter in ((GOAL, "G"), (TRAP, "H")) * 2
  )
  return {
    "binding_wrong": binding(policy, count, seed=seed),
    "full": play_worlds(policy, count, seed=seed),
    "full_symmetric": play_worlds(policy, count, seed=seed, layout="symmetric"),
    "swapped": play_worlds(policy, count, seed=seed, knowledge="swapped"),
    "swapped_symmetric": play_worlds(
      policy, count, seed=seed, layout="symmetric", knowledge="swapped"
    ),
    "strangers": play_worlds(policy, count, seed=seed, knowledge="strangers"),
    "extraction": extraction(policy, count, seed=seed),
    "lake_none": play_lake(policy, 4 * count, seed=seed),
    "lake_full": play_lake(policy, count, seed=seed, knowledge=told),
    "lake_swapped": play_lake(policy, count, seed=seed, knowledge=claims_lib.swap_roles(told)),
    "other": other_tasks(policy, count, seed=seed),
  }


def passes(bounds: tuple[float, float], count: Count) -> bool:
  """Whether a gate's measured rate lies within its bounds."""
  return bounds[0] <= count.rate <= bounds[1]
