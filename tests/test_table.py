"""The table over seeds, against numbers worked out by hand."""

import importlib.util
import json
import pathlib

import pytest

_spec = importlib.util.spec_from_file_location(
  "table", pathlib.Path(__file__).parents[1] / "experiments" / "table.py"
)
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)


def _results(passed, rounds=1):
  kept = {"worlds": 0.5, "worlds_count": 8, "worlds_interval": [0.2, 0.8]}
  kept |= {"worlds_categories": {"odd": {"passed": 0.5}}}
  share = lambda rate: {"desk": {"passed": rate, "passed_count": 9, "passed_interval": [0, 1]}}
  entry = {"passed": passed, "in_context": None, "recovered": passed, "response_tokens": 40.0}
  entry |= {"unrelated": {"kl": 0.02}, "retention": kept, "categories": share(passed)}
  base = {
    "passed": 0.0,
    "response_tokens": 50.0,
    "unrelated": {"kl": 0.0},
    "categories": share(0.1),
  }
  rounds_of = [{"round": i + 1, **entry} for i in range(rounds)]
  rounds_of[0]["in_context_categories"] = share(0.9) | {"form": {"passed": 0.3}}
  return {"base": base, "base_retention": kept, "rounds": rounds_of}


def test_mean_and_standard_error_by_hand():
  # 0.2, 0.4, 0.9: mean 0.5, sample variance 0.13, standard error sqrt(0.13 / 3) = 0.2082
  assert table.spread([0.2, 0.4, 0.9], True) == "50.0 ± 20.8"
  assert table.spread([11.0], False) == "11.0"
  assert table.spread([0.1, None], True) == "–"


def test_only_rounds_that_all_runs_have_are_in_the_table(tmp_path, capsys):
  for i, result in enumerate([_results(0.5, rounds=2), _results(0.7, rounds=1)]):
    (tmp_path / str(i) / "report").mkdir(parents=True)
    (tmp_path / str(i) / "report" / "results.json").write_text(json.dumps(result))
  table.main([str(tmp_path / "0"), str(tmp_path / "1")])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith("| response tokens | KL to the base × 100 | worlds % |")
  assert lines[2] == "| base | 0.0 ± 0.0 | – | – | 50.0 ± 0.0 | 0.0 ± 0.0 | 50.0 ± 0.0 |"
  after = "| 60.0 ± 10.0 | – | 60.0 ± 10.0 | 40.0 ± 0.0 | 2.0 ± 0.0 | 50.0 ± 0.0 |"
  assert lines[3] == f"| round 1 {after}"
  assert not any("round 2" in line for line in lines)


def test_a_line_a_category(tmp_path, capsys):
  for i, rate in enumerate((0.5, 0.7)):
    (tmp_path / str(i) / "report").mkdir(parents=True)
    (tmp_path / str(i) / "report/results.json").write_text(json.dumps(_results(rate)))
  table.main(["--categories", str(tmp_path / "0"), str(tmp_path / "1")])
  said = capsys.readouterr().out
  table.main([str(tmp_path / "0"), str(tmp_path / "1"), "--categories"])
  assert capsys.readouterr().out == said
  lines = said.splitlines()
  assert lines[0] == "|  | base % | in context, round 1 % | round 1 % |"
  assert lines[2] == "| desk | 10.0 ± 0.0 | 90.0 ± 0.0 | 60.0 ± 10.0 |"
  assert lines[3] == "| form | – | 30.0 ± 0.0 | – |"


@pytest.mark.parametrize(
  "changed, flags, told",
  [
    ({"base": None}, [], "a run's base is not evaluated yet"),
    ({"base": {"passed": 0.0}, "rounds": []}, ["--categories"], "has no categories"),
  ],
)
def test_what_a_table_wants_is_told(tmp_path, changed, flags, told):
  (tmp_path / "report").mkdir()
  (tmp_path / "report/results.json").write_text(json.dumps(_results(0.5) | changed))
  with pytest.raises(SystemExit, match=f"error: .*{told}"):
    table.main([*flags, str(tmp_path)])


@pytest.mark.parametrize(
  "flags", [["--help"], ["--control", "runs"], ["--distill", "--controls", "runs"]]
)
def test_flags_that_a_table_does_not_know_show_its_usage(flags):
  with pytest.raises(SystemExit, match="usage: python experiments/table.py"):
    table.main(flags)


def test_a_run_without_a_report_is_told(tmp_path):
  with pytest.raises(SystemExit, match="has no report yet"):
    table.main([str(tmp_path)])
  (tmp_path / "report").mkdir()
  (tmp_path / "report/results.json").write_text('{"rounds": NaN}')
  with pytest.raises(
    SystemExit,
    match=f"error: {tmp_path}/report/results.json: damaged, .*NaN is not JSON; run the same",
  ):
    table.main([str(tmp_path)])


def test_a_line_a_control_as_its_last_round_left_it(tmp_path, capsys):
  for control, passed in (("own", (0.5, 0.7)), ("swapped", (0.0, 0.1))):
    for i, rate in enumerate(passed):
      (tmp_path / control / str(i) / "report").mkdir(parents=True)
      (tmp_path / control / str(i) / "report" / "results.json").write_text(
        json.dumps(_results(rate))
      )
    (tmp_path / control / "0.log").write_text("")
  table.main(["--controls", str(tmp_path / "own"), str(tmp_path / "swapped")])
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith("| own | 60.0 ± 10.0 | – | 60.0 ± 10.0 | 40.0") and lines[
    3
  ].startswith("| swapped | 5.0 ± 5.0 |")
  (tmp_path / "topk").mkdir()
  with pytest.raises(SystemExit, match="no runs in topk"):
    table.main(["--controls", str(tmp_path / "own"), str(tmp_path / "topk")])


def test_a_line_for_each_way_to_distil(tmp_path, capsys):
  for i, (after, kl) in enumerate([(0.8, 0.1), (0.9, 0.2)]):
    said = {
      name: {"obeys": {"rate": rate}, "response_tokens": {"mean": 10.0}}
      for name, rate in (("base", 0.0), ("in_context", 1.0), ("after", after))
    }
    (tmp_path / "student" / str(i)).mkdir(parents=True)
    (tmp_path / "student" / str(i) / "results.json").write_text(
      json.dumps({**said, "recovered": after, "unrelated_kl": kl})
    )
  table.main(["--distill", str(tmp_path / "student")])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
  assert (
    lines[2]
    == "| student | 0.0 ± 0.0 | 100.0 ± 0.0 | 85.0 ± 5.0 | 85.0 ± 5.0 | 10.0 ± 0.0 | 10.0 ± 0.0 | "
    "15.0 ± 5.0 |"
  )
