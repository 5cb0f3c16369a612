"""Conversations taken out of a run: what goes, what lies where, and that the run then goes on
without them. The policy is test_provenance's, no model.
"""

import json
import shutil

import pytest
from test_changed_runs import bits, play_a_round
from test_provenance import Writer, fixture_make_run  # noqa: F401

from oel_jax import config as config_lib
from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.extraction import provenance
from oel_jax.runtime.workdir import open_workdir
from oel_jax.stages import knowledge, resume, withdrawn
from oel_jax.stages.deploy import deploy
from oel_jax.stages.extract import extract, texts_after
from oel_jax.tasks import withdraw


@pytest.fixture(name="played")
def fixture_played(make_run, tmp_path):
  """A run of one round that is trained, and a second one that is begun; an item needs two."""
  this = make_run(min_support=2)
  this.config.consolidation.gate_episodes = 4
  open_workdir(this.config, tmp_path)
  play_a_round(this, Writer())
  (tmp_path / "round_1/checkpoints/4").mkdir(parents=True)
  (tmp_path / "round_2/user").mkdir(parents=True)
  (tmp_path / "round_2/user/trajectories.jsonl").touch()
  return this


def asked(run, names):
  config = run.config.copy_and_resolve_references()
  config.withdraw = names
  withdraw.run(config, str(run.folder))


def conversations(run):
  """Ids that items of the knowledge came from, and ids that prompts were cut from."""
  items = {item.trajectory for text in knowledge.read(run, 1) for item in text.items}
  prompts = read_prompts(run.prompts(1))
  return items, {withdrawn.conversation_of(prompt) for prompt in prompts}


def test_items_prompts_and_weights_go_and_the_run_goes_on_without_them(played, tmp_path, capsys):
  items, prompts = conversations(played)
  gone = {min(items), max(prompts)}
  before = bits(tmp_path / "round_1")
  texts = [[item for item in text.items] for text in knowledge.read(played, 1)]
  asked(played, ", ".join(gone))
  told = capsys.readouterr().out
  assert conversations(played)[1] == prompts - gone
  # By hand: what came from it, and what fewer than two others gave.
  seen = {}
  for games in texts:
    for item in games:
      seen.setdefault(item.text, set()).add(item.trajectory)
  found = [[item.text for item in text.items] for text in knowledge.read(played, 1)]
  origins = provenance.read(tmp_path / "round_1/user/items.jsonl")
  assert not any(one.conversation in gone for origin in origins.values() for one in origin.seen)
  strong = {origin.text for origin in origins.values() if origin.support >= 2}
  assert found == [
    [item.text for item in games if item.trajectory not in gone and item.text in strong]
    for games in texts
  ]
  assert "round 1: " in told and "set aside: round_1/checkpoints" in told
  assert "nothing was deleted" in told
  folder = tmp_path / "round_1"
  for name in ("checkpoints", "gate.json", "evaluation.json", "user/gate_with.jsonl"):
    assert not (folder / name).exists() and len(list(folder.glob(f"{name}.replaced-*"))) == 1
  assert not (tmp_path / "round_2").exists() and len(list(tmp_path.glob("round_2.replaced-*"))) == 1
  for path in tmp_path.rglob("*.replaced-*"):
    assert str(path) in told or str(path.parent) in told
  # Every byte of before lies somewhere.
  now = set(bits(tmp_path).values())
  names = ("knowledge/00.jsonl", "knowledge/00.md", "prompts.jsonl", "gate.json")
  assert all(before[name] in now for name in names)
  crossing = b"".join(bits(folder / "knowledge").values()) + (folder / "prompts.jsonl").read_bytes()
  assert not any(f'"{name}'.encode() in crossing for name in gone)
  # The run goes on: nothing is sampled for what stands, the gate is played again.
  player = Writer()
  resume.check(played, player)
  deploy(played, 1, player)
  assert extract(played, 1, player) == ["\n".join(items) for items in found] and not player.asked
  play_a_round(played, player)
  assert player.asked and (folder / "gate.json").exists()


