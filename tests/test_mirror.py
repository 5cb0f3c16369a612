"""A copy of a run directory elsewhere: in a folder, and in a bucket that is made up."""

import json
import os
import pathlib
import shutil
import time

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from test_distributed import finish, launch
from test_distributed_runs import command, losses

from oel_jax import config as config_lib
from oel_jax.runtime import mirror
from oel_jax.runtime.checkpoint import Checkpoints
from oel_jax.runtime.workdir import opened

FIRST = {"config.json": "{}", "round_1/user/games.jsonl": "a\n", "round_1/knowledge/00.md": "- x"}


class Bucket(MemoryFileSystem):
  """What gcsfs would be, in this process's memory; `left` is how often it can still be changed."""

  protocol = ("gs", "gcs")
  store: dict = {}
  pseudo_dirs = [""]
  left = None

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).replace("gs://", "memory://"))

  def _change(self):
    if Bucket.left is not None:
      Bucket.left -= 1
      if Bucket.left < 0:
        raise ConnectionError("the line is dead")

  def _open(self, path, mode="rb", **how):
    if mode != "rb":
      self._change()
    return super()._open(path, mode, **how)

  def _rm(self, path):
    self._change()
    super()._rm(path)


@pytest.fixture(name="bucket")
def fixture_bucket(monkeypatch):
  """The address of a run in the made-up bucket."""
  Bucket.store.clear()
  Bucket.pseudo_dirs[:] = [""]
  Bucket.left = None
  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: made[name])
  made = {"gcs": Bucket(skip_instance_cache=True), "file": fsspec.filesystem("file")}
  return "gs://bucket/runs/1"


@pytest.fixture(name="address", params=["folder", "bucket"])
def fixture_address(request, bucket, tmp_path):
  return bucket if request.param == "bucket" else str(tmp_path / "elsewhere/1")


def write(folder, contents) -> pathlib.Path:
  for name, text in contents.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder


def held(folder) -> dict[str, str]:
  """Name → text of a directory's files, without what is the mirror's own."""
  paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
  return {name: path.read_text() for name, path in paths.items() if name != mirror.STATE}


def objects(address) -> dict[str, bytes]:
  """Name → bytes of what is stored at the address."""
  if address.startswith("gs://"):
    inner = {name: value.getvalue() for name, value in Bucket.store.items()}
    return {name.removeprefix("/bucket/runs/1/"): data for name, data in inner.items()}
  folder = pathlib.Path(address)
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def brought(address, folder) -> dict[str, str]:
  """What another machine is given."""
  folder.mkdir()
  mirror.restore(address, folder)
  return held(folder)


def test_a_directory_comes_back_as_it_was_without_what_is_unfinished(address, tmp_path):
  folder = write(tmp_path / "run", FIRST | {"round_1/checkpoints/3/state/.zarray": "{}"})
  right = held(folder)
  checkpoint = "round_1/checkpoints/4.orbax-checkpoint-tmp-7/state/x"
  write(folder, {".lock": "", "round_1/.gate.json.12.tmp": "h", checkpoint: "h"})
  mirror.check(address, str(folder))
  mirror.update(address, folder)
  assert brought(address, tmp_path / "other") == right
  assert len(objects(address)) == 1 + len(set(right.values()))  # the probe is not there either


def test_a_checkpoint_that_is_removed_while_it_is_listed_is_no_fault(
  address, tmp_path, monkeypatch
):
  folder = write(tmp_path / "run", FIRST | {"round_1/checkpoints/2/state/x": "{}"})
  old, scan = folder / "round_1/checkpoints/2", os.scandir

  def remove_then_scan(path="."):
    if str(path) == str(old) and old.exists():
      old.rename(tmp_path / "gone")
    return scan(path)

  with monkeypatch.context() as patched:
    patched.setattr(os, "scandir", remove_then_scan)
    mirror.update(address, folder)
  assert not old.exists() and brought(address, tmp_path / "other") == held(folder)


