"""The configuration: what the defaults are, what is refused and in which words, and that every
experiment is accepted.
"""

import importlib.util
import inspect
import io
import json
import pathlib
import re
import tokenize

import ml_collections
import pytest
from test_workdir import open_workdir

from oel_jax import config as config_lib
from oel_jax.policy.architecture import ARCHITECTURES
from oel_jax.runtime import workdir
from oel_jax.tasks import distill

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"


def experiment(name: str):
  spec = importlib.util.spec_from_file_location(f"experiment_{name}", EXPERIMENTS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def leaves(config) -> dict:
  return {
    name: value
    for name, value in flat(config.to_dict()).items()
    if not name.startswith("deployment.game_args")
  }


def flat(value: dict, above: str = "") -> dict:
  found = {}
  for name, inner in value.items():
    found |= flat(inner, f"{above}{name}.") if isinstance(inner, dict) else {above + name: inner}
  return found


def test_the_default_is_locked_and_right():
  config = config_lib.default()
  config_lib.validate(config)
  with pytest.raises(AttributeError, match="learning_rates"):
    config.consolidation.learning_rates = 1.0
  with pytest.raises(AttributeError):
    config.task = "pretrain"
  with pytest.raises(TypeError):
    config.rounds = "two"
  # Values may change, and the placeholder takes a string.
  config.seed, config.policy.weights = (
    3,
    "a.safetensors",
  )
  assert config_lib.default().seed == 0 and config_lib.default().policy.weights is None


def test_the_default_is_the_papers():
  """The constants of method.md, written down a second time."""
  config = config_lib.default()
  paper = {
    "extraction.texts": 10,
    "deployment.max_turns": 5,
    "deployment.max_response_tokens": 1024,
    "deployment.temperature": 0.7,
    "deployment.top_p": 1.0,
    "evaluation.temperature": 0.7,
    "evaluation.top_p": 0.8,
    "evaluation.top_k": 20,
    "extraction.top_p": 0.8,
    "extraction.top_k": 20,
    "evaluation.episodes": 128,
    "consolidation.temperature": 0.7,
    "consolidation.k": 256,
    "consolidation.b1": 0.9,
    "consolidation.b2": 0.999,
    "consolidation.eps": 1e-8,
    "consolidation.weight_decay": 0.01,
    "consolidation.clip_norm": 1.0,
    "consolidation.batch_size": 64,
    "consolidation.steps": 20,
    "extraction.trajectories": 30,
    "extraction.use": 15,
    "extraction.start_from": "nothing",
    "rounds": 2,
    "consolidation.kind": "reverse_kl",
    "consolidation.support": "full",
    "consolidation.data": "student",
    "deployment.game": "FrozenLake-v0-raw",
  }
  found = leaves(config)
  assert {name: found[name] for name in paper} == paper
  assert config.deployment.game_args.to_dict() == {
    "size": 3,
    "num_holes": 2,
    "randomize_start_goal": False,
  }


def test_every_field_is_explained_where_it_stands():
  groups = [name for name, value in config_lib.default().items() if hasattr(value, "items")]
  tables = [config_lib.default, *(getattr(config_lib, f"_{name}") for name in groups)]
  source = "\n".join(map(inspect.getsource, tables))
  commented = {
    token.start[0]
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  above = [i for i, line in enumerate(source.splitlines(), start=1) if line.strip()[:1] == "#"]
  commented |= {i + 1 for i in above}
  bare = []
  for field in leaves(config_lib.default()):
    name = field.split(".")[-1]
    lines = [
      i
      for i, line in enumerate(source.splitlines(), start=1)
      if re.search(rf"\b{name} ?=[^=]", line.partition("#")[0])
    ]
    assert lines, field
    bare += [f"{field}: {source.splitlines()[i - 1].strip()}" for i in lines if i not in commented]
  assert not bare


@pytest.mark.parametrize(
  "field, value, right",
  [
    ("policy.architecture", "qwen9-1b", "one of 'auto', 'pocket', 'pocket-tiny', 'boards-4m'"),
    ("policy.compute_dtype", "int8", "one of 'auto', 'bfloat16', 'float32'"),
    ("extraction.form", "poem", "one of 'items', 'text'"),
    ("extraction.start_from", "", "one of 'nothing', 'previous_round'"),
    ("extraction.source", "raw", "one of 'extracted', 'trajectories', 'empty'"),
    ("consolidation.data", "both", "one of 'student', 'teacher'"),
    ("consolidation.kind", "kl", "one of 'reverse_kl', 'forward_kl', 'jsd', 'imitation'"),
    ("consolidation.support", "top", "one of 'full', 'topk', 'topk_tail'"),
    ("consolidation.on_no_gain", "cry", "one of 'warn', 'skip', 'stop'"),
    ("rounds", 0, "more than 0"),
    ("deployment.temperature", 0.0, "more than 0"),
    ("deployment.slots", -1, "more than 0"),
    ("consolidation.learning_rate", float("nan"), "more than 0"),
    ("consolidation.eps", 0.0, "more than 0"),
    ("consolidation.gate_episodes", -1, "0 or more"),
    ("evaluation.retention", -3, "0 or more"),
    ("extraction.top_k", -1, "0 or more"),
    ("evaluation.top_p", 0.0, "above 0 and at most 1"),
    ("deployment.top_p", 1.5, "above 0 and at most 1"),
    ("consolidation.b1", 1.0, "at least 0 and below 1"),
    ("consolidation.b2", -0.1, "at least 0 and below 1"),
    ("extraction.use", 31, "at most extraction.trajectories (30)"),
    ("consolidation.micro_tokens", 0, "more than 0"),
    ("consolidation.remat", "all", "one of 'none', 'dots', 'full'"),
    ("consolidation.attention", "triton", "one of 'auto', 'xla', 'cudnn', 'flash', 'splash'"),
    ("extraction.max_knowledge_tokens", 16384, "below policy.max_prompt_tokens (16384)"),
    ("evaluation.accumulation", (1, 31), "whole numbers from 1 to extraction.trajectories (30)"),
    ("evaluation.accumulation", (0,), "whole numbers from 1 to extraction.trajectories (30)"),
    ("evaluation.accumulation", (1.5,), "whole numbers from 1"),
    ("evaluation.accumulation", ("4",), "whole numbers from 1"),
    ("evaluation.accumulation", (True,), "whole numbers from 1"),
    ("logs.held_out", 1.0, "below 1"),
    ("consolidation.games_per_step", -1, "0 or more"),
    ("consolidation.renewed", "often", "one of 'step', 'round', 'never'"),
    ("consolidation.teacher", "alive", "one of 'frozen', 'first', 'live'"),
    ("evaluation.accumulation_rounds", 0, "more than 0"),
    ("evaluation.own_answers", -1, "0 or more"),
    ("consolidation.anchor_share", 0.0, "above 0, at most 1"),
    ("consolidation.anchor", -1.0, "0 or more"),
    ("consolidation.select", 0.0, "above 0 and at most 1"),
    ("consolidation.select", 1.5, "above 0 and at most 1"),
  ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(field, value, right):
  config = config_lib.default()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError) as error:
    config_lib.validate(config)
  assert str(error.value).startswith(f"config.{field} is {value!r}: it must be ") and right in str(
    error.value
  )
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "field, value, right",
  [
    ("consolidation.gate_episodes", 4, "0 where deployment.environment is"),
    ("evaluation.accumulation", (4,), "() where deployment.environment is"),
    ("evaluation.own_answers", 4, "0 where deployment.environment is"),
    ("deployment.endpoint", "http://127.0.0.1:1/v1", '"" where logs.path says'),
    ("logs.path", "", '"textarena", FILE.py:NAME or MODULE:NAME'),
  ],
)
def test_a_run_from_logs_alone_is_refused_what_it_has_no_use_of(field, value, right):
  config = config_lib.default()
  alone = {"logs.path": "/logs", "deployment.environment": "", "consolidation.gate_episodes": 0}
  config.update_from_flattened_dict({**alone, "deployment.endpoint_model": "m"})
  config_lib.validate(config)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError) as error:
    config_lib.validate(config)
  assert right in str(error.value) and "\n" not in str(error.value)


FIELDS = {name: value for name, value in leaves(config_lib.default()).items()}
FLOATS = [name for name, value in FIELDS.items() if type(value) is float]


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_of_another_type_is_refused_for_every_field(field):
  """ml_collections lets a bool into an int field, and anything into a field that was None once."""
  kind = type(FIELDS[field]) if FIELDS[field] is not None else str
  wrong = [b"x", {"a": 1}]
  wrong += [True] if kind in (int, str, tuple) else []
  wrong += ["1"] if kind is not str else []
  wrong += [1] if kind not in (int, float) else []
  wrong += [1.5] if kind is int else []
  wrong += [None] if FIELDS[field] is not None else []
  for value in wrong:
    config = config_lib.default()
    group, _, name = field.rpartition(".")
    inner = config[group] if group else config
    with inner.ignore_type():
      inner[name] = value
    with pytest.raises(ValueError) as error:
      config_lib.validate(config)
    assert str(error.value).startswith(f"config.{field} is ")
    assert f"must be of type {kind.__name__}" in str(error.value)


@pytest.mark.parametrize("field", [*FLOATS, "seed", "deployment.top_k"])
def test_a_number_that_is_none_or_has_no_end_is_refused_for_every_field(field):
  for value in (float("inf"), float("-inf"), float("nan")) if field in FLOATS else (10**400,):
    config = config_lib.default()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError) as error:
      config_lib.validate(config)
    assert str(error.value).startswith(f"config.{field} is ") and len(str(error.value)) < 200


