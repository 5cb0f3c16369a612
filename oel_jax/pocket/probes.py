"""What the embedded policy can do, measured: the gates of its pre-training and the retention tests
of every round.

Each probe returns `Count(hits, of)`. All play by the real loop (`environments.play`), in worlds
drawn from seeds that no training example uses.
"""

import dataclasses
import functools
import random
from typing import Any

from oel_jax.conversations.schema import transcript
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
  """A knowledge text that names goal and trap, 2 to 12 items, some of no use, and on request as
  many about letters that are elsewhere.
  """
  said = [Claim(GOAL, world.goal), Claim(TRAP, world.trap)] + [
    rng.choice((Claim(GOAL, world.goal), Claim(TRAP, world.trap), Claim(WALL), Claim(GENERIC)))
    for _ in range(rng.randint(0, 10))
  ]
  if strangers:
    elsewhere = [letter for letter in worlds.LETTERS if letter not in world.letters()]
    said += [Claim(rng.choice((GOAL, TRAP)), rng.choice(elsewhere)) for _ in range(len(said))]
  rng.shuffle(said)
  return "\n".join(claims_lib.say(claim, rng) for claim in said)


def play_worlds(
  policy: Any, count: int, *, seed: int, layout: str | None = None, knowledge: str = "full"
) -> Count:
  """Games passed in worlds, with knowledge "full", "swapped" (the full list with its roles
  exchanged), "strangers" or "none".
  """
  episodes = []
  for i in range(count):
    map_seed = derive(seed, "world", i)
    world, rng = world_of(map_seed, layout), random.Random(f"list {map_seed}")
    text = "" if knowledge == "none" else full_list(world, rng, strangers=knowledge == "strangers")
    episodes.append(
      Episode(
        str(i),
        map_seed,
        derive(seed, "sample", i),
        claims_lib.swap_roles(text) if knowledge == "swapped" else text,
      )
    )
  spec = dataclasses.replace(
    LAKE,
    name="world",
    make=lambda: worlds.Worlds(functools.partial(world_of, layout=layout)),
    max_turns=worlds.MAX_TURNS,
  )
  played = _play(policy, spec, episodes)
  return Count(sum(game.passed for game in played), count)


def play_lake(
  policy: Any, count: int, *, seed: int, knowledge: str = "", spec: GameSpec = LAKE
) -> Count:
  """Games passed in TextArena's Frozen Lake, with this knowledge in the prompt."""
  episodes = [
    Episode(str(i), derive(seed, "lake", i), derive(seed, "lake sample", i), knowledge)
    for i in range(count)
  ]
  return Count(sum(game.passed for game in _play(policy, spec, episodes)), count)


def _play(policy, spec, episodes):
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
    prompts.append(
      policy.tokenizer.chat(
        (corpus.knowledge_message(full_list(world, rng)), corpus.ask_message(role))
      )
    )
  return Count(
    sum(
      answer != right
      for answer, right in zip(_answers(policy, prompts, seed, 4), answers, strict=True)
    ),
    count,
  )


def extraction(policy: Any, count: int, *, seed: int) -> Count:
  """Trajectories of random worlds of which what they reveal is written down: the deciding symbol if
  there is one, and nothing false.
  """
  prompts, revealed = [], []
  for i in range(count):
    rng = random.Random(f"extraction {seed} {i}")
    world = worlds.random_world(rng)
    game, facts = corpus.episode(rng, world)
    known = (
      "\n".join(claims_lib.say(claim, rng) for claim in corpus.item_list(rng, world))
      if rng.random() < 0.7
      else ""
    )
    prompts.append(
      policy.tokenizer.chat((corpus.extraction_message(transcript(game), known, form="items"),))
    )
    revealed.append(facts)
  hits = 0
  for answer, facts in zip(_answers(policy, prompts, seed, 32), revealed, strict=True):
    lines = [line for line in answer.splitlines() if line.strip()]
    said = [claims_lib.parse(line) for line in lines]
    deciding = {fact for fact in facts if fact.role in (GOAL, TRAP)}
    true = all(
      claim is not None and (claim in facts or claim.role in (GENERIC, WALL)) for claim in said
    )
    hits += bool(said) and true and deciding <= set(said)
  return Count(hits, count)


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


def passes(name: str, count: Count) -> bool:
  """Whether this gate's measured rate lies within its bounds."""
  low, high = GATES[name]
  return low <= count.rate <= high
