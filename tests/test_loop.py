"""The whole loop: a shortened quickstart, what it leaves behind, kills at any moment,
controls, the gate, and bad input.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import ml_collections
import numpy as np
import pytest
import textarena
from fakes import Tokenizer, game_of, in_turns, turn_of
from processes import python_path

from oel_jax import choices, main
from oel_jax import config as config_lib
from oel_jax import loop as loop_lib
from oel_jax.consolidation import placement, restore, samples
from oel_jax.consolidation import step as step_lib
from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.conversations.schema import EMPTY
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.pocket import load as pocket
from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import load as load_lib
from oel_jax.policy import transformer
from oel_jax.policy.weights import native
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import play as play_lib
from oel_jax.stages.deploy import deploy
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.extract import extract
from oel_jax.stages.gate import gate
from oel_jax.stages.run import Run

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("deploy", "prefixes", "extract", "gate", "consolidate", "evaluate")
# the quickstart with few games, alike in sampling, batch and length where they can be, so that
# little is compiled
STEPS = {1: 4, 2: 3}  # of each round
SHORT = {
  "rounds": 2,
  "deployment.episodes": 4,
  "deployment.slots": 4,
  "extraction.texts": 2,
  "extraction.trajectories": 4,
  "extraction.use": 4,
  "extraction.max_knowledge_tokens": 60,
  "extraction.top_p": 1.0,
  "extraction.top_k": 0,
  "consolidation.steps": STEPS[1],
  "consolidation.later_steps": STEPS[2],
  "consolidation.batch_size": 4,
  "consolidation.checkpoint_every": 2,
  "consolidation.gate_episodes": 4,
  "consolidation.log_probe": 4,
  "consolidation.on_no_gain": "warn",
  "evaluation.episodes": 4,
  "evaluation.top_p": 1.0,
  "evaluation.top_k": 0,
  "evaluation.retention": 1,
  "evaluation.accumulation": (),
}


def start(cache, workdir, *flags: str, **changes) -> subprocess.Popen:
  """Starts `python -m oel_jax.main` on one CPU device; what it prints lies in WORKDIR.out and
  WORKDIR.err.
  """
  # One device, unlike conftest's eight; and what runs for so short a time need not be compiled
  # well.
  env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=python_path(), OEL_JAX_CACHE=str(cache))
  env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  # All programs, so that how many there are does not hang on how fast the machine is.
  env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  settings = SHORT | {name.replace("__", "."): value for name, value in changes.items()}
  command = [
    sys.executable,
    "-m",
    "oel_jax.main",
    "--config=experiments/frozen_lake.py:pocket",
    f"--workdir={workdir}",
  ]
  command += [f"--config.{name}={value}" for name, value in settings.items()] + list(flags)
  with open(f"{workdir}.out", "ab") as out, open(f"{workdir}.err", "wb") as err:
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=err)


def finish(process: subprocess.Popen, workdir, status: int = 0) -> str:
  """Waits for the end; returns what was printed to stderr."""
  process.wait(timeout=600)
  told = pathlib.Path(f"{workdir}.err").read_text()
  assert process.returncode == status, told
  return told


def short_config() -> ml_collections.ConfigDict:
  spec = importlib.util.spec_from_file_location("frozen_lake", ROOT / "experiments/frozen_lake.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("pocket")
  config.update_from_flattened_dict(SHORT)
  return config


@pytest.fixture(scope="session", name="cache")
def fixture_cache(tmp_path_factory):
  return tmp_path_factory.mktemp("compilations")


@pytest.fixture(scope="session", name="run")
def fixture_run(cache, tmp_path_factory):
  """The run directory of an uninterrupted shortened quickstart. Not to be changed: tests copy
  it.
  """
  workdir = tmp_path_factory.mktemp("quickstart") / "run"
  finish(start(cache, workdir), workdir)
  return workdir


@pytest.fixture(name="copy")
def fixture_copy(run, tmp_path):
  return shutil.copytree(run, tmp_path / "run")


def final_params(folder: pathlib.Path, number: int):
  """The parameters of a round's last checkpoint, read without the loop."""
  config = config_lib.consolidation(short_config(), number)
  optimizer, params = restore.make_optimizer(config), pocket.load().params
  abstract = jax.eval_shape(lambda params: step_lib.init_state(params, optimizer), params)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract
  )
  with Checkpoints(folder / f"round_{number}/checkpoints") as checkpoints:
    restored = checkpoints.restore(abstract)
  assert restored.step == config.steps
  return jax.device_get(restored.state.params)


def same_bits(tree, other) -> bool:
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  return len(leaves) == len(others) and all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(leaves, others)
  )


def hashes(folder: pathlib.Path, *patterns: str) -> dict[str, str]:
  """By path; without TensorBoard's files and the lock, which each process begins anew."""
  paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
  kept = sorted(path for path in paths if not path.name.startswith(("events.", ".lock")))
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept
  }


