"""One stage alone: the user side's leave what a whole run leaves; what is missing or out of order
is told in one sentence. (The server side by itself is in test_loop.py, with a model.)
"""

import numpy as np
import pytest
from test_changed_runs import Player, bits, play_a_round
from test_loop import short_config

from oel_jax import choices
from oel_jax.consolidation import placement, restore
from oel_jax.policy import load
from oel_jax.runtime import files
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages.run import Run
from oel_jax.tasks import stage as stage_lib


@pytest.fixture(name="config")
def fixture_config():
  config = short_config()
  config.evaluation.retention = 0
  return config


@pytest.fixture(name="run_stage")
def fixture_run_stage(config, tmp_path, monkeypatch):
  """Runs a stage in tmp_path/run with a Player for the policy, whose trained weights are 1."""
  monkeypatch.setattr(Player, "replace", lambda self, params: Player(params["w"][0]), raising=False)
  monkeypatch.setattr(load, "load_policy", lambda *_, **__: Player())
  monkeypatch.setattr(placement, "unroll", lambda *_: False)
  monkeypatch.setattr(choices, "choose", lambda *_, **__: {})

  def trained(config, policy, directory, mesh):
    there = (directory / str(config.steps)).is_dir()
    return {"w": np.full(3, 1, np.float32)} if there else None

  monkeypatch.setattr(restore, "trained_params", trained)
  return lambda name, number=1: stage_lib.run(config, tmp_path / "run", stage=name, number=number)


def test_stage_by_stage_leaves_the_bits_of_a_whole_run(run_stage, config, tmp_path, capsys):
  with Metrics(tmp_path) as metrics:
    play_a_round(Run(config, tmp_path / "whole", metrics, None), Player(), after=Player(1))
  run_stage("evaluate", 0)
  for name in ("deploy", "extract"):
    run_stage(name)
  assert "round_1/knowledge and prompts.jsonl" in capsys.readouterr().out
  (tmp_path / "run/round_1/checkpoints/4").mkdir(parents=True)  # as carried back
  run_stage("evaluate")
  whole, found = (
    {name: content for name, content in bits(folder).items() if name.startswith("round_")}
    for folder in (tmp_path / "whole", tmp_path / "run")
  )
  for name in ("round_0/cost.json", "round_1/cost.json"):  # seconds differ
    del whole[name], found[name]
  assert len(whole) > 10 and found == whole


def test_a_stage_that_is_done_is_not_done_again(run_stage, tmp_path):
  for name in ("deploy", "extract", "extract", "deploy"):
    run_stage(name)
    before = bits(tmp_path / "run", "round_*/**/*")
  run_stage("extract")
  assert bits(tmp_path / "run", "round_*/**/*") == before


def test_games_that_were_removed_before_they_were_read_are_played_again(run_stage, tmp_path):
  games = tmp_path / "run/round_1/user/trajectories.jsonl"
  run_stage("deploy")
  before = games.read_bytes()
  games.unlink()
  run_stage("deploy")
  assert games.read_bytes() == before
  run_stage("extract")
  games.unlink()
  run_stage("deploy")  # once read, they are not needed
  assert not games.exists()


@pytest.mark.parametrize(
  "done, name, number, told",
  [
    ([], "extract", 1, "round_1/user/trajectories.jsonl: is not there.*--stage=deploy first"),
    ([], "consolidate", 1, "round_1/knowledge/whole: is not there.*carry knowledge/ and prompts"),
    (["deploy"], "evaluate", 1, "round_0/evaluation.json: is not there.*--round=0 first"),
    ([], "deploy", 2, "round_1/checkpoints: must hold step 4.*--stage=consolidate --round=1"),
    ([], "deploy", 3, r"--round=3 for --stage=deploy: it must be from 1 to config.rounds \(2\)"),
    ([], "consolidate", 0, r"--round=0 for --stage=consolidate: it must be from 1"),
    ([], "evaluate", -1, r"--round=-1 for --stage=evaluate: it must be from 0"),
  ],
)
def test_what_is_missing_or_out_of_order_is_told(run_stage, done, name, number, told):
  for earlier in done:
    run_stage(earlier)
  with pytest.raises(ValueError, match=told):
    run_stage(name, number)


def test_prompts_that_were_not_carried_are_told(run_stage, tmp_path):
  for name in ("deploy", "extract"):
    run_stage(name)
  (tmp_path / "run/round_1/prompts.jsonl").unlink()
  with pytest.raises(ValueError, match="round_1/prompts.jsonl: is not there.*carry"):
    run_stage("consolidate")


def test_a_round_that_its_gate_skips_is_not_consolidated_and_the_next_goes_on(
  run_stage, config, tmp_path
):
  config.consolidation.on_no_gain = "skip"
  run_stage("evaluate", 0)
  for name in ("deploy", "extract"):
    run_stage(name)
  share = lambda hits: {"rate": hits / 4, "hits": hits, "of": 4, "interval": [0.0, 1.0]}
  gate = {"schema": 1, "without": share(3), "with": share(1)}
  files.write_sealed(tmp_path / "run/round_1/gate.json", gate)
  with pytest.raises(ValueError, match='round 1: play with the knowledge was worse.*"skip"'):
    run_stage("consolidate")
  run_stage("evaluate", 1)
  run_stage("deploy", 2)
  assert (tmp_path / "run/round_2/prompts.jsonl").exists()


def test_the_server_side_needs_no_file_of_the_environment(run_stage, config):
  config.deployment.environment = "/on/the/user/side.py:make"
  with pytest.raises(ValueError, match="round_1/knowledge/whole: is not there"):
    run_stage("consolidate")
  with pytest.raises(OSError, match="/on/the/user/side.py"):
    run_stage("deploy")


def test_other_tasks_have_no_stages(run_stage, config):
  with config.unlocked():
    config.task = "distill"
  with pytest.raises(ValueError, match="--stage=deploy: only a run of rounds has it"):
    run_stage("deploy")
