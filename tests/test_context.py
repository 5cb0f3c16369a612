"""A model's context length: read from its files, and compared with what may be asked of it."""

import json

import families
import jax
import ml_collections
import pytest
import test_gguf

from oel_jax import config as config_lib
from oel_jax import loop
from oel_jax.policy import load as load_lib
from oel_jax.policy.weights import gguf, huggingface
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import distill


@pytest.fixture(scope="module", name="theirs")
def fixture_theirs():
  """A small random model with a row for each id of the tokenizer."""
  size = len(families.tokenizer("qwen2.5"))
  return families.model("Qwen2", **test_gguf.SMALL | {"vocab_size": size}, tie_word_embeddings=True)


def folder(path, theirs, **fields):
  """The model's folder, with these fields in its config.json; None: without the field."""
  theirs.save_pretrained(path)
  config = json.loads((path / "config.json").read_text()) | fields
  (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
  return path


@pytest.fixture(params=["folder", "gguf"], name="weights")
def fixture_weights(request, tmp_path, theirs, monkeypatch):
  """A model of 256 tokens of context, whose weights nobody may read."""
  path, tokenizer = tmp_path / f"model.{request.param}", families.tokenizer("qwen2.5")
  if request.param == "gguf":
    test_gguf.write(path, theirs)
    monkeypatch.setattr(gguf, "tokenizer", lambda file: tokenizer)  # the file has none
    monkeypatch.setattr(gguf, "eos_ids", lambda file: ())
  else:
    folder(path, theirs, max_position_embeddings=256)
    tokenizer.save_pretrained(path)
  for module in (gguf, huggingface):
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("the weights are read"))
  return path


def read(weights, prompt_tokens, response_tokens):
  config = config_lib.default().policy
  config.weights, config.max_prompt_tokens = str(weights), prompt_tokens
  devices = mesh_lib.make_mesh(
    ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1]
  )
  return load_lib.load_policy(config, devices, response_tokens=response_tokens)


def test_longer_prompts_and_responses_are_told_before_the_weights_are_read(weights):
  told = "config.policy.max_prompt_tokens is 250, .* 100 .* 350, .* context length .* is 256: "
  with pytest.raises(ValueError, match=told + "it must be at most 156"):
    read(weights, 250, 100)
  with pytest.raises(
    ValueError,
    match="is 10, .*max_position_embeddings.* is 256: max_response_tokens must be far smaller",
  ):
    read(weights, 10, 300)
  for fits in ((156, 100), (16384, None)):
    with pytest.raises(pytest.fail.Exception, match="the weights are read"):
      read(weights, *fits)


@pytest.mark.parametrize("value", [0, "long", True, 4096.5])
def test_a_context_length_that_is_none_is_told(tmp_path, theirs, value):
  folder(tmp_path, theirs, max_position_embeddings=value)
  told = f'"max_position_embeddings" is {value!r}: it must be a whole number above 0'
  with pytest.raises(ValueError, match=told):
    huggingface.read_architecture(tmp_path)


def test_a_model_that_names_no_context_length_has_none_and_equals_one_that_does(tmp_path, theirs):
  found = [
    huggingface.read_architecture(folder(tmp_path, theirs, max_position_embeddings=value))
    for value in (None, 256)
  ]
  assert [shape.max_positions for shape in found] == [None, 256]
  assert len(set(found)) == 1  # no program is compiled anew for it


@pytest.mark.parametrize(
  "run, config", [(loop.run, config_lib.default()), (distill.run, distill.default())]
)
def test_runs_ask_with_their_longest_response(run, config, tmp_path, monkeypatch):
  asked = []

  def load(config, devices, *, response_tokens, **_):
    asked.append(response_tokens)
    raise ValueError("enough")

  monkeypatch.setattr(load_lib, "load_policy", load)
  (tmp_path / "a.txt").write_text("Be brief.\n")
  (tmp_path / "a.py").write_text("def f(answer):\n  return True\n")
  config.deployment.max_response_tokens, config.extraction.max_response_tokens = 70, 90
  if "distill" in config:
    config.distill.update(
      {name: f"{tmp_path}/a.txt" for name in ("knowledge", "prompts", "held_out")}
      | {"obeys": f"{tmp_path}/a.py:f"}
    )
  with pytest.raises(ValueError, match="enough"):
    run(config, str(tmp_path / "run"))
  assert asked == [70 if "distill" in config else 90] and not (tmp_path / "run").exists()


def test_what_shows_without_the_model_is_told_before_it_is_loaded(tmp_path, monkeypatch):
  monkeypatch.setattr(load_lib, "load_policy", lambda *_, **__: pytest.fail("the model is loaded"))
  config = config_lib.default()
  config.deployment.game = "FrozenLak-v0-raw"
  with pytest.raises(ValueError, match="config.deployment.game is 'FrozenLak-v0-raw'"):
    loop.run(config, str(tmp_path / "run"))
  (tmp_path / "a.txt").write_text("Be brief.\n")
  (tmp_path / "a.py").write_text("def f(answer):\n  return answer[0] == 'x'\n")
  config = distill.default()
  config.distill.update(
    {name: f"{tmp_path}/a.txt" for name in ("knowledge", "prompts", "held_out")}
    | {"obeys": f"{tmp_path}/a.py:f"}
  )
  with pytest.raises(
    ValueError, match="config.distill.obeys is .*a.py:f': it fails for the answer '' "
  ):
    distill.run(config, str(tmp_path / "run"))


def test_weights_on_another_store_are_refused():
  config = config_lib.default().policy
  config.weights = "gs://bucket/Qwen3-1.7B"
  with pytest.raises(
    ValueError, match="config.policy.weights is 'gs://bucket/Qwen3-1.7B': .* it must be a path here"
  ):
    load_lib.load_policy(config, None)