def test_what_has_not_changed_is_not_sent_again_and_what_has_gone_goes(address, tmp_path):
  folder = write(tmp_path / "run", FIRST)
  mirror.update(address, folder)
  before = objects(address)
  mirror.update(address, folder)
  assert objects(address) == before  # not even another index
  (folder / "round_1/user/games.jsonl").unlink()
  write(folder, {"round_1/gate.json": "new", "config.json": "{1}"})
  mirror.update(address, folder)
  after, right = objects(address), held(folder)
  assert sorted(data.decode() for name, data in after.items() if name != "index.json") == sorted(
    right.values()
  )
  assert brought(address, tmp_path / "other") == right
  (folder / mirror.STATE).write_text("{}")  # damaged: told, and nothing is overwritten
  with pytest.raises(ValueError, match=f"{mirror.STATE}: damaged"):
    mirror.restore(address, folder)


def test_wherever_it_is_cut_off_it_holds_one_state_whole(bucket, tmp_path):
  folder = write(tmp_path / "run", FIRST)
  mirror.update(bucket, folder)
  states = [held(folder)]
  (folder / "round_1/knowledge/00.md").unlink()
  write(folder, {"config.json": "{1}", "round_2/user/games.jsonl": "b", "round_2/gate.json": "c"})
  states.append(held(folder))
  saved, seen = {name: value.getvalue() for name, value in Bucket.store.items()}, []
  state = (folder / mirror.STATE).read_bytes()
  for left in range(20):
    Bucket.store.clear()
    for name, data in saved.items():
      with Bucket(skip_instance_cache=True).open(name, "wb") as file:
        file.write(data)
    (folder / mirror.STATE).write_bytes(state)
    Bucket.left = left
    try:
      mirror.update(bucket, folder)
    except OSError as error:
      assert "could not be used: the line is dead" in str(error)
    Bucket.left, done = None, Bucket.left >= 0
    found = brought(bucket, tmp_path / f"at {left}")
    seen.append(states.index(found))
    mirror.restore(bucket, folder)  # is its own
    mirror.update(bucket, folder)  # does the rest
    assert brought(bucket, tmp_path / f"after {left}") == states[1]
    assert len(objects(bucket)) == 1 + len(states[1])
    if done:
      break
  assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen) and len(seen) > 4


def test_a_store_that_fails_stops_no_run(bucket, tmp_path, caplog):
  folder = write(tmp_path / "run", FIRST)
  Bucket.left = 1
  mirror.update(bucket, folder, quiet=True)
  assert "could not be used: the line is dead; the run goes on" in caplog.text
  Bucket.left = None
  mirror.update(bucket, folder, quiet=True)
  assert brought(bucket, tmp_path / "other") == FIRST


def test_a_mirror_damaged_while_a_run_goes_on_neither_stops_it_nor_hides_its_error(
  address, tmp_path, caplog
):
  """What is wrong there is told meanwhile, and is the error when nothing else was."""
  folder = write(tmp_path / "run", FIRST)
  mirror.update(address, folder)
  mirror._put(mirror._root(address) / "index.json", b"{")
  with pytest.raises(ValueError, match="index.json: damaged, or no mirror of a run"):
    mirror.update(address, folder)
  mirror.update(address, folder, quiet=True)
  assert "index.json: damaged" in caplog.text and "the run goes on" in caplog.text
  config = config_lib.default()
  config.mirror = other = f"{address}-2"
  with pytest.raises(KeyError, match="what went wrong"), opened(config, str(tmp_path / "own")):
    mirror._put(mirror._root(other) / "index.json", b"{")
    raise KeyError("what went wrong")


def test_the_mirror_of_another_run_or_of_a_later_state_is_refused(address, tmp_path):
  folder = write(tmp_path / "run", FIRST)
  mirror.update(address, folder)
  with pytest.raises(ValueError, match="which mirrors another run than .*other: give another addr"):
    mirror.restore(address, write(tmp_path / "other", FIRST))
  brought(address, tmp_path / "later")
  write(tmp_path / "later", {"round_2/gate.json": "c"})
  mirror.update(address, tmp_path / "later")
  with pytest.raises(ValueError, match="went on elsewhere: .*run has its state 1, the mirror 2: "):
    mirror.restore(address, folder)
  assert held(folder) == FIRST


