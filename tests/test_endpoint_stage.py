"""A round whose deployed policy is behind a server: the same games and prompts as by the policy
itself, and what becomes of games that had no answer. Every other stage asks our own policy.
"""

import json
import logging
import random
import shutil

import jax
import pytest
from chat_server import completion, send, serving
from fakes import in_turns
from test_changed_runs import Player, bits
from test_loop import short_config

from oel_jax import config as config_lib
from oel_jax import loop
from oel_jax.conversations.jsonl import read_conversations, read_prompts
from oel_jax.conversations.schema import cut_prompts
from oel_jax.policy.endpoint import completions
from oel_jax.policy.endpoint import endpoint as client
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import endpoint as endpoint_lib
from oel_jax.stages import resume
from oel_jax.stages.deploy import deploy
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.extract import extract
from oel_jax.stages.gate import gate
from oel_jax.stages.run import Run

MOVES = ("[up]", "[down]", "[left]", "[right]")
KEY = "sk-planted-0123456789abcdef"


def move(seed: int) -> str:
  return random.Random(seed % completions.SEEDS).choice(MOVES)


class Own(Player):
  """Moves as `answers` does, by the seed as it is sent."""

  @in_turns
  def sample(self, prompts, seeds, **how):
    return [self.tokenizer.put(move(seed)) for seed in seeds]


def answers(handler, number, body):
  send(handler, completion(move(body["seed"]), tokens=1))


@pytest.fixture(name="make_run")
def fixture_make_run(tmp_path, monkeypatch):
  monkeypatch.setattr(client, "_pause", lambda stopped, seconds: None)
  monkeypatch.setenv("OEL_ENDPOINT_KEY", KEY)
  with Metrics(tmp_path / "run") as metrics:

    def make(url="", folder="run", **changes) -> Run:
      config = short_config()
      config.evaluation.retention = 0
      config.extraction.trajectories, config.extraction.use = 20, 10
      config.deployment.update(
        endpoint=url, endpoint_model="m", endpoint_retries=1, endpoint_timeout=5.0, episodes=20
      )
      config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
      )
      config_lib.validate(config)
      return Run(config, tmp_path / folder, metrics, None)

    yield make


def test_the_games_and_prompts_are_those_of_the_same_policy_asked_here(make_run, tmp_path):
  deploy(make_run(folder="own"), 1, Own())
  player = Own()
  with serving(answers) as server:
    deploy(make_run(server.url), 1, player)
    turns = len(server.asked)
  assert not player.asked
  own, found = (tmp_path / name / "round_1" for name in ("own", "run"))
  for name in ("user/trajectories.jsonl", "user/prefix_trajectories.jsonl", "prompts.jsonl"):
    assert (found / name).read_bytes() == (own / name).read_bytes()
  assert turns == sum(
    len(game.answers) for path in found.glob("user/*.jsonl") for game in read_conversations(path)
  )


def test_it_is_noted_who_played_and_what_was_asked(make_run, tmp_path):
  with serving(answers) as server:
    deploy(make_run(server.url), 1, Player())
    turns = len(server.asked)
  entries = json.loads((tmp_path / "run/round_1/manifest.json").read_text())["files"]
  for name in ("user/trajectories.jsonl", "user/prefix_trajectories.jsonl"):
    assert entries[name]["made_from"]["endpoint"] == f"{server.url} (m)"
    assert set(entries[name]["made_from"]) == {"weights", "knowledge", "endpoint"}
  lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
  found = {line["stage"]: line for line in lines}
  told = [found[name] for name in ("deploy_endpoint", "prefixes_endpoint")]
  assert sum(line["requests"] for line in told) == turns
  assert [line["faults"] + line["unanswered"] for line in told] == [0, 0]
  costs = json.loads((tmp_path / "run/round_1/cost.json").read_text())["stages"]
  assert sum(cost["tokens"] for cost in costs) == turns


