"""Run directories of before the manifests, the schema of conversations and the fields that came
since: read, gone on with, or refused in one sentence. The files are as commit 7b02e63 left them.
"""

import json

import pytest

from oel_jax import config as config_lib
from oel_jax import report
from oel_jax.conversations.jsonl import read_prompts
from oel_jax.report import records
from oel_jax.stages.run import Run
from oel_jax.tasks import export, stage

SHARE = {"rate": 0.5, "hits": 1, "of": 2, "interval": [0.0945, 0.9055]}
MEAN = {"mean": 3.0, "of": 2, "interval": [1.0, 5.0]}
PLAY = {
  "passed": SHARE,
  "response_tokens": MEAN,
  "moves": MEAN,
  "ended": {"passed": 1, "lost": 1, "invalid": 0, "turn_limit": 0},
  "leaks": {"rate": 0.0, "hits": 0, "of": 2, "interval": [0.0, 0.6576]},
}
ASKED = {"role": "user", "content": "|  P  |  G  |"}
ANSWERED = {
  "role": "assistant",
  "content": "[right]",
  "thinking": "G may be the goal.",
  "action": "[right]",
  "response_tokens": 3,
}
# Fields of the configuration that came since.
NEW = (
  ("wandb_project",),
  ("deployment", "environment"),
  ("deployment", "passed_reward"),
  ("deployment", "endpoint"),
  ("deployment", "endpoint_model"),
  ("deployment", "endpoint_timeout"),
  ("deployment", "endpoint_retries"),
  ("extraction", "edit"),
  ("withdraw",),
  ("plan", "device"),
  ("plan", "prompt_tokens"),
  ("plan", "price"),
  ("extraction", "min_support"),
  ("extraction", "told_by_others"),
  ("extraction", "newest_wins"),
  ("extraction", "repeats"),
  ("extraction", "weights"),
  ("consolidation", "keep"),
  ("consolidation", "select"),
  ("consolidation", "balance"),
  ("consolidation", "anchor"),
  ("consolidation", "anchor_share"),
  ("consolidation", "anchor_edit"),
  ("evaluation", "own_answers"),
  ("evaluation", "tasks"),
  ("evaluation", "unrelated"),
  ("evaluation", "accumulation_rounds"),
  ("consolidation", "games_per_step"),
  ("consolidation", "renewed"),
  ("consolidation", "cut_responses"),
  ("consolidation", "teacher"),
  ("consolidation", "one_end"),
  ("consolidation", "final_rate"),
  ("consolidation", "decay"),
  ("consolidation", "later_steps"),
  ("mesh", "sample_tensor"),
)


def game(number: int, passed: bool) -> dict:
  return {
    "schema": 1,
    "id": f"r-{number}",
    "game": "FrozenLake-v0-raw",
    "seed": number,
    "outcome": "The end.",
    "reward": float(passed),
    "passed": passed,
    "ended": "passed" if passed else "lost",
    "messages": [ASKED, ANSWERED],
  }


def write(path, value) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = value if isinstance(value, list) else [value]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(name="config")
def fixture_config():
  config = config_lib.default()
  config.rounds = 1
  return config


@pytest.fixture(name="old")
def fixture_old(config, tmp_path):
  fields = json.loads(config.to_json())
  for *groups, name in NEW:
    group = fields
    for part in groups:
      group = group[part]
    del group[name]
  versions = {"python": "3.11.2", "jax": "0.10.0", "flax": "0.12.0", "oel_jax": "not installed"}
  write(
    tmp_path / "config.json", {"schema": 1, "config": fields, "versions": versions, "changes": []}
  )
  for number in (0, 1):
    folder = tmp_path / f"round_{number}"
    evaluation = {"schema": 1, "round": number, "without": PLAY, "in_context": None}
    write(folder / "evaluation.json", evaluation | {"retention": {"worlds": SHARE}})
    write(folder / "user/evaluation.jsonl", [game(0, False), game(1, number > 0)])
    cost = {"stage": "evaluate", "seconds": 2.0, "tokens": 6, "flops": 1e9}
    write(folder / "cost.json", {"schema": 1, "stages": [cost]})
  (tmp_path / "round_1/knowledge").mkdir()
  (tmp_path / "round_1/knowledge/00.md").write_text("- EXPERIENCE ITEM: G is the goal.\n")
  write(tmp_path / "round_1/prefixes.jsonl", {"schema": 1, "id": "p-0", "messages": [ASKED]})
  step = {"schema": 1, "round": 1, "stage": "consolidate", "step": 1, "time": 0.0, "loss": 0.5}
  write(tmp_path / "metrics.jsonl", step)
  return tmp_path


def test_the_report_reads_all_of_it(old):
  results = report.write(old)
  assert (results["base"]["passed"], results["rounds"][0]["passed"]) == (0.5, 0.5)
  assert results["rounds"][0]["retention"]["worlds"] == 0.5
  run = records.read(old)
  assert [one["loss"] for one in run.steps] == [0.5]
  assert [found.passed for found in run.games[1]] == [False, True]
  page = (old / "report/index.html").read_text()
  assert "G may be the goal." in page and "Map 1" in page and "EXPERIENCE ITEM: G" in page


def test_its_prompts_are_read_under_their_old_name(old):
  path = Run(None, old, None, None).prompts(1)
  assert path.name == "prefixes.jsonl"
  assert [prompt.messages[0].content for prompt in read_prompts(path)] == [ASKED["content"]]


def test_going_on_is_refused_in_one_sentence_which_names_each_new_field(old, config, tmp_path):
  config.policy.weights = "pocket"
  fields = json.loads((old / "config.json").read_text())
  fields["config"]["policy"]["weights"] = "pocket"
  write(old / "config.json", fields)
  before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
  with pytest.raises(ValueError) as error:
    stage.run(config, str(old), stage="consolidate", number=1)
  told = str(error.value)
  assert "\n" not in told and "came or went with a version of oel_jax" in told
  assert "or give --resume_anyway" in told
  for name in NEW:
    assert f"config.{'.'.join(name)} was 'no such field'" in told
  after = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
  after.pop(old / ".lock", None)
  assert after == before


def test_exporting_goes_by_its_own_configuration(old, config):
  """As far as the weights, which are nowhere."""
  own = export._own_config(config, old)
  assert own.rounds == 1 and own.deployment.environment == config.deployment.environment
  with pytest.raises(ValueError, match="config.policy.weights is not set"):
    export.run(config, str(old))