def read_json(path: pathlib.Path):
  return json.loads(path.read_text())


# What a run leaves behind.


def test_the_run_directory_is_as_designed(run):
  for name in ("config.json", "metrics.jsonl", "report/index.html", "report/results.json"):
    assert (run / name).is_file(), name
  assert list(run.glob("events.out.tfevents*")) and list(run.glob("report/*.png"))
  for number in (1, 2):
    folder = run / f"round_{number}"
    names = [
      "user/trajectories.jsonl",
      "knowledge/00.md",
      "knowledge/00.jsonl",
      "knowledge/01.md",
      "knowledge/01.jsonl",
      "prompts.jsonl",
    ]
    for name in [*names, "gate.json", "evaluation.json", "cost.json"]:
      assert (folder / name).is_file(), f"round {number}: {name}"
    assert sorted(
      int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()
    ) == [2, STEPS[number]]
    assert len((folder / "user/trajectories.jsonl").read_text().splitlines()) == 4
    assert {entry["stage"] for entry in read_json(folder / "cost.json")["stages"]} == set(STAGES)
  assert (
    (run / "round_0/evaluation.json").is_file()
    and not (run / "round_0/checkpoints").exists()
    and not (run / "round_3").exists()
  )
  assert not [path for path in run.rglob("*") if path.name.endswith((".partial", ".tmp"))]
  for path in run.rglob("*.jsonl"):
    assert all("schema" in json.loads(line) for line in path.read_text().splitlines()), path
  told = pathlib.Path(f"{run}.out").read_text()
  assert str(run / "report/index.html") in told and "round 2: consolidate: 3 of 3" in told


def test_the_results_have_their_counts_and_say_what_the_games_say(run):
  results = read_json(run / "report/results.json")

  def held_out(number: int, name: str = "evaluation") -> list[dict]:
    return [
      json.loads(line)
      for line in (run / f"round_{number}/user/{name}.jsonl").read_text().splitlines()
    ]

  def check(entry: dict, games: list[dict]) -> None:
    tokens = [
      m["response_tokens"] for game in games for m in game["messages"] if m["role"] == "assistant"
    ]
    assert len(games) == entry["passed_count"] == 4 and entry["passed"] == pytest.approx(
      sum(game["reward"] >= 1 for game in games) / 4
    )
    assert entry["response_tokens"] == pytest.approx(sum(tokens) / len(tokens)) and entry[
      "response_tokens_count"
    ] == len(tokens)
    for name in ("passed", "response_tokens"):
      low, high = entry[f"{name}_interval"]
      assert low <= entry[name] <= high
    cut = entry["cut"]["without"]
    assert cut["cut"] == pytest.approx(sum(n >= limit for n in tokens) / len(tokens))

  limit = read_json(run / "config.json")["config"]["deployment"]["max_response_tokens"]
  check(results["base"], held_out(0))
  assert [entry["round"] for entry in results["rounds"]] == [1, 2]
  for entry in results["rounds"]:
    check(entry, held_out(entry["round"]))
    assert {"knowledge", "prompts", "consolidation", "in_context"} < set(entry["cut"])
    in_context = held_out(entry["round"], "evaluation_in_context")
    assert (
      entry["in_context"] == pytest.approx(sum(game["reward"] >= 1 for game in in_context) / 4)
      and entry["in_context_count"] == 4
    )
    low, high = entry["in_context_interval"]
    assert low <= entry["in_context"] <= high
    by_text = entry["in_context_texts"]
    assert sum(text["passed_count"] for text in by_text) == 4
    passed = sum(text["passed"] * text["passed_count"] for text in by_text)
    assert passed == pytest.approx(4 * entry["in_context"])
    for name in ("extraction", "worlds", "symmetric", "other"):
      kept = entry["retention"]
      low, high = kept[f"{name}_interval"]
      assert kept[f"{name}_count"] == 1 and kept[name] in (0, 1) and low <= kept[name] <= high


