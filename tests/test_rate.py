"""The rate of a round's steps, and what weights become by it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_draws import fixture_policy, fixture_said, run  # noqa: F401 (used by their names)
from test_trainer import _config, _one_device, _task

from oel_jax import config as config_lib
from oel_jax.consolidation import restore


def moves(**changes):
  """What each step takes from a weight whose gradient never changes: Adam's move is the rate."""
  config = _config(weight_decay=0.0, **changes)
  optimizer, weight = restore.make_optimizer(config), jnp.ones(())
  state, found = optimizer.init(weight), []
  for _ in range(config.steps):
    update, state = optimizer.update(jnp.float32(0.3), state, weight)
    found.append(-float(update))
  return found


@pytest.mark.parametrize(
  "final, thousandths",
  [(1.0, [4, 4, 4, 4, 4]), (0.0, [4, 3, 2, 1, 0]), (0.5, [4, 3.5, 3, 2.5, 2])],
)
def test_the_rate_falls_in_a_line_to_its_share(final, thousandths):
  found = moves(steps=5, learning_rate=4e-3, final_rate=final)
  np.testing.assert_allclose(1e3 * np.array(found), thousandths, atol=1e-4)


@pytest.mark.parametrize(
  "decay, thousandths",
  [(0.5, [4, 4, 4, 4, 2, 0]), (0.3, [4, 4, 4, 4, 4, 0]), (0.01, [4, 4, 4, 4, 4, 4])],
)
def test_the_rate_falls_in_the_last_steps_alone(decay, thousandths):
  """Of three steps, the first still has the whole rate; of one, so has that one."""
  found = moves(steps=6, learning_rate=4e-3, final_rate=0.0, decay=decay)
  np.testing.assert_allclose(1e3 * np.array(found), thousandths, atol=1e-4)


def test_later_rounds_have_steps_of_their_own():
  config = config_lib.default()
  config.consolidation.update(steps=7, later_steps=3)
  found = [config_lib.consolidation(config, number) for number in (1, 2, 3)]
  assert [each.steps for each in found] == [7, 3, 3] and config.consolidation.steps == 7
  config.consolidation.later_steps = 0
  assert config_lib.consolidation(config, 2).steps == 7


def test_a_single_step_has_the_whole_rate():
  np.testing.assert_allclose(moves(steps=1, learning_rate=1e-2, final_rate=0.0), 1e-2, rtol=1e-4)


def test_a_round_goes_on_at_the_rate_where_it_stood(policy, tmp_path, monkeypatch, said):
  """Cut off behind step 2 of 4, it comes to the same weights."""
  changes = dict(steps=4, final_rate=0.1, checkpoint_every=2)
  *_, whole = run(policy, tmp_path / "run", _task(policy), monkeypatch, **changes)
  shutil.rmtree(tmp_path / "run/checkpoints/4")
  seen, _, again = run(policy, tmp_path / "run", _task(policy), monkeypatch, **changes)
  assert len(seen) == 2
  jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_rate_that_begins_to_fall_in_the_middle_goes_by_the_steps_done():
  weight, found = jnp.ones(()), []
  how = dict(weight_decay=0.0, steps=5, learning_rate=4e-3)
  optimizers = [restore.make_optimizer(_config(**how, final_rate=share)) for share in (1.0, 0.0)]
  state = optimizers[0].init(weight)
  for i in range(5):
    move, state = optimizers[i > 1].update(jnp.float32(0.3), state, weight)
    found.append(-1e3 * float(move))
  np.testing.assert_allclose(found, [4, 4, 2, 1, 0], atol=1e-4)


def test_a_run_whose_rate_begins_to_fall_has_its_rounds_still(policy, tmp_path, monkeypatch, said):
  """A finished round's weights, and one that was cut off and goes on; and back again."""
  changes, directory = dict(steps=3, checkpoint_every=1), tmp_path / "run/checkpoints"
  *_, whole = run(policy, tmp_path / "run", _task(policy), monkeypatch, **changes)
  falling = _config(steps=3, final_rate=0.0)
  read = restore.trained_params(falling, policy, directory, _one_device())
  jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(read))
  shutil.rmtree(directory / "3")
  how = changes | dict(final_rate=0.0)
  seen, _, ended = run(policy, tmp_path / "run", _task(policy), monkeypatch, **how)
  assert len(seen) == 1
  read = restore.trained_params(_config(steps=3), policy, directory, _one_device())
  jax.tree.map(np.testing.assert_array_equal, ended, jax.device_get(read))


@pytest.mark.parametrize(
  "field, share, right",
  [("final_rate", share, "from 0 to 1") for share in (-0.1, 1.5, float("nan"))]
  + [("decay", share, "above 0 and at most 1") for share in (0.0, 1.5, float("nan"))],
)
def test_a_share_that_is_none_is_refused(field, share, right):
  config = config_lib.default()
  config.consolidation.final_rate = 0.0
  config.consolidation[field] = share
  told = f"config.consolidation.{field} is .*: it must be {right}"
  with pytest.raises(ValueError, match=told):
    config_lib.validate(config)


@pytest.mark.parametrize(
  "config, changes, told",
  [
    (config_lib.default(), dict(decay=0.25), "decay is 0.25: it must be 1 where .*final_rate is 1"),
    (
      config_lib.default_distill(),
      dict(later_steps=5),
      "later_steps is 5: it must be 0, as config",
    ),
  ],
)
def test_what_would_change_nothing_is_refused(config, changes, told):
  config.consolidation.update(changes)
  with pytest.raises(ValueError, match=told):
    config_lib.validate(config)
