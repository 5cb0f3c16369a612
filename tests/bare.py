"""What test_installed.py runs where nothing but the package's own requirements is installed; so no
pytest and no torch here.

python tests/bare.py core FOLDER    a round of the embedded policy; what only an extra
                                  brings cannot be imported
python tests/bare.py hf FOLDER      a round of a small Hugging Face folder, and out again; a
                                  GGUF file of the same weights gives the same policy
python tests/bare.py both FOLDER    a round of both
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable

import numpy as np

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
SAYS = "- EXPERIENCE ITEM: H is a hole [down]"  # knowledge to the extractor, a move to the game
FEWER = {
  "rounds": 1,
  "deployment.episodes": 2,
  "deployment.max_turns": 2,
  "deployment.max_response_tokens": 32,
  "deployment.top_p": 0.8,
  "deployment.top_k": 20,
  "extraction.texts": 2,
  "extraction.trajectories": 2,
  "extraction.use": 2,
  "extraction.max_response_tokens": 32,
  "consolidation.steps": 1,
  "consolidation.batch_size": 2,
  "consolidation.gate_episodes": 0,
  "consolidation.log_probe": 0,
  "evaluation.episodes": 2,
  "evaluation.in_context": False,
  "evaluation.accumulation": (),
  "evaluation.retention": 0,
}


def brought_by(name: str) -> set[str]:
  """All distributions that installing `name` without extras brings, itself included, as far as they
  are installed.
  """
  from packaging.requirements import Requirement

  found, waiting = set(), [Requirement(name)]
  while waiting:
    asked = waiting.pop()
    key = (normal(asked.name), frozenset(asked.extras))
    if key in found:
      continue
    found.add(key)
    try:
      lines = importlib.metadata.requires(asked.name) or []
    except importlib.metadata.PackageNotFoundError:
      continue
    for further in map(Requirement, lines):
      if further.marker is None or any(
        further.marker.evaluate({"extra": extra}) for extra in ("", *asked.extras)
      ):
        waiting.append(further)
  return {name for name, _ in found}


def normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


class Refuse:
  """Finds no module that these names begin with, as if their distributions were not installed."""

  def __init__(self, names: Iterable[str]):
    self.names = frozenset(names)

  def find_spec(self, name: str, path: object = None, target: object = None) -> None:
    if name.partition(".")[0] in self.names:
      raise ModuleNotFoundError(
        f"No module named {name!r}: no requirement of oel_jax itself brings it", name=name
      )


def core(folder: pathlib.Path) -> None:
  kept = brought_by("oel_jax")
  found = importlib.metadata.packages_distributions()
  others = {
    module for module, names in found.items() if not kept & {normal(name) for name in names}
  }
  assert {"transformers", "tokenizers", "gguf", "jinja2"} <= others and not {
    "jax",
    "flax",
    "numpy",
    "textarena",
  } & others, others
  sys.meta_path.insert(0, Refuse(others))
  fields = [f"--config.{name}={value}" for name, value in FEWER.items()]
  sys.argv = [
    "oel_jax",
    f"--config={EXPERIMENTS}/frozen_lake.py:pocket",
    f"--workdir={folder}/run",
    *fields,
  ]
  try:
    runpy.run_module("oel_jax.main", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    assert not end.code, end.code
  results = json.loads((folder / "run/report/results.json").read_text())
  assert [entry["round"] for entry in results["rounds"]] == [1] and (
    folder / "run/report/index.html"
  ).exists()


def hf(folder: pathlib.Path) -> None:
  """A round of the folder; the GGUF file is read."""
  tokenizer, tensors = write_both(folder)
  there_and_back(folder / "model", tokenizer, tensors)
  same_policy(folder / "model", folder / "model.gguf")


def both(folder: pathlib.Path) -> None:
  """A round of each."""
  tokenizer, tensors = write_both(folder)
  trained = [
    there_and_back(weights, tokenizer, tensors)
    for weights in (folder / "model", folder / "model.gguf")
  ]
  for name, value in trained[0].items():
    np.testing.assert_array_equal(
      trained[1][name], value, err_msg=f"{name}: the two files hold the same model"
    )


def write_both(folder: pathlib.Path) -> tuple[object, dict[str, np.ndarray]]:
  """Writes model/ and model.gguf; returns their tokenizer and tensors."""
  assert importlib.util.find_spec("torch") is None, (
    "torch is here: it brings packages that hide what the extra lacks"
  )
  from oel_jax.policy.tokenizers import HuggingFaceTokenizer, import_transformers

  import_transformers()  # as the package does it: what it prints is looked at
  import families

  (folder / "model").mkdir()
  tokenizer = families.tokenizer("qwen3")
  tokenizer.save_pretrained(folder / "model")
  tensors = write_folder(folder / "model", tokenizer, HuggingFaceTokenizer(tokenizer))
  write_gguf(folder / "model.gguf", tokenizer, tensors)
  return tokenizer, tensors


def same_policy(*files: pathlib.Path) -> None:
  """Reads both; their parameters, and the ids of a chat, are the same."""
  import jax

  from oel_jax import config as config_lib
  from oel_jax.conversations.schema import Message
  from oel_jax.policy import load
  from oel_jax.runtime import mesh

  config = config_lib.default()
  found = []
  for file in files:
    config.policy.weights = str(file)
    policy = load.load_policy(config.policy, mesh.make_mesh(config.mesh))
    chat = policy.tokenizer.chat([Message("user", "How are you?")])
    found.append((policy.architecture, policy.params, chat))
  assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
  jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])


def write_folder(folder: pathlib.Path, tokenizer: object, chat: object) -> dict[str, np.ndarray]:
  """A small Qwen3, written without the package; its head is bent, so that after any prompt it
  mostly says SAYS.
  """
  import safetensors.numpy

  from oel_jax.conversations.schema import Message

  V, D, F, H, L = 512, 64, 96, 16, 2
  config = dict(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=H,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=32768,
    eos_token_id=tokenizer.eos_token_id,
    hidden_act="silu",
    torch_dtype="float32",
  )
  (folder / "config.json").write_text(json.dumps(config))
  rng = np.random.default_rng(0)
  random = lambda *shape: rng.normal(scale=0.02, size=shape).astype(np.float32)
  embedding = rng.normal(size=(V, D))
  embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
  head = random(V, D)
  steps = set()
  for thinking in (True, False):
    chain = [
      chat.chat([Message("user", "?")], thinking=thinking)[-1],
      *chat.encode(SAYS),
      tokenizer.eos_token_id,
    ]
    assert len(set(chain)) == len(chain), "each token needs a successor of its own"
    steps.update(zip(chain, chain[1:]))
  for now, then in steps:
    # Not so far that no other token has a probability, and no gradient is left.
    head[then] += embedding[now]
  tensors = {
    "model.embed_tokens.weight": np.float32(8 * embedding),
    "lm_head.weight": head,
    "model.norm.weight": np.ones(D, np.float32),
  }
  for layer in range(L):
    name = f"model.layers.{layer}"
    tensors |= {
      f"{name}.{norm}_layernorm.weight": np.ones(D, np.float32)
      for norm in ("input", "post_attention")
    }
    tensors |= {f"{name}.self_attn.{x}_norm.weight": np.ones(H, np.float32) for x in "qk"}
    tensors |= {
      f"{name}.self_attn.{x}_proj.weight": random(heads * H, D)
      for x, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    tensors |= {
      f"{name}.self_attn.o_proj.weight": random(D, 4 * H),
      f"{name}.mlp.down_proj.weight": random(D, F),
    }
    tensors |= {f"{name}.mlp.{x}_proj.weight": random(F, D) for x in ("gate", "up")}
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return tensors


def write_gguf(path: pathlib.Path, tokenizer: object, tensors: dict[str, np.ndarray]) -> None:
  """The same model as llama.cpp's converter writes it, in float32, with the vocabulary and the chat
  template.
  """
  import gguf

  writer = gguf.GGUFWriter(path, "qwen3")
  for name, value in dict(
    block_count=2,
    context_length=32768,
    embedding_length=64,
    feed_forward_length=96,
    **{
      "attention.head_count": 4,
      "attention.head_count_kv": 2,
      "attention.key_length": 16,
      "attention.value_length": 16,
    },
  ).items():
    writer.add_uint32(f"qwen3.{name}", value)
  writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
  writer.add_float32("qwen3.rope.freq_base", 1e6)
  vocabulary = tokenizer.get_vocab()
  tokens = sorted(vocabulary, key=vocabulary.get)
  merges = [
    " ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
  ]
  kinds = {
    str(token): 3 if token.special else 4 for token in tokenizer.added_tokens_decoder.values()
  }
  writer.add_string("tokenizer.ggml.model", "gpt2")
  writer.add_string("tokenizer.ggml.pre", "qwen2")
  writer.add_array("tokenizer.ggml.tokens", tokens)
  writer.add_array("tokenizer.ggml.token_type", [kinds.get(token, 1) for token in tokens])
  writer.add_array("tokenizer.ggml.merges", merges)
  writer.add_uint32("tokenizer.ggml.eos_token_id", tokenizer.eos_token_id)
  writer.add_uint32("tokenizer.ggml.padding_token_id", tokenizer.pad_token_id)
  writer.add_string("tokenizer.chat_template", tokenizer.chat_template)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
  for name, value in tensors.items():
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def there_and_back(
  weights: pathlib.Path, tokenizer: object, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Reads the model, plays, trains a step, exports, and reads what was exported; returns the
  trained tensors.
  """
  import jax
  import safetensors.numpy

  from oel_jax import config as config_lib
  from oel_jax import loop
  from oel_jax.conversations.schema import Message
  from oel_jax.policy import load
  from oel_jax.runtime import mesh
  from oel_jax.tasks import export

  config, workdir = config_lib.default(), weights.with_name(f"{weights.name}-run")
  config.update_from_flattened_dict(FEWER | {"policy.weights": str(weights), "mesh.data": 1})
  loop.run(config, workdir)
  played = [
    json.loads(line)
    for line in (workdir / "round_1/user/trajectories.jsonl").read_text().splitlines()
  ]
  assert "[down]" in json.dumps(played), played[0]
  assert "H is a hole" in (workdir / "round_1/knowledge/00.md").read_text()
  export.run(config, workdir, dtype="float32")
  found = safetensors.numpy.load_file(workdir / "export/model.safetensors")
  assert {name: value.shape for name, value in found.items()} == {
    name: value.shape for name, value in tensors.items()
  }
  moved = [name for name in found if not np.array_equal(found[name], tensors[name])]
  assert set(moved) == set(tensors) and all(np.isfinite(value).all() for value in found.values()), (
    moved
  )
  config.policy.weights = str(workdir / "export")
  policy = load.load_policy(config.policy, mesh.make_mesh(config.mesh))
  np.testing.assert_array_equal(
    jax.device_get(policy.params["embed"]["embedding"]), found["model.embed_tokens.weight"]
  )
  chat = [{"role": "user", "content": "How are you?"}]
  right = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
  assert policy.tokenizer.chat([Message("user", "How are you?")]) == right
  return found


if __name__ == "__main__":
  print(importlib.util.find_spec("oel_jax").origin)
  {"core": core, "hf": hf, "both": both}[sys.argv[1]](pathlib.Path(sys.argv[2]))
