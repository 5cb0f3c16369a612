"""Which weights --stage=export writes: those of the run's own configuration and its newest whole
round.
"""

import json
import pathlib
import types

import pytest
from test_workdir import open_workdir

from oel_jax import choices, main
from oel_jax import config as config_lib
from oel_jax.runtime.workdir import locked
from oel_jax.tasks import export


@pytest.fixture(name="make")
def fixture_make(tmp_path, monkeypatch):
  """Makes a run of three rounds trained for these numbers of steps; exporting it notes whose
  weights were saved, and of which model.
  """
  saved = []
  model = tmp_path / "model"
  model.mkdir()
  (model / "config.json").write_text('{"model_type": "m"}')
  tokenizer = types.SimpleNamespace(save=lambda folder: None, eos_ids=(0,), pad_id=0)

  def load(policy, devices, narrow):
    assert not narrow
    return types.SimpleNamespace(tokenizer=tokenizer, architecture=policy.weights)

  def trained(config, policy, directory, devices):
    path = pathlib.Path(directory)
    return path.parent.name if (path / str(config.steps)).exists() else None

  monkeypatch.setattr(export.load, "load_policy", load)
  monkeypatch.setattr(export.restore, "trained_params", trained)
  monkeypatch.setattr(
    export.huggingface, "save", lambda target, params, shape, **how: saved.append((params, shape))
  )

  def run(*steps):
    config = config_lib.default()
    config.rounds, config.policy.weights, config.consolidation.steps = 3, str(model), 20
    folder = open_workdir(config, tmp_path / "run")
    for number, done in enumerate(steps, start=1):
      (folder / f"round_{number}/checkpoints/{done}").mkdir(parents=True)
    return config, folder

  return run, saved


@pytest.mark.parametrize(
  "steps, number", [((20, 20, 20), 3), ((20, 20, 10), 2), ((20, 20), 2), ((20,), 1)]
)
def test_the_newest_whole_round_by_the_runs_own_configuration(make, steps, number, capsys, caplog):
  run, saved = make
  config, folder = run(*steps)
  # What the command now says; the run knows better.
  config.rounds, config.consolidation.steps = (
    1,
    10,
  )
  assert export.run(config, str(folder)) == folder / "export"
  assert saved == [(f"round_{number}", config.policy.weights)]
  assert (
    f"exported: weights of round {number} of {folder}, after 20 steps" in capsys.readouterr().out
  )
  assert (
    "what was given for config.consolidation, config.rounds differs and is not used" in caplog.text
  )
  assert ("round 3 has been consolidated for 10 of 20 steps only" in caplog.text) == (10 in steps)


def test_nothing_to_export_is_one_line(make, tmp_path):
  run, saved = make
  config, folder = run(10)
  with pytest.raises(ValueError, match="no round has been consolidated to the end"):
    export.run(config, str(folder))
  with pytest.raises(
    ValueError, match=f"{tmp_path}: not a run directory: it has no config.json"
  ) as error:
    export.run(config, str(tmp_path))
  assert main._is_told_in_one_line(error.value) and not saved


def test_weights_that_have_been_moved_are_taken_and_others_are_refused(make, tmp_path):
  run, saved = make
  config, folder = run(20)
  moved = (tmp_path / "model").rename(tmp_path / "moved")
  config.policy.weights = str(moved)
  export.run(config, str(folder))
  assert saved == [("round_1", str(moved))]
  (moved / "config.json").write_text('{"model_type": "other"}')
  with pytest.raises(ValueError, match="policy.weights is .*/moved': these are not the files that"):
    export.run(config, str(folder))
  config.policy.weights = None  # those that the run names, which are gone
  with pytest.raises(ValueError, match="policy.weights is .*/model': these are not .* now None"):
    export.run(config, str(folder))


@pytest.mark.parametrize(
  "group, name, value", [("consolidation", "steps", "x"), (None, "rounds", 1.5), (None, "mesh", 3)]
)
def test_a_value_of_another_type_is_named(make, group, name, value):
  run, saved = make
  config, folder = run(20)
  written = json.loads((folder / "config.json").read_text())
  del written["digest"]  # or that would tell
  (written["config"][group] if group else written["config"])[name] = value
  (folder / "config.json").write_text(json.dumps(written))
  field = f"{group}.{name}" if group else name
  with pytest.raises(ValueError, match=f"config.json: config.{field} is {value!r}: it must be of"):
    export.run(config, str(folder))
  assert not saved


def test_a_run_of_an_earlier_version_lacks_fields_that_came_since(make):
  run, saved = make
  config, folder = run(20)
  written = json.loads((folder / "config.json").read_text())
  del written["config"]["consolidation"]["attention"], written["digest"], written["files"]
  (folder / "config.json").write_text(json.dumps(written))
  export.run(config, str(folder))
  assert [name for name, _ in saved] == ["round_1"]


def test_a_directory_in_use_is_left_alone(make):
  run, saved = make
  config, folder = run(20)
  with locked(folder), pytest.raises(OSError, match="another process is running in this directory"):
    export.run(config, str(folder))
  assert not saved


def test_a_file_in_the_folders_place_is_told(make):
  run, saved = make
  config, folder = run(20)
  (folder / "export").write_text("mine")
  with pytest.raises(ValueError, match=f"{folder}/export: is a file: move it, for the weights go"):
    export.run(config, str(folder))
  assert not saved and (folder / "export").read_text() == "mine"


@pytest.mark.parametrize("asked, wanted", [("auto", "bfloat16"), ("float32", "float32")])
def test_adapters_weights_are_read_in_the_type_that_the_run_held_them_in(
  make, tmp_path, monkeypatch, asked, wanted
):
  """On whatever device it ran: "auto" may be another type here."""
  run, saved = make
  config = config_lib.default()
  config.policy.update(weights=str(tmp_path / "model"), compute_dtype=asked)
  config.consolidation.lora_rank = 2
  folder = open_workdir(config, tmp_path / "adapters")
  choices.tell(folder, {"compute_dtype": "bfloat16"})
  found = []

  def load(policy, devices, narrow):
    found.append((policy.compute_dtype, narrow))
    return types.SimpleNamespace(tokenizer=types.SimpleNamespace(save=None))

  monkeypatch.setattr(export.load, "load_policy", load)
  with pytest.raises(ValueError, match="no round has been consolidated"):
    export.run(config, str(folder))
  assert found == [(wanted, True)]


def test_an_adapter_of_other_weights_does_not_stay(make):
  """It would be served as what was added to the weights beside it."""
  run, saved = make
  config, folder = run(20)
  old = folder / "export" / export.ADAPTER
  old.mkdir(parents=True)
  (old / "adapter_config.json").write_text("{}")
  export.run(config, str(folder))
  assert saved and not old.exists()