def test_the_metrics_have_one_line_a_step(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  stages = [(line["round"], line["stage"]) for line in lines if line["stage"] != "consolidate"]
  assert stages == [
    (0, "evaluate"),
    *((number, name) for number in (1, 2) for name in STAGES if name != "consolidate"),
  ]
  deploy, gate = (
    next(line for line in lines if line["stage"] == name) for name in ("deploy", "gate")
  )
  games = read_conversations(run / "round_1/user/trajectories.jsonl")
  assert (
    deploy["passed"] == sum(game.passed for game in games) / len(games)
    and gate["passed_with"] == read_json(run / "round_1/gate.json")["with"]["rate"]
  )
  trained = [(line["round"], line["step"]) for line in lines if line["stage"] == "consolidate"]
  assert trained == [(number, step) for number in (1, 2) for step in range(STEPS[number] + 1)]
  for line in lines:
    if line["stage"] == "consolidate":
      measured = {"kl", "student_entropy", "teacher_entropy"}
      names = (
        {"loss", "gradient_norm", "tokens", "response_tokens", "seconds", "kl_0_15"} | measured
        if line["step"]
        else set()
      )
      names |= (
        {f"probe_{name}" for name in (*measured, "topk_mass")} if line["step"] % 2 == 0 else set()
      )
      assert names <= line.keys() and all(np.isfinite(line[name]) for name in names), line


def test_the_server_side_gets_prompts_only(run):
  """No knowledge, no rules, no outcome, and of the games only those that were deployed for it."""
  env = textarena.make("FrozenLake-v0-raw", size=3, num_holes=2, randomize_start_goal=False)
  state = random.getstate()
  env.reset(num_players=1, seed=1)
  random.setstate(state)
  rules = [
    text for _, text, kind in env.get_observation()[1] if kind is textarena.ObservationType.PROMPT
  ]
  sentences = [
    part.strip()
    for text in rules
    for part in re.split(r"\n|(?<=[.!?])\s", text)
    if len(part.split()) >= 4
  ]
  assert len(sentences) >= 3
  for number in (1, 2):
    folder = run / f"round_{number}"
    found = read_prompts(folder / "prompts.jsonl")
    games = read_conversations(folder / "user/prefix_trajectories.jsonl")
    assert len(games) == 4 and len(found) == sum(len(game.answers) for game in games)
    assert len({prefix.id for prefix in found}) == len(found)
    items = [
      item.text for i in (0, 1) for item in knowledge_lib.read(folder / "knowledge", i).items
    ]
    assert items
    for prefix in found:
      text = "\n".join(message.content for message in prefix.messages)
      assert [message.role for message in prefix.messages] == ["user", "assistant"] * (
        len(prefix.messages) // 2
      ) + ["user"]
      assert (
        "EXPERIENCE ITEM" not in text
        and "Experience from earlier games" not in text
        and not any(item in text for item in items)
      )
      assert not any(sentence in text for sentence in sentences)
      assert "Congratulations" not in text and "fell into a hole" not in text
    extracted_from = {
      game.source.seed for game in read_conversations(folder / "user/trajectories.jsonl")
    }
    assert extracted_from.isdisjoint(game.source.seed for game in games)
    provenance = {
      item.trajectory
      for i in (0, 1)
      for item in knowledge_lib.read(folder / "knowledge", i).items
      if item.round == number
    }
    assert provenance <= {
      game.id for game in read_conversations(folder / "user/trajectories.jsonl")
    }


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_server_side_needs_knowledge_and_prompts_only(run, cache, tmp_path, number):
  """`--stage=consolidate`, in a folder that holds nothing else of the run but, for a later round,
  the checkpoints that it made before, leaves the bits of the whole run.
  """
  server = tmp_path / "server"
  there, here = run / f"round_{number}", server / f"round_{number}"
  shutil.copytree(there / "knowledge", here / "knowledge")
  shutil.copy(there / "prompts.jsonl", here)
  if number == 2:
    shutil.copytree(run / "round_1/checkpoints", server / "round_1/checkpoints")
  finish(start(cache, server, "--stage=consolidate", f"--round={number}"), server)
  assert same_bits(final_params(server, number), final_params(run, number))
  made = {path.name for path in here.iterdir()} - {"knowledge", "prompts.jsonl"}
  assert made == {"checkpoints", "cost.json", "manifest.json"}
  assert f"the user side needs {here}/checkpoints" in pathlib.Path(f"{server}.out").read_text()


def test_held_out_maps_are_nobody_elses(run):
  held_out, others = {}, set()
  others_files = {*run.glob("**/extraction.jsonl"), *run.glob("**/items.jsonl")}
  for path in set(run.glob("round_*/user/*.jsonl")) - others_files:
    seeds = [json.loads(line)["source"]["seed"] for line in path.read_text().splitlines()]
    if path.name.startswith("evaluation"):
      held_out[str(path)] = seeds
    else:
      others |= set(seeds)
      assert len(set(seeds)) == 4, path
  # The same maps, however played.
  assert len(held_out) == 1 + 3 + 4 and len({tuple(seeds) for seeds in held_out.values()}) == 1
  [seeds] = {tuple(seeds) for seeds in held_out.values()}
  assert len(set(seeds)) == 4 and all(seed % 2 == 1 for seed in seeds)
  # Two rounds of trajectories, prefixes and gate.
  assert len(others) == 2 * 3 * 4 and all(seed % 2 == 0 for seed in others)


def test_trained_weights_run_in_the_programs_of_the_first(run, cache):
  """A program for each of the shapes that prompts and cache have: 8 and 4; twice as many, if the
  base model's were not used again.
  """
  assert 4 <= len(list(cache.glob("jit_prefill_layer-*-cache"))) <= 12
  assert 2 <= len(list(cache.glob("jit_decode-*-cache"))) <= 6
  assert len(list(cache.glob("jit_prepare-*-cache"))) == 1


def test_each_round_starts_from_the_weights_of_the_one_before(copy, monkeypatch):
  shutil.rmtree(copy / "round_2/checkpoints")
  (copy / "round_2/evaluation.json").unlink()
  config = short_config()
  config.consolidation.log_probe = (
    0  # the probe would compile for its numbers, which are of no use here
  )
  seen = {}

  class Enough(Exception):
    pass

  def spy(task, student, teacher, *_, **__):
    seen.update(
      round=task.round,
      student=jax.device_get(student.params),
      teacher=jax.device_get(teacher.params),
    )
    raise Enough

  monkeypatch.setattr(samples, "draw", spy)
  with pytest.raises(Enough):
    loop_lib.run(config, copy, resume_anyway=True)
  first = final_params(copy, 1)
  assert (
    seen["round"] == 2 and same_bits(seen["teacher"], first) and same_bits(seen["student"], first)
  )
  assert not same_bits(first, pocket.load().params)


def test_the_same_command_again_does_nothing_new(cache, copy):
  contents, written = (
    hashes(copy, "**/*"),
    {name: (copy / name).stat().st_mtime_ns for name in hashes(copy, "round_*/**/*", "*")},
  )
  finish(start(cache, copy), copy)
  assert hashes(copy, "**/*") == contents
  assert written == {
    name: (copy / name).stat().st_mtime_ns for name in hashes(copy, "round_*/**/*", "*")
  }


# Kills.

LAST_FILES = (
  "user/trajectories.jsonl",
  "prompts.jsonl",
  "knowledge/whole",
  "gate.json",
  "checkpoints/{steps}",
  "evaluation.json",
)
ORDER = [("evaluate", "round_0/evaluation.json")] + [
  (stage, f"round_{number}/{name.format(steps=steps)}")
  for number, steps in STEPS.items()
  for stage, name in zip(STAGES, LAST_FILES)
]


def at(folder: pathlib.Path) -> int:
  """The index in ORDER of the stage that the run is in."""
  return next((i for i, (_, name) in enumerate(ORDER) if not (folder / name).exists()), len(ORDER))


def steps_done(folder: pathlib.Path, number: int) -> int:
  try:
    lines = [
      json.loads(line)
      for line in (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
      if line.endswith(b"\n")
    ]
  except FileNotFoundError:
    return 0
  return sum(
    line["stage"] == "consolidate" and line["round"] == number and line["step"] > 0
    for line in lines
  )


def kill_in(cache, workdir: pathlib.Path, stage: int, rng: random.Random, **changes) -> str | None:
  """Runs until ORDER[stage] has begun, then kills after a random while; returns the name of the
  stage cut off, None if there was none.
  """
  name, number = ORDER[stage][0], (stage + 5) // 6
  steps = rng.randint(0, 2) if name == "consolidate" else 0
  process = start(cache, workdir, **changes)
  while process.poll() is None and (
    at(workdir) < stage or (at(workdir) == stage and steps_done(workdir, number) < steps)
  ):
    time.sleep(0.01)
  time.sleep(rng.uniform(0, 0.4))
  if process.poll() is not None:
    finish(process, workdir)
    return None
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  return ORDER[at(workdir)][0] if at(workdir) < len(ORDER) else None


def outcome(folder: pathlib.Path, last: int) -> dict:
  """Everything that a run is for, bit for bit, up to the last round."""
  names = ("evaluation.json", "gate.json", "prompts.jsonl", "knowledge/*", "user/*")
  found = hashes(
    folder, *(f"round_{number}/{name}" for number in range(last + 1) for name in names)
  )
  for number in range(1, last + 1):
    params = b"".join(
      np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(final_params(folder, number))
    )
    found[f"parameters of round {number}"] = hashlib.sha256(params).hexdigest()
  for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
    if line["round"] > last:
      continue
    place = f"metrics of round {line['round']}, {line['stage']}, step {line['step']}"
    assert place not in found, f"{place} stand there twice"
    found[place] = {
      name: value
      for name, value in line.items()
      if name not in ("time", "seconds", "compiles", "digest")
    }
  return found


def survives(run, cache, workdir, stages, rng, last: int) -> set[str]:
  """Kills in each of these stages, lets the run end, compares; returns the names of the stages that
  were cut off.
  """
  hit = [kill_in(cache, workdir, stage, rng, rounds=last) for stage in stages]
  finish(start(cache, workdir, rounds=last), workdir)
  expected, found = outcome(run, last), outcome(workdir, last)
  assert {name for name in expected | found if expected.get(name) != found.get(name)} == set(), hit
  results, wanted = (
    read_json(workdir / "report/results.json"),
    read_json(run / "report/results.json"),
  )
  assert results["base"] == wanted["base"] and results["rounds"] == wanted["rounds"][:last]
  return {name for name in hit if name}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(run, cache, tmp_path):
  """Killed in extraction, consolidation and evaluation; and a run of one round is the first round
  of a run of two.
  """
  assert len(survives(run, cache, tmp_path / "run", (2, 5, 6), random.Random(31), last=1)) >= 2


@pytest.mark.slow
def test_ten_kills_in_every_stage_change_no_bit(run, cache, tmp_path):
  rng = random.Random(10)
  stages = sorted(rng.sample(range(len(ORDER)), 10))
  # So that a stage that ended too soon is mostly met again.
  while {ORDER[stage][0] for stage in stages[:-2]} != set(STAGES):
    stages = sorted(rng.sample(range(len(ORDER)), 10))
  assert survives(run, cache, tmp_path / "run", stages, rng, last=2) == set(STAGES)


# The stages by themselves, with a policy that is not a model.


class Scripted:
  """Walks down; when asked what a game teaches, gives `lesson`."""

  params = {}

  def __init__(
    self, lesson: str = "- EXPERIENCE ITEM: The goal is G.\n- EXPERIENCE ITEM: H is a hazard."
  ):
    self.lesson, self.tokenizer = lesson, Tokenizer()

  @in_turns
  def sample(self, prompts, seeds, **how):
    asked = [self.tokenizer.seen[prompt[0]][-1].content for prompt in prompts]
    return [
      self.tokenizer.put(self.lesson if "record of a finished game" in text else "[down]")
      for text in asked
    ]


@pytest.fixture(name="make_run")
def fixture_make_run(tmp_path):
  with Metrics(tmp_path) as metrics:

    def make(**changes) -> Run:
      config = short_config()
      config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
      )
      return Run(config, tmp_path, metrics, None)

    yield make


def test_the_controls_change_what_the_knowledge_says(make_run, tmp_path):
  own = extract(make_run(), 1, Scripted())
  assert (
    own
    == ["\n".join(["- EXPERIENCE ITEM: The goal is G.", "- EXPERIENCE ITEM: H is a hazard."] * 4)]
    * 2
  )
  shutil.rmtree(tmp_path / "round_1/knowledge")
  # Of the same extraction: nothing is sampled again.
  swapped = extract(make_run(extraction__edit="oel_jax.pocket.claims:swap_roles"), 1, Scripted())
  assert (
    swapped
    == ["\n".join(["- EXPERIENCE ITEM: The hazard is G.", "- EXPERIENCE ITEM: H is the goal."] * 4)]
    * 2
  )
  assert (tmp_path / "round_1/knowledge/00.md").read_text() == swapped[0] + "\n"
  shutil.rmtree(tmp_path / "round_1/knowledge")
  assert extract(make_run(extraction__source="empty"), 1, Scripted()) == [EMPTY]
  assert not EMPTY.strip()
  shutil.rmtree(tmp_path / "round_1/knowledge")
  raw = extract(
    make_run(extraction__source="trajectories", extraction__max_knowledge_tokens=900), 1, Scripted()
  )
  assert len(raw) == 2 and raw[0] != raw[1]  # the same transcripts, each text in its own order
  games = read_conversations(tmp_path / "round_1/user/trajectories.jsonl")
  for text in raw:
    assert (
      all(text.count(game.outcome) >= 1 for game in games)
      and text.count("You are P on the board.") == len(games) == 4
    )


def test_items_are_carried_over_or_begun_anew(make_run, tmp_path):
  extract(make_run(), 1, Scripted("- EXPERIENCE ITEM: The goal is G."))
  carried = extract(
    make_run(extraction__start_from="previous_round"),
    2,
    Scripted("- EXPERIENCE ITEM: H is a hazard."),
  )
  assert (
    carried
    == [
      "\n".join(
        ["- EXPERIENCE ITEM: The goal is G."] * 4 + ["- EXPERIENCE ITEM: H is a hazard."] * 4
      )
    ]
    * 2
  )
  shutil.rmtree(tmp_path / "round_2")
  assert (
    extract(
      make_run(extraction__start_from="nothing"), 2, Scripted("- EXPERIENCE ITEM: H is a hazard.")
    )
    == ["\n".join(["- EXPERIENCE ITEM: H is a hazard."] * 4)] * 2
  )


class Dice(Scripted):
  """Walks wherever the seed says, whatever is known."""

  @in_turns
  def sample(self, prompts, seeds, **how):
    return [
      self.tokenizer.put(random.Random(seed).choice(("[up]", "[down]", "[left]", "[right]")))
      for seed in seeds
    ]


def test_held_out_games_have_the_same_luck_in_every_round(make_run, tmp_path):
  this, dice = make_run(evaluation__retention=0, evaluation__episodes=6), Dice()
  evaluate(this, 0, dice, dice, [])
  for number in (1, 2):
    deploy(this, number, dice)
    evaluate(this, number, dice, dice, extract(this, number, Scripted()))

  def moves(pattern: str) -> dict[str, list]:
    return {
      str(path): [[answer.action for answer in game.answers] for game in read_conversations(path)]
      for path in tmp_path.glob(pattern)
    }

  held_out = moves("round_*/user/evaluation*.jsonl")
  assert len(held_out) == 1 + 2 + 2 + 3
  assert all(
    games == held_out[f"{tmp_path}/round_0/user/evaluation.jsonl"] for games in held_out.values()
  )
  first, second = moves("round_*/user/prefix_trajectories.jsonl").values()
  assert first != second  # training draws anew


def test_knowledge_that_is_all_empty_stops_with_its_folder(make_run, tmp_path):
  with pytest.raises(ValueError, match="all 2 knowledge texts are empty") as error:
    extract(make_run(), 1, Scripted("I have nothing to say."))
  assert (
    str(tmp_path / "round_1") in str(error.value)
    and len((tmp_path / "round_1/user/trajectories.jsonl").read_text().splitlines()) == 4
  )


@pytest.mark.parametrize(
  "without, given, on_no_gain, decision",
  [
    (1, 3, "stop", "train"),
    (1, 3, "skip", "train"),
    (1, 3, "warn", "train"),
    (2, 2, "warn", "warn"),
    (2, 2, "skip", "warn"),
    (2, 2, "stop", None),
    (3, 1, "warn", "warn"),
    (3, 1, "skip", "skip"),
    (3, 1, "stop", None),
  ],
)
def test_the_gate_decides_by_what_was_played(
  make_run, tmp_path, monkeypatch, caplog, without, given, on_no_gain, decision
):
  played = []

  def play(path, policy, spec, *, episodes, sampling, advance, **how):
    wins = given if episodes[0].knowledge else without
    played.append([(episode.map_seed, episode.knowledge) for episode in episodes])
    games = [
      game_of(
        episode.id,
        "g",
        episode.map_seed,
        (turn_of("", "", "[up]", "[up]", 1),),
        "",
        float(i < wins),
        i < wins,
        "passed" if i < wins else "lost",
      )
      for i, episode in enumerate(episodes)
    ]
    write_jsonl(path, games)
    return games

  monkeypatch.setattr(play_lib, "play_to_file", play)
  monkeypatch.setattr(loop_lib.report, "write", lambda folder: {})
  this = make_run(consolidation__on_no_gain=on_no_gain)
  for i, text in enumerate(("one", "two")):
    items = (knowledge_lib.Item(text, "c", 1, 1),)
    knowledge_lib.write(tmp_path / "round_1/knowledge", i, knowledge_lib.Knowledge(items))
  (tmp_path / "round_1/knowledge/whole").touch()
  for _ in range(2):  # the second time from the file
    if decision is None:
      with pytest.raises(
        ValueError,
        match=f"{given} of 4 games .*, without it {without}; config.consolidation.on_no_gain is "
        '"stop"',
      ):
        gate(this, 1, Scripted(), ["one", "two"])
    else:
      assert gate(this, 1, Scripted(), ["one", "two"]) == (decision != "skip")
  plain, informed = played
  assert [seed for seed, _ in plain] == [seed for seed, _ in informed] and len(
    {seed for seed, _ in plain}
  ) == 4
  assert {text for _, text in plain} == {""} and {text for _, text in informed} <= {"one", "two"}
  written = read_json(tmp_path / "round_1/gate.json")
  assert (written["without"]["hits"], written["with"]["hits"]) == (without, given)
  assert decision is None or this.gate(1)["decision"] == decision
  assert ("no gain from the knowledge" in caplog.text) == (given <= without)


def test_no_gate_is_no_games(make_run, tmp_path):
  assert gate(make_run(consolidation__gate_episodes=0), 1, None, ["text"]) is True
  assert not (tmp_path / "round_1").exists()


def test_a_round_without_gain_leaves_the_weights_as_they_are(make_run, monkeypatch):
  """By "skip", `run` goes on with the policy that it had; the round is evaluated all the same."""
  calls = []
  # They ask for an architecture.
  monkeypatch.setattr(choices, "choose", lambda *given, **how: {})
  monkeypatch.setattr(placement, "unroll", lambda *given: False)

  def note(this, number, policy, before, texts):
    calls.append((number, list(policy.params), list(before.params)))

  stages = {
    "deploy": lambda this, number, policy: None,
    "extract": lambda this, number, policy: ["text"],
    "gate": lambda this, number, policy, texts: number == 2,
    "consolidate": lambda this, number, policy, texts: policy.params | {number: np.zeros(1)},
    "evaluate": note,
  }
  for name, stage in stages.items():
    monkeypatch.setattr(loop_lib, name, stage)

  @dataclasses.dataclass(frozen=True)
  class Fake:
    params: dict

    def replace(self, params):
      return Fake(params)

  monkeypatch.setattr(load_lib, "load_policy", lambda config, devices, **how: Fake({}))
  monkeypatch.setattr(loop_lib.report, "write", lambda folder: {})
  monkeypatch.setattr(loop_lib.report, "rows", lambda results: [])
  loop_lib.run(make_run(rounds=3).config, make_run().folder / "run")
  # By the rounds whose training is in the weights.
  assert calls == [
    (0, [], []),
    (1, [], []),
    (2, [2], []),
    (3, [2], [2]),
  ]


@pytest.mark.slow
def test_weights_from_a_file_and_an_off_policy_round(tmp_path):
  """consolidation.data = "teacher" with imitation, on a small policy from a file that knows
  nothing: only the way is tested.
  """
  shape = architecture_lib.named("pocket-tiny")
  path = tmp_path / "tiny.safetensors"
  native.save(path, jax.jit(lambda key: transformer.init(shape, key))(jax.random.key(0)))
  shutil.copy(pocket.DATA / pocket.TOKENIZER, tmp_path)
  config = short_config()
  config.update_from_flattened_dict(
    {
      "rounds": 1,
      "policy.architecture": "pocket-tiny",
      "policy.weights": str(path),
      "deployment.max_response_tokens": 8,
      "deployment.max_turns": 1,
      "extraction.source": "trajectories",
      "extraction.max_knowledge_tokens": 200,
      "consolidation.data": "teacher",
      "consolidation.kind": "imitation",
      "consolidation.steps": 2,
      "consolidation.gate_episodes": 0,
      "consolidation.log_probe": 0,
      "evaluation.retention": 0,
      "evaluation.in_context": False,
      "mesh.data": 1,
    }
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      mesh_lib, "make_mesh", lambda asked, make=mesh_lib.make_mesh: make(asked, jax.devices()[:1])
    )
    results = loop_lib.run(config, tmp_path / "run")
  assert [entry["round"] for entry in results["rounds"]] == [1] and results["rounds"][0][
    "in_context"
  ] is None
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if line["stage"] == "consolidate" and line["step"] > 0]
  # Of a policy that has learned nothing, a sampled token's negative log-likelihood is about log V
  # (a little less: it was sampled at 0.7), where a divergence would be near 0.
  assert len(losses) == 2 and all(-1.5 < loss - np.log(shape.vocabulary) < 1 for loss in losses)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_tokenizer_that_the_weights_have_no_rows_for_is_told_before_they_are_read(
  kind, tmp_path, monkeypatch
):
  pytest.importorskip("torch")
  import families
  import test_gguf

  from oel_jax.policy.weights import gguf, huggingface

  theirs, tokenizer = test_gguf.make("qwen2.5"), families.tokenizer("qwen2.5")
  path = tmp_path / ("model.gguf" if kind == "gguf" else "model")
  if kind == "gguf":
    test_gguf.write(path, theirs)
    monkeypatch.setattr(gguf, "tokenizer", lambda file: tokenizer)  # the file has none
    monkeypatch.setattr(gguf, "eos_ids", lambda file: [tokenizer.eos_token_id])
  else:
    theirs.save_pretrained(path)
    tokenizer.save_pretrained(path)
  for module in (gguf, huggingface):
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("the weights are read"))
  config = short_config().policy
  config.weights, config.architecture = str(path), "auto"
  devices = mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1]
  )
  with pytest.raises(
    ValueError,
    match=f"config.policy.weights is '{path}': .* has {len(tokenizer)} ids but its weights only 97 "
    "rows",
  ):
    load_lib.load_policy(config, devices)