def test_numbers_inside_the_arguments_of_a_game_are_looked_at_too():
  config = config_lib.default()
  with config.unlocked():
    config.deployment.game_args = {"size": 3, "odds": {"left": [0.5, float("nan")]}}
  told = "config.deployment.game_args.odds.left.1 is nan: it must be a finite number"
  with pytest.raises(ValueError, match=told):
    config_lib.validate(config)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64])
def test_a_whole_number_that_the_runs_own_file_could_not_be_read_with_is_refused(number, tmp_path):
  config = config_lib.default()
  with config.unlocked():
    config.deployment.game_args = {"sizes": [3, number]}
  told = f"config.deployment.game_args.sizes.1 is {number}: it must be a whole number of 64 bits"
  with pytest.raises(ValueError, match=told):
    config_lib.validate(config)
  config.deployment.game_args.sizes = [3, 2**63 - 1, -(2**63)]
  config_lib.validate(config)
  run = open_workdir(config, tmp_path / "run")
  assert workdir.read_config(run / "config.json")["config"] == json.loads(config.to_json())


def test_a_field_that_is_missing_and_a_whole_number_for_a_float():
  config = config_lib.default()
  config.consolidation.clip_norm = 2
  config_lib.validate(config)
  with config.unlocked():
    del config.consolidation.clip_norm
  with pytest.raises(ValueError, match="config.consolidation.clip_norm is missing: start from"):
    config_lib.validate(config)


