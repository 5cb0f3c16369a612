"""The report of a run, on synthetic run directories: no number in this file was ever measured."""

import html.parser
import json
import math
import pathlib
import random
import re
import types
import warnings

import pytest
from fakes import game_of, turn_of
from test_workdir import open_workdir

from oel_jax import report
from oel_jax.config import default, default_distill
from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.conversations.schema import LOG, Conversation, Message, Source, ToolCall
from oel_jax.extraction import provenance
from oel_jax.extraction.knowledge import Item, Knowledge
from oel_jax.report import answers as answers_lib
from oel_jax.report import cuts, games, page, plots, records
from oel_jax.report import items as items_lib
from oel_jax.report import results as results_lib
from oel_jax.runtime import files
from oel_jax.runtime.manifest import Manifest

EVIL = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)></pre>&amp;'
BOARD = (
  "Current Board:\n\n+-----+-----+\n|  P  |  H  |\n+-----+-----+\n|     |  G  |\n+-----+-----+\n"
)
RETAINED = {"extraction": 197, "worlds": 190, "symmetric": 186, "other": 195}


def count(hits: int, of: int) -> dict:
  p, z = hits / of, 1.96  # Wilson, as the evaluation writes it
  middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
  return {
    "rate": p,
    "hits": hits,
    "of": of,
    "interval": [max(0.0, (middle - half) / (1 + z * z / of)), (middle + half) / (1 + z * z / of)],
  }


def mean(value: float, of: int) -> dict:
  return {"mean": value, "of": of, "interval": [0.95 * value, 1.05 * value]}


