"""Conversations taken out of a run: what goes, what lies where, and that the run then goes on
without them. The policy is test_provenance's, no model.
"""

import json
import pathlib
import shutil

import pytest
from test_changed_runs import bits, play_a_round
from test_provenance import Writer, fixture_make_run  # noqa: F401
from test_workdir import open_workdir

from oel_jax import config as config_lib
from oel_jax import report
from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.conversations.schema import conversation_of
from oel_jax.evaluation import statistics
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction import provenance
from oel_jax.pocket import load
from oel_jax.policy.tokenizers import SentencePieceTokenizer
from oel_jax.runtime import files
from oel_jax.runtime.manifest import Manifest
from oel_jax.stages import held_out, knowledge, resume, withdrawn
from oel_jax.stages.collect import collect
from oel_jax.stages.deploy import deploy
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.extract import extract, texts_after
from oel_jax.stages.run import ITEMS
from oel_jax.tasks import withdraw

ITEMS_OF_1 = f"round_1/{ITEMS}"


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
  return items, {conversation_of(prompt.id) for prompt in prompts}


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
  curve = texts_after(played, 1, 5, Writer())
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


def test_an_item_that_stands_once_stays_as_anothers(make_run, tmp_path, capsys):
  this = make_run(min_support=2, repeats=False)
  open_workdir(this.config, tmp_path)
  play_a_round(this, Writer())
  before = knowledge.texts(this, 1)
  before_items = [item for text in knowledge.read(this, 1) for item in text.items]
  gone = next(item.trajectory for text in knowledge.read(this, 1) for item in text.items)
  support = {
    o.text: o.support for o in provenance.read(tmp_path / "round_1/user/items.jsonl").values()
  }
  asked(this, gone)
  told = [item for text in knowledge.read(this, 1) for item in text.items]
  assert gone not in {item.trajectory for item in told}
  origins = provenance.read(tmp_path / "round_1/user/items.jsonl")
  gave = {one.text: {seen.conversation for seen in one.seen} for one in origins.values()}
  assert all(item.trajectory in gave[item.text] for item in told)
  latest = {
    one.text: max((seen.round, seen.place, seen.conversation) for seen in one.seen)[2]
    for one in origins.values()
  }
  weak = {text for text in support if len(gave.get(text, ())) < 2}
  left = [[line for line in text.split("\n") if line not in weak] for text in before]
  assert [text.split("\n") for text in knowledge.texts(this, 1)] == left
  stayed = [item for item in before_items if item.text not in weak]
  moved = [now for was, now in zip(stayed, told, strict=True) if was.trajectory == gone]
  assert moved and all(item.trajectory == latest[item.text] for item in moved)


def test_extraction_counts_the_steps_that_it_takes(make_run, tmp_path, capsys):
  this = make_run()
  open_workdir(this.config, tmp_path)
  deploy(this, 1, Writer())
  games = read_conversations(tmp_path / "round_1/user/trajectories.jsonl")
  asked(this, games[0].id)
  extract(this, 1, Writer())
  assert len(games) == 6 and "round 1: extract: 5 of 5 in " in capsys.readouterr().out


def newer(folder):
  """The conversations that gave items which took the place of older ones."""
  origins = provenance.read(folder / ITEMS_OF_1)
  names = {origin.superseded_by for origin in origins.values()} - {""}
  return {one.conversation for name in names for one in origins[provenance.normalised(name)].seen}


def test_an_item_stands_again_that_a_withdrawn_one_had_taken_the_place_of(
  make_run, tmp_path, capsys
):
  this = make_run(newest_wins=True)
  open_workdir(this.config, tmp_path)
  extract(make_run(), 1, Writer())
  every = knowledge.read(this, 1)
  (tmp_path / "round_1/knowledge/whole").unlink()
  extract(this, 1, Writer())
  before = [[item.text for item in text.items] for text in knowledge.read(this, 1)]
  gone = newer(tmp_path)
  asked(this, ",".join(gone))
  assert (
    "stand no more: the same command as before writes knowledge/ anew" in capsys.readouterr().out
  )
  player = Writer()
  resume.check(this, player)
  extract(this, 1, player)
  # By hand: of what others gave, in each case what the latest conversation said.
  games = [game.id for game in read_conversations(tmp_path / "round_1/user/trajectories.jsonl")]
  left = [[item for item in text.items if item.trajectory not in gone] for text in every]
  latest = {}
  for item in sorted(sum(left, []), key=lambda item: games.index(item.trajectory)):
    latest[item.text.rpartition(":")[0]] = item.text
  right = [[i.text for i in items if latest[i.text.rpartition(":")[0]] == i.text] for items in left]
  found = [[item.text for item in text.items] for text in knowledge.read(this, 1)]
  assert found == right and not player.asked
  assert set(sum(found, [])) - set(sum(before, []))
  origins = provenance.read(tmp_path / ITEMS_OF_1)
  assert {o.text for o in origins.values() if not o.left_out} == set(sum(found, []))