def test_the_fields_of_distillation_are_looked_at_too():
  config = distill.default()
  config_lib.validate(config, distill.default())
  with config.distill.ignore_type():
    config.distill.held_out = None
  with pytest.raises(ValueError, match="config.distill.held_out is None: it must be of type str"):
    config_lib.validate(config, distill.default())


def test_distillation_extracts_nothing_and_so_needs_no_room_for_it():
  config = distill.default()
  config.policy.max_prompt_tokens = 512  # below extraction.max_knowledge_tokens
  config_lib.validate(config, distill.default())


@pytest.mark.parametrize(
  "field, value, names",
  [
    ("extraction.source", "swapped", "extraction.edit"),
    ("evaluation.retention", 8, "evaluation.tasks"),
  ],
)
def test_what_an_older_version_knew_by_itself_names_the_field_that_hands_it_in(field, value, names):
  config = config_lib.default()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=f"config.{field} is {value!r}: it must be .*{names}"):
    config_lib.validate(config)


def test_another_model_is_named_only_where_something_is_written_down():
  config = config_lib.default()
  config.extraction.weights = "pocket"
  config_lib.validate(config)
  found = config_lib.extractor(config)
  assert (found.weights, found.architecture) == ("oel_jax.pocket.load:load", "auto")
  config.extraction.source = "trajectories"
  with pytest.raises(ValueError, match='extraction.weights is .pocket.: it must be "" where'):
    config_lib.validate(config)