def play(hits: int, of: int, tokens: float) -> dict:
  rest = of - hits
  ended = {
    "passed": hits,
    "lost": rest - rest // 4 - rest // 8,
    "invalid": rest // 4,
    "turn_limit": rest // 8,
  }
  return {
    "passed": count(hits, of),
    "response_tokens": mean(tokens, 3 * of),
    "moves": mean(3.2, of),
    "ended": ended,
    "leaks": count(hits // 20, 3 * of),
  }


def evaluation(number: int) -> dict:
  without = [16, 40, 61, 70][number]
  value = {
    "schema": 1,
    "round": number,
    "without": play(without, 128, 412.5 - 40 * number),
    "in_context": None,
    "after_in_context": None,
    "first_knowledge": None,
    "accumulation": [],
    "recovered": None,
    "gate": None,
    "retention": {task: count(hits - number, 200) for task, hits in RETAINED.items()},
  }
  if number:
    decision = ("train", "warn", "skip")[number - 1]
    value |= {
      "in_context": play(without - 9, 128, 430.0),
      "after_in_context": play(without + 3, 128, 300.0),
      "first_knowledge": play(without + 1, 128, 305.0),
      "recovered": 1.6 - 0.25 * number,
      "gate": {
        "without": count(8, 64),
        "with": count(16 - 6 * (number == 2), 64),
        "decision": decision,
      },
    }
  if number == 1:
    points = ((1, 20), (5, 26), (10, 30), (15, 31), (30, 32))
    value["accumulation"] = [{"trajectories": n, "passed": count(hits, 128)} for n, hits in points]
  return value


def game(number: int, passed: bool, after: bool) -> Conversation:
  thinking = (
    "The symbol H may be a hole. " * 6 + "I do not know what G means yet.\nMoving right seems safe."
  )
  turns = [
    turn_of("You are playing a game.\n\n" + BOARD, thinking, "I will go [right]", "[right]", 180),
    turn_of(
      BOARD.replace("P", " "),
      "" if after else "Hm.",
      "[down]" if passed else "",
      "[down]" if passed else "",
      90,
    ),
  ]
  return game_of(
    f"r-{number:05d}",
    "FrozenLake-v0-raw",
    1000 + number,
    tuple(turns),
    BOARD + "The end.",
    float(passed),
    passed,
    "passed" if passed else "lost",
  )


def write_round(root: pathlib.Path, number: int) -> None:
  folder = root / f"round_{number}"
  (folder / "user").mkdir(parents=True)
  (folder / "evaluation.json").write_text(json.dumps(evaluation(number)))
  write_jsonl(
    folder / "user" / "evaluation.jsonl",
    [game(i, i % 8 == 0 or (number > 0 and i % 3 == 2), number > 0) for i in range(24)],
  )
  stages = (
    ("deploy", "extract", "prefixes", "gate", "consolidate", "evaluate")
    if number
    else ("evaluate",)
  )
  cost = [
    {"stage": stage, "seconds": 61.5 * i, "tokens": 120000 * i, "flops": 3.1e15 * i}
    for i, stage in enumerate(stages, start=1)
  ]
  for entry in cost if number else ():  # an earlier version counted no programs
    entry |= {"programs": 7, "compile_seconds": 20.5}
  (folder / "cost.json").write_text(json.dumps({"schema": 1, "stages": cost}))
  if number:
    (folder / "knowledge").mkdir()
    for i in range(3):
      lines = [f"- EXPERIENCE ITEM: step on G to win, keep off H ({n})" for n in range(8 + i)]
      (folder / "knowledge" / f"{i:02d}.md").write_text("\n".join(lines) + "\n")
    write_steps(root, number)


def write_steps(root: pathlib.Path, number: int, steps: int = 20) -> None:
  rng = random.Random(number)
  with open(root / "metrics.jsonl", "a") as file:
    for step in range(1, steps + 1):
      line = {
        "schema": 1,
        "round": number,
        "stage": "consolidate",
        "step": step,
        "time": 0.0,
        "loss": 0.2 * math.exp(-step / 8) + 0.01 * rng.random(),
        "gradient_norm": 0.3,
        "response_tokens": 400 - 4 * step - 60 * number + 9 * rng.random(),
        "student_entropy": 0.5 - 0.01 * step + 0.02 * rng.random(),
        "teacher_entropy": None if step == 7 else 0.35,
        "cut": (step % 4) / 4,
        "topk_mass": 0.999,
        "probe_kl": 0.1,
        "seconds": 3.0,
        "compiles": 0,
      }
      file.write(json.dumps(line) + "\n")


@pytest.fixture
def run(tmp_path):
  """A run of three rounds of which two are done and the third is being played."""
  root = build(tmp_path / "lake")
  (root / "round_3" / "user").mkdir(parents=True)
  write_jsonl(root / "round_3" / "user" / "trajectories.jsonl", [game(1, True, True)])
  return root


def build(root: pathlib.Path, done: int = 2) -> pathlib.Path:
  config = default()
  config.rounds = 3
  open_workdir(config, root)
  for number in range(done + 1):
    write_round(root, number)
  return root


class Seen(html.parser.HTMLParser):
  """What a browser would: tags with their attributes, and text. Checks that what is opened is
  closed.
  """

  VOID = ("meta", "img", "source", "br")

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.text, self.open = [], "", []
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

  def handle_data(self, data):
    self.text += "" if self.open[-1:] == ["style"] else data


def page_of(root: pathlib.Path) -> str:
  return (root / "report" / "index.html").read_text(encoding="utf-8")


def test_results_are_the_inputs_with_count_and_interval(run):
  results = report.write(run)
  assert json.loads((run / "report" / "results.json").read_text()) == results
  assert [entry["round"] for entry in results["rounds"]] == [1, 2]

  def compare(entry, name, measured):
    right = measured["rate"] if "rate" in measured else measured["mean"]
    assert (entry[name], entry[f"{name}_count"], entry[f"{name}_interval"]) == (
      right,
      measured["of"],
      measured["interval"],
    ), name

  for number, entry in enumerate([results["base"], *results["rounds"]]):
    source = evaluation(number)
    for name in ("passed", "response_tokens", "moves", "leaks"):
      compare(entry, name, source["without"][name])
    assert entry["ended"] == source["without"]["ended"]
    for task, measured in source["retention"].items():
      compare(results["base_retention"] if number == 0 else entry["retention"], task, measured)
    if number:
      for name in ("in_context", "after_in_context", "first_knowledge"):
        compare(entry, name, source[name]["passed"])
      assert (
        entry["recovered"] == source["recovered"]
        and entry["gate"]["decision"] == source["gate"]["decision"]
      )
      compare(entry["gate"], "with", source["gate"]["with"])
  for found, source in zip(
    results["rounds"][0]["accumulation"], evaluation(1)["accumulation"], strict=True
  ):
    assert found["trajectories"] == source["trajectories"]
    compare(found, "passed", source["passed"])
  assert "accumulation" not in results["rounds"][1]
  assert (
    results["config"]["consolidation.learning_rate"] == 1e-6
    and results["config"]["policy.weights"] is None
  )


def test_steps_of_many_samples_weigh_more_than_those_of_few():
  steps = [{"cut": 0.5, "samples": 2}, {"cut": 0.25, "samples": 8}, {"cut": 1.0}]
  found = types.SimpleNamespace(
    config={"consolidation.batch_size": 4}, steps=[{"round": 1, **step} for step in steps]
  )
  share = cuts._samples(found, 1)  # a line of before does not say how many they were
  assert (share.value, share.of) == (7 / 14, 14)


def test_responses_that_the_limit_cut_are_counted_wherever_there_are_any(run):
  """In results.json and on the page; what an earlier version did not count is not shown."""
  assert results_lib.summarize(records.read(run))["base"]["cut"] == {}
  change_evaluation(run, 0, lambda found: found["without"].update(cut=count(7, 384)))
  away = {"prompts": 32, "withdrawn": 4, "kl_before": 0.5, "kl_after": 0.25, "closer": 0.5}
  away |= {f"response_tokens_{when}": mean(20, 32) for when in ("before", "after")}

  def later(found):
    found["in_context"]["cut"] = count(9, 384)
    texts = [{"text": 2 * i, "passed": count(i, 64), "cut": count(30 + i, 192)} for i in (0, 1)]
    found["in_context"]["texts"] = texts
    found["deployed_cut"] = {"knowledge": count(1, 90), "prompts": count(2, 80)}
    found["held_out"] = away | {"cut_before": count(3, 32), "cut_after": count(5, 32)}

  change_evaluation(run, 1, later)
  results = results_lib.summarize(records.read(run))
  base, first, second = results["base"]["cut"], *(entry["cut"] for entry in results["rounds"])
  assert {name: share["cut_count"] for name, share in base.items()} == {"without": 384}
  size, steps = default().consolidation.batch_size, 20
  # 20 steps with 0, 1/4, 2/4 and 3/4 in turn.
  samples = {"cut": 3 / 8, "cut_count": size * steps, "cut_interval": None}
  assert second == {"consolidation": samples} and first["consolidation"] == samples
  right = {"in_context": (9, 384), "knowledge": (1, 90), "prompts": (2, 80)}
  right |= {"held_out_before": (3, 32), "held_out_after": (5, 32)}
  assert {name: (share["cut"], share["cut_count"]) for name, share in first.items()} == {
    name: (hits / of, of) for name, (hits, of) in right.items()
  } | {"consolidation": (3 / 8, size * steps)}
  by_text = results["rounds"][0]["in_context_texts"]
  assert [(one["text"], one["passed"], one["cut"]) for one in by_text] == [
    (0, 0, 30 / 192),
    (2, 1 / 64, 31 / 192),
  ]
  text = " ".join(Seen(page.render(records.read(run), {}, {})).text.split())
  assert "Responses that the limit cut" in text and "31 of 192" in text
  assert text.count("text by text, held-out games in context") == 1
  assert "324 withdrawn" in text and results["rounds"][0]["held_out"]["withdrawn"] == 4
  assert "9 of 384" in text and "5 of 32" in text and "Round 1’s knowledge, after" in text


def change_evaluation(root, number, change):
  path = root / f"round_{number}" / "evaluation.json"
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


def test_the_same_run_gives_the_same_bytes_and_leaves_nothing_else(run):
  report.write(run)
  first = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
  report.write(run)
  assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == first
  assert set(first) == {
    "index.html",
    "results.json",
    "passed.png",
    "response_tokens.png",
    "accumulation.png",
    "rounds.png",
    "consolidation.png",
  }
  assert all(data.startswith(b"\x89PNG") for name, data in first.items() if name.endswith(".png"))


def test_costs_with_programs_where_they_were_counted(run):
  costs = report.write(run)["costs"]
  [base] = [cost for cost in costs if cost["round"] == 0]
  assert base["stage"] == "evaluate" and base["programs"] is base["compile_seconds"] is None
  later = [cost for cost in costs if cost["round"]]
  assert later and all(cost["programs"] == 7 for cost in later)
  cells = re.findall(r"<td>All rounds</td>.*?</tr>", page_of(run), re.DOTALL)
  assert f"<td>{7 * len(later)}</td>" in cells[0]


def test_the_page_says_the_numbers_in_words(run):
  report.write(run)
  text = " ".join(Seen(page_of(run)).text.split())
  # By hand: 16 / 128 = 12.5%, 61 / 128 = 47.66%, 412.5 → 332.5 is a fall by 19.4%; Wilson's bounds
  # are those of count().
  assert "the base model passed 12.5% of 128 held-out games (95% interval 7.8–19.3)" in text
  assert (
    "After round 2 the model passed 47.7% of 128 held-out games (95% interval 39.2–56.3)" in text
  )
  assert "from 412 to 332 tokens a turn (−19%)" in text and "intervals overlap" not in text
  assert "Not evaluated yet: round 3." in text and "2 of 3 rounds evaluated" in text
  assert "Round 3not measured yet" in text
  assert "110%" in text  # recovered in round 2: 1.6 − 0.25 · 2
  assert "no clear gain in context: trained on it all the same" in text
  # Base: passed at 0, 8, 16; after: these and 2, 5, 8, 11, 14, 17, 20, 23. Newly passed: all of
  # those but 8.
  assert (
    "after round 2 against the base model: 7 newly passed, 0 no longer passed, 3 passed both "
    "times, 14 neither time." in text
  )
  assert "Map 1002" in text and "Map 1005" in text and text.count("End of game") == 4
  # Stage "consolidate" of two rounds: 2 · 5 · 61.5 s = 615 s, 2 · 600,000 tokens.
  assert re.search(r"consolidate ?615 ?\d+% ?1\.2 M", text)
  assert "8 items, 96 words" in text


def test_the_summary_admits_that_intervals_overlap(run):
  source = evaluation(2) | {"without": play(20, 128, 500.0)}
  (run / "round_2" / "evaluation.json").write_text(json.dumps(source))
  text = page.summary(records.read(run))
  assert (
    "15.6%" in text
    and "intervals overlap" in text
    and "from 412 to 500 tokens a turn (+21%)" in text
  )


def test_the_page_loads_nothing_and_runs_nothing(run):
  report.write(run)
  seen = Seen(page_of(run))
  assert {tag for tag, _ in seen.tags} & {
    "script",
    "link",
    "iframe",
    "object",
    "base",
    "form",
  } == set()
  addresses = [
    value
    for _, attributes in seen.tags
    for name, value in attributes.items()
    if name in ("src", "href", "srcset", "action")
  ]
  # Five plots, light and dark.
  assert len(addresses) == 10 and all(
    address.startswith("data:image/png;base64,") for address in addresses
  )
  assert "url(" not in page_of(run) and "@import" not in page_of(run)
  assert any(
    "default-src 'none'" in attributes.get("content", "")
    for tag, attributes in seen.tags
    if tag == "meta"
  )


def test_untrusted_text_is_shown_and_never_obeyed(run):
  (run / "round_1" / "knowledge" / "00.md").write_text(f"- EXPERIENCE ITEM: {EVIL}\n")
  evil = game_of(EVIL, EVIL, 1002, (turn_of(EVIL, EVIL, EVIL, EVIL, 3),), EVIL, 1.0, True, "passed")
  lost = game_of(
    "a", EVIL, 1002, (turn_of("\ud800 half", EVIL, EVIL, "", 3),), EVIL, 0.0, False, "lost"
  )
  for number, shown in ((0, lost), (2, evil)):
    write_jsonl(run / f"round_{number}" / "user" / "evaluation.jsonl", [shown])
  (run / "round_1" / "cost.json").write_text(
    json.dumps(
      {"schema": 1, "stages": [{"stage": EVIL, "seconds": 1.0, "tokens": 1, "flops": None}]}
    )
  )
  config = json.loads((run / "config.json").read_text())
  config["config"]["deployment"]["game"] = config["versions"][EVIL] = EVIL
  del config["digest"]
  config["changes"] = [{"time": 0.0, "fields": [{"field": EVIL, "was": EVIL, "is": "\ud800"}]}]
  (run / "config.json").write_text(json.dumps(config))
  moved = run.rename(run.with_name("<script>alert(1)<script>"))
  report.write(moved)
  seen = Seen(page_of(moved))
  assert not {tag for tag, _ in seen.tags} & {"script"} and not any(
    "onerror" in attributes for _, attributes in seen.tags
  )
  # Knowledge, thinking twice, answer twice, outcome twice, observation and action once, cost twice,
  # configuration in four places.
  assert "<script>alert(1)<script>" in seen.text and seen.text.count("</pre>&amp;") >= 12


@pytest.mark.parametrize(
  "done, sentence",
  [
    (-1, "Nothing has been measured yet"),
    (0, "No round has been evaluated yet."),
    (1, "Not evaluated yet: rounds 2, 3."),
  ],
)
def test_an_unfinished_run_is_reported_as_one(tmp_path, done, sentence):
  root = build(tmp_path / "run", done)
  results = report.write(root)
  seen = Seen(page_of(root))
  assert (
    sentence in seen.text
    and (results["base"] is None) == (done < 0)
    and len(results["rounds"]) == max(done, 0)
  )
  assert ("passed.png" in {path.name for path in (root / "report").iterdir()}) == (done >= 0)
  assert "nan" not in seen.text.lower().replace("finance", "") and "None" not in seen.text
  assert [row["round"] for row in report.rows(results)] == ["base", "1", "2"][: done + 1]


def test_a_round_with_little_measured(tmp_path):
  (
    tmp_path / "round_1"
  ).mkdir()  # no configuration, no base model, no knowledge in context, no retention, empty counts
  empty = {"rate": None, "hits": 0, "of": 0, "interval": None}
  without = play(5, 10, 50.0) | {"leaks": empty}
  (tmp_path / "round_1" / "evaluation.json").write_text(
    json.dumps({"schema": 1, "round": 1, "without": without, "retention": {}})
  )
  results = report.write(tmp_path)
  (entry,) = results["rounds"]
  assert (
    results["base"] is None
    and entry["in_context"] is entry["in_context_count"] is entry["in_context_interval"] is None
  )
  assert (entry["leaks"], entry["leaks_count"], entry["retention"]) == (None, 0, {})
  text = Seen(page_of(tmp_path)).text
  assert (
    "The base model has no evaluation, so there is nothing to compare" in text
    and "config.json is missing" in text
  )
  assert report.rows(results) == [
    {
      "round": "1",
      "passed % (interval)": "50.0 [23.7, 76.3]",
      "in context %": None,
      "recovered": None,
      "response tokens": 50.0,
    }
  ]


def test_a_task_of_the_users_own_is_shown_where_it_was_measured(tmp_path):
  for number, kept in enumerate(({}, {"spelling": count(3, 4)})):
    (tmp_path / f"round_{number}").mkdir()
    found = {"schema": 1, "round": number, "without": play(5, 10, 50.0), "retention": kept}
    (tmp_path / f"round_{number}/evaluation.json").write_text(json.dumps(found))
  results = report.write(tmp_path)
  assert results["base_retention"]["spelling"] is None
  assert results["rounds"][0]["retention"]["spelling"] == 0.75
  assert [row["spelling"] for row in report.rows(results)] == [None, "75.0"]
  assert "Spelling" in Seen(page_of(tmp_path)).text


def test_a_task_with_parts_shows_them_round_by_round(tmp_path):
  def kept(a: int, b: int) -> dict:
    return {
      "orders": count(a + b, 8) | {"categories": {"one_word": count(a, 4), "<b>": count(b, 4)}}
    }

  for number, found in enumerate((kept(4, 3), kept(1, 2))):
    (tmp_path / f"round_{number}").mkdir()
    found = {"schema": 1, "round": number, "without": play(5, 10, 50.0), "retention": found}
    (tmp_path / f"round_{number}/evaluation.json").write_text(json.dumps(found))
  run = records.read(tmp_path)
  results = results_lib.summarize(run)
  assert results["base_retention"]["orders_categories"]["one_word"]["passed"] == 1.0
  parts = results["rounds"][0]["retention"]["orders_categories"]
  assert {name: part["passed"] for name, part in parts.items()} == {"one_word": 0.25, "<b>": 0.5}
  assert [row["orders"] for row in results_lib.rows(results)] == ["87.5", "37.5"]
  text = Seen(page.render(run, {}, {})).text
  assert "Orders, part by part" in text and "One word100.0%" in text
  assert "<b>" in text  # as text, not as print


def test_the_divergence_from_the_base_stands_in_every_row_that_has_one(tmp_path):
  for number, kl in enumerate((-2e-8, 0.03126, None)):
    (tmp_path / f"round_{number}").mkdir()
    found = {"schema": 1, "round": number, "without": play(5, 10, 50.0), "retention": {}}
    away = {"prompts": 60, "kl": kl, "response_tokens": mean(21.0, 60)}
    found |= {"unrelated": None if kl is None else away}
    (tmp_path / f"round_{number}/evaluation.json").write_text(json.dumps(found))
  run = records.read(tmp_path)
  results = results_lib.summarize(run)
  assert results["base"]["unrelated"]["kl"] == -2e-8
  away = results["rounds"][0]["unrelated"]
  assert (away["kl"], away["prompts"], away["response_tokens"]) == (0.03126, 60, 21.0)
  assert results["rounds"][1]["unrelated"] is None
  told = [row.get("KL to the base") for row in results_lib.rows(results)]
  assert told == ["0.0000", "0.0313", None]
  text = Seen(page.render(run, {}, {})).text
  assert "Unrelated prompts" in text and "Base model600.000021.0" in text
  assert "Round 1600.031321.0" in text


def test_a_single_category_has_no_table_of_its_own(tmp_path):
  (tmp_path / "round_0").mkdir()
  found = {"schema": 1, "round": 0, "retention": {}}
  found["without"] = play(2, 10, 50.0) | {"categories": {"desk": count(2, 10)}}
  (tmp_path / "round_0/evaluation.json").write_text(json.dumps(found))
  results = report.write(tmp_path)
  assert results["base"]["categories"]["desk"]["passed"] == 0.2
  assert "By category" not in Seen(page_of(tmp_path)).text


def test_games_are_counted_by_what_the_environment_calls_them(tmp_path):
  for number, hits in enumerate((1, 4)):
    parts = {"desk": count(hits, 6), "form <b>": count(1, 4)}
    found = {"schema": 1, "round": number, "retention": {}}
    found |= {"without": play(hits + 1, 10, 50.0) | {"categories": parts}}
    found |= (
      {"in_context": play(9, 10, 50.0) | {"categories": {"desk": count(9, 10)}}} if number else {}
    )
    (tmp_path / f"round_{number}").mkdir()
    (tmp_path / f"round_{number}/evaluation.json").write_text(json.dumps(found))
  results = report.write(tmp_path)
  desk = [entry["categories"]["desk"] for entry in (results["base"], results["rounds"][0])]
  assert [(share["passed"], share["passed_count"]) for share in desk] == [(1 / 6, 6), (4 / 6, 6)]
  assert results["rounds"][0]["in_context_categories"]["desk"]["passed"] == 0.9
  seen = Seen(page_of(tmp_path))
  text = seen.text.partition("By category")[2].partition("Does the knowledge help")[0]
  assert text.startswith("RoundDeskForm <b>Base model16.7%1 of 6")
  assert (
    "Round 1, in context, before90.0%9 of 10" in text and "Round 1, in context, after" not in text
  )


def test_rows_of_a_finished_round(run):
  base, first, _ = report.rows(report.write(run))
  assert first == {
    "round": "1",
    "passed % (interval)": "31.2 [23.9, 39.7]",
    "in context %": "24.2",
    "recovered": "135%",
    "response tokens": 372.5,
    "extraction": "98.0",
    "worlds": "94.5",
    "symmetric": "92.5",
    "other": "97.0",
  }
  assert base["in context %"] is None and list(base) == list(first)


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda value: value.pop("without"), "no field 'without'"),
    (lambda value: value.update(schema=2), "schema is 2: it must be 1"),
    (lambda value: value.update(round=1), "round is 1: it must be 2"),
    (
      lambda value: value["without"]["passed"].update(rate=0.9),
      "without.passed.rate is 0.9: it must be hits / of (61 / 128)",
    ),
    (
      lambda value: value["in_context"]["passed"].update(hits=500),
      "in_context.passed.hits is 500: it must be at most",
    ),
    (
      lambda value: value["retention"]["other"].update(interval=[0.9, 0.1]),
      "retention.other.interval is [0.9, 0.1]",
    ),
    (
      lambda value: value["retention"]["other"].update(categories={"one": count(3, 200)}),
      "retention.other.categories is 3: it must be 193 hits in all, as retention.other says",
    ),
    (
      lambda value: value.update(unrelated={"prompts": 3, "kl": "0"}),
      "unrelated.kl is '0': it must be a number",
    ),
    (
      lambda value: value["without"]["response_tokens"].update(mean="<b>"),
      "without.response_tokens.mean is '<b>': it must be a number",
    ),
    (
      lambda value: value["gate"].update(decision="stop"),
      "gate.decision is 'stop': it must be one of 'train', 'warn', 'skip'",
    ),
  ],
)
def test_a_damaged_evaluation_is_one_error_that_names_it(run, change, words):
  (run / "report").mkdir()
  (run / "report" / "index.html").write_text("an earlier report")
  path = run / "round_2" / "evaluation.json"
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))
  with pytest.raises(ValueError) as error:
    report.write(run)
  assert (
    str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
  )
  assert page_of(run) == "an earlier report"


