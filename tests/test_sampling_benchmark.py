"""The sampling benchmark runs, small, and its shares are what its times say."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from oel_jax.policy.architecture import named

FOLDER = pathlib.Path(__file__).parents[1] / "experiments/benchmarks"
_spec = importlib.util.spec_from_file_location("sampling", FOLDER / "sampling.py")
sampling = importlib.util.module_from_spec(_spec)
sys.path.insert(0, str(FOLDER))  # as for a script: it shares a module with its neighbours
_spec.loader.exec_module(sampling)
sys.path.remove(str(FOLDER))


def test_it_runs_and_its_limit_is_that_of_the_bytes(tmp_path, capsys):
  path = tmp_path / "figures.json"
  result = sampling.main(
    [
      "--architecture=pocket-tiny",
      "--rows=tiny",
      "--repeats=1",
      "--copy_bytes=1048576",
      f"--json={path}",
    ]
  )
  assert json.loads(path.read_text()) == result and [row["batch"] for row in result["rows"]] == [
    1,
    4,
  ]
  # q; k and v; o; feed-forward; norms
  layer = 32 * 2 * 16 + 2 * (32 * 1 * 16) + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 16
  weights = 576 * 32 + 2 * layer + 32
  for row in result["rows"]:
    # 2 layers, keys and values, one head of 16
    read = 4 * weights + row["batch"] * (20 + 4) * 2 * 2 * 16 * 4
    assert row["limit_ms"] == pytest.approx(1e3 * read / result["bytes_per_s"])
    assert row["share"] == pytest.approx(row["limit_ms"] / row["decode_ms"])
  assert capsys.readouterr().out.count("| 20 | 8 |") == 2


@pytest.mark.slow
def test_several_devices_get_as_many_rows_each(monkeypatch):
  given, run = [], sampling.generate
  monkeypatch.setattr(
    sampling,
    "generate",
    lambda params, shape, prompts, *args, **how: (
      given.append(
        (len(prompts), how["slots"], len(jax.tree.leaves(params)[0].sharding.device_set))
      )
      or run(params, shape, prompts, *args, **how)
    ),
  )
  flags = ["--architecture=pocket-tiny", "--rows=tiny", "--repeats=1", "--copy_bytes=1048576"]
  result = sampling.main([*flags, "--devices=2"])
  assert set(given) == {(2, 2, 2), (8, 8, 2)} and [row["batch"] for row in result["rows"]] == [2, 8]
  alone = sampling.main(flags)
  for row, one in zip(result["rows"], alone["rows"], strict=True):
    assert row["limit_ms"] * result["bytes_per_s"] == pytest.approx(
      one["limit_ms"] * alone["bytes_per_s"]
    )
    assert row["decode_tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["decode_ms"])


@pytest.mark.slow
def test_mixed_lengths_are_compared_with_equal_ones_of_the_same_sum(monkeypatch):
  given, run = [], sampling.generate
  monkeypatch.setattr(
    sampling,
    "generate",
    lambda *args, **how: given.append((args[2], how["slots"])) or run(*args, **how),
  )
  shape = named("pocket-tiny")
  found = sampling.mixed(
    sampling.random_params(shape, jnp.float32), shape, jnp.float32, repeats=1, new=3, count=6
  )
  assert (
    found["share"] == pytest.approx(found["mixed_tokens_per_s"] / found["equal_tokens_per_s"])
    and found["share"] > 0
  )
  lengths = [sorted(map(len, prompts)) for prompts, _ in given]
  assert (
    sorted(map(tuple, lengths))[0] == (50, 91, 165, 301, 549, 1000)
    and sorted(map(tuple, lengths))[-1] == (359,) * 6
  )
  assert {slots for _, slots in given} == {64}


@pytest.mark.slow
def test_episodes_are_played_and_counted():
  found, again = sampling.episodes(2, repeats=1), sampling.episodes(2, repeats=1)
  assert (
    found["episodes"] == 2
    and found["seconds"] > 0
    and 2 * 3 <= found["tokens"] <= 2 * 5 * 96
    and found["tokens"] == again["tokens"]
  )


def test_prompts_stand_behind_texts_which_count_once(monkeypatch):
  given = []
  monkeypatch.setattr(
    sampling, "generate", lambda params, shape, prompts, *args, **how: given.append((prompts, how))
  )
  shape = named("pocket-tiny")
  params = sampling.random_params(shape, jnp.float32)
  measured = lambda *texts: sampling.measure(
    params, shape, 6, 5, 8, 1e6, jnp.float32, 1, texts=texts
  )
  row, plain = measured(2, 40), measured(0, 0)
  prompts, how = given[0]
  assert how["slots"] is None and given[-1][1]["slots"] == 6 and row["prompt"] == 45
  assert len({tuple(prompt[:40]) for prompt in prompts}) == 2 and len(prompts) == 6
  assert len({tuple(prompt[40:]) for prompt in prompts}) == 6 and set(map(len, prompts)) == {45}
  token = 2 * 2 * 16 * 4  # 2 layers, keys and values, one head of 16
  assert row["limit_ms"] - plain["limit_ms"] == pytest.approx(2 * 40 * token / 1e3)


@pytest.mark.parametrize("flag", ("--rows=goals,nosuch", "--architecture=nosuch"))
def test_what_is_no_row_or_architecture_is_told_before_anything_is_measured(flag, capsys):
  with pytest.raises(SystemExit) as error:
    sampling.main(["--architecture=pocket", flag])
  assert error.value.code == 2 and "'nosuch'" in capsys.readouterr().err