def test_a_short_name_of_a_policy_is_written_out_in_a_copy():
  config = config_lib.default()
  for weights, means in (("pocket", "oel_jax.pocket.load:load"), ("/m", "/m"), (None, None)):
    config.policy.weights = weights
    found = config_lib.policy(config)
    assert found.weights == means and config.policy.weights == weights
    assert found.max_prompt_tokens == config.policy.max_prompt_tokens


def test_flash_attention_and_packing_exclude_each_other():
  config = config_lib.default()
  config.consolidation.attention = "flash"
  with pytest.raises(
    ValueError,
    match="config.consolidation.pack is True: it must be False, as consolidation.attention = "
    '"flash"',
  ):
    config_lib.validate(config)


def test_new_games_in_each_step_must_be_there():
  config = config_lib.default()
  config.update_from_flattened_dict(
    {"consolidation.games_per_step": 64, "deployment.episodes": 1279}
  )
  told = (
    "config.deployment.episodes is 1279: it must be at least 1280: consolidation.games_per_step"
  )
  with pytest.raises(ValueError, match=re.escape(told)):
    config_lib.validate(config)
  config.deployment.episodes = 1280
  config_lib.validate(config)
  distill = config_lib.default_distill()
  distill.consolidation.games_per_step = 1
  with pytest.raises(ValueError, match="games_per_step is 1: it must be 0, as config.task is dis"):
    config_lib.validate(distill, config_lib.default_distill())


def test_imitation_knows_no_equivalent_ends():
  config = config_lib.default()
  config.update_from_flattened_dict(
    {"consolidation.kind": "imitation", "consolidation.one_end": True}
  )
  with pytest.raises(
    ValueError, match="one_end is True: it must be False where consolidation.kind"
  ):
    config_lib.validate(config)


@pytest.mark.parametrize(
  "changes, told",
  [
    (dict(select=0.25, data="teacher"), 'select is 0.25: it must be 1 where .*data is not "stud'),
    (dict(select=0.25, renewed="round"), 'or consolidation.renewed not "step"'),
    (dict(anchor=1.0, kind="imitation"), "anchor is 1.0: it must be 0 where"),
    (dict(anchor=1.0, teacher="live"), "anchor is 1.0: it must be 0 where"),
    (dict(balance=True, games_per_step=1), "balance is True: it must be False where"),
    (dict(anchor_edit="own.py:edit"), 'anchor_edit is .*: it must be "" where'),
    (dict(teacher_on_host=2.0), "teacher_on_host is 2.0: it must be 0 to 1"),
    (dict(teacher_on_host=1.0, teacher="live"), "teacher_on_host is 1.0: it must be 0 where"),
    (dict(teacher_on_host=0.5, anchor=1.0), "teacher_on_host is 0.5: it must be 0 where .*anchor"),
  ],
)
def test_what_guards_the_rounds_and_cannot_be_so_is_refused(changes, told):
  config = config_lib.default()
  config.consolidation.update(changes)
  with pytest.raises(ValueError, match=told):
    config_lib.validate(config)


