"""Tables of the paper: from run directories by hand to lines, and the one command that makes the
runs.
"""

import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fakes import game_of, turn_of

from oel_jax import config as config_lib
from oel_jax.conversations.jsonl import write_jsonl

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import oel_table1  # noqa: E402
import readings  # noqa: E402
import running  # noqa: E402
import study as study_lib  # noqa: E402
from readings import Cell, Column, Compared  # noqa: E402


def leave_run(
  folder: pathlib.Path, games: dict[str, list], limit: int = 10, rounds: int = 1, **measured
) -> None:
  """A run directory with played games: "ROUND WAY" → of each game (passed, tokens of each turn)."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {"deployment": {"max_response_tokens": limit}, "rounds": rounds}
  (folder / "config.json").write_text(json.dumps({"config": config}))
  for name, played in games.items():
    number, way = name.split()
    end = "" if way == "without" else f"_{way}"
    records = [
      game_of(
        f"r{number}-{way}-{i:05d}",
        "Lake",
        2 * i + 1,
        [turn_of("?", "", "[up]", "[up]", tokens) for tokens in turns],
        "The end.",
        float(passed),
        bool(passed),
        "passed" if passed else "lost",
      )
      for i, (passed, turns) in enumerate(played)
    ]
    write_jsonl(folder / f"round_{number}/user/evaluation{end}.jsonl", records)
    found = {"retention": {}, "unrelated": None} | measured
    (folder / f"round_{number}/evaluation.json").write_text(json.dumps(found))


@pytest.fixture(name="column")
def fixture_column(tmp_path):
  game = lambda passed, *turns: (passed, turns or (4,))
  for seed, (own, raw) in enumerate([([1, 1, 1, 0], [0, 1, 0, 0]), ([0, 1, 0, 1], [0, 1, 1, 0])]):
    leave_run(tmp_path / f"own/{seed}", {
      "0 without": [game(0, 10, 2), game(0, 4), game(0, 4), game(1, 4)],
      "1 without": [game(passed) for passed in own],
      "1 in_context": [game(1)] * 4,
    }, retention={"instructions": {"rate": 0.5 + seed / 4}}, unrelated={"kl": 0.02})  # fmt: skip
    leave_run(tmp_path / f"raw/{seed}", {"1 without": [game(passed) for passed in raw]})
  return Column("here", tmp_path)


def test_what_a_game_has_is_one_number(column):
  assert column.arms() == ["own", "raw"] and column.seeds("own") == [0, 1]
  assert column.values(Cell("own", 0, what="tokens"))[0].tolist() == [6, 4, 4, 4]
  assert column.values(Cell("own", 0, what="cut"))[1].tolist() == [0.5, 0, 0, 0]
  assert column.values(Cell("own", 0))[0].tolist() == [0, 0, 0, 1]
  assert column.values(Cell("own", 2)) == column.values(Cell("other")) == {}
  both = column.values((Cell("own"), Cell("own", 1, "in_context")))
  assert both[0].tolist() == [1, 1, 1, 0.5]


def test_lines_of_a_table_by_hand(column, tmp_path):
  rows = [
    readings.Row("own", "21.4", Cell("own")),
    readings.Row("in context", "18.2", Cell("own", 1, "in_context")),
    readings.Row("tokens", "", Cell("own", 0, what="tokens")),
    readings.Row("kept", "", Cell("own", what="instructions")),
    readings.Row("KL × 100", "", Cell("own", what="kl")),
  ]
  empty = Column("elsewhere", tmp_path / "none")
  # 75% and 50%: mean 62.5, standard error 12.5.
  assert readings.table([column, empty], rows) == [
    "|  | published | here | elsewhere |",
    "|---|---|---|---|",
    "| own | 21.4 | 62.5 ± 12.5 |  |",
    "| in context | 18.2 | 100.0 ± 0.0 |  |",
    "| tokens |  | 4.5 ± 0.0 |  |",
    "| kept |  | 62.5 ± 12.5 |  |",
    "| KL × 100 |  | 2.0 ± 0.0 |  |",
  ]
  told = "2 seeds, 4 held-out games or prompts, the last checkpoint."
  assert (column.counts(rows), empty.counts(rows)) == (told, "no run has come so far")


def test_differences_have_the_intervals_of_a_hand_computation(column):
  """Those of `test_evaluate.test_paired_intervals_by_hand`: 0.25, 0.25 and 3.177 to each side."""
  lines = readings.intervals([column], [
    Compared("own above raw", Cell("own"), Cell("raw")),
    Compared("context above base", Cell("own", 1, "in_context"), Cell("own", 0)),
    Compared("kept", Cell("own", what="instructions"), Cell("own", what="kl")),
    Compared("not there", Cell("own"), Cell("other")),
  ])  # fmt: skip
  assert lines[2] == "| own above raw | here | +25.0 | [-24.0, +74.0] | [-292.7, +342.7] | no |"
  assert lines[3].startswith("| context above base | here | +75.0 |") and lines[3].endswith("yes |")
  assert lines[4].startswith("| kept | here | +60.5 | – | [") and len(lines) == 7
  assert "Of 3 differences that are none, about 0.1 would" in lines[-1]


def test_another_number_of_games_is_told(column, tmp_path):
  leave_run(tmp_path / "raw/1", {"1 without": [(1, (4,))]})
  with pytest.raises(ValueError, match=r"own above raw: seed number 2 has games of the shapes"):
    readings.intervals([column], [Compared("own above raw", Cell("own"), Cell("raw"))])


@pytest.fixture(name="runs")
def fixture_runs(monkeypatch):
  """Stands in for oel_jax.main: notes the commands, and leaves what they would."""
  commands = []

  def status(command, environment, log):
    assert command[:3] == [sys.executable, "-m", "oel_jax.main"]
    said = dict(flag.removeprefix("--").split("=", 1) for flag in command[3:])
    commands.append(said)
    folder = pathlib.Path(said["workdir"])
    passed = said.get("config.extraction.source") != "trajectories"
    number = int(said.get("round", 1))
    leave_run(folder, {f"{number} without": [(passed, (4,)), (0, (4,))]})
    bad = said["config.seed"] == "7" and "stage" not in said
    return int(bad)

  monkeypatch.setattr(running, "_status", status)
  monkeypatch.setattr(study_lib, "_commit", lambda: "")
  return commands


def test_one_command_makes_what_is_missing_and_prints_the_table(runs, tmp_path, capsys):
  command = ["pocket", str(tmp_path), "--seeds=3,4", "--config.consolidation.steps=2"]
  study_lib.main(oel_table1.STUDY, command)
  begun, arms = runs[:4], runs[4:]
  assert [(one["config.seed"], one["stage"], one["round"]) for one in begun] == [
    ("3", "evaluate", "0"), ("3", "deploy", "1"), ("4", "evaluate", "0"), ("4", "deploy", "1"),
  ]  # fmt: skip
  assert {(one["config.seed"], one.get("config.extraction.source")) for one in arms} == {
    (seed, source) for seed in "34" for source in (None, "trajectories")
  }
  assert all(one["config.consolidation.steps"] == "2" for one in runs)
  assert all(one["config.rounds"] == "1" and "frozen_lake.py:poc" in one["config"] for one in runs)
  told = capsys.readouterr().out.splitlines()
  assert told[2] == "|  | published | embedded policy, 3 × 3 | Sokoban, Qwen3-4B |"
  assert "| no experience | 7.5 | 50.0 ± 0.0 |  |" in told
  assert "| extracted knowledge consolidated | 21.4 | 50.0 ± 0.0 |  |" in told
  assert "| raw trajectories consolidated | 7.8 | 0.0 ± 0.0 |  |" in told
  # The base is what was begun, copied.
  assert (tmp_path / "pocket/trajectories/4/round_0/evaluation.json").exists()
  count = len(runs)
  study_lib.main(oel_table1.STUDY, command)
  assert len(runs) == count and "| 21.4 | 50.0 ± 0.0 |" in capsys.readouterr().out
  # Another configuration is for main to refuse.
  study_lib.main(oel_table1.STUDY, command[:3])
  assert len(runs) == 2 * count


def test_a_run_that_fails_is_told_and_the_others_are_in_the_table(runs, tmp_path, capsys):
  with pytest.raises(SystemExit, match="error: 2 runs failed: the same command"):
    study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path), "--seeds=3,7"])
  told = capsys.readouterr()
  assert "pocket/trajectories/7 ended with status 1: see" in told.err
  assert "| extracted knowledge consolidated | 21.4 | 50.0 ± 0.0 |" in told.out


@pytest.mark.parametrize(
  "arguments, told",
  [
    (["nowhere", "runs"], "invalid choice: 'nowhere'"),
    (["desk", "runs"], "desk needs --weights"),
    (["pocket", "runs", "--seeds=a"], "--seeds is 'a': it must be whole numbers from 0"),
    (["pocket", "runs", "--seeds=-1"], "--seeds is '-1': it must be whole numbers from 0"),
    (["pocket", "runs", "--seeds=1,0,1"], "with commas between, each once"),
    (["pocket", "runs", "--stage=plan"], "--stage=plan: of other flags only --config.FIELD=VALUE"),
  ],
)
def test_a_wrong_command_is_one_line(arguments, told, capsys):
  with pytest.raises(SystemExit):
    study_lib.main(oel_table1.STUDY, arguments)
  assert told in capsys.readouterr().err


@pytest.mark.parametrize(
  "flag, told",
  [
    ("seed=3", "--config.seed=3: every run would have it: give --seeds"),
    (
      "extraction.source=items",
      r"in this field extracted \('as it is'\) and trajectories \('trajectories'\) differ",
    ),
  ],
)
def test_a_flag_that_would_make_all_runs_alike_is_refused(flag, told, runs, tmp_path):
  with pytest.raises(SystemExit, match=told):
    study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path), f"--config.{flag}"])
  assert not runs


def test_a_run_whose_directory_was_removed_is_made_again(runs, tmp_path, capsys):
  command = ["pocket", str(tmp_path), "--seeds=0"]
  study_lib.main(oel_table1.STUDY, command)
  told, count = capsys.readouterr().out, len(runs)
  shutil.rmtree(tmp_path / "pocket/extracted/0")
  study_lib.main(oel_table1.STUDY, command)
  assert len(runs) == count + 1 and capsys.readouterr().out == told


def test_what_has_not_begun_by_itself_is_no_run_yet(runs, tmp_path, capsys):
  """As a kill leaves it between the copy of what was begun and the run."""
  study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path), "--seeds=0,1"])
  told = capsys.readouterr().out.splitlines()
  (tmp_path / "pocket/trajectories/1/config.json").unlink()
  study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path), "--print"])
  now = capsys.readouterr().out.splitlines()
  assert "| raw trajectories consolidated | 7.8 | 0.0 |  |" in now
  assert now[:5] == told[:5] and "1 to 2 seeds" in now[-2]


def test_rounds_that_the_gate_skipped_are_told(tmp_path, capsys):
  for seed, decision in enumerate(("skip", "train")):
    leave_run(
      tmp_path / f"pocket/extracted/{seed}", {"1 without": [(1, (4,))]}, gate={"decision": decision}
    )
  study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path), "--print"])
  told = "skipped by the gate, so nothing was trained: extracted, seed 0, round 1."
  assert f"embedded policy, 3 × 3: {told}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("at", [".", "pocket/begun/0.done"])
def test_what_cannot_be_gone_on_with_is_one_line(at, runs, tmp_path):
  path = tmp_path / "runs" / at
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("")
  with pytest.raises(SystemExit, match=f"error: .*{path}"):
    study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path / "runs"), "--seeds=0"])


STOPPED = """
import running, sys
running.give_devices()
wait = "import signal, time; signal.signal(15, lambda *_: (print('saved', flush=True), exit(3)));"
command = [sys.executable, "-c", wait + "print('there', flush=True); time.sleep(60)"]
with running.ended_together():
  running.at_a_time([(running._status, command, None, name) for name in ("0", "1", "2")])
