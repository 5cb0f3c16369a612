"""A help desk whose rules nobody tells: customers, corrections, complaints and silence.

    python -m oel_jax.main --config=experiments/help_desk.py:all \\
        --workdir=runs/desk --config.policy.weights=FOLDER_OR_GGUF

Orders are looked up by a line of text; --config.deployment.game_args.tool=True offers a tool in its
place. The rules of the next period are --config.deployment.game_args.period=1; `changing` begins a
period with each round. `HelpDesk` in oel_jax/environments/help_desk.py explains all arguments. What
a run's customers said becomes a log:

    python -m oel_jax.conversations.exporters runs/desk/round_1/user/trajectories.jsonl log.jsonl
"""

import pathlib

import ml_collections

from oel_jax import config as config_lib
from oel_jax.environments import help_desk_rules

HERE = pathlib.Path(__file__).parent
GAME_ARGS = {
  "all": dict(kinds=help_desk_rules.KINDS, topics=24, vague=0.2),
  # The same, with rules that change as a round begins: facts expire, and a quarter of the others.
  "changing": dict(kinds=help_desk_rules.KINDS, topics=24, vague=0.2, period="{rounds_before}"),
  # Where a case goes and nothing else, and one answer a case.
  "desk": dict(kinds=("desk",), topics=12, vague=0.0, second_answer=False),
}
SIZES = tuple(GAME_ARGS)


def get_config(size: str = "all") -> ml_collections.ConfigDict:
  """`size`: "all" kinds of rules, the same "changing" from round to round, or "desk" alone."""
  if size not in SIZES:
    known = ", ".join(SIZES)
    raise ValueError(f"experiments/help_desk.py has no size {size!r}: it must be one of {known}")
  config = config_lib.default()
  with config.unlocked():
    config.rounds = 3
    config.policy.thinking = False
    config.policy.max_prompt_tokens = 4096
    config.deployment.update(
      environment="oel_jax.environments.help_desk:HelpDesk",
      player="",
      actions="",
      action_pattern=r"(?s)(.+)",
      max_turns=6,
      max_response_tokens=96,
      episodes=256,
    )
    config.deployment.game_args = ml_collections.ConfigDict(
      dict(period=0, rules_seed=0, complaint=0.2, silence=0.2, tool=False) | GAME_ARGS[size]
    )
    # Nearly greedy: what a small model writes down at 0.7 is often not what it was told. Two
    # conversations must have given an item in which others said it: where nobody told what was
    # right it makes rules of its own, and once trained it answers wrong the same way each time.
    config.extraction.update(
      trajectories=200,
      use=200,
      wording="conversations",
      see_previous=False,
      answered_only=True,
      temperature=0.1,
      start_from="previous_round",  # what nobody has to say again is not forgotten
      min_support=2,
      told_by_others=True,
      newest_wins=True,
      repeats=False,
      max_knowledge_tokens=2048,
      max_response_tokens=64,
    )
    # The rate of the least that is forgotten (experiments/README.md). The first round has most to
    # teach; of later ones, what AdamW moves the weights by where nothing is left to learn is noise.
    config.consolidation.update(learning_rate=3e-6, on_no_gain="skip", gate_episodes=256)
    config.consolidation.update(steps=400, later_steps=100, final_rate=0.0, decay=0.25)
    # Of each round the weights at its end: 4 bytes a parameter, where a checkpoint is 12.
    config.consolidation.update(keep="weights", checkpoint_every=400)
    config.evaluation.update(episodes=256, temperature=0.1)
    config.evaluation.tasks = ("oel_jax.evaluation.instructions:instructions",)
    config.evaluation.retention = 256
    config.evaluation.unrelated = str(HERE / "data/unrelated.txt")
  return config