def test_prompts_of_no_conversation_are_not_balanced():
  config = config_lib.default_distill()
  config.consolidation.balance = True
  with pytest.raises(ValueError, match="consolidation.balance is True: it must be False where"):
    config_lib.validate(config, config_lib.default_distill())


@pytest.mark.parametrize(
  "edge",
  [
    {"extraction.use": 30},
    {"evaluation.accumulation": (1, 30)},
    {"evaluation.top_p": 1.0},
    {"consolidation.micro_tokens": 1},
    {"consolidation.attention": "flash", "consolidation.pack": False},
    {"consolidation.gate_episodes": 0, "consolidation.log_probe": 0},
    {"consolidation.weight_decay": 0.0, "consolidation.b1": 0.0},
    {"extraction.max_knowledge_tokens": 16383},
  ],
)
def test_the_edges_are_inside(edge):
  config = config_lib.default()
  config.update_from_flattened_dict(edge)
  config_lib.validate(config)


# The files of experiments/.

SIZES = experiment("frozen_lake").SIZES
CHOICES = [("frozen_lake", size) for size in SIZES]
CHOICES += [
  *(("controls", name) for name in experiment("controls").CONTROLS),
  *(("help_desk_controls", name) for name in experiment("help_desk_controls").CONTROLS),
  ("sokoban", "qwen3-4b-instruct"),
]


@pytest.mark.parametrize("name, choice", CHOICES)
def test_an_experiment_starts_from_the_default_and_is_right(name, choice):
  config = experiment(name).get_config(choice)
  config_lib.validate(config)
  assert config.is_locked and config.deployment.is_locked
  fields = lambda config: {
    field for field in leaves(config) if not field.startswith("deployment.game_args.")
  }
  assert fields(config) == fields(config_lib.default())
  embedded = "pocket" if name == "controls" or choice.startswith("pocket") else None
  assert config.policy.weights == embedded and config.policy.architecture == (embedded or "auto")


# Trajectories accumulated and used, steps, rate, rounds and longest knowledge, as method.md has
# them of the paper.
@pytest.mark.parametrize(
  "name, size, numbers, thinking, form, sees",
  [
    ("sokoban", "qwen3-4b-instruct", (100, 50, 100, 1e-6, 3, 8192), False, "items", True),
    ("frozen_lake", "qwen3-1.7b", (30, 15, 20, 5e-6, 2, 2048), True, "text", False),
    ("frozen_lake", "qwen3-4b", (50, 25, 20, 1e-6, 2, 8192), True, "items", True),
    ("frozen_lake", "qwen3-8b", (100, 50, 100, 1e-6, 2, 8192), True, "items", True),
  ],
)
def test_the_papers_settings(name, size, numbers, thinking, form, sees):
  c = experiment(name).get_config(size)
  e, k, d = c.extraction, c.consolidation, c.deployment
  assert (
    e.trajectories,
    e.use,
    k.steps,
    k.learning_rate,
    c.rounds,
    e.max_knowledge_tokens,
  ) == numbers
  assert (c.policy.thinking, e.form, e.see_previous, e.texts, e.start_from) == (
    thinking,
    form,
    sees,
    10,
    "nothing",
  )
  assert (
    d.max_turns,
    d.max_response_tokens,
    d.temperature,
    k.temperature,
    k.batch_size,
    k.data,
  ) == (5, 1024, 0.7, 0.7, 64, "student")
  assert (c.evaluation.episodes, c.evaluation.top_p, c.evaluation.top_k) == (128, 0.8, 20)


