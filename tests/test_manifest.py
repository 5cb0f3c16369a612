"""manifest.json: each way in which a file can change is told; a file cut off by a kill is not."""

import json

import pytest

from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.conversations.schema import Message, Prompt
from oel_jax.runtime.manifest import Manifest, differing

LINES = [Prompt(f"p{i}", (Message("user", str(i)),)) for i in range(4)]
INPUTS = {"weights": "aa", "knowledge": "bb"}


@pytest.fixture(name="manifest")
def fixture_manifest(tmp_path):
  manifest = Manifest(tmp_path / "round_1")
  manifest.announce("user/a.jsonl", INPUTS)
  write_jsonl(tmp_path / "round_1/user/a.jsonl", LINES)
  manifest.record(["user/a.jsonl"], INPUTS)
  return manifest


def test_a_file_that_is_as_it_was_passes_and_nothing_is_written_again(manifest):
  path = manifest.folder / "manifest.json"
  written = path.stat().st_mtime_ns
  manifest.verify()
  assert manifest.changed("user/a.jsonl", INPUTS) == []
  manifest.announce("user/a.jsonl", INPUTS)
  manifest.record(["user/a.jsonl"], INPUTS)
  assert path.stat().st_mtime_ns == written
  entry = json.loads(path.read_text())["files"]["user/a.jsonl"]
  assert entry["records"] == 4 and entry["made_from"] == INPUTS


@pytest.mark.parametrize(
  "order, told",
  [
    ((0, 1, 2), "4 lines then, 3 now"),
    ((0, 1, 2, 3, 3), "4 lines then, 5 now"),
    ((1, 0, 2, 3), "4 lines then, 4 now"),
    ((0, 1, 1, 3), "4 lines then, 4 now"),
  ],
)
def test_lines_lost_doubled_or_moved(manifest, order, told):
  path = manifest.folder / "user/a.jsonl"
  write_jsonl(path, [LINES[i] for i in order])
  with pytest.raises(ValueError) as error:
    manifest.verify()
  assert str(error.value).startswith(f"{path}: not as this run wrote it: {told}; restore it")
  assert f"or remove {path} and the same command" in str(error.value)


def test_the_damaged_line_is_named(manifest):
  path = manifest.folder / "user/a.jsonl"
  path.write_bytes(path.read_bytes().replace(b'"content": "2"', b'"content": "3"'))
  with pytest.raises(ValueError, match="line 3: damaged, or edited"):
    manifest.verify()


def test_other_inputs_are_listed_for_a_file_and_for_one_that_has_only_begun(manifest):
  other = {"weights": "cc", "settings": "dd"}
  assert manifest.changed("user/a.jsonl", other) == ["knowledge", "settings", "weights"]
  manifest.announce("user/b.jsonl", INPUTS)
  assert manifest.changed("user/b.jsonl", other) == []  # nothing of it is there
  (manifest.folder / "user/b.jsonl.partial").write_text("")
  assert manifest.changed("user/b.jsonl", other) == ["knowledge", "settings", "weights"]
  manifest.verify()


def test_a_kill_between_file_and_entry_and_a_file_that_the_user_removed_are_no_faults(manifest):
  manifest.announce("user/b.jsonl", INPUTS)
  write_jsonl(manifest.folder / "user/b.jsonl", LINES)  # killed here
  manifest.verify()
  assert manifest.changed("user/b.jsonl", INPUTS) == []
  (manifest.folder / "user/a.jsonl").unlink()
  manifest.verify()
  assert manifest.changed("user/a.jsonl", {"weights": "cc"}) == []
  manifest.announce("user/a.jsonl", {"weights": "cc"})
  write_jsonl(manifest.folder / "user/a.jsonl", LINES[:2])  # made again from something else
  manifest.verify()
  assert manifest.made_from("user/a.jsonl") == {"weights": "cc"}


def test_a_folder_of_a_version_without_manifests_is_taken_as_it_stands(tmp_path, caplog):
  write_jsonl(tmp_path / "user/a.jsonl", LINES)
  Manifest(tmp_path).verify()
  assert f"{tmp_path}: carried here without its manifest.json, or made before" in caplog.text
  assert Manifest(tmp_path).changed("user/a.jsonl", INPUTS) == []
  Manifest(tmp_path).record(["user/a.jsonl"], INPUTS)
  assert Manifest(tmp_path).changed("user/a.jsonl", {}) == ["knowledge", "weights"]


@pytest.mark.parametrize(
  "change, told",
  [
    (lambda text: text[:-30], "damaged"),
    (lambda text: text.replace('"aa"', '"ab"'), 'its field "digest"'),
    (lambda text: "[]", "the file is []: it must be an object"),
    (lambda text: '{"schema": 2}', "schema is 2: it must be 1"),
    (lambda text: '{"schema": 1, "files": {"a": 3}}', "a is 3: it must be an object"),
    (
      lambda text: '{"schema": 1, "files": {"a": {"sha256": 3, "records": 1, "made_from": {}}}}',
      "a.sha256 is 3",
    ),
    (
      lambda text: (
        '{"schema": 1, "files": {"a": {"sha256": null, "records": 1, "made_from": {"w": 1}}}}'
      ),
      "a.made_from",
    ),
  ],
)
def test_a_damaged_manifest_is_named(manifest, change, told):
  path = manifest.folder / "manifest.json"
  path.write_text(change(path.read_text()))
  with pytest.raises(ValueError) as error:
    manifest.verify()
  assert str(error.value).startswith(f"{path}: ") and told in str(error.value)


def test_what_an_earlier_version_does_not_say_is_not_compared():
  now = {"weights": "aa", "knowledge": "bb"}
  assert differing(now | {"more": "cc"}, now) == [] == differing(None, now)
  assert differing({"weights": "aa"}, now) == ["knowledge"]
  assert differing({"weights": "x", "knowledge": "y"}, now) == ["weights", "knowledge"]