@pytest.mark.parametrize("name", ["round_2/evaluation.json", "round_1/cost.json", "config.json"])
@pytest.mark.parametrize(
  "text", ["", '{"schema": 1, "rou', '{"schema": 1, "round": NaN}', "7", "\udcff"]
)
def test_a_cut_off_file_is_named(run, name, text):
  (run / name).write_bytes(text.encode("utf-8", "surrogateescape"))
  with pytest.raises(ValueError, match=re.escape(str(run / name))):
    report.write(run)


def test_a_directory_that_is_no_run_stays_as_it_is(tmp_path):
  for folder in (tmp_path, tmp_path / "not there"):
    with pytest.raises(ValueError, match="not a run directory"):
      report.write(folder)
  assert list(tmp_path.iterdir()) == []


def test_steps_that_were_done_again_count_once_and_damaged_lines_not_at_all(run):
  write_steps(run, 2, steps=3)  # a resumed round writes its steps again
  with open(run / "metrics.jsonl", "a") as file:
    file.write(
      '{"schema": 1, "round": 2, "stage": "deploy", "step": 1}\nnot json\n{"schema": 1, "round": '
      '2, "sta'
    )
  steps = records.read(run).steps
  assert [(step["round"], step["step"]) for step in steps] == [
    (number, step) for number in (1, 2) for step in range(1, 21)
  ]


