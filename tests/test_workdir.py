"""The run directory, and the seeds of a run: the same run goes on, another one is refused."""

import json
import logging

import ml_collections
import pytest

from oel_jax import config as default_config
from oel_jax.runtime import seeds, workdir
from oel_jax.runtime.workdir import locked, opened
from oel_jax.tasks import distill


def open_workdir(config, workdir, resume_anyway=False):
  """The run directory, made or gone on with, and let go of again."""
  with opened(config, workdir, resume_anyway) as path:
    return path


def test_first_use_writes_the_configuration_and_versions(tmp_path):
  config = default_config.default()
  path = open_workdir(config, tmp_path / "a" / "b")
  written = json.loads((path / "config.json").read_text())
  assert path == tmp_path / "a" / "b" and written["schema"] == 1
  assert (
    written["config"]["consolidation"]["learning_rate"] == 1e-6
    and written["config"]["policy"]["weights"] is None
  )
  assert set(written["versions"]) == {"python", "jax", "flax", "oel_jax"}
  before = (path / "config.json").read_bytes()
  assert open_workdir(default_config.default(), path) == path
  assert (path / "config.json").read_bytes() == before


def test_another_configuration_is_refused_with_both_values(tmp_path):
  open_workdir(default_config.default(), tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  config = default_config.default()
  config.seed = 3
  config.policy.weights = "pocket"
  with config.unlocked():
    config.extra = ml_collections.ConfigDict(dict(on=True))
    del config.deployment["slots"]
  with pytest.raises(ValueError) as error:
    open_workdir(config, tmp_path)
  for part in (
    "config.seed was 0 and is 3",
    "config.policy.weights was None and is 'pocket'",
    "config.extra.on was 'no such field' and is True",
    "config.deployment.slots was 64 and is 'no such field'",
    "--resume_anyway",
    "config.json",
  ):
    assert part in str(error.value)
  assert str(error.value).count(" was ") == 4
  assert (tmp_path / "config.json").read_bytes() == before


def test_more_rounds_need_no_permission_fewer_do(tmp_path):
  config = default_config.default()
  config.rounds = 2
  open_workdir(config, tmp_path)
  config.rounds = 3
  open_workdir(config, tmp_path)
  [change] = json.loads((tmp_path / "config.json").read_text())["changes"]
  assert change["fields"] == [{"field": "rounds", "was": 2, "is": 3}]
  config.seed = 7  # more rounds and something else
  config.rounds = 4
  with pytest.raises(ValueError, match="config.rounds was 3 and is 4.*config.seed was 0 and is 7"):
    open_workdir(config, tmp_path)
  config.seed, config.rounds = 0, 2
  with pytest.raises(ValueError, match="config.rounds was 3 and is 2.*--resume_anyway"):
    open_workdir(config, tmp_path)


def test_what_a_plan_was_asked_for_needs_no_permission(tmp_path):
  config = default_config.default()
  with config.unlocked():
    del config["plan"]  # as earlier versions left it
  open_workdir(config, tmp_path)
  config = default_config.default()
  config.plan.device = "h200,8"
  open_workdir(config, tmp_path)
  changes = json.loads((tmp_path / "config.json").read_text())["changes"]
  assert {field["field"] for field in changes[0]["fields"]} == {
    "plan.device",
    "plan.prompt_tokens",
    "plan.price",
  }


def test_resume_anyway_records_what_changed(tmp_path):
  open_workdir(default_config.default(), tmp_path)
  for seed in (1, 2):
    config = default_config.default()
    config.seed = seed
    open_workdir(config, tmp_path, resume_anyway=True)
  written = json.loads((tmp_path / "config.json").read_text())
  assert written["config"]["seed"] == 2
  assert [change["fields"] for change in written["changes"]] == [
    [{"field": "seed", "was": 0, "is": 1}],
    [{"field": "seed", "was": 1, "is": 2}],
  ]
  config = default_config.default()
  config.seed = 2
  open_workdir(config, tmp_path)  # what it is now is what is compared


def test_other_versions_are_a_warning(tmp_path, caplog):
  open_workdir(default_config.default(), tmp_path)
  path = tmp_path / "config.json"
  written = json.loads(path.read_text())
  written["versions"]["jax"] = "0.0.1"
  del written["digest"]  # as one who edits the file by hand is told to
  path.write_text(json.dumps(written))
  with caplog.at_level(logging.WARNING):
    open_workdir(default_config.default(), tmp_path)
  assert "'jax': '0.0.1'" in caplog.text


def make_files(folder):
  """A configuration of `distill`, and the files that it names."""
  (folder / "model").mkdir()
  (folder / "model/model.safetensors").write_bytes(bytes(range(256)) * 10)
  (folder / "model/chat_template.jinja").write_text("{{ messages }}")
  (folder / "model/README.md").write_text("A model.")
  texts = ("knowledge.md", "prompts.txt", "held_out.jsonl", "unrelated.txt")
  for name in (*texts, "check.py", "my_env.py", "my_task.py", "my_edit.py", "my_policy.py"):
    (folder / name).write_text(f"{name}\n")
  config = distill.default()
  config.policy.weights = f"{folder}/model"
  config.deployment.environment = f"{folder}/my_env.py:make"
  config.evaluation.tasks = (f"{folder}/my_task.py:count", "oel_jax.pocket.retention:worlds")
  config.extraction.edit = f"{folder}/my_edit.py:swap"
  config.distill.update(
    knowledge=f"{folder}/knowledge.md",
    prompts=f"{folder}/prompts.txt",
    held_out=f"{folder}/held_out.jsonl",
    unrelated=f"{folder}/unrelated.txt",
    obeys=f"{folder}/check.py:short",
  )
  return config


@pytest.mark.parametrize(
  "name, field",
  [
    ("model/model.safetensors", "policy.weights"),
    ("model/chat_template.jinja", "policy.weights"),
    ("knowledge.md", "distill.knowledge"),
    ("prompts.txt", "distill.prompts"),
    ("held_out.jsonl", "distill.held_out"),
    ("unrelated.txt", "distill.unrelated"),
    ("check.py", "distill.obeys"),
    ("my_env.py", "deployment.environment"),
    ("my_task.py", "evaluation.tasks"),
    ("my_edit.py", "extraction.edit"),
    ("my_policy.py", "policy.weights"),
  ],
)
def test_a_file_that_the_configuration_names_and_that_was_edited_is_refused_by_name(
  tmp_path, name, field
):
  config = make_files(tmp_path)
  if name == "my_policy.py":
    config.policy.weights = f"{tmp_path}/my_policy.py:load"
  folder = open_workdir(config, tmp_path / "run")
  (tmp_path / "model/README.md").write_text("Another text about the same model.")
  assert open_workdir(config, folder) == folder
  path, before = tmp_path / name, (folder / "config.json").read_bytes()
  data = bytearray(path.read_bytes())
  data[3] ^= 1
  path.write_bytes(bytes(data))
  with pytest.raises(
    ValueError,
    match=f"the content of config.{field} .* has changed: its digest was .* give --resume_anyway",
  ):
    open_workdir(config, folder)
  assert (folder / "config.json").read_bytes() == before
  open_workdir(config, folder, resume_anyway=True)
  [change] = json.loads((folder / "config.json").read_text())["changes"]
  assert [found["field"] for found in change["fields"]] == [f"content of {field}"]
  open_workdir(config, folder)  # what it is now is what is compared


def test_a_large_file_is_named_by_size_beginning_end_and_blocks_between(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "WHOLE_BELOW", 2**20)
  path, size = tmp_path / "model.gguf", 40 * 2**20
  path.write_bytes(bytes(size))
  config = default_config.default()
  config.policy.weights = str(path)
  found = {workdir.file_digests(config)["policy.weights"]}
  # The last: the 100th of 256 blocks between. One place in 2.3 is looked at in a file of this size.
  for place in (0, 2**20 - 1, size - 1, size - 2**20, size * 100 // 257 + 5):
    with open(path, "r+b") as file:
      file.seek(place)
      file.write(b"x")
      file.flush()
      found.add(workdir.file_digests(config)["policy.weights"])
      file.seek(place)
      file.write(b"\0")
  path.write_bytes(bytes(size + 1))
  found.add(workdir.file_digests(config)["policy.weights"])
  assert len(found) == 7


def test_every_part_of_a_split_file_counts(tmp_path):
  parts = [tmp_path / f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
  for part in parts:
    part.write_bytes(b"GGUF" + part.name.encode())
  config = default_config.default()
  config.policy.weights = str(parts[0])
  found = [workdir.file_digests(config)["policy.weights"]]
  for part in parts:
    part.write_bytes(b"FUGG" + part.name.encode())
    found.append(workdir.file_digests(config)["policy.weights"])
  assert len(set(found)) == 4
  config.policy.weights = str(parts[2])  # whichever is named
  assert workdir.file_digests(config)["policy.weights"] == found[-1]


def test_a_run_that_did_not_note_its_files_goes_on(tmp_path):
  config = make_files(tmp_path)
  folder = open_workdir(config, tmp_path / "run")
  written = json.loads((folder / "config.json").read_text())
  del written["files"], written["digest"]  # an earlier version's
  (folder / "config.json").write_text(json.dumps(written))
  (tmp_path / "prompts.txt").write_text("others\n")
  assert open_workdir(config, folder) == folder


def test_nothing_changes_while_another_process_holds_the_directory(tmp_path):
  open_workdir(default_config.default(), tmp_path)
  before, config = (tmp_path / "config.json").read_bytes(), default_config.default()
  config.seed = 3
  # The lock belongs to an open file: in this process a second one is refused as in another.
  with locked(tmp_path):
    with pytest.raises(OSError, match="another process is running in this directory"):
      open_workdir(config, tmp_path, resume_anyway=True)
    assert (tmp_path / "config.json").read_bytes() == before
  with opened(config, tmp_path, resume_anyway=True):
    with pytest.raises(OSError, match="another process is running in this directory"):
      open_workdir(config, tmp_path)
  open_workdir(config, tmp_path)


@pytest.mark.parametrize(
  "text, told",
  [
    ("", "damaged"),
    ('{"schema": 1, "config"', "damaged"),
    ('{"schema": 9}', "schema is 9: it must be 1"),
    ("[]", "damaged"),
    ('{"schema": 1, "config": [], "versions": {}, "changes": []}', "damaged"),
  ],
)
def test_a_damaged_file_is_named_and_kept(tmp_path, text, told):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=told) as error:
    open_workdir(default_config.default(), tmp_path, resume_anyway=True)
  assert str(tmp_path / "config.json") in str(error.value)
  assert (tmp_path / "config.json").read_text() == text


def test_a_file_in_the_way_is_named(tmp_path):
  (tmp_path / "taken").write_text("")
  with pytest.raises(OSError, match="taken"):
    open_workdir(default_config.default(), tmp_path / "taken")


def test_seeds_are_stable_and_apart():
  # From another implementation of the same rule: printf "(0, 1, 'deploy', 2)" | b2sum --length 32
  assert f"{seeds.derive(0, 1, 'deploy', 2):08x}" == "074c6ab8"
  drawn = {
    seeds.derive(seed, stage, index)
    for seed in range(5)
    for stage in ("deploy", "extract")
    for index in range(200)
  }
  assert len(drawn) == 2000 and all(0 <= value < 2**32 for value in drawn)
  assert seeds.derive(1) != seeds.derive("1") and seeds.derive("ab", "c") != seeds.derive("a", "bc")
  for part in (1.0, True, None):
    with pytest.raises(TypeError, match="int or str"):
      seeds.derive(part)


@pytest.mark.parametrize("place", ["gs://b/run", "s3://b/run", "hdfs://h/run", "gs:/b/run"])
def test_an_address_of_another_store_is_refused_and_makes_no_folder(place, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  told = f"--workdir is '{place}': .*on this machine only, so it must be a path here"
  told += ".*gcsfuse .*rename-dir-limit" if place.startswith("gs:") else "(?!.*gcsfuse)"
  with pytest.raises(ValueError, match=told):
    open_workdir(default_config.default(), place)
  assert not list(tmp_path.iterdir())


def test_a_colon_makes_no_address(tmp_path):
  for name in ("run:1", "a/b:c", "C:/runs"):
    assert (open_workdir(default_config.default(), f"{tmp_path}/{name}") / "config.json").exists()
