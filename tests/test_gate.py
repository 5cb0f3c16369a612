"""What the gate knows of each text: counted by hand from the games that were played, and what is
left out where a text hurts. Whether a round trains at all is in test_loop.py.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil

import pytest
from fakes import game_of, turn_of
from scipy import stats
from test_changed_runs import Player
from test_loop import short_config

from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.evaluation import episodes as episodes_lib
from oel_jax.evaluation import statistics
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction.knowledge import Item, Knowledge
from oel_jax.report import gates
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import knowledge, resume
from oel_jax.stages import play as play_lib
from oel_jax.stages.gate import HURTS, gate
from oel_jax.stages.run import Run
from oel_jax.tasks import stage as stage_lib

TEXTS = ("good", "", "bad", "fair")  # the second says nothing: the gate plays with three
COUNT, LIMIT = 96, 9


def test_fishers_exact_test_is_scipys():
  for of, other in itertools.product((0, 1, 5, 9), (1, 7, 40)):
    for hits, other_hits in itertools.product(range(of + 1), range(other + 1)):
      table = [[hits, of - hits], [other_hits, other - other_hits]]
      right = stats.fisher_exact(table, alternative="less").pvalue
      assert statistics.fewer(hits, of, other_hits, other) == pytest.approx(right, abs=1e-12)


def test_the_example_of_few_games():
  """That of HURTS: with 10 texts and 30 of 60 passed without, 9 lost games show harm, 8 do not."""
  shows = [statistics.fewer(0, games, 30, 60) < HURTS / 10 for games in range(1, 13)]
  assert shows == [False] * 8 + [True] * 4


def test_responses_that_the_limit_cut():
  turns = [turn_of("x", "", "y", "y", tokens) for tokens in (3, 8, 9, 9)]
  games = [game_of("a", "g", 1, turns[:3], "", 0.0, False, "lost")]
  games += [game_of("b", "g", 1, turns[3:], "", 0.0, False, "lost")]
  found = episodes_lib.cut(games, 9)
  assert (found["hits"], found["of"], found["rate"]) == (2, 4, 0.5)
  assert episodes_lib.cut([], 9) == {"hits": 0, "of": 0, "rate": None, "interval": None}


@pytest.fixture(name="run")
def fixture_run(tmp_path, monkeypatch):
  """A round with TEXTS, whose games are passed and cut as `rule` (knowledge, number) says."""
  config = short_config()
  config.extraction.texts = len(TEXTS)
  config.consolidation.gate_episodes = COUNT
  config.deployment.max_response_tokens = LIMIT
  for i, text in enumerate(TEXTS):
    items = (Item(text, f"c{i}", 1, 1),) if text else ()
    knowledge_lib.write(tmp_path / "round_1/knowledge", i, Knowledge(items))
  (tmp_path / "round_1/knowledge/whole").touch()
  played = {}

  def play(path, policy, spec, *, episodes, **how):
    games, seen = [], []
    for i, episode in enumerate(episodes):
      passed, tokens = rules[0](episode.knowledge, i)
      end = ("", float(passed), passed, "passed" if passed else "lost")
      turn = turn_of("board", "", "[up]", "[up]", tokens)
      games.append(game_of(episode.id, "g", episode.map_seed, (turn,), *end))
      seen.append((episode.knowledge, passed, tokens))
    played[path.name] = seen
    write_jsonl(path, games)
    return games

  rules = [lambda text, i: (text == "good" or (text != "bad" and i % 2 == 0), LIMIT - (i % 3 > 0))]
  monkeypatch.setattr(play_lib, "play_to_file", play)
  with Metrics(tmp_path) as metrics:
    made = Run(config, tmp_path, metrics, None)
    yield made, rules, played


def read_json(path):
  return json.loads(path.read_text())


def test_each_text_is_counted_and_one_that_hurts_is_left_out(run, tmp_path, caplog):
  this, _, played = run
  given = knowledge.texts(this, 1)
  assert gate(this, 1, Player(), given) is True
  found = read_json(tmp_path / "round_1/gate.json")
  without, with_it = played["gate_without.jsonl"], played["gate_with.jsonl"]
  passes = sum(passed for _, passed, _ in without)
  assert [entry["text"] for entry in found["texts"]] == [0, 2, 3]
  for entry in found["texts"]:
    games = [(passed, tokens) for text, passed, tokens in with_it if text == TEXTS[entry["text"]]]
    hits = sum(passed for passed, _ in games)
    assert len(games) > 10 and (entry["passed"]["hits"], entry["passed"]["of"]) == (
      hits,
      len(games),
    )
    assert entry["cut"]["hits"] == sum(tokens == LIMIT for _, tokens in games)
    table = [[hits, len(games) - hits], [passes, COUNT - passes]]
    assert entry["p"] == pytest.approx(stats.fisher_exact(table, alternative="less").pvalue)
    assert entry["left_out"] == (entry["text"] == 2)
  assert found["cut"]["without"]["hits"] == COUNT // 3
  kept = [passed for text, passed, _ in with_it if text != "bad"]
  assert (found["kept"]["hits"], found["kept"]["of"]) == (sum(kept), len(kept))
  assert found["with"]["hits"] == sum(passed for _, passed, _ in with_it)
  assert "round 1: knowledge text 02 hurts and is left out: 0 of" in caplog.text
  assert knowledge.kept(this, 1, given) == ["good", "fair"]
  assert [text.text for text in knowledge.carried(this, 1)] == ["good", "", "", "fair"]
  assert [text.text for text in knowledge.read(this, 1)] == list(TEXTS)  # nothing is lost
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  assert line["cut_without"] == found["cut"]["without"]["rate"] and line["passed_with"]


def test_a_gate_that_was_killed_before_the_texts_were_marked_marks_them(run, tmp_path):
  this, _, played = run
  given = knowledge.texts(this, 1)
  gate(this, 1, Player(), given)
  path = tmp_path / "round_1/knowledge/left_out.json"
  before = path.read_bytes()
  path.unlink()
  played.clear()
  gate(this, 1, Player(), given)
  assert path.read_bytes() == before and not played
  resume.check(this, Player())


def test_texts_that_all_hurt_are_left_to_on_no_gain(run, tmp_path):
  this, rules, _ = run
  rules[0] = lambda text, i: (not text, 1)
  this.config.consolidation.on_no_gain = "skip"
  assert gate(this, 1, Player(), knowledge.texts(this, 1)) is False
  found = read_json(tmp_path / "round_1/gate.json")
  assert not any(entry["left_out"] for entry in found["texts"]) and "kept" not in found
  assert not (tmp_path / "round_1/knowledge/left_out.json").exists()


def test_the_gain_is_that_of_the_texts_that_are_kept(run, tmp_path):
  """With all three it is a loss, and the round would be skipped."""
  this, rules, _ = run
  rules[0] = lambda text, i: (text != "bad" and i % 8 > (0 if text else 2), 1)
  this.config.consolidation.on_no_gain = "skip"
  assert gate(this, 1, Player(), knowledge.texts(this, 1)) is True
  found = read_json(tmp_path / "round_1/gate.json")
  assert found["with"]["hits"] < found["without"]["hits"]
  assert this.gate(1)["decision"] == "train"


def test_each_of_several_texts_is_tested_at_its_share_of_the_chance(run, tmp_path):
  """What would show harm if it were the only text is chance among three."""
  this, rules, _ = run
  bad = itertools.count()
  rules[0] = lambda text, i: (next(bad) < 10 if text == "bad" else bool(text) or i % 2 == 0, 1)
  gate(this, 1, Player(), knowledge.texts(this, 1))
  [entry] = [e for e in read_json(tmp_path / "round_1/gate.json")["texts"] if e["text"] == 2]
  assert HURTS / 3 < entry["p"] < HURTS
  assert not entry["left_out"] and knowledge.kept(this, 1, TEXTS) == list(TEXTS)


@pytest.mark.parametrize("on_no_gain", ["warn", "stop"])
def test_no_gain_is_told_of_the_texts_that_are_kept(run, tmp_path, caplog, on_no_gain):
  this, rules, _ = run
  passes = {"good": (0, 2, 4), "fair": (0, 2, 4), "bad": (), "": (0, 2, 4, 6)}
  rules[0] = lambda text, i: (i % 8 in passes[text], 1)
  this.config.consolidation.on_no_gain = on_no_gain
  stops = pytest.raises(ValueError, match='is "stop"') if on_no_gain == "stop" else None
  with stops or contextlib.nullcontext() as raised:
    gate(this, 1, Player(), knowledge.texts(this, 1))
  found = read_json(tmp_path / "round_1/gate.json")
  kept, without = found["kept"], found["without"]
  assert kept["of"] < found["with"]["of"] and kept["rate"] < without["rate"]
  told = f"{kept['hits']} of {kept['of']} passed with it, {without['hits']} without: consolidated"
  assert f"round 1: no gain from the knowledge: {told}" in caplog.text
  if on_no_gain == "stop":
    assert f"with the knowledge {kept['hits']} of {kept['of']} games" in str(raised.value)


@pytest.mark.parametrize("teacher", ["frozen", "first", "live"])
def test_with_the_knowledge_the_rounds_teacher_plays(run, monkeypatch, teacher):
  """The first weights pass nothing, and those of the round everything: by "first" there is no gain,
  though the round's own would play as well with the knowledge.
  """
  made, rules, _ = run
  own, this = Player(), dataclasses.replace(made, base=Player())
  fake, who = play_lib.play_to_file, {}

  def play(path, meter, spec, **how):
    who[path.name] = meter.policy
    passed = meter.policy is not this.base
    rules[0] = lambda text, i: (passed, 1)
    return fake(path, meter, spec, **how)

  monkeypatch.setattr(play_lib, "play_to_file", play)
  this.config.consolidation.update(teacher=teacher, on_no_gain="skip")
  trained = gate(this, 1, own, knowledge.texts(this, 1))
  assert who["gate_without.jsonl"] is own
  assert who["gate_with.jsonl"] is (this.base if teacher == "first" else own)
  assert trained is (teacher != "first")


def test_a_gate_of_an_earlier_version_leaves_out_nothing(run, tmp_path):
  this, _, _ = run
  given = knowledge.texts(this, 1)
  gate(this, 1, Player(), given)
  path = tmp_path / "round_1/gate.json"
  old = {k: v for k, v in read_json(path).items() if k in ("schema", "without", "with")}
  path.write_text(json.dumps(old))
  gate(this, 1, Player(), given)
  assert knowledge.kept(this, 1, given) == given
  [aside] = (tmp_path / "round_1/knowledge").glob("left_out.json.replaced-*")
  assert read_json(aside)["left_out"][0]["text"] == 2
  parsed = gates.parse(old | {"decision": "train"})
  assert (parsed.texts, parsed.cut_with, parsed.kept) == ((), None, None)


@pytest.mark.parametrize(
  "field, value, told",
  [
    ("p", 2, r"gate.texts\[1\].p is 2: it must be a number from 0 to 1"),
    ("left_out", 1, r"gate.texts\[1\].left_out is 1: it must be of type bool"),
    ("cut", None, r"gate.texts\[1\].cut"),
  ],
)
def test_a_damaged_gate_is_told(run, tmp_path, field, value, told):
  this, _, _ = run
  gate(this, 1, Player(), knowledge.texts(this, 1))
  path = tmp_path / "round_1/gate.json"
  found = {k: v for k, v in read_json(path).items() if k != "digest"}
  found["texts"][1][field] = value
  path.write_text(json.dumps(found))
  with pytest.raises(ValueError, match=f"{path}.*{told}"):
    gates.read_gate(path)


def test_the_server_side_is_told_with_the_knowledge(run, tmp_path, monkeypatch):
  """Which texts consolidation gets in a folder that holds nothing but knowledge/ and prompts."""
  this, _, _ = run
  gate(this, 1, Player(), knowledge.texts(this, 1))
  server = Run(this.config, tmp_path / "server", this.metrics, None)
  shutil.copytree(tmp_path / "round_1/knowledge", server.round(1) / "knowledge")
  (server.round(1) / "prompts.jsonl").touch()
  got = []
  monkeypatch.setattr(
    stage_lib, "consolidate", lambda run, number, policy, texts: got.append(texts)
  )
  stage_lib._consolidate(server, 1, Player())
  assert got == [["good", "fair"]]
  # The knowledge of another extraction beside it is no text that it names.
  knowledge_lib.write(server.round(1) / "knowledge", 2, Knowledge((Item("else", "c", 1, 1),)))
  with pytest.raises(ValueError, match="left_out.json: leaves out 1 texts that are none of the 3"):
    stage_lib._consolidate(server, 1, Player())