# Bad input: one clear line, status 2, and nothing lost.


@pytest.fixture(name="refused")
def fixture_refused(cache, tmp_path, monkeypatch, capsys):
  """Runs main on a configuration, as it is after the flags are parsed (test_main.py has the
  parsing); returns the one line it ends with.
  """
  monkeypatch.setenv("OEL_JAX_CACHE", str(tmp_path / "compilations"))
  # The cache is for this process's whole life.
  monkeypatch.setattr(main.jax.config, "update", lambda *_: None)
  monkeypatch.setattr(main.logging, "set_verbosity", lambda *_: None)
  capsys.readouterr()

  def run_main(workdir=None, resume_anyway=False, **changes) -> str:
    config = short_config()
    if changes.pop("deployment.game_args", None) == {}:
      with config.unlocked():
        config.deployment.game_args = ml_collections.ConfigDict()
    config.update_from_flattened_dict(
      {name.replace("__", "."): value for name, value in changes.items()}
    )
    flags = {
      "_CONFIG": config,
      "_WORKDIR": str(workdir or tmp_path / "refused"),
      "_RESUME_ANYWAY": resume_anyway,
      "_DEBUG": False,
      "_STAGE": "run",
      "_ROUND": 1,
      "_DISTRIBUTED": False,
      "_COORDINATOR": None,
      "_PROCESSES": None,
      "_PROCESS": None,
      "_START_TIMEOUT": 300.0,
    }
    for name, value in flags.items():
      monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    # No flag was parsed that would say where a path was set.
    monkeypatch.setattr(main, "_resolve_paths", lambda config: None)
    with pytest.raises(SystemExit) as end:
      main.main([])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]

  return run_main