def test_all_other_stages_ask_our_own_policy(make_run, tmp_path):
  with serving(answers) as server:
    this, player = make_run(server.url), Player()
    evaluate(this, 0, player, player, [])
    assert player.asked and not server.asked
    deploy(this, 1, player)
    asked = len(server.asked)
    texts = extract(this, 1, player)
    gate(this, 1, player, texts)
    evaluate(this, 1, player, player, texts)
    assert len(server.asked) == asked
  whole = bits(tmp_path / "run", "round_*/evaluation.json")
  with serving(answers) as server:  # elsewhere, and more patient: no measurement depends on it
    changed = make_run(server.url, deployment__endpoint_timeout=9.0, deployment__endpoint_retries=7)
    resume.check(changed, player)
    evaluate(changed, 1, player, player, texts)
    deploy(changed, 1, player)
    assert not server.asked
  assert bits(tmp_path / "run", "round_*/evaluation.json") == whole


def failing(*lost):
  """Answers all but what begins with one of these boards."""

  def behave(handler, number, body):
    if any(text in body["messages"][0]["content"] for text in lost):
      send(handler, {"error": {"message": f"{KEY} is fine, I am not"}}, 500)
    else:
      answers(handler, number, body)

  return behave


def boards(folder) -> dict[str, str]:
  """The id of each game → how it begins, for games that no other begins like."""
  games = read_conversations(folder / "user/trajectories.jsonl")
  games += read_conversations(folder / "user/prefix_trajectories.jsonl")
  first = {game.id: game.messages[0].content for game in games}
  return {id: text for id, text in first.items() if list(first.values()).count(text) == 1}


@pytest.fixture(name="alone")
def fixture_alone(make_run, tmp_path):
  """(id, board) of a knowledge game and of a prompt game, whose boards no other has."""
  deploy(make_run(folder="all"), 1, Own())
  found = boards(tmp_path / "all/round_1")
  pick = lambda kind: next((id, text) for id, text in found.items() if kind in id)
  return pick("deploy"), pick("prefix")


def test_a_game_without_an_answer_is_left_out_and_named(make_run, tmp_path, alone, caplog):
  (deployed, one), (prefix, other) = alone
  with serving(failing(one, other)) as server:
    this = make_run(server.url)
    deploy(this, 1, Player())
  folder = tmp_path / "run/round_1"
  for name, lost in (("trajectories", deployed), ("prefix_trajectories", prefix)):
    whole = read_conversations(tmp_path / f"all/round_1/user/{name}.jsonl")
    assert read_conversations(folder / f"user/{name}.jsonl") == [g for g in whole if g.id != lost]
    [(id, why)] = json.loads((folder / f"user/{name}.unanswered.json").read_text())[
      "unanswered"
    ].items()
    assert id == lost
    assert why == "turn 1: HTTP 500: '[key] is fine, I am not', after 2 tries"
    told = [
      record.message for record in caplog.records if f"user/{name}.jsonl: 1 of 20" in record.message
    ]
    assert len(told) == 1 and f"left out: {lost}, turn 1: HTTP 500" in told[0]
  games = read_conversations(folder / "user/prefix_trajectories.jsonl")
  prompts = read_prompts(folder / "prompts.jsonl")
  assert prompts == [prompt for game in games for prompt in cut_prompts(game)]
  assert "2 had no answer (HTTP 500: 2); 1 of" in caplog.text
  extract(this, 1, Player())
  assert deployed not in (folder / "user/extraction.jsonl").read_text()


