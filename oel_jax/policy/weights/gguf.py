"""GGUF models: metadata → `Architecture`, tensors → parameters, vocabulary → tokenizer.

They are as llama.cpp writes them; `gguf_file` reads the file itself. Needs the extra `hf`.
"""

import operator
import pathlib
from typing import Any

import jax
import numpy as np

try:
  import tokenizers
except ImportError as error:
  raise ImportError(
    f'GGUF files need the extra "hf": pip install "oel_jax[hf]" ({error})'
  ) from error

from oel_jax.policy import parameters
from oel_jax.policy.architecture import Architecture, Llama3Scaling
from oel_jax.policy.attention import frequencies
from oel_jax.policy.tokenizers import import_transformers
from oel_jax.policy.weights import assemble, gguf_blocks, gguf_file, place
from oel_jax.policy.weights.gguf_file import File, read  # noqa: F401  (read is called as gguf.read)
from oel_jax.runtime import finite

transformers = import_transformers()

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

_name_of = operator.attrgetter("gguf")
EMBEDDING = parameters.BY_PATH["embed/embedding"].gguf
HEAD = parameters.BY_PATH["head/kernel"].gguf

# Metadata below the family's name that is read here, or changes nothing of the forward pass. Any
# other is refused.
READ = {
  "block_count",
  "embedding_length",
  "feed_forward_length",
  "attention.head_count",
  "attention.head_count_kv",
  "attention.key_length",
  "attention.value_length",
  "attention.layer_norm_rms_epsilon",
  "rope.dimension_count",
  "rope.freq_base",
  "context_length",
}
REAL = {"attention.layer_norm_rms_epsilon", "rope.freq_base"}  # the others are whole numbers
HARMLESS = {"vocab_size"}
FIXED = {"rope.scaling.type": "none", "rope.scale_linear": 1.0, "attention.causal": True}