def test_an_unknown_field_is_told_in_one_line(cache, tmp_path):
  told = finish(
    start(cache, tmp_path / "run", "--config.consolidation.learning_rates=1"),
    tmp_path / "run",
    status=2,
  )
  assert (
    told.startswith(
      "error: config.consolidation.learning_rates: the configuration has no such field."
    )
    and told.count("\n") == 1
  )
  assert 'Did you mean "learning_rate"' in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "changes, parts",
  [
    ({"policy.architecture": "qwen9"}, ("config.policy.architecture is 'qwen9'", "'pocket'")),
    (
      {"policy.architecture": "qwen3-4b"},
      ("config.policy.architecture is 'qwen3-4b'", "oel_jax.pocket"),
    ),
    ({"policy.weights": None}, ("config.policy.weights is not set", "MODULE:NAME")),
    (
      {"policy.weights": "/nowhere/x.safetensors"},
      ("config.policy.weights", "/nowhere/x.safetensors"),
    ),
    (
      {"deployment.game": "FrozenLak-v0"},
      ("config.deployment.game is 'FrozenLak-v0'", "FrozenLake-v0-raw"),
    ),
    (
      {"deployment.game": "FrozenLake-v0"},
      ("config.deployment.game is 'FrozenLake-v0'", "'FrozenLake-v0-raw'"),
    ),
    (
      {"deployment.game": "TicTacToe-v0-raw", "deployment.game_args": {}},
      ("config.deployment.game is 'TicTacToe-v0-raw'", "one player"),
    ),
    (
      {"deployment.action_pattern": "[up"},
      ("config.deployment.action_pattern is '[up'", "no regular expression"),
    ),
    ({"consolidation.kind": "kl"}, ("config.consolidation.kind is 'kl'", "'reverse_kl'")),
    ({"mesh.data": 5}, ("config.mesh", "5")),
    (
      {"evaluation.tasks": ("nowhere:f",)},
      ("config.evaluation.tasks is 'nowhere:f'", "No module named"),
    ),
    ({"extraction.edit": "json:f"}, ("config.extraction.edit is 'json:f'", "no function f")),
  ],
)
def test_a_wrong_configuration_is_told_before_the_directory_is_its(
  refused, tmp_path, changes, parts
):
  told = refused(**changes)
  assert all(part in told for part in parts), told
  # So that the same command goes on once the mistake is mended.
  assert not (tmp_path / "refused").exists()