def test_what_was_left_out_is_not_asked_again(make_run, tmp_path, alone):
  (deployed, one), _ = alone
  folder, out = tmp_path / "run/round_1", []

  def behave(handler, number, body):
    (failing(one) if not out else failing(""))(handler, number, body)

  with serving(behave) as server:
    deploy(make_run(server.url), 1, Player())
    (folder / "prompts.jsonl").unlink()  # as if it had been killed before
    before = bits(folder, "user/*") | bits(folder, "prompts.jsonl")
    out.append("the server fails from now on")
    asked = len(server.asked)
    deploy(make_run(server.url), 1, Player())
    assert len(server.asked) == asked
    assert bits(folder, "user/*") == before and (folder / "prompts.jsonl").exists()
    # Whoever removes the games has all of them asked again.
    (folder / "user/trajectories.jsonl").unlink()
    (folder / "prompts.jsonl").unlink()
    del out[:]
    server.behave = answers
    deploy(make_run(server.url), 1, Player())
  assert deployed in [game.id for game in read_conversations(folder / "user/trajectories.jsonl")]
  assert not list(folder.rglob("*.unanswered.json"))


def test_games_that_another_endpoint_began_are_refused(make_run, tmp_path, alone):
  (_, one), (_, other) = alone
  with serving(answers) as server:
    deploy(make_run(server.url), 1, Player())
  (tmp_path / "run/round_1/prompts.jsonl").unlink()
  told = "trajectories.jsonl: played with other endpoint than the round has now"
  with pytest.raises(ValueError, match=told):
    deploy(make_run("http://127.0.0.1:9/v1"), 1, Player())
  with pytest.raises(ValueError, match=told):
    deploy(make_run(), 1, Player())


def test_a_server_that_fails_ends_the_stage_in_one_sentence_and_it_goes_on(
  make_run, tmp_path, caplog
):
  def behave(handler, number, body):
    answers(handler, number, body) if number < 20 else send(handler, "down for repair", 503)

  with serving(behave) as server:
    this = make_run(server.url, deployment__slots=4)
    with pytest.raises(RuntimeError) as error:
      deploy(this, 1, Player())
    told = str(error.value)
    assert (
      "3 of 20 episodes had no answer, which is more than 10% of them; the last is r1-d" in told
    )
    assert "HTTP 503: 'down for repair', after 2 tries; the same command goes on" in told
    assert "\n" not in told
    partial = tmp_path / "run/round_1/user/trajectories.jsonl.partial"
    kept = [game.id for game in read_conversations(partial)]
    assert 0 < len(kept) < 20 and not list(tmp_path.rglob("*.unanswered.json"))
    server.behave = answers
    del server.asked[:]
    deploy(make_run(server.url), 1, Player())
    # By their seeds: a request of the run that ended may still arrive, and is one of the same.
    first = {body["seed"] for *_, body in server.asked if len(body["messages"]) == 1}
  assert len(first) == 40 - len(kept)  # what had been answered whole is not asked for again
  deploy(make_run(folder="own"), 1, Own())
  for name in ("user/trajectories.jsonl", "prompts.jsonl"):
    own = tmp_path / "own/round_1" / name
    assert (tmp_path / "run/round_1" / name).read_bytes() == own.read_bytes()


def test_a_later_round_reminds_of_the_weights(make_run, caplog):
  with serving(answers) as server:
    deploy(make_run(server.url), 1, Player())
    assert "must serve" not in caplog.text
    deploy(make_run(server.url), 2, Player())
  assert f"round 2: {server.url} (m) must serve the weights that round 1 ended with" in caplog.text


def test_answers_that_the_server_cuts_are_told(make_run, caplog):
  def behave(handler, number, body):
    send(handler, completion(move(body["seed"]), tokens=3, finish="length"))

  with serving(behave) as server:
    deploy(make_run(server.url), 1, Player())
    turns = len(server.asked)
  found = [record.message for record in caplog.records if "cut by the server" in record.message]
  assert len(found) == 2 and "max_response_tokens (" in found[0]
  assert sum(int(text.split(" of ")[0].split()[-1]) for text in found) == turns


# Before a run.