"""


def test_runs_end_with_their_study(tmp_path):
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(EXPERIMENTS.parent), str(EXPERIMENTS)])
  }
  environment["JOBS"] = "2"
  how = dict(cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
  process = subprocess.Popen([sys.executable, "-c", STOPPED], **how)
  said = lambda: sorted(path.read_text() for path in tmp_path.iterdir())
  for _ in range(200):
    if said() == ["there\n", "there\n"]:
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=20)[1] == "stopped by SIGTERM: the same command goes on\n"
  assert process.returncode == 143 and said() == ["there\nsaved\n"] * 2


def test_jobs_that_are_no_number_are_told(monkeypatch, tmp_path):
  monkeypatch.setenv("JOBS", "many")
  with pytest.raises(SystemExit, match="JOBS is 'many': it must be a whole number from 1"):
    study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path)])


def test_a_damaged_file_is_told(runs, tmp_path, capsys):
  leave_run(tmp_path / "pocket/extracted/0", {"1 without": [(1, (4,))]})
  (tmp_path / "pocket/extracted/0/round_1/user/evaluation.jsonl").write_text("{\n")
  with pytest.raises(SystemExit, match="error: .*evaluation.jsonl"):
    study_lib.main(oel_table1.STUDY, ["pocket", str(tmp_path), "--print"])
  assert not runs


FILES = ("oel_table1", "oel_table2", "oel_figure4", "oel_figure5", "oel_figure6", "oel_figure7")
FILES += ("opcd_tables", "contested_axes")
GIVEN = {"oel_figure7": ["--sizes=1.7b=FOLDER,8b=FOLDER"]}


def study_of(name: str) -> study_lib.Study:
  return importlib.import_module(name).STUDY


@pytest.mark.parametrize("name", FILES)
def test_every_arm_is_a_configuration(name):
  """In each setting that the study has, the setting's own changes with it."""
  study = study_of(name)
  for word in study.settings:
    setting = study_lib.SETTINGS[word]
    rest = GIVEN.get(name, ["--weights=w"] * (not study.sizes))
    rest += ["--larger=x", "--budgets=64,96"] if name == "oel_table2" else []
    options, _ = study_lib._parse(study, [word, "runs", *rest])
    qwen = word.startswith("qwen3")
    if name == "oel_figure7" and not qwen:
      options.sizes = "small=x,large=y"
    for arm, changes in study.arms(setting, options).items():
      config = setting.default()
      config.update_from_flattened_dict({**setting.changes, "rounds": study.rounds or 1, **changes})
      expected = None if setting.plays else config_lib.default_distill()
      config_lib.validate(config, expected)
      assert "/" not in arm and " " not in arm and not arm.startswith("begun")


