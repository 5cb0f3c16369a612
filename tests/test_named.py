"""Functions that a configuration names: found, or told in one sentence what is wrong."""

import os.path

import pytest

from oel_jax.runtime import named


def test_a_module_and_a_file_hand_in_their_functions(tmp_path):
  (tmp_path / "mine.py").write_text("def double(x):\n  return 2 * x\n")
  assert named.function("os.path:join", "config.x") is os.path.join
  assert named.function(f"{tmp_path}/mine.py:double", "config.x")(4) == 8


def test_two_files_of_one_name_stay_two(tmp_path):
  for number in (1, 2):
    (tmp_path / str(number)).mkdir()
    (tmp_path / f"{number}/mine.py").write_text(f"def f():\n  return {number}\n")
  found = [named.function(f"{tmp_path}/{number}/mine.py:f", "config.x") for number in (1, 2)]
  assert [function() for function in found] == [1, 2]


@pytest.mark.parametrize(
  "text, told",
  [
    ("pocket", "it must be MODULE:NAME or FILE.py:NAME"),
    ("/models/Qwen3", "it must be MODULE:NAME or FILE.py:NAME"),
    ("no_such_module:f", "the module cannot be imported .*no_such_module"),
    ("os.path:no_such", "the module has no function no_such"),
    ("os.path:sep", "the module has no function sep"),
    ("BROKEN.py:f", r"the file cannot be run \(ZeroDivisionError"),
    ("EMPTY.py:f", "the file has no function f"),
  ],
)
def test_what_is_wrong_is_told_with_the_field(tmp_path, monkeypatch, text, told):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "BROKEN.py").write_text("1 / 0\n")
  (tmp_path / "EMPTY.py").write_text("")
  with pytest.raises(ValueError, match=f"config.x is '{text}': .*{told}"):
    named.function(text, "config.x")


def test_a_file_that_is_not_there_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match="config.x is .*none.py:f': there is no such file"):
    named.function(f"{tmp_path}/none.py:f", "config.x")


def test_a_file_is_found_without_being_run(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "never_run.py").write_text("1 / 0\n")
  here = tmp_path / "never_run.py"
  assert named.found(f"{here}:f") == named.found("never_run:f") == here
  for text in (f"{tmp_path}/none.py:f", "no_such_module:f", "no_such.module:f"):
    assert named.found(text) is None


@pytest.mark.parametrize(
  "text, is_one",
  [
    ("oel_jax.pocket.load:load", True),
    ("/somewhere/my file.py:make", True),
    ("/models/Qwen3-1.7B", False),
    ("gs://bucket/folder", False),
    ("runs/a:b/model.gguf", False),
    ("model.safetensors", False),
  ],
)
def test_paths_are_no_names(text, is_one):
  assert named.is_name(text) is is_one


def test_a_function_that_fails_is_told_with_its_line(tmp_path):
  file = tmp_path / "own.py"
  file.write_text("def half(x):\n  return 1 / x\n")
  text = f"{file}:half"
  half = named.function(text, "config.x")
  assert named.called(text, "config.x", half, 2) == 0.5
  told = rf"config.x is '{text}': it fails \(ZeroDivisionError: .*, at {file}:2\)"
  with pytest.raises(ValueError, match=told):
    named.called(text, "config.x", half, 0)


def test_one_that_exits_fails_like_any_other(tmp_path):
  """It would end the run with its own status, 0 even, and not a word."""
  file = tmp_path / "own.py"
  file.write_text("import sys\ndef leave(x):\n  sys.exit()\n")
  text = f"{file}:leave"
  told = rf"config.x is '{text}': it fails \(SystemExit: , at {file}:3\)"
  with pytest.raises(ValueError, match=told):
    named.called(text, "config.x", named.function(text, "config.x"), 0)