def test_losses_stand_at_the_optimizers_own_steps(run):
  """Lines as a run has them: step 0 with the probe alone; and one is missing."""
  (run / "metrics.jsonl").unlink()
  lines = [
    {
      "schema": 1,
      "round": number,
      "stage": "consolidate",
      "step": step,
      "loss" if step else "probe_kl": float(step),
    }
    for number in (1, 2)
    for step in range(17)
    if (number, step) != (1, 7)
  ]
  (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  steps = records.read(run).steps
  points = [point for point in plots._curve(steps, "loss") if math.isfinite(point[1])]
  assert points == [
    (begin + step, step) for begin in (0, 16) for step in range(1, 17) if begin + step != 7
  ]
  assert [x for x, value in plots._curve(steps, "loss") if math.isnan(value)] == [16.5]
  assert plots._curve(steps, "probe_kl")[-1] == (16, 0.0)


def test_the_plot_of_one_step_fills_its_width(run):
  """A round's name beside the axes left no room for them, with a warning."""
  line = {"schema": 1, "round": 1, "stage": "consolidate", "step": 1, "loss": 0.5}
  (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    plots.draw(records.read(run), plots.LIGHT)


@pytest.mark.parametrize(
  "change, told",
  [
    (lambda lines: lines[:7] + lines[8:], "round 1 has no line for steps 8"),
    (lambda lines: lines[:19] + lines[20:], "round 1 has no line for steps 20"),
    (lambda lines: lines[:20], "round 2 has no line for steps 1, 2, 3"),
    (lambda lines: [], "round 1 has no line for steps 1, 2"),
  ],
)
def test_lines_of_metrics_that_are_missing_are_told(run, caplog, change, told):
  for number in (1, 2):
    (run / f"round_{number}/checkpoints").mkdir()
  records.read(run)
  assert "has no line" not in caplog.text
  lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (run / "metrics.jsonl").write_text("".join(change(lines)))
  records.read(run)
  assert f"{run / 'metrics.jsonl'}: {told}" in caplog.text


def test_steps_that_a_round_is_still_to_take_are_not_missing(run, caplog):
  """config.consolidation.steps was raised, and the report is read before they are trained."""
  for number in (1, 2):
    (run / f"round_{number}/checkpoints").mkdir()
    Manifest(run / f"round_{number}").announce("checkpoints", {"steps": "20", "weights": "0"})
  value = json.loads((run / "config.json").read_text())
  assert value["config"]["consolidation"]["steps"] == 20
  value["config"]["consolidation"]["steps"] = 21
  files.write_sealed(run / "config.json", value)
  records.read(run)
  assert "has no line" not in caplog.text
  Manifest(run / "round_1").announce("checkpoints", {"steps": "21", "weights": "0"})
  records.read(run)
  assert "round 1 has no line for steps 21" in caplog.text


@pytest.mark.parametrize(
  "name, change, told",
  [
    (
      "round_1/evaluation.json",
      lambda value: value["without"]["ended"].update(lost=9),
      "without.ended is ",
    ),
    (
      "round_1/evaluation.json",
      lambda value: value["in_context"]["moves"].update(of=9),
      "in_context.moves.of is 9: it must be 128 in all",
    ),
    (
      "round_1/evaluation.json",
      lambda value: value["without"]["leaks"].update(count(1, 7)),
      "without.leaks.of is 7: it must be 384 in all",
    ),
    (
      "round_1/evaluation.json",
      lambda value: value["without"].update(categories={"desk": count(1, 7)}),
      "without.categories is 7: it must be 128 in all",
    ),
    (
      "round_1/cost.json",
      lambda value: value["stages"][0].update(seconds=-1),
      "stages[0].seconds is -1: it must be a number, 0 or more",
    ),
    ("round_1/cost.json", lambda value: value["stages"][0].update(flops=10**400), "beyond 64 bits"),
    (
      "round_1/gate.json",
      lambda value: value["with"].update(count(3, 60)),
      "with.of is 60: it must be without.of (64)",
    ),
    ("round_1/gate.json", lambda value: value.pop("without"), "the file has no field 'without'"),
    ("round_1/knowledge/01.md", None, "01.md:1: not UTF-8"),
  ],
)
def test_counts_that_contradict_each_other_and_other_damage_are_named(run, name, change, told):
  path = run / name
  (run / "round_1/gate.json").write_text(
    json.dumps({"schema": 1, "without": count(8, 64), "with": count(16, 64)})
  )
  records.read(run)
  if change is None:
    path.write_bytes(b"- \xff" + path.read_bytes())
  else:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
  with pytest.raises(ValueError) as error:
    report.write(run)
  assert str(path) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_games_are_paired_by_map_where_a_line_is_missing(run):
  before = [game(i, False, False) for i in (0, 1, 2, 1)]
  after = [game(i, True, True) for i in (1, 2, 1, 3)]
  assert [(a.source.seed, b.source.seed) for a, b in games.pair_games(before, after)] == [
    (1001, 1001),
    (1002, 1002),
    (1001, 1001),
  ]


# A run of distill.


def measured(obeys: int, tokens: float, answers: list[str], content: int | None = None) -> dict:
  of = len(answers)
  value = {"obeys": count(obeys, of), "response_tokens": mean(tokens, of)}
  if content is not None:
    value["content"] = count(content, of)
  kept = [{"prompt": f"Question {i}?", "answer": answer} for i, answer in enumerate(answers)]
  return {"schema": 1, "measured": value, "answers": kept}


@pytest.fixture(name="distilled_run")
def fixture_distilled_run(tmp_path):
  """Finished, 25 held-out prompts; one of the answers would like to be obeyed."""
  config = default_distill()
  config.policy.weights = "/models/small"
  open_workdir(config, tmp_path / "style")
  long, short = ["A long answer."] * 24, ["Short."] * 24
  for name, value in (
    ("base", measured(2, 90.0, [*long, EVIL], content=20)),
    ("in_context", measured(20, 30.0, [*short, EVIL], content=15)),
    ("after", measured(19, 27.0, [EVIL, *short], content=16)),
    ("results", {"schema": 1, "recovered": 17 / 18, "unrelated_kl": 0.125}),
  ):
    (tmp_path / f"style/{name}.json").write_text(json.dumps(value))
  write_steps(tmp_path / "style", 1, steps=6)
  return tmp_path / "style"


def test_a_distilled_text_has_a_page_too(distilled_run):
  results = report.write(distilled_run)
  assert json.loads((distilled_run / "report/results.json").read_text()) == results
  for name, hits, tokens, content in (
    ("base", 2, 90.0, 20),
    ("in_context", 20, 30.0, 15),
    ("after", 19, 27.0, 16),
  ):
    entry, right = results[name], count(hits, 25)
    assert (entry["obeys"], entry["obeys_count"]) == (hits / 25, 25)
    assert entry["obeys_interval"] == right["interval"]
    assert (entry["content"], entry["response_tokens"]) == (content / 25, tokens)
  assert (results["recovered"], results["unrelated_kl"]) == (17 / 18, 0.125)
  assert results["config"]["policy.weights"] == "/models/small" and results["choices"] is None
  seen = Seen(page_of(distilled_run))
  text = " ".join(seen.text.split())
  # By hand: 2 / 25 = 8%, 19 / 25 = 76%, 90 → 27 tokens is a fall by 70%.
  assert "Before, 8.0% of 25 answers (95% interval 2.2–25.0) have the wanted form." in text
  assert "After training, without the text, 76.0% of 25 answers" in text
  assert "from 90.0 to 27.0 tokens (−70%)" in text and "intervals" not in text.split("Held-out")[0]
  assert "80.0%20 of 25" in text and "94%" in text and "0.125" in text
  assert "Question 0?" in text and text.count("Short.") == 15 and "The first 8 of 25" in text
  assert not {tag for tag, _ in seen.tags} & {"script"} and '<script>alert("x")' in seen.text
  assert {path.name for path in (distilled_run / "report").iterdir()} == {
    "index.html",
    "results.json",
    "consolidation.png",
  }


def test_an_unfinished_or_earlier_run_of_distill_is_reported_as_far_as_it_is(distilled_run):
  for name, sentence in (
    ("results", "After training"),
    ("after", "The trained model has not been measured yet."),
    ("base", "Nothing has been measured yet."),
  ):
    (distilled_run / f"{name}.json").unlink()
    results = report.write(distilled_run)
    assert sentence in Seen(page_of(distilled_run)).text
    assert results["recovered"] is None and results.get(name) is None


@pytest.mark.parametrize(
  "name, change, told",
  [
    ("after", lambda value: value["answers"].pop(), "measured.obeys.of is 25: it must be 24"),
    ("base", lambda value: value["answers"][3].pop("answer"), "no field 'answer'"),
    ("base", lambda value: value["measured"]["content"].update(rate=2), "content.rate is 2"),
    ("results", lambda value: value.update(recovered="all"), "recovered is 'all'"),
  ],
)
def test_a_damaged_file_of_distill_is_named(distilled_run, name, change, told):
  path = distilled_run / f"{name}.json"
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))
  with pytest.raises(ValueError) as error:
    report.write(distilled_run)
  assert str(path) in str(error.value) and told in str(error.value)


