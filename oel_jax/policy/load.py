"""The policy that a configuration names: from a folder, a file, or a function of another module."""

import functools
import pathlib
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from oel_jax.policy import architecture as architecture_lib
from oel_jax.policy import parameters, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import groups
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from oel_jax.policy.weights import huggingface, native
from oel_jax.runtime import files, mesh, named, target

TOKENIZER = "tokenizer.model"  # beside a .safetensors file of ours, as pre-training leaves it
FORMS = (
  "a Hugging Face folder, a .gguf file, a .safetensors file of ours, or MODULE:NAME or "
  "FILE.py:NAME, a function that is given the compute dtype and returns a Policy"
)
# What reads the parameters, float32, as the given shardings place them.
Read = Callable[..., Any]


def load_policy(
  config: Any,
  devices: jax.sharding.Mesh,
  *,
  response_tokens: int | None = None,
  field: str = "policy.weights",
  sample_tensor: int = 1,
  narrow: bool = False,
) -> Policy:
  """Returns the policy that config.policy names, its parameters in float32 and placed as training
  leaves them.

  Args:
    config: config.policy; its `weights` are one of FORMS.
    devices: the mesh.
    response_tokens: the longest response that is to follow a prompt; None: nothing is sampled.
    field: of the configuration, that its weights came from: errors name it.
    sample_tensor: config.mesh.sample_tensor.
    narrow: whether matrices and tables are held in the type that it computes in, for they are not
      trained.

  Raises:
    ValueError: no such weights, or damaged ones; or they are of another architecture than
      config.policy.architecture; or, which shows before they are read: they are too small for the
      tokenizer, do not divide into `sample_tensor`, or prompts and responses may be longer than the
      model's context.
    OSError: a file is missing in the folder.
  """
  dtype = config.compute_dtype
  if dtype == "auto":
    dtype = "float32" if target.backend() == "cpu" else "bfloat16"
  dtype = jnp.dtype(dtype)
  architecture, tokenizer, read = _source(config, dtype, f"config.{field}")
  _agree(config, architecture, tokenizer, f"config.{field}")
  if response_tokens is not None:
    _check_context(config, architecture.max_positions, response_tokens)
  if sample_tensor != 1:
    groups.check(architecture, sample_tensor, len(groups.local(devices)))
  params = read(shardings=mesh.param_shardings(devices, parameters.abstract(architecture)))
  if narrow:
    params = transformer.cast(params, dtype, tables=True)
  return Policy(architecture, params, tokenizer, dtype, sample_tensor)


def _source(config: Any, dtype: jnp.dtype, field: str) -> tuple[Architecture, Any, Read]:
  """The architecture, the tokenizer and what reads the parameters, which takes longest."""
  if config.weights is None:
    raise ValueError(f"{field} is not set: it must be {FORMS}")
  if named.is_name(config.weights):
    policy = _made(config.weights, dtype, field)
    return policy.architecture, policy.tokenizer, functools.partial(_place, policy.params)
  path = files.local(config.weights, field)
  if path.is_dir():
    architecture = huggingface.read_architecture(path)
    tokenizer = HuggingFaceTokenizer.from_folder(path)
    return architecture, tokenizer, functools.partial(huggingface.load, path, architecture)
  if path.suffix == ".gguf":
    from oel_jax.policy.weights import gguf  # here, for it needs packages of the extra "hf"

    file = gguf.read(path)
    architecture = gguf.read_architecture(file)
    tokenizer = HuggingFaceTokenizer(gguf.tokenizer(file), gguf.eos_ids(file))
    return architecture, tokenizer, functools.partial(gguf.load, file, architecture)
  return _own_file(config, path, field)


def _made(text: str, dtype: jnp.dtype, field: str) -> Policy:
  """What the user's function makes."""
  policy = named.called(text, field, named.function(text, field), dtype)
  if not isinstance(policy, Policy):
    raise ValueError(f"{field} is {text!r}: it returns {reprlib.repr(policy)}: it must be a Policy")
  return policy


def _own_file(config: Any, path: pathlib.Path, field: str) -> tuple[Architecture, Any, Read]:
  """A .safetensors file of ours, and the vocabulary beside it."""
  if not path.is_file():
    raise ValueError(
      f"{field} is {config.weights!r}: there is no such file or folder; it must be {FORMS}"
    )
  name = config.architecture
  if name == "auto":
    name = native.metadata(path).get("architecture")
  if name is None:
    raise ValueError(
      f'config.policy.architecture is "auto", but {path} does not say its own: give a name of '
      "policy/architecture.py"
    )
  vocabulary = path.with_name(TOKENIZER)
  if not vocabulary.is_file():
    raise ValueError(
      f"{field} is {config.weights!r}: {vocabulary}, the SentencePiece model that "
      "the weights were trained with, must lie beside it"
    )
  architecture = architecture_lib.named(name)
  tokenizer = SentencePieceTokenizer(vocabulary.read_bytes())
  return (
    architecture,
    tokenizer,
    lambda shardings: _place(native.load(path, architecture), shardings),
  )


def _place(params: Any, shardings: Any) -> Any:
  """To jit, host arrays are not what training leaves: with them, every program would be compiled
  again after round 1.
  """
  return mesh.put(params, shardings)


def _agree(config: Any, architecture: Architecture, tokenizer: Any, field: str) -> None:
  """Raises ValueError if the weights are of another architecture than the configuration names, or
  lack ids of the tokenizer.
  """
  if config.architecture != "auto" and architecture_lib.named(config.architecture) != architecture:
    raise ValueError(
      f"config.policy.architecture is {config.architecture!r}, but {config.weights} holds "
      f'{architecture}: it must be "auto" or fit'
    )
  if tokenizer.vocabulary > architecture.vocabulary:
    raise ValueError(
      f"{field} is {config.weights!r}: its tokenizer has {tokenizer.vocabulary} ids "
      f"but its weights only {architecture.vocabulary} rows: tokenizer and weights must be of one "
      "model, with a row for each id"
    )


def _check_context(config: Any, context: int | None, response_tokens: int) -> None:
  """Raises ValueError if a prompt that is allowed and its response are longer than the context."""
  together = config.max_prompt_tokens + response_tokens
  if context is not None and together > context:
    limit = context - response_tokens
    right = f"it must be at most {limit}"
    if limit <= 0:
      right = "max_response_tokens must be far smaller"
    raise ValueError(
      f"config.policy.max_prompt_tokens is {config.max_prompt_tokens}, with up to "
      f"{response_tokens} tokens of a response {together}, but the context length "
      f"(max_position_embeddings) of {config.weights} is {context}: {right}"
    )