def test_nothing_says_any_more_that_they_gave_an_item(make_run, tmp_path):
  """Be the item another's now, as it stands in the texts, or in no text at all; and the report that
  was there is made anew.
  """
  this = make_run(repeats=False)
  open_workdir(this.config, tmp_path)
  play_a_round(this, Writer())
  report.write(tmp_path)
  path = tmp_path / "round_1/user/items.jsonl"
  gave = {
    one.text: [seen.conversation for seen in one.seen] for one in provenance.read(path).values()
  }
  texts = [item for text in knowledge.read(this, 1) for item in text.items]
  standing = {item.trajectory for item in texts}
  gone = next(name for all_of in gave.values() for name in all_of if name not in standing)
  page = tmp_path / "report/index.html"
  assert f"{gone}," in page.read_text()
  asked(this, gone)
  assert [item for text in knowledge.read(this, 1) for item in text.items] == texts
  left = {
    one.text: [seen.conversation for seen in one.seen] for one in provenance.read(path).values()
  }
  rest = {text: [name for name in all_of if name != gone] for text, all_of in gave.items()}
  assert left == {text: all_of for text, all_of in rest.items() if all_of} != gave
  assert f"{gone}," not in page.read_text()
  this.manifest(1).verify()


STEPS = (
  (withdraw, "_aside"),
  (withdraw.shutil, "copy2"),
  (Manifest, "announce"),
  (Manifest, "record"),
  (withdraw, "write_jsonl"),
  (knowledge_lib, "write"),
  (provenance, "write"),
  (files, "write_text"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
  "rules",
  (
    dict(min_support=2),
    dict(min_support=2, repeats=False),
    dict(newest_wins=True),  # an item stands again whose newer one goes
  ),
)
def test_a_kill_at_any_moment_leaves_what_the_same_command_ends(
  make_run, tmp_path, tmp_path_factory, monkeypatch, rules
):
  this = make_run(**rules)
  open_workdir(this.config, tmp_path)
  play_a_round(this, Writer())
  items, prompts = conversations(this)
  gone = f"{min(items)},{max(prompts)}"
  if "newest_wins" in rules:
    gone = ",".join(newer(this.folder))

  def ask(folder, moment):
    """Withdraws them, killed before the step of this number; whether there was one."""
    rest = iter(range(moment))
    with monkeypatch.context() as patch:
      for owner, name in STEPS:
        made = getattr(owner, name)

        def step(*args, made=made):
          if next(rest, None) is None:
            raise KeyboardInterrupt
          return made(*args)

        patch.setattr(owner, name, step)
      try:
        asked(type(this)(this.config, folder, this.metrics, None), gone)
      except KeyboardInterrupt:
        return True
      return False

  def left(folder):
    """After the same command again: the texts' items, the prompts, and who gave each item."""
    there = type(this)(this.config, folder, this.metrics, None)
    asked(there, gone)
    deploy(there, 1, Writer())
    player = Writer()
    texts = [sorted(text.split("\n")) for text in extract(there, 1, player)]
    assert not player.asked
    there.manifest(1).verify()
    origins = provenance.read(folder / "round_1" / ITEMS).values()
    gave = {one.text: [seen.conversation for seen in one.seen] for one in origins}
    return texts, conversations(there)[1], gave

  whole = shutil.copytree(tmp_path, tmp_path_factory.mktemp("copy") / "run")
  assert not ask(whole, 1000)
  right = left(whole)
  for moment in range(1000):
    folder = shutil.copytree(tmp_path, tmp_path_factory.mktemp("copy") / "run")
    killed = ask(folder, moment)
    assert left(folder) == right, moment
    if not killed:
      break
  assert moment > 10


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
  assert bits(tmp_path / "round_1") == before and withdrawn.read(tmp_path) == {
    "nobody",
    "user:ann",
  }
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  write_jsonl(path, [line | {"user": "ann"} for line in lines[:2]] + lines[2:])
  played.manifest(1).record(
    ["user/trajectories.jsonl"], played.manifest(1).made_from("user/trajectories.jsonl")
  )
  asked(played, "user:ann")
  ann = {said.id for said in read_conversations(path) if said.user == "ann"}
  assert len(ann) == 2 and withdrawn.read(tmp_path) == ann | {"nobody", "user:ann"}
  assert not conversations(played)[0] & ann


def said(user, number):
  """A conversation of a log, with a first and a second answer."""
  asked = f"case {number}: {'abcdefghij'[number % 10] * 9} of {number}"
  pairs = ((asked, "one"), ("and then?", f"two {number}"))
  roles = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]
  messages = [{"role": role, "content": text} for role, text in roles]
  return {"id": f"case{number}", "user": user, "messages": messages}


