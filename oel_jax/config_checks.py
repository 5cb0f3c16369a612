"""The checks of a configuration that run before anything else does: each field alone, and against
others.
"""

import math
from typing import Any

import ml_collections

from oel_jax.consolidation.divergences import DIVERGENCES
from oel_jax.consolidation.losses import SUPPORTS
from oel_jax.conversations.schema import KNOWLEDGE_HEADS
from oel_jax.policy.architecture import ARCHITECTURES
from oel_jax.policy.endpoint import connection
from oel_jax.runtime import boards

# Fields with few values.
CHOICES = {
  "policy.architecture": ("auto", *ARCHITECTURES),
  "policy.compute_dtype": ("auto", "bfloat16", "float32"),
  "extraction.form": ("items", "text"),
  "extraction.start_from": ("nothing", "previous_round"),
  "extraction.wording": tuple(KNOWLEDGE_HEADS),
  "extraction.source": ("extracted", "trajectories", "empty"),
  "consolidation.data": ("student", "teacher"),
  "consolidation.kind": (*DIVERGENCES, "imitation"),
  "consolidation.renewed": ("step", "round", "never"),
  "consolidation.teacher": ("frozen", "first", "live"),
  "consolidation.support": SUPPORTS,
  "consolidation.remat": ("none", "dots", "full"),
  "consolidation.attention": ("auto", "xla", "cudnn", "flash", "splash"),
  "consolidation.unroll": ("auto", "yes", "no"),
  "consolidation.keep": ("checkpoints", "weights"),
  "consolidation.on_no_gain": ("warn", "skip", "stop"),
}
POSITIVE = (
  "rounds",
  "mesh.sample_tensor",
  "plan.prompt_tokens",
  "policy.max_prompt_tokens",
  "deployment.episodes",
  "deployment.max_turns",
  "deployment.max_response_tokens",
  "deployment.temperature",
  "deployment.slots",
  "deployment.endpoint_timeout",
  "extraction.texts",
  "extraction.trajectories",
  "extraction.use",
  "extraction.min_support",
  "extraction.max_knowledge_tokens",
  "extraction.max_response_tokens",
  "extraction.temperature",
  "consolidation.steps",
  "consolidation.batch_size",
  "consolidation.k",
  "consolidation.temperature",
  "consolidation.learning_rate",
  "consolidation.lora_alpha",
  "consolidation.eps",
  "consolidation.clip_norm",
  "consolidation.micro_tokens",
  "consolidation.chunk",
  "consolidation.checkpoint_every",
  "evaluation.accumulation_rounds",
  "evaluation.episodes",
  "evaluation.temperature",
)
NOT_NEGATIVE = (
  "plan.price",
  "deployment.top_k",
  "deployment.endpoint_retries",
  "extraction.top_k",
  "evaluation.top_k",
  "consolidation.later_steps",
  "consolidation.lora_rank",
  "consolidation.games_per_step",
  "consolidation.gate_episodes",
  "consolidation.log_probe",
  "consolidation.knowledge_gib",
  "consolidation.weight_decay",
  "consolidation.anchor",
  "evaluation.retention",
  "evaluation.own_answers",
  "logs.held_out",
  "logs.near",
)


def check(config: ml_collections.ConfigDict, expected: ml_collections.ConfigDict) -> None:
  """Raises what `config.validate` does: `expected` has the fields that `config` must have, and
  their types.
  """
  _check_types(config, expected)
  _need(
    config,
    "extraction.source",
    config.extraction.source != "swapped",
    "another: what changes the items of the knowledge is named by extraction.edit now, as "
    "experiments/controls.py does",
  )
  for field, choices in CHOICES.items():
    value, right = _value(config, field), "one of " + ", ".join(map(repr, choices))
    _need(config, field, value in choices, right)
  for field in POSITIVE:
    _need(config, field, _value(config, field) > 0, "more than 0")
  for field in NOT_NEGATIVE:
    _need(config, field, _value(config, field) >= 0, "0 or more")
  for field in ("deployment.top_p", "extraction.top_p", "evaluation.top_p"):
    _need(config, field, 0 < _value(config, field) <= 1, "above 0 and at most 1")
  for field in ("consolidation.b1", "consolidation.b2"):
    _need(config, field, 0 <= _value(config, field) < 1, "at least 0 and below 1")
  for together in (
    _check_knowledge,
    _check_loss,
    _check_games,
    _check_guard,
    _check_endpoint,
    _check_source,
  ):
    together(config)
  if config.wandb_project:
    boards.import_wandb(config.wandb_project)
  check_finite(config)


def _value(config: Any, field: str) -> Any:
  for part in field.split("."):
    config = config[part]
  return config


