"""The shipped weights and vocabulary of the embedded policy, their hashes checked."""

import pathlib
from typing import Any

import jax.numpy as jnp

from oel_jax.policy import architecture
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import SentencePieceTokenizer
from oel_jax.policy.weights import native

DATA = pathlib.Path(__file__).parent / "data"
WEIGHTS, TOKENIZER, SUMS = "pocket.safetensors", "tokenizer.model", "sha256sums"


def load(dtype: Any = jnp.float32, folder: pathlib.Path = DATA) -> Policy:
  """Returns the embedded policy, parameters in float32, activations in `dtype`.

  Raises:
    ValueError: a file's sha256 is not the one in `sha256sums`: damaged, or weights and vocabulary
      that do not belong together.
  """
  for line in (folder / SUMS).read_text().splitlines():
    expected, name = line.split()
    found = native.digest(folder / name)
    if found != expected:
      raise ValueError(
        f"{folder / name}: its sha256 is {found}, {SUMS} says {expected}: the file is damaged; "
        "install the package again"
      )
  tokenizer = SentencePieceTokenizer((folder / TOKENIZER).read_bytes())
  name = native.metadata(folder / WEIGHTS)["architecture"]
  params = native.load(folder / WEIGHTS, architecture.named(name))
  return Policy(architecture.named(name), params, tokenizer, dtype)