def test_two_runs_that_begin_at_once_do_not_share_a_mirror(address, tmp_path, caplog):
  """Both found it empty: it stays the first one's, whole, and the second is told at each stage."""
  first, second = (write(tmp_path / name, FIRST | {"who": name}) for name in ("first", "second"))
  for folder in (first, second):
    mirror.restore(address, folder)
  mirror.update(address, first)
  before = objects(address)
  mirror.update(address, second, quiet=True)
  assert f"mirrors another run than {second}" in caplog.text
  with pytest.raises(ValueError, match="mirrors another run than .*second: give another address"):
    mirror.update(address, second)
  assert objects(address) == before
  mirror.update(address, write(first, {"round_2/gate.json": "c"}))
  assert brought(address, tmp_path / "other") == held(first)


def test_a_machine_that_was_given_up_and_comes_back_leaves_the_mirror_alone(address, tmp_path):
  given_up = write(tmp_path / "run", FIRST)
  mirror.update(address, given_up)
  brought(address, tmp_path / "later")
  mirror.update(address, write(tmp_path / "later", {"round_2/gate.json": "c"}))
  before = objects(address)
  with pytest.raises(ValueError, match="went on elsewhere: .*run has its state 1, the mirror 2: "):
    mirror.update(address, write(given_up, {"round_2/gate.json": "d"}))
  assert objects(address) == before


def test_another_run_that_takes_the_mirror_while_one_is_sending_keeps_it(
  address, tmp_path, monkeypatch
):
  slow, quick = (write(tmp_path / name, FIRST | {"who": name}) for name in ("slow", "quick"))
  send = mirror._send

  def sending(*args):
    monkeypatch.setattr(mirror, "_send", send)
    mirror.update(address, quick)
    send(*args)

  monkeypatch.setattr(mirror, "_send", sending)
  with pytest.raises(ValueError, match="mirrors another run than .*slow: give another address"):
    mirror.update(address, slow)
  assert brought(address, tmp_path / "other") == held(quick)