def test_an_item_stands_with_what_was_said_where_it_came_from(run):
  """Words of the conversation and of the item are shown and never obeyed."""
  folder = run / "round_1/user"
  said = game_of(
    "c1", "g", 1, (turn_of(f"The lamp {EVIL}", "", "no", "", 1),), "", 0.0, False, "lost"
  )
  write_jsonl(folder / "trajectories.jsonl", [said])
  items = tuple(Item(text, "c1", 1, 1) for text in (f"Lamp: A {EVIL}", "Sofa: B"))
  origins = provenance.gather([Knowledge(items)], [said], {})
  origins = provenance.placed(origins, [Knowledge(items[:1])])
  provenance.write(folder / "items.jsonl", origins)
  seen = Seen(items_lib.items(records.read(run)))
  assert not {tag for tag, _ in seen.tags} & {"script"}
  text = " ".join(seen.text.split())
  assert "Where items came from" in text and "Lamp: A <script>" in text
  assert "c1, round 1Message 1 · userThe lamp <script>" in text
  assert "1 conversation · texts 00" in text
  assert "Sofa: B · 1 conversation · left out: the oldest items go" in text


def answer_file(run, number, when, *lines):
  """Answers to held-out prompts: (id, asked, answer, tokens)."""
  said = [
    Conversation(
      id,
      (
        Message("user", "Hello"),
        Message("assistant", "", (ToolCall("", "look", '{"at": 1}'),)),
        Message("tool", asked),
        Message("assistant", answer, thinking=f"of {number}", response_tokens=tokens),
      ),
      Source(LOG, "user/held_out.jsonl"),
    )
    for id, asked, answer, tokens in lines
  ]
  write_jsonl(run / f"round_{number}/user/held_out_{when}.jsonl", said)