def test_a_run_begins_with_a_question_to_the_endpoint(make_run, tmp_path, monkeypatch):
  def begins(*_):
    raise NotImplementedError("as far as this")

  monkeypatch.setattr(loop, "begin", begins)
  with serving(answers) as server:
    config = make_run(server.url).config
    with pytest.raises(NotImplementedError, match="as far as this"):
      loop.run(config, str(tmp_path / "new"))
    [(_, headers, body)] = server.asked
    assert body["max_tokens"] == endpoint_lib.PROBE_TOKENS and headers["Authorization"].endswith(
      KEY
    )
    for number in range(1, config.rounds + 1):
      (tmp_path / f"done/round_{number}").mkdir(parents=True)
      (tmp_path / f"done/round_{number}/prompts.jsonl").touch()
    endpoint_lib.reach(config, tmp_path / "done")
    assert len(server.asked) == 1
  for behave, error, told in (
    (lambda handler, *_: send(handler, {"detail": "Not Found"}, 404), ValueError, "'Not Found'"),
    (
      lambda handler, *_: send(handler, "", 500),
      RuntimeError,
      "does not answer: HTTP 500.*after 10 tries",
    ),
  ):
    with serving(behave) as server:
      with pytest.raises(error, match=told):
        loop.run(make_run(server.url, deployment__endpoint_retries=9).config, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_a_server_that_loads_its_model_is_waited_for_and_an_empty_port_is_not(make_run, tmp_path):
  def behave(handler, number, body):
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    send(handler, loading, 503) if number < 9 else answers(handler, number, body)

  retries = dict(deployment__endpoint_retries=8)
  with serving(behave) as server:
    endpoint_lib.reach(make_run(server.url, **retries).config, tmp_path / "new")
    assert len(server.asked) == 10
  with pytest.raises(RuntimeError, match="does not answer: broken connection: .*, after 4 tries"):
    endpoint_lib.reach(make_run(server.url, **retries).config, tmp_path / "new")


def test_several_processes_are_refused(make_run, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="has 2 processes: give --stage=deploy in one process"):
    endpoint_lib.of(make_run("http://127.0.0.1:9/v1").config)
  assert endpoint_lib.of(make_run().config) is None


@pytest.mark.parametrize(
  "changes, told",
  [
    (
      {"endpoint": "localhost:80"},
      "config.deployment.endpoint is no address: it must be a base URL",
    ),
    ({"endpoint": f"http://me:{KEY}@h/v1"}, "without a name or password in it"),
    ({"endpoint_model": ""}, "config.deployment.endpoint_model is '': it must be the name"),
    ({"endpoint_retries": -1}, "config.deployment.endpoint_retries is -1: it must be 0 or more"),
    (
      {"endpoint_timeout": 0.0},
      "config.deployment.endpoint_timeout is 0.0: it must be more than 0",
    ),
  ],
)
def test_a_wrong_field_is_told_without_what_may_be_secret(changes, told):
  config = config_lib.default()
  config.deployment.update({"endpoint": "http://h/v1", "endpoint_model": "m"} | changes)
  with pytest.raises(ValueError) as error:
    config_lib.validate(config)
  assert told in str(error.value) and KEY not in str(error.value)


def test_the_key_is_in_no_file_and_no_log(make_run, tmp_path, alone, caplog, capfd):
  """Also where the server says it back, in an error and in an answer."""
  caplog.set_level(logging.DEBUG)
  (_, one), (_, other) = alone

  def behave(handler, number, body):
    if one in body["messages"][0]["content"]:
      send(handler, f"{handler.headers['Authorization']} is wrong", 500, kind=KEY)
    elif other in body["messages"][0]["content"]:
      send(handler, f"no JSON but {KEY}")
    else:
      send(handler, completion(f"{KEY} {move(body['seed'])}", tokens=1))

  with serving(behave) as server:
    deploy(make_run(server.url), 1, Player())
  shutil.rmtree(tmp_path / "all")
  found = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(found) >= 7 and not [path for path in found if KEY.encode() in path.read_bytes()]
  assert "2 had no answer" in caplog.text
  printed = "".join(capfd.readouterr())
  assert KEY not in caplog.text + printed and "deploy: 19 of 20" in printed
