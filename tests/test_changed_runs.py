"""What a run shows after something that it depends on has changed: measured again, or refused
before any work is done.
"""

import dataclasses
import json
import logging
import random
import shutil

import numpy as np
import pytest
from fakes import Tokenizer, in_turns
from test_loop import short_config

from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.conversations.schema import Message, Prompt
from oel_jax.evaluation.instruction_kinds import KINDS
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.runtime import files, named, schema
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import play as play_lib
from oel_jax.stages import resume
from oel_jax.stages.consolidate import note_trained
from oel_jax.stages.deploy import deploy
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.extract import extract
from oel_jax.stages.gate import gate
from oel_jax.stages.run import Run

TEXTS = ["- EXPERIENCE ITEM: The goal is G."]


class Player:
  """Walks wherever the seed and its weights say; writes one item a game."""

  def __init__(self, weights: int = 0):
    self.params, self.tokenizer, self.asked = {"w": np.full(3, weights, np.float32)}, Tokenizer(), 0

  @in_turns
  def sample(self, prompts, seeds, **how):
    self.asked += len(prompts)
    lesson = [
      "record of a finished game" in self.tokenizer.seen[prompt[0]][-1].content
      for prompt in prompts
    ]
    moves = [
      random.Random(int(self.params["w"][0]) + seed).choice(("[up]", "[down]", "[left]", "[right]"))
      for seed in seeds
    ]
    return [self.tokenizer.put(TEXTS[0] if wanted else move) for wanted, move in zip(lesson, moves)]


@pytest.fixture(name="make_run")
def fixture_make_run(tmp_path):
  with Metrics(tmp_path) as metrics:

    def make(**changes) -> Run:
      config = short_config()
      config.evaluation.retention = 0
      config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
      )
      return Run(config, tmp_path, metrics, None)

    yield make


def bits(folder, pattern="**/*"):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.glob(pattern)
    if path.is_file()
  }


def play_a_round(this, player, after=None):
  """All stages but the training, which is said to have made `after` of the player."""
  evaluate(this, 0, player, player, [])
  deploy(this, 1, player)
  texts = extract(this, 1, player)
  gate(this, 1, player, texts)
  evaluate(this, 1, after or player, player, texts)
  return texts


def test_in_context_the_rounds_teacher_plays(make_run, tmp_path):
  """Another teacher is another measurement; what it was before is set aside."""
  first, own, after, asked = Player(1), Player(2), Player(3), []
  for teacher in ("frozen", "first", "frozen"):
    this = dataclasses.replace(make_run(consolidation__teacher=teacher), base=first)
    if not asked:
      texts = play_a_round(this, own, after)
    before = first.asked, own.asked
    evaluate(this, 1, after, own, texts)
    asked.append((first.asked - before[0], own.asked - before[1]))
  assert asked[0] == (0, 0)
  assert asked[1][0] > 0 == asked[1][1]
  assert asked[2][1] > 0 == asked[2][0]
  set_aside = list((tmp_path / "round_1").glob("evaluation.json.replaced-*"))
  assert len(set_aside) == 2


def test_stages_found_whole_are_checked_and_not_done_again(make_run, tmp_path):
  play_a_round(make_run(), Player())
  before, player = bits(tmp_path, "round_*/**/*"), Player()
  this = make_run()
  resume.check(this, player)
  play_a_round(this, player)
  assert bits(tmp_path, "round_*/**/*") == before and not player.asked
  for name in (
    "trajectories",
    "prefix_trajectories",
    "gate_with",
    "gate_without",
    "evaluation",
    "evaluation_in_context",
  ):
    assert (
      f"user/{name}.jsonl" in json.loads((tmp_path / "round_1/manifest.json").read_text())["files"]
    )


OWN = """
from oel_jax.environments import Step

class Doors:
  def __init__(self, size, **others):
    self.doors = ["up", "down", "left", "right"][:size + 1]

  def reset(self, seed):
    self.open = self.doors[seed // 2 % 4]
    return f"There are {len(self.doors)} doors."

  def step(self, action):
    return Step(f"It was {self.open}.", True, float(action == self.open))
"""