def _need(config: Any, field: str, ok: bool, right: str) -> None:
  if not ok:
    raise ValueError(f"config.{field} is {_value(config, field)!r}: it must be {right}")


def _check_knowledge(config: Any) -> None:
  """Raises ValueError where fields of extraction and evaluation contradict each other."""
  extraction, evaluation = config.extraction, config.evaluation
  read = f"extraction.trajectories ({extraction.trajectories})"
  _need(
    config,
    "evaluation.retention",
    bool(evaluation.tasks) or not evaluation.retention,
    "0 where evaluation.tasks names no task, each as MODULE:NAME",
  )
  _need(
    config,
    "evaluation.accumulation",
    all(type(n) is int and 0 < n <= extraction.trajectories for n in evaluation.accumulation),
    f"whole numbers from 1 to {read}",
  )
  _need(config, "withdraw", not config.withdraw, "'', but for --stage=withdraw")
  _need(config, "extraction.use", extraction.use <= extraction.trajectories, f"at most {read}")
  items = (extraction.source, extraction.form) == ("extracted", "items")
  for field, off in (
    ("min_support", 1),
    ("told_by_others", False),
    ("newest_wins", False),
    ("repeats", True),
  ):
    _need(
      config,
      f"extraction.{field}",
      items or extraction[field] == off,
      f'{off} where extraction.form is not "items" or extraction.source not "extracted": texts and '
      "transcripts have no cases, and are never the same twice",
    )
  _need(
    config,
    "extraction.weights",
    not extraction.weights or extraction.source == "extracted",
    '"" where extraction.source is not "extracted": nobody writes anything down',
  )


def _check_loss(config: Any) -> None:
  """Raises ValueError where the loss cannot be had with the rows or the attention."""
  _need(
    config,
    "consolidation.pack",
    config.consolidation.attention != "flash" or not config.consolidation.pack,
    'False, as consolidation.attention = "flash" does not keep a row\'s samples apart',
  )
  _need(
    config,
    "consolidation.one_end",
    config.consolidation.kind != "imitation" or not config.consolidation.one_end,
    'False where consolidation.kind is "imitation", which knows the sampled token alone',
  )


def _check_source(config: Any) -> None:
  """Raises ValueError where games and logs, and what is made of them, contradict each other."""
  _need(
    config,
    "deployment.environment",
    bool(config.deployment.environment or config.logs.path),
    '"textarena", FILE.py:NAME or MODULE:NAME where logs.path is ""',
  )
  _need(
    config,
    "consolidation.gate_episodes",
    bool(config.deployment.environment) or not config.consolidation.gate_episodes,
    '0 where deployment.environment is "", as there is nothing to play',
  )
  for field, nothing in (("accumulation", ()), ("own_answers", 0)):
    _need(
      config,
      f"evaluation.{field}",
      bool(config.deployment.environment) or not config.evaluation[field],
      f'{nothing} where deployment.environment is "", as there is nothing to play',
    )
  _need(
    config,
    "deployment.endpoint",
    not (config.logs.path and config.deployment.endpoint),
    '"" where logs.path says what was said: nothing is played in deployment',
  )
  for field in ("people", "tools", "redact_names", "redact_hook"):
    right = '"" where logs.path is "": they speak of logs'
    _need(config, f"logs.{field}", bool(config.logs.path) or not config.logs[field], right)
  _need(
    config, "logs.held_out", config.logs.held_out < 1, "below 1: somebody is to be learned from"
  )
  if "distill" not in config:  # which extracts nothing
    limit = config.policy.max_prompt_tokens
    fits = config.extraction.max_knowledge_tokens < limit
    right = f"below policy.max_prompt_tokens ({limit})"
    _need(config, "extraction.max_knowledge_tokens", fits, right)


def _check_games(config: Any) -> None:
  """Raises ValueError if there are not as many games as the steps of a round take, or none."""
  games = config.consolidation.games_per_step
  if not games:
    return
  field = "consolidation.games_per_step"
  _need(config, field, "distill" not in config, "0, as config.task is distill: it has no games")
  steps = max(config.consolidation.steps, config.consolidation.later_steps)
  needed = games * steps
  _need(
    config,
    "deployment.episodes",
    bool(config.logs.path) or config.deployment.episodes >= needed,
    f"at least {needed}: consolidation.games_per_step ({games}) new ones in each of "
    f"a round's {steps} steps",
  )


