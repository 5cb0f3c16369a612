"""What README.md shows is run as it stands there, and the pieces that it points to: each of Python,
in its order.
"""

import asyncio
import json
import pathlib
import re
import runpy
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from oel_jax import config as config_lib
from oel_jax.conversations import logs
from oel_jax.environments import Game, api, game_spec
from oel_jax.environments.load import try_game
from oel_jax.tasks import distill

README = pathlib.Path(__file__).parents[1] / "README.md"
CALLBACKS = README.with_name("experiments") / "data/custom_callbacks.py"


def shown(word: str) -> str:
  """The one piece of Python that holds this word."""
  pieces = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
  [found] = [piece for piece in pieces if word in piece]
  return found


def made(word: str, **given):
  """What the piece leaves, run with these names."""
  exec(compile(shown(word), str(README), "exec"), given)  # noqa: S102 (our own text)
  return given


def test_the_loss_is_that_of_its_definition():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  student, teacher, heads = draw(5, 8), draw(5, 8), (draw(12, 8), draw(12, 8))
  mask = np.array([1, 0, 1, 1, 1], np.float32)
  names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "mask")
  given = dict(zip(names, (student, heads[0], teacher, heads[1], mask), strict=True))
  logits = [x.astype(float) @ h.T.astype(float) / 0.7 for x, h in zip((student, teacher), heads)]
  log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
  each = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  found = made("linear_divergence", **given)
  np.testing.assert_allclose(found["loss"], each @ mask / mask.sum(), rtol=1e-5)
  total, count = found["divergence"](
    student @ heads[0].T, teacher @ heads[1].T, mask, kind="reverse_kl", temperature=0.7
  )
  np.testing.assert_allclose(total / count, each @ mask / mask.sum(), rtol=1e-5)


def test_the_proxys_callback_writes_a_log_that_is_read(tmp_path, monkeypatch):
  base = types.ModuleType("litellm.integrations.custom_logger")
  base.CustomLogger = object
  for name in ("litellm", "litellm.integrations", base.__name__):
    monkeypatch.setitem(sys.modules, name, base)
  monkeypatch.setenv("CHAT_LOG", str(tmp_path / "chats.jsonl"))
  said = {
    "id": "c1",
    "end_user": "ann",
    "messages": [{"role": "user", "content": "Wo ist Łódź?"}],
    "response": {"choices": [{"message": {"role": "assistant", "content": "In Poland."}}]},
  }
  handler = runpy.run_path(str(CALLBACKS))["proxy_handler_instance"]
  asyncio.run(handler.async_log_success_event({"standard_logging_object": said}, None, 0, 1))
  counts = logs.Counts()
  [found] = logs.read(tmp_path, counts)
  assert [message.content for message in found.messages] == ["Wo ist Łódź?", "In Poland."]
  assert counts.damaged == 0


def test_batches_become_a_log_that_is_read(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  asked, says = {"role": "user", "content": "Noon?"}, {"role": "assistant", "content": "Yes."}
  request = {"custom_id": "a", "method": "POST", "body": {"model": "m", "messages": [asked]}}
  completion = {"object": "chat.completion", "choices": [{"message": says}]}
  answer = {"id": "b", "custom_id": "a", "response": {"status_code": 200, "body": completion}}
  for name, line in (("requests", request), ("answers", answer)):
    (tmp_path / f"batch_{name}.jsonl").write_text(json.dumps(line) + "\n")
  made("custom_id")
  [found] = logs.read(tmp_path / "logs.jsonl", logs.Counts())
  assert (found.id, [m.content for m in found.messages]) == ("a", ["Noon?", "Yes."])


def test_a_text_to_distil_is_configured():
  config = made("my_check.py:is_short")["get_config"]()
  config_lib.validate(config, distill.default())
  assert config.distill.held_out == "held_out.txt"


def game_config():
  return made("FrozenLake-v0-random-raw")["get_config"]()


def test_a_game_is_configured_and_can_be_played():
  config = game_config()
  config_lib.validate(config)
  try_game(game_spec(config.deployment))


@pytest.mark.parametrize("name", ["Coin", "Clock"])
def test_an_environment_of_ones_own_can_be_played(name, tmp_path):
  file = tmp_path / "coin.py"
  clock = textwrap.dedent(api.__doc__[api.__doc__.index("    class Clock(Coin):") :])
  file.write_text(f"{shown('class Coin')}\n{clock}")
  config = game_config()
  with config.unlocked():
    made("coin.py:Coin", config=config)
    config.deployment.environment = f"{file}:{name}"
  config_lib.validate(config)
  spec = game_spec(config.deployment)
  try_game(spec)
  ends = [Game(spec, seed).play("[tails]").ended for seed in range(6)]
  assert ends == ["lost", "lost", "passed", "passed", "lost", "lost"]


def anchors(text: str) -> set[str]:
  """What GitHub makes of the headings: small letters, no punctuation, hyphens for spaces."""
  headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("place", ["", "launch", "experiments"])
def test_every_link_leads_to_a_file_and_a_heading(place):
  file = README.parent / place / "README.md"
  links = re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8"))
  own = [link for link in links if not link.startswith("https://")]
  assert own
  for link in own:
    path, _, heading = link.partition("#")
    target = file.parent / path if path else file
    assert target.exists(), f"{file}: {link}"
    assert not heading or heading in anchors(target.read_text(encoding="utf-8")), f"{file}: {link}"


@pytest.mark.parametrize(
  "name",
  [f"{place}README.md" for place in ("", "launch/", "experiments/", "experiments/benchmarks/")],
)
def test_commands_stand_in_fences_and_are_whole_lines(name):
  """What is indented instead is joined by whatever wraps paragraphs, one command to the next."""
  text = (README.parent / name).read_text(encoding="utf-8")
  outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
  assert not re.findall(r"^    .*", outside, re.MULTILINE)
  for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for line in block.replace("\\\n", " ").splitlines():
      code = line.split(" #")[0]
      programs = re.findall(r"(?:python\d?|pip) (?:-m )?\S+", code)
      assert len(programs) <= 1 or " && " in code or "$(" in code, f"{name}: {line}"