def reader():
  """A policy that renders prompts."""
  player = Writer()
  player.tokenizer = SentencePieceTokenizer((load.DATA / load.TOKENIZER).read_bytes())
  return player


@pytest.fixture(name="collected")
def fixture_collected(make_run, tmp_path, tmp_path_factory):
  """A round that began from logs, of users whom redaction renames; its evaluation is there."""
  this, folder = make_run(), tmp_path_factory.mktemp("logs")
  users = [f"user{i}@example.com" for i in range(20)]
  lines = [said(user, 20 * again + i) for again in (0, 1) for i, user in enumerate(users)]
  (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
  this.config.update_from_flattened_dict(
    {
      "logs.path": str(folder),
      "logs.held_out": 0.4,
      "deployment.environment": "",
      "deployment.episodes": 100,
      "extraction.trajectories": 5,
      "evaluation.episodes": 100,
    }
  )
  open_workdir(this.config, tmp_path)
  collect(this, 1, reader())
  for name in ("evaluation.json", "user/held_out_before.jsonl", "user/held_out_after.jsonl"):
    (tmp_path / "round_1" / name).write_text("measured")
  (tmp_path / "round_1/checkpoints/4").mkdir(parents=True)
  return this, {user: {f"case{i}", f"case{20 + i}"} for i, user in enumerate(users)}


def of_users_in(path):
  return {prompt.id.rpartition("-")[0] for prompt in read_prompts(path)}


def of_users(folder, name):
  return of_users_in(folder / "round_1" / name)


def test_held_out_prompts_go_and_what_was_measured_on_them(collected, tmp_path, capsys):
  """Nothing was learned from them: the weights stay. The user is named as in the logs."""
  this, cases = collected
  folder, before = tmp_path / "round_1", of_users(tmp_path, "user/held_out.jsonl")
  sides = {user: bool(ids & before) for user, ids in cases.items()}
  gone = min(user for user, out in sides.items() if out)
  assert before == set().union(*(cases[user] for user, out in sides.items() if out))
  files = bits(folder)
  asked(this, f"user:{gone}")
  assert of_users(tmp_path, "user/held_out.jsonl") == before - cases[gone]
  assert (
    f"round 1: 4 prompts went from those that are measured on, {2 * len(before) - 4} are left"
    in capsys.readouterr().out
  )
  assert (folder / "checkpoints").is_dir() and (folder / "prompts.jsonl").read_bytes() == (
    files["prompts.jsonl"]
  )
  for name in ("evaluation.json", "user/held_out_before.jsonl", "user/held_out_after.jsonl"):
    [aside] = folder.glob(f"{name}.replaced-*")
    assert not (folder / name).exists() and aside.read_bytes() == files[name]
  [aside] = folder.glob("user/held_out.jsonl.replaced-*")
  assert aside.read_bytes() == files["user/held_out.jsonl"]
  assert gone not in (tmp_path / "withdrawn.json").read_text()  # only as redaction left it
  this.manifest(1).verify()
  # Again, it finds nothing more.
  now = bits(tmp_path)
  asked(this, f"user:{gone}")
  assert bits(tmp_path) == now


def test_prompts_go_by_their_user_and_later_rounds_leave_him_out(collected, tmp_path):
  this, cases = collected
  out = of_users(tmp_path, "user/held_out.jsonl")
  gone = max(user for user, ids in cases.items() if not ids & out)
  before = of_users(tmp_path, "prompts.jsonl")
  assert cases[gone] <= before
  asked(this, f"user:{gone},user:nobody@example.com")
  assert of_users(tmp_path, "prompts.jsonl") == before - cases[gone]
  assert of_users(tmp_path, "user/held_out.jsonl") == out  # measured anew, for the weights go
  assert not (tmp_path / "round_1/checkpoints").exists()
  # Later logs hold new conversations of both.
  path = pathlib.Path(this.config.logs.path) / "log.jsonl"
  names = (gone, "nobody@example.com", "ann@example.com")
  path.write_text("\n".join(json.dumps(said(user, 70 + i)) for i, user in enumerate(names)))
  this.config.logs.held_out = 0.0
  collect(this, 2, reader())
  assert {prompt.id[:6] for prompt in read_prompts(tmp_path / "round_2/prompts.jsonl")} == {
    "case72"
  }


def test_what_has_the_same_id_goes_together(make_run, tmp_path, tmp_path_factory, capsys):
  """A record whose id came before in the logs has its file and line behind it; a session's
  sub-agents have the session's before theirs.
  """
  this, folder = make_run(), tmp_path_factory.mktemp("logs")
  session = "0b3f2c1e-9d4a-4c5b-8e7f-0123456789ab"
  ids = ("a", "ann@example.com", "ann@example.com", "a", "a#1", "b", "b/c", f"{session}/side")
  lines = [said(None, number) | {"id": id} for number, id in enumerate(ids)]
  (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
  said_to = {"logs.path": str(folder), "logs.held_out": 0.0, "deployment.environment": ""}
  this.config.update_from_flattened_dict(said_to | {"extraction.trajectories": 9})
  this.config.deployment.episodes = 100
  open_workdir(this.config, tmp_path)
  collect(this, 1, reader())
  assert len(of_users(tmp_path, "prompts.jsonl")) == len(ids)
  asked(this, f"a,ann@example.com,c,{session}")
  assert of_users(tmp_path, "prompts.jsonl") == {"a#1", "b", "b/c"}
  assert "in no round so far: c;" in capsys.readouterr().out
  collect(this, 2, reader())
  assert of_users_in(tmp_path / "round_2/prompts.jsonl") == {"a#1", "b", "b/c"}


def test_an_evaluation_of_other_held_out_prompts_is_measured_again(
  collected, tmp_path, monkeypatch, caplog
):
  this, _ = collected
  measured, player = [], Writer()
  away = {f"kl_{when}": 0.5 for when in ("before", "after")} | {"prompts": 1, "closer": 0.0}
  away |= {f"response_tokens_{when}": statistics.mean([1]) for when in ("before", "after")}
  away |= {f"cut_{when}": statistics.count(0, 1) for when in ("before", "after")}
  measure = lambda run, number, *_: measured.append(number) or away
  monkeypatch.setattr(held_out, "measure", measure)
  (tmp_path / "round_1/evaluation.json").unlink()
  (tmp_path / "round_1/gate.json").unlink(missing_ok=True)
  again = lambda: evaluate(this, 1, player, player, ["text"])
  again()
  again()
  assert measured == [1]
  path = tmp_path / "round_1/user/held_out.jsonl"
  write_jsonl(path, read_prompts(path)[1:])
  again()
  assert measured == [1, 1] and "it was measured with other user/held_out.jsonl" in caplog.text
  # An earlier version did not say which prompts: what it measured stays.
  found = json.loads((tmp_path / "round_1/evaluation.json").read_text())
  del found["made_from"]["user/held_out.jsonl"], found["digest"]
  (tmp_path / "round_1/evaluation.json").write_text(json.dumps(found))
  again()
  assert measured == [1, 1]


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
  open_workdir(config_lib.default_distill(), empty)
  with pytest.raises(ValueError, match="of config.task 'distill', and only a run of rounds learns"):
    withdraw.run(config, str(empty))
  assert not (empty / "withdrawn.json").exists()
  with pytest.raises(ValueError, match="config.withdraw is 'x': it must be '', but for --stage="):
    config_lib.validate(config)
