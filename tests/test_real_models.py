"""Real weights: the greedy continuations of `transformers` reading the same GGUF file.

Runs where the environment's OEL_MODELS names a folder that holds the files:

    OEL_MODELS=FOLDER python -m pytest -m slow tests/test_real_models.py

Each side is a process of its own, one after the other: the larger model takes 9 GB and ours 17 GB,
for the sampler keeps weights of its own layout beside the others.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FILES = ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
QUESTIONS = (
  "What is the capital of France?",
  "Write a Python function that reverses a string.",
  "List 3 uses of a brick.",
  "Explain why the sky is blue to a child.",
  "Translate to German: Good morning, my friend.",
)
TOKENS = 24
ROOT = str(pathlib.Path(__file__).parents[1])
FOLDER = os.environ.get("OEL_MODELS", "")


def read_prompts(path):
  from oel_jax.conversations.schema import Message
  from oel_jax.policy.tokenizers import HuggingFaceTokenizer
  from oel_jax.policy.weights import gguf

  file = gguf.read(path)
  tokenizer = HuggingFaceTokenizer(gguf.tokenizer(file), gguf.eos_ids(file))
  return file, tokenizer, [tokenizer.chat((Message("user", text),)) for text in QUESTIONS]


def ours(path):
  from oel_jax.policy.sampling import sampler as generate
  from oel_jax.policy.weights import gguf

  file, tokenizer, prompts = read_prompts(path)
  shape = gguf.read_architecture(file)
  return generate.generate(
    gguf.load(file, shape),
    shape,
    prompts,
    range(len(prompts)),
    max_new_tokens=TOKENS,
    sampling=generate.Sampling(1.0, top_k=1),
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )


def theirs(path):
  import torch
  import transformers

  _, tokenizer, prompts = read_prompts(path)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  ends = dict(eos_token_id=list(tokenizer.eos_ids), pad_token_id=tokenizer.pad_id)
  rows = [
    model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, **ends)[0]
    for prompt in prompts
  ]
  return [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="needs OEL_MODELS=FOLDER, a folder with the real weights")
@pytest.mark.parametrize("name", FILES)
def test_a_real_model_continues_as_in_transformers(name):
  pytest.importorskip("torch")
  path = pathlib.Path(FOLDER).expanduser() / name
  if not path.is_file():
    pytest.skip(f"{path}: no such file")
  found = {}
  for side in ("ours", "theirs"):
    command = [sys.executable, __file__, side, path]
    places = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(command, capture_output=True, text=True, env=places)
    assert done.returncode == 0, done.stderr[-2000:]
    found[side] = json.loads(done.stdout.splitlines()[-1])
  assert found["ours"] == found["theirs"]
  assert all(len(ids) > 3 for ids in found["ours"])


if __name__ == "__main__":
  print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[1]](pathlib.Path(sys.argv[2]))))
