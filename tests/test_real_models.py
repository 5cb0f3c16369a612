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
from processes import python_path

FILES = ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
QUESTIONS = (
  "What is the capital of France?",
  "Write a Python function that reverses a string.",
  "List 3 uses of a brick.",
  "Explain why the sky is blue to a child.",
  "Translate to German: Good morning, my friend.",
)
TOKENS = 24
FOLDER = os.environ.get("OEL_MODELS", "")


def read_prompts(path):
  from oel_jax.conversations.schema import Message
  from oel_jax.policy.tokenizers import HuggingFaceTokenizer
  from oel_jax.policy.weights import gguf

  file = gguf.read(path)
  tokenizer = HuggingFaceTokenizer(gguf.tokenizer(file), gguf.eos_ids(file))
  return file, tokenizer, [tokenizer.chat((Message("user", text),)) for text in QUESTIONS]


def differing(path):
  """The tensors of a file whose parameters are not the `gguf` package's numbers, bit for bit."""
  import flax
  import gguf as package
  import jax
  import numpy as np

  from oel_jax.policy.weights import assemble, gguf

  file = gguf.read(path)
  shape = gguf.read_architecture(file)
  found = flax.traverse_util.flatten_dict(gguf.load(file, shape), sep="/")
  bits = lambda numbers: np.ascontiguousarray(numbers).view(np.uint32)
  wrong = []
  for name, (parameter, layer) in assemble.names(shape, lambda one: one.gguf).items():
    tensor, leaf = file.tensors[name], found[parameter.path]
    right = package.dequantize(tensor.data, tensor.kind).reshape(tensor.shape)
    each = jax.device_get(leaf if layer is None else leaf[layer])
    if not np.array_equal(bits(each), bits(parameter.from_stored(right, shape))):
      wrong.append(name)
  return wrong


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


def in_a_process(name, what):
  """What one of the functions above returns, for a file of `FOLDER`."""
  path = pathlib.Path(FOLDER).expanduser() / name
  if not path.is_file():
    pytest.skip(f"{path}: no such file")
  places = os.environ | {"PYTHONPATH": python_path()}
  done = subprocess.run(
    [sys.executable, __file__, what, path], capture_output=True, text=True, env=places
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="needs OEL_MODELS=FOLDER, a folder with the real weights")
@pytest.mark.parametrize("name", FILES)
def test_a_real_model_continues_as_in_transformers(name):
  pytest.importorskip("torch")
  found = {side: in_a_process(name, side) for side in ("ours", "theirs")}
  assert found["ours"] == found["theirs"]
  assert all(len(ids) > 3 for ids in found["ours"])


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="needs OEL_MODELS=FOLDER, a folder with the real weights")
@pytest.mark.parametrize("name", FILES)
def test_the_parameters_of_a_real_model_are_the_packages_numbers(name):
  assert in_a_process(name, "differing") == []


if __name__ == "__main__":
  sides = {"ours": ours, "theirs": theirs, "differing": differing}
  print(json.dumps(sides[sys.argv[1]](pathlib.Path(sys.argv[2]))))