def test_every_study_has_every_game():
  """So that `papers.sh` does not fail with any of them."""
  for name in FILES:
    assert set(study_lib.GAMES) <= set(study_of(name).settings)


@pytest.mark.parametrize("name", FILES)
def test_the_help_says_what_a_study_takes(name, capsys):
  with pytest.raises(SystemExit) as end:
    study_lib.main(study_of(name), ["--help"])
  told = capsys.readouterr().out
  assert end.value.code == 0 and "--seeds" in told and "JOBS runs share" in told
  assert ("--weights" in told) != study_of(name).sizes


def test_what_is_begun_together_is_what_the_arms_have_in_common():
  before = study_lib._before
  loss, text = {"consolidation.kind": "jsd"}, {"extraction.source": "empty"}
  game = {"deployment.max_turns": 3}
  assert before("extract", loss) == before("deploy", loss | text) == ("begun", {})
  assert before("extract", loss | text)[1] == text and before("deploy", text | game)[1] == game
  names = {before("extract", changes)[0] for changes in (text, game, text | game)}
  assert len(names) == 3 and all(name.startswith("begun-") for name in names)


def test_texts_are_told_one_by_one(tmp_path):
  import oel_table2

  share = lambda hits, of: {"rate": hits / of, "hits": hits, "of": of}
  texts = [{"text": i, "passed": share(hits, 10)} for i, hits in enumerate((2, 9, 4))]
  play = {"texts": texts, "cut": share(1, 4)}
  found = dict(in_context=play, without={"cut": share(0, 4)})
  leave_run(tmp_path / "own/3", {"1 without": [(1, (4,))]}, **found)
  lines = oel_table2.text_by_text(Column("here", tmp_path))
  # Rates .2 .9 .4: mean .5, deviation sqrt(.26 / 2) = .3606; by chance sqrt(.25 / 10) = .1581.
  assert lines[5] == "| own | 3 | 90 40 20 | 36.1 | 15.8 | 25.0 | 0.0 |"