def test_an_environment_of_ones_own_is_played_and_again_where_its_file_was_edited(
  make_run, tmp_path, caplog, tmp_path_factory
):
  file, player = tmp_path_factory.mktemp("own") / "own.py", Player()
  file.write_text(OWN)
  play_a_round(make_run(deployment__environment=f"{file}:Doors"), player)
  path = tmp_path / "round_1/user/evaluation.jsonl"
  games = read_conversations(path)
  for game in games:
    door = ("up", "down", "left", "right")[game.source.seed // 2 % 4]
    assert game.source.name == "own.py:Doors" and game.outcome == f"It was {door}."
    assert game.messages[0].content.endswith("\n\nThere are 4 doors.")
    assert (game.passed, game.reward) == (game.messages[1].action == f"[{door}]",) * 2
  assert {game.passed for game in games} == {True, False}
  asked, before = player.asked, path.read_bytes()
  play_a_round(make_run(deployment__environment=f"{file}:Doors"), player)
  assert player.asked == asked and "made again" not in caplog.text
  file.write_text(OWN + "# edited\n")
  play_a_round(make_run(deployment__environment=f"{file}:Doors"), player)
  assert player.asked > asked and path.read_bytes() == before
  assert "other settings" in caplog.text


def test_a_task_of_ones_own_is_measured_again_where_its_file_was_edited(
  make_run, tmp_path, caplog, tmp_path_factory
):
  file = tmp_path_factory.mktemp("own") / "own.py"
  task = (
    "from oel_jax.evaluation.tasks import Count\n\n\ndef odd(policy, count, *, seed):\n  return "
  )
  file.write_text(f"{task}Count(1, count)\n")
  changes = dict(evaluation__tasks=(f"{file}:odd",), evaluation__retention=4)
  rate = lambda: json.loads((tmp_path / "round_0/evaluation.json").read_text())["retention"]["odd"]
  evaluate(make_run(**changes), 0, Player(), Player(), [])
  assert (rate()["hits"], rate()["of"]) == (1, 4)
  file.write_text(f"{task}Count(3, count)\n")
  evaluate(make_run(**changes), 0, Player(), Player(), [])
  assert rate()["hits"] == 3 and "it was measured with other settings" in caplog.text
  file.write_text(f"{task}0.5\n")
  with pytest.raises(ValueError, match="config.evaluation.tasks: odd returns 0.5: .*Count"):
    evaluate(make_run(**changes), 0, Player(), Player(), [])


def test_instructions_are_measured_where_nothing_is_played(make_run, tmp_path):
  task = "oel_jax.evaluation.instructions:instructions"
  changes = dict(evaluation__tasks=(task,), evaluation__retention=40, deployment__environment="")
  this, player = make_run(**changes), Player()
  evaluate(this, 0, player, player, [])
  found = json.loads((tmp_path / "round_0/evaluation.json").read_text())["retention"]
  # It says "[up]" or the like whatever it is asked.
  assert (found["instructions"]["hits"], found["instructions"]["of"]) == (0, 40)
  assert len(found["instructions"]["categories"]) == len(KINDS) and player.asked == 40
  [cost] = json.loads((tmp_path / "round_0/cost.json").read_text())["stages"]
  assert (cost["stage"], cost["tokens"]) == ("evaluate", 40)


@pytest.mark.parametrize(
  "body, told",
  [
    ("return 3", "it returns 3: it must be a text"),
    ("return text[9]", r"it fails \(IndexError.*:2"),
  ],
)
def test_an_edit_of_ones_own_that_fails_is_told(tmp_path_factory, body, told):
  file = tmp_path_factory.mktemp("own") / "own.py"
  file.write_text(f"def edit(text):\n  {body}\n")
  edit = named.edit(f"{file}:edit", "config.extraction.edit")
  with pytest.raises(ValueError, match=f"config.extraction.edit is '{file}:edit': {told}"):
    edit("short")


@pytest.mark.parametrize(
  "changes, weights, told",
  [
    ({"evaluation__top_k": 7}, 0, "settings"),
    ({"deployment__max_turns": 4}, 0, "settings"),
    ({"seed": 1}, 0, "settings"),
    ({}, 5, "weights, weights before"),
  ],
)
def test_held_out_games_are_played_again_where_what_they_show_has_changed(
  make_run, tmp_path, caplog, changes, weights, told
):
  evaluate(make_run(), 0, Player(), Player(), [])
  before = bits(tmp_path / "round_0")
  player = Player(weights)
  evaluate(make_run(**changes), 0, player, player, [])
  now = bits(tmp_path / "round_0")
  assert (
    player.asked
    and "kept as evaluation.json.replaced-" in caplog.text
    and f"it was measured with other {told}" in caplog.text
  )
  for name in ("evaluation.json", "user/evaluation.jsonl"):
    [aside] = [other for other in now if other.startswith(f"{name}.replaced-")]
    assert now[aside] == before[name]
  fresh = Run(make_run(**changes).config, tmp_path / "fresh", make_run().metrics, None)
  evaluate(fresh, 0, Player(weights), Player(weights), [])
  assert {name: now[name] for name in ("evaluation.json", "user/evaluation.jsonl")} == {
    name: (tmp_path / "fresh/round_0" / name).read_bytes()
    for name in ("evaluation.json", "user/evaluation.jsonl")
  }


@pytest.mark.parametrize(
  "changes",
  [
    {"deployment__slots": 2},
    {"consolidation__learning_rate": 0.5},
    {"deployment__temperature": 1.0},
  ],
)
def test_what_held_out_games_do_not_depend_on_changes_nothing(make_run, tmp_path, changes):
  evaluate(make_run(), 0, Player(), Player(), [])
  before, player = bits(tmp_path / "round_0"), Player()
  evaluate(make_run(**changes), 0, player, player, [])
  assert bits(tmp_path / "round_0") == before and not player.asked


def test_one_more_point_of_the_curve_leaves_the_other_games_as_they_are(make_run, tmp_path):
  texts = play_a_round(make_run(), Player(), after=Player(1))
  before = bits(tmp_path / "round_1/user")
  evaluate(make_run(evaluation__accumulation=(2,)), 1, Player(1), Player(), texts)
  after = bits(tmp_path / "round_1/user")
  assert {name for name in after if before.get(name) != after[name]} == {
    "evaluation_after_002_trajectories.jsonl"
  }
  assert (
    json.loads((tmp_path / "round_1/evaluation.json").read_text())["accumulation"][0][
      "trajectories"
    ]
    == 2
  )


def test_the_curve_of_a_later_round_is_of_its_own_knowledge(make_run, tmp_path, monkeypatch):
  asked = []

  def after(run, number, step, policy):
    asked.append((number, step))
    return [f"- EXPERIENCE ITEM: Round {number}, {step} games."]

  monkeypatch.setattr("oel_jax.stages.extract.texts_after", after)
  how = dict(evaluation__accumulation=(2,), evaluation__accumulation_rounds=2)
  how |= dict(evaluation__in_context=False)
  player = Player()
  for number in (0, 1, 2, 3):
    evaluate(make_run(**how), number, player, player, TEXTS if number else [])
  assert asked == [(1, 2), (2, 2)]
  curve = lambda number: json.loads((tmp_path / f"round_{number}/evaluation.json").read_text())
  assert [len(curve(number)["accumulation"]) for number in (0, 1, 2, 3)] == [0, 1, 1, 0]


def test_games_that_were_cut_off_are_not_gone_on_with_by_other_weights(
  make_run, tmp_path, monkeypatch
):
  class Cut(Exception):
    pass

  def cut(path, *_, **__):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.partial").write_text("half of the games")
    raise Cut

  with monkeypatch.context() as patch:
    patch.setattr(play_lib, "play_to_file", cut)
    with pytest.raises(Cut):
      evaluate(make_run(), 0, Player(), Player(), [])
    with pytest.raises(Cut):
      extract(make_run(), 1, Player())
  evaluate(make_run(), 0, Player(1), Player(1), [])
  [aside] = (tmp_path / "round_0/user").glob("evaluation.jsonl.partial.replaced-*")
  assert aside.read_text() == "half of the games"
  with pytest.raises(
    ValueError,
    match="round_1/user/trajectories.jsonl: made from other weights than round 1 has now",
  ):
    extract(make_run(), 1, Player(1))


def test_rounds_of_other_weights_are_refused_before_anything_is_changed(make_run, tmp_path):
  texts = play_a_round(make_run(), Player())
  before, player = bits(tmp_path), Player(1)
  for stage in (
    lambda this: resume.check(this, player),
    lambda this: extract(this, 1, player),
    lambda this: gate(this, 1, player, texts),
    lambda this: gate(this, 1, Player(), ["other"]),
  ):
    with pytest.raises(
      ValueError,
      match=f"{tmp_path}/round_1/.* other (weights|knowledge) than .* remove the (folder|round)",
    ):
      stage(make_run())
  assert bits(tmp_path) == before and not player.asked


def test_knowledge_of_other_games_is_refused(make_run, tmp_path):
  play_a_round(make_run(), Player())
  path = tmp_path / "round_1/user/trajectories.jsonl"
  write_jsonl(path, read_conversations(path)[::-1])
  with pytest.raises(ValueError, match=f"{path}: not as this run wrote it"):
    resume.check(make_run(), Player())
  manifest = tmp_path / "round_1/manifest.json"
  entries = json.loads(manifest.read_text())
  entries["files"].pop("user/trajectories.jsonl"), entries.pop("digest")
  manifest.write_text(json.dumps(entries))
  with pytest.raises(
    ValueError,
    match="knowledge/00.jsonl: made from other user/trajectories.jsonl than round 1 has now",
  ):
    resume.check(make_run(), Player())


@pytest.mark.parametrize(
  "change, place, has, wants",
  [
    (lambda found: found[:-1], -1, None, -1),
    (lambda found: [*found, found[0]], None, 0, None),
    (lambda found: [found[1], found[0], *found[2:]], 0, 1, 0),
    (lambda found: [*found[:2], found[3], found[3], *found[4:]], 2, 3, 2),
    (lambda found: [Prompt(found[0].id, (Message("user", "x"),)), *found[1:]], 0, 0, 0),
  ],
)
def test_prompts_are_those_of_the_games_even_where_no_manifest_says_so(
  make_run, tmp_path, change, place, has, wants
):
  this = make_run(deployment__episodes=8)
  player = Player()
  deploy(this, 1, player)
  asked = player.asked
  path = tmp_path / "round_1/prompts.jsonl"
  (tmp_path / "round_1/manifest.json").unlink()
  deploy(this, 1, player)
  found = read_prompts(path)
  write_jsonl(path, change(found))
  number = len(found) + 1 if place is None else place % len(found) + 1
  name = lambda index: "nothing" if index is None else found[index].id
  with pytest.raises(ValueError) as error:
    deploy(this, 1, player)
  assert str(error.value).startswith(
    f"{path}: its {len(change(found))} prompts are not the {len(found)} of {tmp_path}/round_1/user"
  )
  assert player.asked == asked
  assert f"number {number} is {name(has)}, and must be {name(wants)};" in str(error.value)


@pytest.mark.parametrize("noted", [True, False])
def test_more_steps_are_for_the_last_round(make_run, tmp_path, caplog, noted):
  """`noted`: the manifest says how far training came; an earlier version's has to be told by the
  checkpoints.
  """
  play_a_round(make_run(), Player())
  (tmp_path / "round_1/checkpoints/4").mkdir(parents=True)
  if noted:
    note_trained(make_run(), 1, {"w": np.ones(2)})
  before = bits(tmp_path / "round_1")
  resume.check(make_run(), Player())
  assert bits(tmp_path / "round_1") == before
  longer = make_run(consolidation__steps=6)
  write_jsonl(tmp_path / "round_2/user/trajectories.jsonl", [])
  with pytest.raises(
    ValueError,
    match="steps is 6, round 1 has been trained for 4, and round 2 was built on those .* set it to "
    "4",
  ):
    resume.check(longer, Player())
  assert bits(tmp_path / "round_1") == before
  shutil.rmtree(tmp_path / "round_2")
  resume.check(longer, Player())
  assert (
    not (tmp_path / "round_1/evaluation.json").exists()
    and len(list((tmp_path / "round_1").glob("evaluation.json.replaced-*"))) == 1
  )


def test_a_checkpoint_that_was_lost_is_trained_again_whatever_was_built_on_it(
  make_run, tmp_path, caplog
):
  play_a_round(make_run(), Player())
  # That of step 4 was damaged and set aside.
  (tmp_path / "round_1/checkpoints/2").mkdir(parents=True)
  note_trained(make_run(), 1, {"w": np.ones(2)})
  write_jsonl(tmp_path / "round_2/user/trajectories.jsonl", [])
  resume.check(make_run(), Player())
  with caplog.at_level(logging.WARNING):
    note_trained(make_run(), 1, {"w": np.zeros(2)})
  assert "round 1: trained again, to other weights than before" in caplog.text


def test_a_run_of_a_version_without_digests_is_read(make_run, tmp_path, caplog):
  texts = play_a_round(make_run(), Player())
  for path in tmp_path.glob("round_*/manifest.json"):
    path.unlink()
  for path in tmp_path.rglob("*.json*"):
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    values = [
      {
        name: value
        for name, value in json.loads(line).items()
        if name not in ("digest", "made_from")
      }
      for line in lines
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
  player = Player()
  this = make_run()
  resume.check(this, player)
  assert play_a_round(this, player) == texts and not player.asked
  assert (
    f"{tmp_path / 'round_1'}: carried here without its manifest.json, or made before runs had one: "
    "its files are taken as they stand" in caplog.text
  )


def sealed_line(value):
  return json.dumps(schema.sealed(value), ensure_ascii=False) + "\n"


def as_before(folder):
  """Makes a round's folder what schema version 1 left: games that name game and seed,
  prefixes.jsonl, and extraction.json.
  """
  (folder / "user/items.jsonl").unlink()
  for path in (folder / "user").glob("*.jsonl"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
      line.pop("digest")
    if path.name == "extraction.jsonl":
      header, *steps = lines
      texts = [knowledge_lib.read(folder / "knowledge", i).items for i in range(header["texts"])]
      header |= {"schema": 1, "done": len(steps)}
      header["items"] = [[dataclasses.asdict(item) for item in items] for items in texts]
      header.pop("start")
      path.with_suffix(".json").write_text(sealed_line(header))
      path.unlink()
      continue
    for line in lines:
      source = line.pop("source")
      line |= {"schema": 1, "game": source["name"], "seed": source["seed"]}
    path.write_text("".join(map(sealed_line, lines)))
  (folder / "prompts.jsonl").rename(folder / "prefixes.jsonl")
  lines = (folder / "prefixes.jsonl").read_text().splitlines()
  old = [{**json.loads(line), "schema": 1} for line in lines]
  (folder / "prefixes.jsonl").write_text("".join(map(sealed_line, old)))
  manifest = json.loads((folder / "manifest.json").read_text())
  entries = manifest["files"]
  entries["prefixes.jsonl"] = entries.pop("prompts.jsonl")
  for name, entry in entries.items():
    if (folder / name).is_file():
      entry["sha256"] = files.sha256(folder / name)
    for other in entry["made_from"].keys() & entries.keys():
      entry["made_from"][other] = files.sha256(folder / other)[:16]
  (folder / "manifest.json").write_text(sealed_line(manifest))


def test_a_run_of_the_version_before_conversations_goes_on(make_run, tmp_path):
  texts = play_a_round(make_run(), Player())
  prompts, folder = read_prompts(tmp_path / "round_1/prompts.jsonl"), tmp_path / "round_1"
  as_before(folder)
  before, player, this = bits(folder), Player(), make_run()
  resume.check(this, player)
  assert play_a_round(this, player) == texts and not player.asked and bits(folder) == before
  assert this.prompts(1) == folder / "prefixes.jsonl" and not (folder / "prompts.jsonl").exists()
  assert read_prompts(this.prompts(1), max_damaged=0.0) == prompts
  # What the extractor wrote is read back for a point of the curve, and not sampled anew.
  longer = make_run(evaluation__accumulation=(2,))
  evaluate(longer, 1, player, player, texts)
  games = read_conversations(folder / "user/evaluation_after_002_trajectories.jsonl")
  assert player.asked == sum(len(game.answers) for game in games)
  path = folder / "user/prefix_trajectories.jsonl"
  path.write_text(path.read_text().replace("board", "broad", 1))
  with pytest.raises(ValueError, match=f"{path}: not as this run wrote it"):
    resume.check(this, player)