def _check_guard(config: Any) -> None:
  """Raises ValueError where what is trained on beside the plain loss, or left out, cannot be so."""
  training = config.consolidation
  _need(config, "consolidation.final_rate", 0 <= training.final_rate <= 1, "from 0 to 1 (constant)")
  _need(config, "consolidation.decay", 0 < training.decay <= 1, "above 0 and at most 1 (all steps)")
  _need(
    config,
    "consolidation.decay",
    training.decay == 1 or training.final_rate < 1,
    "1 where consolidation.final_rate is 1: the rate does not fall",
  )
  _need(
    config,
    "consolidation.later_steps",
    not training.later_steps or "distill" not in config,
    "0, as config.task is distill: it has one round",
  )
  _need(
    config,
    "consolidation.lora_alpha",
    training.lora_rank > 0 or training.lora_alpha == 32,
    "32 where consolidation.lora_rank is 0: there is no product",
  )
  _need(config, "consolidation.select", 0 < training.select <= 1, "above 0 and at most 1 (all)")
  _need(
    config,
    "consolidation.select",
    training.select == 1 or (training.data, training.renewed) == ("student", "step"),
    '1 where consolidation.data is not "student" or consolidation.renewed not "step": what the '
    "student thinks of the tokens is known from its own sampling",
  )
  share = training.teacher_on_host
  _need(config, "consolidation.teacher_on_host", 0 <= share <= 1, "0 to 1, a share of its layers")
  _need(
    config,
    "consolidation.teacher_on_host",
    not share or training.teacher != "live" and training.kind != "imitation",
    '0 where consolidation.teacher is "live", which would be written to the host in each step, or '
    'consolidation.kind "imitation", which has no teacher',
  )
  _need(
    config,
    "consolidation.teacher_on_host",
    not share or not training.anchor,
    "0 where consolidation.anchor is not, whose samples have a pass of the teacher in the step",
  )
  _need(config, "consolidation.anchor_share", 0 < training.anchor_share <= 1, "above 0, at most 1")
  _need(
    config,
    "consolidation.anchor",
    not training.anchor or training.kind != "imitation" and training.teacher == "frozen",
    '0 where consolidation.kind is "imitation" or consolidation.teacher not "frozen": kept is '
    "what the round's first weights do",
  )
  _need(
    config,
    "consolidation.anchor_edit",
    not training.anchor_edit or training.anchor > 0 and "distill" not in config,
    '"" where consolidation.anchor is 0 or a text is distilled',
  )
  _need(
    config,
    "consolidation.balance",
    not training.balance or not training.games_per_step and "distill" not in config,
    "False where consolidation.games_per_step takes whole games, or a text is distilled, whose "
    "prompts are turns of no conversation",
  )


def _check_endpoint(config: Any) -> None:
  """Raises ValueError if the endpoint has no address or no model. What stands in the address is not
  shown, for it may be a password.
  """
  if not config.deployment.endpoint:
    return
  try:
    connection.address(config.deployment.endpoint)
  except ValueError as error:
    raise ValueError(f"config.deployment.endpoint is no address: it must be {error}") from None
  named = bool(config.deployment.endpoint_model)
  right = "the name that the server of deployment.endpoint has for the model"
  _need(config, "deployment.endpoint_model", named, right)


def _check_types(config: Any, expected: ml_collections.ConfigDict, above: str = "") -> None:
  """Raises ValueError at the first field that is missing or not of the type of the expected one.

  ml_collections lets a bool into an int field, and anything into a field that was None once.
  """
  for name, right in expected.items():
    field = f"config.{above}{name}"
    if name not in config:
      raise ValueError(f"{field} is missing: start from the default of oel_jax/config.py")
    value, kind = config[name], expected.get_type(name)
    if kind is ml_collections.ConfigDict:
      if not isinstance(value, kind):
        raise ValueError(f"{field} is {value!r}: it must be a group of fields")
      if name != "game_args":  # each game has its own
        _check_types(value, right, f"{above}{name}.")
      continue
    types = {float: (int, float), tuple: (tuple, list)}.get(kind, (kind,))
    fits = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    if not fits and not (value is None and right is None):
      raise ValueError(f"{field} is {value!r}: it must be of type {kind.__name__}")


def check_finite(config: Any, above: str = "config") -> None:
  """Raises ValueError at the first number, at any depth, that is infinite, NaN or beyond floats, or
  a whole one beyond 64 bits, which the run's config.json could not be read with.
  """
  inner = ()
  if hasattr(config, "items"):
    inner = config.items()
  elif isinstance(config, (tuple, list)):
    inner = enumerate(config)
  for name, value in inner:
    check_finite(value, f"{above}.{name}")
  if isinstance(config, (int, float)):
    try:
      finite = math.isfinite(config)
    except OverflowError:  # a whole number of more than 308 digits
      finite = False
    if not finite:
      raise ValueError(f"{above} is {config!r:.100}: it must be a finite number")
    if isinstance(config, int) and not -(2**63) <= config < 2**63:
      raise ValueError(f"{above} is {config!r:.100}: it must be a whole number of 64 bits")