def test_a_share_of_the_trajectories_is_found_by_the_runs_own_use(tmp_path):
  leave_run(tmp_path / "own/0", {"1 after_002_trajectories": [(1, (4,)), (0, (4,))]})
  path = tmp_path / "own/0/config.json"
  config = json.loads(path.read_text())
  config["config"]["extraction"] = {"use": 16}
  path.write_text(json.dumps(config))
  column = Column("here", tmp_path)
  assert column.values(Cell("own", 1, 0.125))[0].tolist() == [1, 0]
  assert column.values(Cell("own", 1, 0.5)) == {}
  assert [readings.share_of(15, share) for share in (0.125, 0.25, 0.5)] == [2, 4, 8]


def test_points_of_accumulation_are_of_the_use_that_the_flags_say():
  import oel_figure4

  def points(*flags):
    options, _ = study_lib._parse(oel_figure4.STUDY, ["pocket", "runs", *flags])
    arms = oel_figure4.STUDY.arms(study_lib.SETTINGS["pocket"], options)
    return arms["own"]["evaluation.accumulation"]

  use = study_lib.SETTINGS["pocket"].default().extraction.use
  assert points() == tuple(readings.share_of(use, share) for share in (0.125, 0.25, 0.5))
  assert points("--config.extraction.use=16") == (2, 4, 8)
  with pytest.raises(ValueError, match="--config.extraction.use is 'all': it must be of type int"):
    points("--config.extraction.use=all")