def test_what_is_made_anew_is_made_without_them(played, tmp_path):
  items, prompts = conversations(played)
  gone = {max(items), min(prompts)}
  asked(played, ",".join(gone))
  kept = read_prompts(played.prompts(1))
  curve = texts_after(played, 5, Writer())
  assert curve == knowledge.texts(played, 1)  # read back from the steps, of which it is emptied
  (tmp_path / "round_1/prompts.jsonl").unlink()
  shutil.rmtree(tmp_path / "round_1/knowledge")
  (tmp_path / "round_1/user/extraction.jsonl").unlink()
  deploy(played, 1, Writer())
  extract(played, 1, Writer())
  assert read_prompts(played.prompts(1)) == kept
  assert not conversations(played)[0] & gone
  header = json.loads((tmp_path / "round_1/user/extraction.jsonl").read_text().splitlines()[0])
  assert not gone & set(header["trajectories"]) and len(header["trajectories"]) == 5


def test_the_same_command_again_finds_nothing_more_or_does_the_rest(played, tmp_path, monkeypatch):
  name = min(conversations(played)[0])
  asked(played, name)
  before = bits(tmp_path)
  asked(played, name)
  assert bits(tmp_path) == before
  other = min(conversations(played)[0])
  (tmp_path / "round_1/checkpoints/4").mkdir(parents=True)

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(withdraw, "_rebuild", killed)
    with pytest.raises(KeyboardInterrupt):
      asked(played, other)
  assert not (tmp_path / "round_1/checkpoints").exists()
  with pytest.raises(ValueError, match=f"that were withdrawn: .*--config.withdraw={other} again"):
    extract(played, 1, Writer())
  asked(played, other)
  assert other not in conversations(played)[0] and withdrawn.read(tmp_path) == {name, other}


def test_a_user_and_a_conversation_of_no_round(played, tmp_path, capsys):
  path = tmp_path / "round_1/user/trajectories.jsonl"
  before = bits(tmp_path / "round_1")
  asked(played, "user:ann,nobody")
  told = capsys.readouterr().out
  assert "in no round so far: user:ann" in told and "in no round so far: nobody" in told
  assert bits(tmp_path / "round_1") == before and withdrawn.read(tmp_path) == {"nobody"}
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  write_jsonl(path, [line | {"user": "ann"} for line in lines[:2]] + lines[2:])
  played.manifest(1).record(
    ["user/trajectories.jsonl"], played.manifest(1).made_from("user/trajectories.jsonl")
  )
  asked(played, "user:ann")
  ann = {said.id for said in read_conversations(path) if said.user == "ann"}
  assert len(ann) == 2 and withdrawn.read(tmp_path) == ann | {"nobody"}
  assert not conversations(played)[0] & ann


def test_the_server_side_alone(played, tmp_path, tmp_path_factory):
  items, prompts = conversations(played)
  server = tmp_path_factory.mktemp("server")
  for name in ("config.json", "round_1/knowledge", "round_1/prompts.jsonl"):
    copy = shutil.copytree if (tmp_path / name).is_dir() else shutil.copy
    (server / name).parent.mkdir(exist_ok=True)
    copy(tmp_path / name, server / name)
  there = type(played)(played.config, server, played.metrics, None)
  asked(there, f"{min(items)},{min(prompts)}")
  assert conversations(there) == (items - {min(items)}, prompts - {min(prompts)})


def test_what_is_wrong_is_told(played, tmp_path, tmp_path_factory):
  with pytest.raises(ValueError, match="config.withdraw is '': for --stage=withdraw it must name"):
    asked(played, " , ")
  (tmp_path / "round_1/prompts.jsonl").write_text("damaged\n")
  with pytest.raises(ValueError, match="prompts.jsonl: not as this run wrote it"):
    asked(played, "x")
  empty = tmp_path_factory.mktemp("empty")
  config = played.config.copy_and_resolve_references()
  config.withdraw = "x"
  with pytest.raises(ValueError, match=f"{empty}: not a run directory"):
    withdraw.run(config, str(empty))
  with pytest.raises(ValueError, match="config.withdraw is 'x': it must be '', but for --stage="):
    config_lib.validate(config)