def test_answers_to_the_same_prompt_stand_side_by_side(run):
  limit = records.read(run).config["deployment.max_response_tokens"]
  for number in (1, 2):
    before = "at first" if number == 1 else "then"
    answer_file(run, number, "before", ("a-0", f"lamp {EVIL}", f"{before} {EVIL}", limit - 1))
    after = "then" if number == 1 else "at last"
    more = [("b-0", "sofa", "", limit), ("b-0", "desk", "x" * 9000, 3)][number - 1]
    answer_file(run, number, "after", ("a-0", f"lamp {EVIL}", after, 5), more)
  found = records.read(run)
  cases = answers_lib.cases(found)
  assert [[name for name, _ in case] for case in cases] == [
    ["Base model", "After round 1", "After round 2"],
    ["After round 1"],
    ["After round 2"],  # the same id, another prompt
  ]
  assert [said.messages[-1].content for _, said in cases[0]] == [
    f"at first {EVIL}",
    "then",
    "at last",
  ]
  items = tuple(Item(f"{text} {EVIL}", "c1", 1, 1) for text in ("Desk: A", "Lamp: B"))
  origins = provenance.placed(provenance.gather([Knowledge(items)], [], {}), [Knowledge(items)])
  provenance.write(run / "round_2/user/items.jsonl", origins)
  text = answers_lib.answers(records.read(run))
  seen = Seen(text)
  assert not {tag for tag, _ in seen.tags} & {"script"}
  words = " ".join(seen.text.split())
  assert "The first prompt of 3 held-out conversations" in words and 'look({"at": 1})' in words
  assert "2 earlier messages" in words and "After round 2" in words and "of 2" in words
  assert "Of the knowledge, most words in common: Lamp: B" in words and "no answer" in words
  assert text.count(">cut</span>") == 1 and "x" * 1500 + "…" in text and "x" * 1501 not in text
  assert "Held-out prompts, before and after" in page.render(records.read(run), {}, {})