def test_a_prompt_over_the_limit_is_told(refused):
  told = refused(policy__max_prompt_tokens=20, extraction__max_knowledge_tokens=10)
  assert (
    "config.policy.max_prompt_tokens is 20, but the prompt of episode r0-without-00000, turn 1, has"
    in told
  )


def test_another_configuration_is_refused_with_the_fields_that_differ(refused, copy):
  before = hashes(copy, "**/*")
  told = refused(copy, consolidation__learning_rate=0.5, evaluation__top_k=7)
  assert str(copy / "config.json") in told and "--resume_anyway" in told
  assert (
    "config.consolidation.learning_rate was 0.0001 and is 0.5; config.evaluation.top_k was 0 and "
    "is 7" in told
  )
  assert hashes(copy, "**/*") == before


def test_another_configuration_goes_on_if_told_to(copy):
  config = short_config()
  config.deployment.slots = 3  # nothing that was measured depends on it
  before = hashes(copy, "round_*/**/*")
  loop_lib.run(config, copy, resume_anyway=True)
  [change] = read_json(copy / "config.json")["changes"]
  assert (
    change["fields"] == [{"field": "deployment.slots", "was": 4, "is": 3}]
    and hashes(copy, "round_*/**/*") == before
  )


def test_damaged_trajectories_are_refused_by_file_and_line(refused, copy):
  path = copy / "round_1/user/trajectories.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
  before = hashes(copy, "**/*")
  told = refused(copy)
  assert (
    f"{path}: not as this run wrote it: 4 lines then, 4 now; line 2: " in told
    and f"remove {path} and the same command" in told
  )
  assert hashes(copy, "**/*") == before


def test_knowledge_that_is_all_empty_is_told(refused, copy):
  for index in (0, 1):
    knowledge_lib.write(copy / "round_1/knowledge", index, knowledge_lib.Knowledge())
  (
    copy / "round_1/manifest.json"
  ).unlink()  # or they would be told to be other texts than the run's
  before = hashes(copy, "**/*")
  told = refused(copy)
  after = hashes(copy, "**/*")
  after["choices.json"] = before["choices.json"]  # this process has other devices
  assert (
    f"{copy / 'round_1'}: all 2 knowledge texts are empty" in told and "extraction.form" in told
  )
  assert after == before