# How text is cut before the merges. Qwen and Llama 3 differ in how many digits go together.
CUTS = {
  name: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
  + digits
  + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  for name, digits in (("qwen", r"\p{N}"), ("llama-3", r"\p{N}{1,3}"))
}
# tokenizer.ggml.pre → the way to cut. DeepSeek-R1's distilled Qwens have Qwen's vocabulary.
PRE = {
  "qwen2": "qwen", "deepseek-r1-qwen": "qwen",
  "llama-bpe": "llama-3", "llama3": "llama-3", "llama-v3": "llama-3",
  "smollm": "smollm",
}  # fmt: skip
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
SPECIAL = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "unk_token": "unknown_token_id",
  "pad_token": "padding_token_id",
}
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a response wherever they exist. A folder lists them in its
# generation_config.json, a GGUF file has no key for them; llama.cpp goes by their names, too.
END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def read_architecture(file: File) -> Architecture:
  """The shapes that the metadata give; the vocabulary and whether the head is tied come from the
  tensors.

  The head is tied if the file has none of its own, or one with the embedding's numbers. Qwen's
  files have one that is quantised in another way, so with other numbers: it counts.

  Raises:
    ValueError: metadata are missing, or say something that this decoder does not do; names the key
      and its value.
  """
  kind = file.metadata.get("general.type", "model")
  if kind != "model":
    raise ValueError(
      f'{file.path}: "general.type" is {kind!r}: it must be "model"; an adapter must be merged '
      "into its base model first"
    )
  family = file.metadata.get("general.architecture")
  if family not in FAMILIES:
    raise ValueError(
      f'{file.path}: "general.architecture" is {family!r}: it must be one of '
      f"{', '.join(map(repr, FAMILIES))}"
    )
  given = {
    key.removeprefix(f"{family}."): value
    for key, value in file.metadata.items()
    if key.startswith(f"{family}.")
  }
  for name in READ & given.keys():
    value, kind = given[name], (int, float) if name in REAL else int
    if isinstance(value, list):
      raise ValueError(
        f'{file.path}: "{family}.{name}" is {value!r:.100}: layers that differ are not supported'
      )
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < np.inf:
      whole = "" if name in REAL else "whole "
      raise ValueError(
        f'{file.path}: "{family}.{name}" is {value!r:.100}: it must be a {whole}number above 0'
      )

  def need(name: str) -> Any:
    if name not in given:
      raise ValueError(f'{file.path}: "{family}.{name}" is missing')
    return given[name]

  if EMBEDDING not in file.tensors:
    raise ValueError(f"{file.path}: {EMBEDDING} is missing")
  width, heads = need("embedding_length"), need("attention.head_count")
  size = given.get("attention.key_length", width // heads)
  fixed = FIXED | {"attention.value_length": size, "rope.dimension_count": size}
  for name, value in given.items():
    if name in fixed and value != fixed[name]:
      raise ValueError(
        f'{file.path}: "{family}.{name}" is {value!r}: only {fixed[name]!r} is supported'
      )
    if name not in READ | HARMLESS and name not in fixed and value not in (0, ""):
      raise ValueError(
        f'{file.path}: "{family}.{name}" is {value!r:.100}: this decoder does not know it'
      )
  theta = _plain(given.get("rope.freq_base", 10000.0))
  return Architecture(
    vocabulary=file.tensors[EMBEDDING].shape[0],
    width=width,
    layers=need("block_count"),
    heads=heads,
    kv_heads=given.get("attention.head_count_kv", heads),
    head_size=size,
    feedforward=need("feed_forward_length"),
    rope_theta=theta,
    rope_scaling=_scaling(file, size, theta) if family == "llama" else None,
    norm_eps=_plain(need("attention.layer_norm_rms_epsilon")),
    qk_norm=family == "qwen3",
    qkv_bias=family == "qwen2",
    tied_head=_is_tied(file),
    max_positions=given.get("context_length"),
  )


def _is_tied(file: File) -> bool:
  head = file.tensors.get(HEAD)
  return head is None or head.holds_what(file.tensors[EMBEDDING])


def _plain(value: float) -> float:
  """The shortest number that is this float32: 1e-5, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _scaling(file: File, size: int, theta: float) -> Llama3Scaling | None:
  """Llama 3's scaling, which GGUF keeps only as what each frequency is divided by. Every release
  differs in the factor alone.
  """
  if ROPE_FACTORS not in file.tensors:
    return None
  found = file.tensors[ROPE_FACTORS].values()
  # Rounded, for it is a quotient of float32 numbers.
  scaling = Llama3Scaling(round(float(found.max()), 3), 1.0, 4.0, 8192.0)
  right = np.asarray(frequencies(size, theta) / frequencies(size, theta, scaling))
  if found.shape != right.shape or not np.allclose(found, right, rtol=1e-3):
    raise ValueError(
      f"{file.path}: {ROPE_FACTORS} is not Llama 3's scaling of rotary positions ({scaling}), "
      "which is the only one that is supported"
    )
  return scaling


def config_fields(file: File) -> dict[str, int]:
  """What the metadata say for a config.json beyond the architecture: first and last token."""
  keys = {name: f"tokenizer.ggml.{name}" for name in ("bos_token_id", "eos_token_id")}
  return {name: file.metadata[key] for name, key in keys.items() if key in file.metadata}


def load(
  file: File, architecture: Architecture, *, dtype: Any = np.float32, shardings: Any = None
) -> Any:
  """Reads the parameters, tensor by tensor, each straight to its devices.

  Args:
    file: from `read`.
    architecture: from `read_architecture`.
    dtype: of the parameters returned.
    shardings: tree of shardings (`mesh.param_shardings`); None for the default device.

  Returns:
    The parameter tree of `parameters.init`, layers stacked.

  Raises:
    ValueError: tensors are missing, unknown or misshaped: one error lists them all; or one holds
      numbers that are not finite.
  """
  turned = {
    name
    for name, (parameter, _) in assemble.names(architecture, _name_of).items()
    if parameter.rotated and file.metadata["general.architecture"] == "llama"
  }
  left = dict(file.tensors)
  if architecture.rope_scaling:
    del left[ROPE_FACTORS]
  if architecture.tied_head:
    left.pop(HEAD, None)  # the embedding once more
  tensors = {
    # llama.cpp rotates neighbouring rows of a llama's heads against each other, we the two halves
    # of a head.
    name: _to_place(file.path, tensor, architecture.head_size if name in turned else 0)
    for name, tensor in left.items()
  }
  complaint = f"{file.path}: the tensors do not fit the metadata"
  return assemble.assemble(
    complaint, tensors, architecture, _name_of, dtype=dtype, shardings=shardings
  )


def _to_place(path: pathlib.Path, tensor: gguf_file.Tensor, interleaved: int) -> place.Tensor:
  def values() -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a scale that is no number is told of by who checks
      return tensor.values()

  mapped = tensor.mapped()
  if mapped is None:  # of a type that only the gguf package reads
    raw, raw_type = values, jax.ShapeDtypeStruct(tensor.shape, np.float32)
  else:
    raw, raw_type = lambda: mapped, jax.ShapeDtypeStruct(mapped.shape, mapped.dtype)
  in_blocks = tensor.kind in gguf_blocks.TYPES
  return place.Tensor(
    shape=tensor.shape,
    checked=lambda: finite.checked(path, tensor.name, values()),
    raw=raw,
    raw_type=raw_type,
    decode=gguf_blocks.decoder(tensor.kind) if in_blocks else place.plain,
    interleaved=interleaved,
  )


def eos_ids(file: File) -> list[int]:
  """The ids that end a response: those that the metadata name, and tokens that always do."""
  prefix = "tokenizer.ggml."
  named = [file.metadata[prefix + key] for key in END_KEYS if prefix + key in file.metadata]
  kinds = zip(file.metadata[prefix + "tokens"], file.metadata[prefix + "token_type"], strict=True)
  always = [i for i, pair in enumerate(kinds) if pair[0] in END_NAMES and pair[1] == CONTROL]
  return list(dict.fromkeys([*named, *always]))


def tokenizer(file: File) -> transformers.PreTrainedTokenizerFast:
  """The file's byte-level BPE vocabulary, with its chat template, as a `transformers` tokenizer.

  Built here rather than by `transformers`, whose reader of GGUF wants torch and cuts SmolLM's
  digits wrongly. A token that the file marks as control is special, one that it marks as the user's
  is an added token, one that it marks as unused is none; nothing is put before or after an encoded
  text. Text for Qwen is brought to Unicode's normal form C as by its tokenizer.json, though the
  file says nothing of it.

  Raises:
    ValueError: another kind of vocabulary or of cutting text, or metadata are missing or do not fit
      one another; names the key and its value.
  """
  prefix = "tokenizer.ggml."
  given = {
    key.removeprefix(prefix): value
    for key, value in file.metadata.items()
    if key.startswith(prefix)
  }
  if given.get("model") != "gpt2":
    raise ValueError(
      f'{file.path}: "{prefix}model" is {given.get("model")!r}: only "gpt2", byte-level BPE, is '
      "supported"
    )
  missing = [
    name for name in ("tokens", "token_type", "merges", "eos_token_id") if name not in given
  ]
  if missing:
    raise ValueError(
      f"{file.path}: {', '.join(prefix + name for name in missing)} missing: there is no tokenizer "
      "to read"
    )
  for name in ("tokens", "token_type", "merges"):
    if not isinstance(given[name], list):
      raise ValueError(f'{file.path}: "{prefix}{name}" is {given[name]!r:.99}: it must be a list')
  tokens, kinds = given["tokens"], given["token_type"]
  if len(tokens) != len(kinds):
    raise ValueError(
      f'{file.path}: "{prefix}tokens" holds {len(tokens)} and "{prefix}token_type" {len(kinds)}: '
      "there must be a type for each token"
    )
  named = {name: given[name] for name in (*SPECIAL.values(), *END_KEYS) if name in given}
  for name, i in named.items():
    if not isinstance(i, int) or not 0 <= i < len(tokens):
      raise ValueError(
        f'{file.path}: "{prefix}{name}" is {i!r}: it must be the number of one of the '
        f"{len(tokens)} tokens"
      )
  cut = _cut(file.path, given.get("pre"))
  spare = {i for i, kind in enumerate(kinds) if kind == UNUSED} - set(named.values())
  ids = {token: i for i, token in enumerate(tokens) if i not in spare}
  merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
  whole = cut == "llama-3"  # a word that is a token is that token, whatever the merges make of it
  try:
    model = tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=whole)
  except Exception as error:  # the library raises nothing more special
    raise ValueError(f'{file.path}: "{prefix}merges" do not fit the tokens ({error})') from error
  backend = tokenizers.Tokenizer(model)
  if cut == "qwen":
    backend.normalizer = tokenizers.normalizers.NFC()
  backend.pre_tokenizer = _pre_tokenizer(cut)
  backend.decoder = tokenizers.decoders.ByteLevel()
  for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
    add(
      [
        tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, found in zip(tokens, kinds, strict=True)
        if found == kind
      ]
    )
  roles = {ours: tokens[named[theirs]] for ours, theirs in SPECIAL.items() if theirs in named}
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    name_or_path=str(file.path),
    clean_up_tokenization_spaces=False,
    chat_template=file.metadata.get("tokenizer.chat_template"),
    **roles,
  )


def _cut(path: pathlib.Path, name: str | None) -> str:
  if name not in PRE:
    raise ValueError(
      f'{path}: "tokenizer.ggml.pre" is {name!r}: of the ways to cut text, only '
      f"{', '.join(map(repr, PRE))} are supported"
    )
  return PRE[name]


def _pre_tokenizer(cut: str) -> tokenizers.pre_tokenizers.PreTokenizer:
  split, byte_level = tokenizers.pre_tokenizers.Split, tokenizers.pre_tokenizers.ByteLevel
  if cut == "smollm":
    first = tokenizers.pre_tokenizers.Digits(individual_digits=True)
  else:
    first = split(tokenizers.Regex(CUTS[cut]), behavior="isolated")
  to_bytes = byte_level(add_prefix_space=False, use_regex=cut == "smollm")
  return tokenizers.pre_tokenizers.Sequence([first, to_bytes])