@pytest.mark.parametrize("name", ["frozen_lake", "controls", "help_desk_controls"])
def test_an_unknown_size_is_refused_with_the_known_ones(name):
  module = experiment(name)
  known = SIZES if name == "frozen_lake" else module.CONTROLS
  with pytest.raises(ValueError) as error:
    module.get_config("huge")
  assert (
    f"experiments/{name}.py" in str(error.value)
    and "'huge'" in str(error.value)
    and ", ".join(known) in str(error.value)
  )


def test_a_control_of_the_help_desk_differs_in_what_it_says():
  module = experiment("help_desk_controls")
  table = leaves(experiment("help_desk").get_config("desk")) | {"rounds": 1}
  for name, changes in module.CONTROLS.items():
    other = leaves(module.get_config(name))
    assert {field: other[field] for field in other if other[field] != table[field]} == changes, name


def test_a_control_differs_from_the_own_round_in_what_it_says():
  module = experiment("controls")
  own = leaves(module.get_config("own"))
  for name, changes in module.CONTROLS.items():
    other = leaves(module.get_config(name))
    assert {field: other[field] for field in other if other[field] != own[field]} == changes, name
  table = leaves(experiment("frozen_lake").get_config("pocket-table"))
  assert {field for field in table if table[field] != own[field]} == {
    "rounds",
    "evaluation.accumulation",
    "consolidation.on_no_gain",
  }


@pytest.mark.parametrize("size", ["pocket", "pocket-tiny", "boards-4m", "boards-6m", "boards-tiny"])
def test_pre_training_names_a_known_architecture(size):
  config = experiment("pretrain_pocket").get_config(size)
  assert (
    config.is_locked
    and config.task == "pretrain"
    and config.architecture == size
    and size in ARCHITECTURES
  )


def test_every_size_of_every_experiment_is_a_configuration():
  paths = [p for p in EXPERIMENTS.glob("*.py") if "def get_config(" in p.read_text()]
  assert len(paths) >= 5
  for path in paths:
    module = experiment(path.stem)
    for size in module.SIZES:
      assert isinstance(module.get_config(size), ml_collections.ConfigDict)


def test_every_experiment_opens_with_its_command():
  texts = {path.name: path.read_text() for path in sorted(EXPERIMENTS.glob("*.py"))}
  run = {
    n: text for n, text in texts.items() if re.search("^(def get_config|if __name__)", text, re.M)
  }
  assert len(run) >= 3 and texts.keys() - run.keys() == {
    "readings.py",
    "running.py",
    "study.py",
  }
  for name, text in run.items():
    head = text.split('"""')[1]
    assert re.search(rf"^ *(JOBS=\d+ )?python .*experiments/{name}", head, re.MULTILINE), name


@pytest.mark.parametrize(
  "name, size, steps",
  [
    ("frozen_lake", "qwen3-1.7b", 20),
    ("frozen_lake", "qwen3-8b", 100),
    ("sokoban", "qwen3-4b-instruct", 100),
  ],
)
def test_the_papers_update_is_64_new_games_a_step_and_the_students_top_256(name, size, steps):
  module = experiment(name)
  plain, exact = (leaves(module.get_config(each)) for each in (size, f"{size}-paper"))
  assert {field: exact[field] for field in exact if exact[field] != plain[field]} == {
    "consolidation.games_per_step": 64,
    "consolidation.support": "topk",
    "deployment.episodes": 64 * steps,
  }
  assert (exact["consolidation.k"], exact["extraction.texts"]) == (256, 10)
  assert exact["consolidation.steps"] == steps


@pytest.mark.parametrize("field", ["people", "tools", "redact_names", "redact_hook"])
def test_what_speaks_of_logs_is_refused_where_there_are_none(field):
  """Nothing would be taken out of games by those that redact."""
  config = config_lib.default()
  config.logs[field] = "x"
  with pytest.raises(
    ValueError, match=f'config.logs.{field} is .x.: it must be "" where logs.path'
  ):
    config_lib.validate(config)