def test_a_run_without_games_says_so_and_speaks_of_held_out_prompts(run):
  away = {"prompts": 32, "kl_before": 0.5, "kl_after": 0.2, "closer": 0.6}
  away |= {"response_tokens_before": mean(50, 32), "response_tokens_after": mean(40, 32)}
  nothing = {
    "passed": {"rate": None, "hits": 0, "of": 0, "interval": None},
    "response_tokens": {"mean": None, "of": 0, "interval": None},
    "moves": {"mean": None, "of": 0, "interval": None},
    "ended": dict.fromkeys(("passed", "lost", "invalid", "turn_limit"), 0),
    "leaks": {"rate": None, "hits": 0, "of": 0, "interval": None},
  }
  for number in range(3):
    change_evaluation(
      run,
      number,
      lambda found: found.update(
        without=nothing, in_context=None, held_out=away if found["round"] else None
      ),
    )
  found = records.read(run)
  assert page.summary(found) == (
    "No games were played. After round 2, on 32 held-out prompts of logs, the model without "
    "knowledge in its prompt is 60% nearer to the one that has it there, than before the round. An "
    "answer went from 50.0 to 40.0 tokens. Not evaluated yet: round 3."
  )
  text = page.render(found, {}, {})
  assert "How games ended" not in text and "Held-out games, before and after" not in text


def test_without_answers_there_is_no_such_part(run):
  assert "Held-out prompts, before and after" not in page.render(records.read(run), {}, {})