def test_what_is_damaged_there_is_told_and_no_run_begins(address, tmp_path):
  mirror.update(address, write(tmp_path / "run", FIRST))
  root = mirror._root(address)
  digest = json.loads((root / "index.json").read_text())["files"]["round_1/knowledge/00.md"]
  (root / "files" / digest).write_text("- y")
  (tmp_path / "other").mkdir()
  told = f"files/{digest}: damaged or gone: it should hold round_1/knowledge/00.md of the run"
  with pytest.raises(ValueError, match=told):
    mirror.restore(address, tmp_path / "other")
  assert not (tmp_path / "other/config.json").exists()
  index = (root / "index.json").read_text()
  for text in (index.replace('"number": 1', '"number": 7'), "[]", '{"schema": 1, "files": []}'):
    (root / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json: damaged, or no mirror of a run"):
      mirror.restore(address, tmp_path / "other")
  text = '{"schema": 1, "run": "r", "number": 1, "files": {"../config.json": "0"}}'
  (root / "index.json").write_text(text)
  with pytest.raises(ValueError, match="must be paths within the run directory"):
    mirror.restore(address, tmp_path / "other")


@pytest.mark.parametrize(
  "address, told",
  [
    ("backup", "config.mirror is 'backup': it must be gs://BUCKET/FOLDER, .* or an absolute path"),
    ("ftp://host/run", "config.mirror is 'ftp://host/run': it must be gs://"),
    ("gs:/bucket/run", "config.mirror is 'gs:/bucket/run': it must be gs://"),
    ("gs://", "config.mirror is 'gs://': it must be gs://"),
    ("{}/run/mirror", "within the run directory .*/run: it must be"),
    ("{}/run", "within the run directory .*/run: it must be"),
    ("{}/file/mirror", "config.mirror is '.*': could not be used: .*Not a directory"),
    ("s3://bucket/run", "config.mirror is 's3://bucket/run': pip install s3fs"),
  ],
)
def test_an_address_that_cannot_be_is_told_in_one_line(tmp_path, address, told):
  (tmp_path / "file").write_text("")
  with pytest.raises((ValueError, OSError, ImportError), match=told) as error:
    mirror.check(address.format(tmp_path), str(tmp_path / "run"))
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_bucket_that_does_not_answer_is_told_before_any_work(bucket, tmp_path):
  Bucket.left = 0
  with pytest.raises(OSError, match="is 'gs://bucket/runs/1': could not be used: the line is dead"):
    mirror.check(bucket, str(tmp_path / "run"))
  mirror.check("", str(tmp_path / "run"))


def test_an_opened_directory_is_filled_and_brought_up_to_date(bucket, tmp_path):
  config = config_lib.default()
  config.mirror = bucket
  with opened(config, tmp_path / "run") as folder:
    write(folder, {"round_1/gate.json": "c"})
  with pytest.raises(RuntimeError, match="a bug"), opened(config, tmp_path / "run") as folder:
    write(folder, {"round_1/more.json": "d"})
    raise RuntimeError("a bug")
  shutil.rmtree(tmp_path / "run")
  with opened(config, tmp_path / "run") as folder:
    assert (folder / "round_1/gate.json").read_text() == "c"
    assert (folder / "round_1/more.json").read_text() == "d"
  config.mirror = ""  # which changes nothing of the run
  with opened(config, tmp_path / "run"):
    pass


def test_a_checkpoint_is_mirrored_when_it_is_whole_and_restored(bucket, tmp_path):
  state = {"x": jnp.arange(12.0).reshape(3, 4), "y": {"z": jnp.int32(7)}}
  folder, inner = write(tmp_path / "run", FIRST), "round_1/checkpoints"
  told = []
  advance = mirror.with_checkpoints(bucket, folder, folder / inner, told.append)
  advance(1)
  assert not objects(bucket) and told == [1]
  with Checkpoints(folder / inner) as checkpoints:
    checkpoints.save(2, state, {"step": 2})
    checkpoints.wait()
    advance(2)
  count = len(objects(bucket))
  advance(3)
  assert len(objects(bucket)) == count > len(FIRST) + 1 and told == [1, 2, 3]
  brought_to = tmp_path / "other"
  brought_to.mkdir()
  mirror.restore(bucket, brought_to)
  with Checkpoints(brought_to / inner) as checkpoints:
    step, found, extra = checkpoints.restore(state)
  assert step == 2 and extra == {"step": 2}
  np.testing.assert_array_equal(found["x"], state["x"])
  assert found["y"]["z"] == 7
  assert mirror.with_checkpoints("", folder, folder / inner, told.append) == told.append


@pytest.mark.slow
def test_a_run_goes_on_from_its_mirror_where_its_machine_was_lost(tmp_path):
  """Killed in its training, its directory gone: the files are those of a run left alone."""
  cache, copy = tmp_path / "cache", str(tmp_path / "copy")
  start = lambda name, **how: launch(
    command(tmp_path / name, cache, **how), OEL_JAX_CACHE=str(cache)
  )
  finish([start("alone")], (0,))
  lost = start("run", mirror=copy)
  index = tmp_path / "copy/index.json"
  while not (index.exists() and "round_1/checkpoints/" in index.read_text()):
    assert lost.poll() is None
    time.sleep(0.02)
  lost.kill()
  lost.communicate()
  shutil.rmtree(tmp_path / "run")
  _, said = finish([start("run", mirror=copy)], (0,))[0]
  assert f"brought here from {copy}" in said and "consolidation goes on after step" in said
  alone, run = tmp_path / "alone", tmp_path / "run"
  for path in sorted(alone.glob("round_*/**/*.jsonl")) + sorted(alone.glob("round_1/knowledge/*")):
    assert (run / path.relative_to(alone)).read_bytes() == path.read_bytes(), path
  np.testing.assert_array_equal(losses(run), losses(alone))
  taken = json.loads((run / "round_1/user/trajectories.jsonl").read_text().splitlines()[0])["id"]
  finish(
    [launch(command(run, cache, "--stage=withdraw", withdraw=taken), OEL_JAX_CACHE=str(cache))],
    (0,),
  )
  assert "withdrawn.json" in json.loads(index.read_text())["files"]
