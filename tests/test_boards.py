"""Weights & Biases beside TensorBoard: only if asked for, one run a directory, numbers alone. What
stands in for its package writes down every call.
"""

import json
import sys

import pytest
from test_workdir import open_workdir

from oel_jax import config as config_lib
from oel_jax.runtime import boards
from oel_jax.runtime.metrics import Metrics

WANDB = """
import json, os

def tell(*what):
  with open(os.environ["WANDB_TOLD"], "a") as file:
    file.write(json.dumps(what) + "\\n")

def Settings(**settings):
  return settings

class Run:
  def define_metric(self, name, step_metric):
    tell("define", name, step_metric)
  def log(self, values):
    if values.get("evaluate/passed") == 0.125:
      raise BrokenPipeError("its process is gone")
    tell("log", values)
  def finish(self, exit_code):
    if os.environ.get("WANDB_GONE"):
      raise BrokenPipeError("its process is gone")
    tell("finish", exit_code)

def init(**how):
  if how["project"] == "refused":
    raise RuntimeError("nobody is logged in")
  tell("init", how)
  return Run()
"""


@pytest.fixture(name="told")
def fixture_told(tmp_path, monkeypatch):
  """Calls of the package so far, and forgets them."""
  (tmp_path / "site").mkdir()
  (tmp_path / "site/wandb.py").write_text(WANDB)
  monkeypatch.syspath_prepend(tmp_path / "site")
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  monkeypatch.setenv("WANDB_TOLD", str(tmp_path / "told"))

  def told() -> list:
    path = tmp_path / "told"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found

  yield told
  sys.modules.pop("wandb", None)


def asked(project: str):
  config = config_lib.default()
  config.wandb_project = project
  return config


def test_nothing_is_sent_and_nothing_imported_unless_asked_for(told, tmp_path):
  for config in (None, config_lib.default()):
    with Metrics(tmp_path / "run", config) as metrics:
      metrics.write("consolidate", 1, round=1, loss=0.5)
  assert told() == [] and "wandb" not in sys.modules
  assert not (tmp_path / "run" / boards.WANDB_RUN).exists()


def test_going_on_goes_on_with_the_same_run(told, tmp_path):
  config = asked("mine")
  with Metrics(tmp_path / "lake", config) as metrics:
    metrics.write("consolidate", 1, round=1, loss=0.5, tokens=7)
    metrics.write("consolidate", 2, round=1, loss=float("nan"))
    metrics.write("evaluate", 0, round=1, at=1, passed=0.25)
  first, *points, end = told()
  assert first[0] == "init" and first[1]["project"] == "mine" and first[1]["name"] == "lake"
  assert first[1]["resume"] == "allow" and first[1]["config"] == json.loads(config.to_json())
  assert first[1]["settings"] == {"console": "off", "disable_git": True, "save_code": False}
  assert points == [
    ["define", "consolidate/*", "consolidate/step"],
    ["log", {"consolidate/loss": 0.5, "consolidate/tokens": 7, "consolidate/step": 1}],
    ["log", {"consolidate/step": 2}],
    ["define", "evaluate/*", "evaluate/step"],
    ["log", {"evaluate/passed": 0.25, "evaluate/step": 1}],
  ]
  assert end == ["finish", 0]
  with pytest.raises(KeyError), Metrics(tmp_path / "lake", config) as metrics:
    metrics.write("consolidate", 1, round=2, loss=0.25)
    raise KeyError
  again, _, point, end = told()
  assert again[1]["id"] == first[1]["id"] and end == ["finish", 1]
  # Through all rounds, as on TensorBoard's axis.
  assert point[1]["consolidate/step"] == 3
  for folder, project in (("lake", "another"), ("other", "mine")):
    Metrics(tmp_path / folder, asked(project)).close()
    assert told()[0][1]["id"] != first[1]["id"]


def test_an_end_that_cannot_be_sent_is_a_warning(told, tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("WANDB_GONE", "1")
  with Metrics(tmp_path, asked("mine")) as metrics:
    metrics.write("evaluate", 0, round=1, passed=0.25)
  assert [call[0] for call in told()] == ["init", "define", "log"]
  assert "was not told of the end (BrokenPipeError" in caplog.text


def test_curves_that_end_do_not_end_the_run(told, tmp_path, caplog):
  with Metrics(tmp_path, asked("mine")) as metrics:
    metrics.write("evaluate", 0, round=1, passed=0.125)
    metrics.write("evaluate", 0, round=2, passed=0.25)
  assert [call[0] for call in told()] == ["init", "define"]
  assert caplog.text.count("Weights & Biases gets no more points") == 1
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_what_is_wrong_is_one_sentence(told, tmp_path, monkeypatch):
  with pytest.raises(RuntimeError, match="is 'refused', but .*: nobody is logged in.*wandb login"):
    Metrics(tmp_path, asked("refused"))
  (tmp_path / boards.WANDB_RUN).write_text('{"schema": 1, "project": "mine"}')
  with pytest.raises(ValueError, match="wandb.json: .* has no field 'id'"):
    Metrics(tmp_path, asked("mine"))
  (tmp_path / "site/wandb.py").unlink()
  (tmp_path / "site/wandb").mkdir()  # as a run leaves it in its folder: no package, though it loads
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  with pytest.raises(ImportError, match="config.wandb_project is 'mine', but .* pip install wandb"):
    config_lib.validate(asked("mine"))


def test_it_can_be_asked_for_in_the_middle_of_a_run(tmp_path):
  for project in ("", "mine", ""):
    open_workdir(asked(project), tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  assert [change["fields"][0]["is"] for change in config["changes"]] == ["mine", ""]