def test_sizes_keep_their_places(tmp_path):
  import oel_figure7

  def arms(sizes):
    options, _ = study_lib._parse(oel_figure7.STUDY, ["pocket", str(tmp_path), f"--sizes={sizes}"])
    return list(oel_figure7.STUDY.arms(study_lib.SETTINGS["pocket"], options))

  assert arms("a=x,b=y") == ["1-a", "2-b"]
  for name in ("1-a", "2-b"):
    (tmp_path / "pocket" / name).mkdir(parents=True)
  assert arms("a=x,b=y,c=z") == ["1-a", "2-b", "3-c"] and arms("a=x") == ["1-a"]
  for sizes, told in (("b=y", "1-a, 1-b: "), ("0=w,a=x", "1-0, 1-a"), ("a=x,a=y", "2-a, 2-b")):
    with pytest.raises(ValueError, match=f"together have {told}"):
      arms(sizes)
  names = [f"{place}-s{place}" for place in range(1, 12)]
  assert [row.name for row in oel_figure7.rows(sorted(names))][::3][-2:] == [
    "s10, base",
    "s11, base",
  ]


def test_a_text_that_is_trained_in_is_read_answer_by_answer(tmp_path):
  check = tmp_path / "check.py"
  check.write_text("def short(answer):\n  return len(answer) < 3\n")
  run = tmp_path / "runs/on/0"
  leave_run(run, {})
  path = run / "config.json"
  config = json.loads(path.read_text())
  config["config"]["distill"] = {"obeys": f"{check}:short"}
  path.write_text(json.dumps(config))
  for name, answers in {
    "base": ["long", "ok"],
    "in_context": ["a", "b"],
    "after": ["a", "long"],
  }.items():
    (run / f"{name}.json").write_text(json.dumps({"answers": [{"answer": a} for a in answers]}))
  column = Column("here", tmp_path / "runs")
  cells = Cell("on", 0), Cell("on", 1, "in_context"), Cell("on")
  assert [column.values(cell)[0].tolist() for cell in cells] == [[0, 1], [1, 1], [1, 0]]
  assert column.values(Cell("on", 2)) == column.values(Cell("on", what="tokens")) == {}


def test_axes_are_compared_over_the_crossings_of_the_others():
  import contested_axes

  study, setting = contested_axes.STUDY, study_lib.SETTINGS["pocket"]
  options, _ = study_lib._parse(study, ["pocket", "runs"])
  whole = study.arms(setting, options)
  assert len(whole) == 2 * 2 * 3 * 3 * 2  # one token alone ends a response here
  assert len(study.arms(study_lib.SETTINGS["qwen3-1.7b"], options)) == 2 * len(whole)
  options.axes = "samples,rate"
  some = study.arms(setting, options)
  assert len(some) == 6 and some["samples=teacher+rate=triple"] == {
    "consolidation.on_no_gain": "warn",
    "consolidation.data": "teacher",
    "consolidation.learning_rate": 3 * setting.default().consolidation.learning_rate,
  }
  found = {one.name: one for one in study.compared(list(some))}
  one = found["passed %, round 1: samples teacher above student, mean of 3"]
  assert [cell.arm for cell in one.first] == [name for name in some if "=teacher" in name]
  assert [cell.arm for cell in one.second] == [name for name in some if "=student" in name]
  assert len(found) == 3 * 2 * 2  # two levels of the rate, one of the samples
  options.axes = "ends"
  with pytest.raises(ValueError, match="one token alone ends"):
    study.arms(setting, options)
  options.axes = "rates"
  with pytest.raises(ValueError, match="--axes names 'rates': it must be of samples, direction"):
    study.arms(setting, options)


def test_a_larger_models_gain_is_compared_with_a_smaller_ones(tmp_path):
  import oel_figure7

  for arm, base, after in (("1-small", [0, 1], [1, 1]), ("2-large", [0, 0], [1, 1])):
    games = {"0 without": [(p, (4,)) for p in base], "1 without": [(p, (4,)) for p in after]}
    leave_run(tmp_path / arm / "0", games)
  column = Column("here", tmp_path)
  gains = {
    one.name: readings.difference(column, one)["difference"]
    for one in oel_figure7.compared(column.arms())
  }
  assert gains == {
    "gain of small": 0.5,
    "gain of large": 1,
    "gain of large above that of small": 0.5,
  }
