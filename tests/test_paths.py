"""Where the paths that a configuration names are looked for, and that runs of before go on."""

import pytest
from test_workdir import open_workdir

from oel_jax import config as config_lib
from oel_jax.runtime import paths


@pytest.fixture(name="places")
def fixture_places(tmp_path, monkeypatch):
  """The configuration's folder and the working directory, each with files of its own."""
  for name, there in (("conf", ("a.txt", "both.txt", "check.py")), ("here", ("b.txt", "both.txt"))):
    (tmp_path / name).mkdir()
    for file in there:
      (tmp_path / name / file).touch()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "conf", tmp_path / "here"


def resolved(field, value, places, *given, **how):
  config = config_lib.default_distill()
  with config.unlocked():
    config.deployment.environment = ""
  config.update_from_flattened_dict({field: value})
  how.setdefault("names", ("pocket",))
  paths.resolve(config, places[0] / "mine.py", given, **how)
  group, name = field.split(".")
  return config[group][name]


@pytest.mark.parametrize(
  "field, value, place, found",
  [
    ("distill.knowledge", "a.txt", 0, "a.txt"),
    ("distill.prompts", "./both.txt", 0, "both.txt"),
    ("distill.held_out", "b.txt", 1, "b.txt"),  # as once, where it is not beside the configuration
    ("distill.unrelated", "../conf/a.txt", 0, "a.txt"),
    ("distill.obeys", "check.py:short", 0, "check.py:short"),
    ("deployment.environment", "check.py:Game", 0, "check.py:Game"),
    ("policy.weights", "both.txt", 0, "both.txt"),
    ("extraction.weights", "a.txt", 0, "a.txt"),
  ],
)
def test_what_the_file_sets_is_beside_it_or_in_the_working_directory(
  field, value, place, found, places
):
  assert resolved(field, value, places) == f"{places[place]}/{found}"


def test_what_the_command_line_sets_is_in_the_working_directory(places):
  assert (
    resolved("distill.prompts", "both.txt", places, "distill.prompts") == f"{places[1]}/both.txt"
  )
  # Whatever is wrong with it is told where it is read.
  assert resolved("distill.prompts", "a.txt", places, "distill.prompts") == f"{places[1]}/a.txt"


def test_several_functions_of_files_and_modules(places):
  found = resolved("evaluation.tasks", ("check.py:one", "oel_jax.pocket.probes:worlds"), places)
  assert found == (f"{places[0]}/check.py:one", "oel_jax.pocket.probes:worlds")


@pytest.mark.parametrize("value", ["/absolute/model", "pocket", "package.module:load"])
def test_what_is_no_relative_path_stays(value, places):
  assert resolved("policy.weights", value, places) == value


def test_home_is_no_relative_path(places, monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")
  assert resolved("policy.weights", "~/models/x", places) == "/home/someone/models/x"


def test_what_leads_nowhere_is_told_with_both_places(places):
  told = f"config.distill.obeys is 'c.py': .* neither in {places[0]}, .* nor in {places[1]}, the"
  with pytest.raises(ValueError, match=told):
    resolved("distill.obeys", "c.py:short", places)
  # Exporting needs none of them.
  assert resolved("distill.obeys", "c.py:f", places, needed=False) == f"{places[0]}/c.py:f"
  with pytest.raises(
    ValueError, match="config.policy.weights is 'gs://models/x'.*this machine only"
  ):
    resolved("policy.weights", "gs://models/x", places)


def test_a_run_of_before_which_wrote_relative_paths_down_goes_on(places, monkeypatch):
  """From where it was begun; elsewhere the same words would lead somewhere else."""
  config = config_lib.default_distill()
  config.distill.update(prompts="b.txt", obeys="check.py:short")
  run = open_workdir(config, places[1] / "run")
  config.distill.update(prompts=f"{places[1]}/b.txt", obeys=f"{places[1]}/check.py:short")
  written = (run / "config.json").read_text()
  monkeypatch.chdir(places[0])
  with pytest.raises(ValueError, match="config.distill.prompts was 'b.txt' and is '/"):
    open_workdir(config, run)
  monkeypatch.chdir(places[1])
  open_workdir(config, run)
  assert (run / "config.json").read_text() != written
  monkeypatch.chdir(places[0])
  open_workdir(config, run)  # which now says where they are
