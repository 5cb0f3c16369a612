"""The benchmark of vLLM asks it for what `sampling.py` asks ours for; vLLM is played here."""

import importlib
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import transformers

from oel_jax.policy.architecture import named

FOLDER = pathlib.Path(__file__).parents[1] / "experiments/benchmarks"


@pytest.fixture(name="peer")
def fixture_peer(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  yield importlib.import_module("peer_vllm")
  for name in ("peer_vllm", "sampling", "measure", "figures_file"):
    sys.modules.pop(name, None)


class Played:
  """What is called of vLLM, and its answers: `new` ids a prompt, one too few if `short`."""

  __version__, short = "0.0", False
  SamplingParams = types.SimpleNamespace

  def __init__(self):
    self.calls, self.given, self.emptied = [], {}, 0

  def LLM(self, model, **how):
    self.given = how | {"config": json.loads((pathlib.Path(model) / "config.json").read_text())}
    return self

  def reset_prefix_cache(self):
    self.emptied += 1
    return True

  def generate(self, prompts, how, use_tqdm):
    prompts = [prompt["prompt_token_ids"] for prompt in prompts]
    self.calls.append((prompts, how))
    ids = [0] * (how.max_tokens - self.short)
    answer = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])
    return [answer] * len(prompts)


@pytest.fixture(name="played")
def fixture_played(peer, monkeypatch):
  played = Played()
  monkeypatch.setitem(sys.modules, "vllm", played)
  cuda = types.SimpleNamespace(get_device_name=lambda: "a GPU")
  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
  monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
  return played


def test_rows_and_prompts_are_those_of_ours(peer, played, monkeypatch, tmp_path, capsys):
  sampling, ours = sys.modules["sampling"], []
  record = lambda params, shape, prompts, *args, **how: ours.append(
    (prompts, how["max_new_tokens"], how["sampling"].temperature)
  )
  monkeypatch.setattr(sampling, "generate", record)
  rows = {"goals": ((2, 6, 5),), "shared": ((3, 2, 4, 2, 8),)}
  monkeypatch.setattr(sampling, "random_params", lambda *args: {"w": np.zeros(1)})
  for module in (sampling, peer):
    monkeypatch.setattr(module, "ROWS", rows)
  beside, own = tmp_path / "ours.json", tmp_path / "vllm.json"
  flags = ["--rows=goals,shared,mixed", "--repeats=1"]
  sampling.main([*flags, "--copy_bytes=1048576", f"--json={beside}"])
  result = peer.main([*flags, f"--json={own}", f"--beside={beside}", "--sequences=64"])
  assert [(p, how.max_tokens, how.temperature) for p, how in played.calls] == ours
  assert all(how.ignore_eos and not how.detokenize for _, how in played.calls)
  assert played.emptied == len(played.calls) == 12
  assert json.loads(own.read_text()) == result
  theirs = json.loads(beside.read_text())
  for row, other in zip(result["rows"], theirs["rows"], strict=True):
    assert {name: row[name] for name in ("batch", "texts", "prompt", "new")} == {
      name: other[name] for name in ("batch", "texts", "prompt", "new")
    }
    assert row.keys() <= other.keys()
  assert result["mixed"].keys() < theirs["mixed"].keys()
  out = capsys.readouterr().out
  assert "| 2 | 0 | 6 | 5 |" in out and "| 3 | 2 | 10 | 4 |" in out and "mixed, ours" in out
  assert played.given["max_model_len"] == 1000 + 256 and played.given["max_num_seqs"] == 64
  assert played.given["load_format"] == "dummy" and played.given["skip_tokenizer_init"]


def test_its_defaults_are_the_rows_of_the_readme(peer):
  flags = peer.parse([])
  assert peer.rows_of(flags.rows) == [
    (1, 600, 256, 0, 0),
    (64, 600, 256, 0, 0),
    (256, 600, 256, 0, 0),
    (64, 200, 256, 1, 8192),
    (256, 200, 256, 1, 8192),
    (64, 200, 256, 10, 8192),
  ]
  assert peer.longest_of(peer.rows_of(flags.rows), mixed=True) == 8192 + 200 + 256


def test_transformers_reads_the_shapes_that_it_writes(peer, tmp_path):
  peer.write_model(tmp_path, named("qwen3-1.7b"), 8648)
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  assert isinstance(config, transformers.Qwen3Config) and str(config.dtype).endswith("bfloat16")
  assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (151936, 2048, 6144)
  assert (config.num_hidden_layers, config.num_attention_heads) == (28, 16)
  assert (config.num_key_value_heads, config.head_dim) == (8, 128)
  assert config.tie_word_embeddings and config.max_position_embeddings == 8648


def test_too_few_tokens_and_a_full_cache_are_no_figure(peer, played, monkeypatch):
  played.short = True
  with pytest.raises(RuntimeError, match="answered with 4 tokens: not 2 times 3"):
    peer.generated(played, [[1], [2]], 3, 1)
  monkeypatch.setattr(peer.time, "sleep", lambda seconds: None)
  played.reset_prefix_cache = lambda: False
  with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
    peer.generated(played, [[1], [2]], 3, 1)


def test_without_vllm_it_says_so_in_one_line(peer, monkeypatch):
  monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="not installed here: pip install vllm"):
    peer.main([])


def test_an_unknown_row_is_named(peer, capsys):
  with pytest.raises(SystemExit):
    peer.parse(["--rows=goals,fast"])
  assert "'fast'" in capsys.readouterr().err
