"""GGUF files in, as llama.cpp writes them: metadata → `Architecture`, tensors (float or quantised) → parameters, vocabulary → tokenizer.

A file is opened once (`read`); its tensors stay on disk until `load` takes them one by one. Needs the extra `hf`.
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

try:
  import gguf
  import tokenizers
  import transformers
except ImportError as error:
  raise ImportError('GGUF files need the extra "hf": pip install "oel_jax[hf]"') from error
from gguf import GGMLQuantizationType as Type

from oel_jax.policy import huggingface
from oel_jax.policy.architecture import Architecture, Llama3Scaling
from oel_jax.policy.attention import frequencies
from oel_jax.runtime import finite

FAMILIES = ("llama", "qwen2", "qwen3")
TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q6_K)
SLICE = 2**22  # numbers dequantised at once: the float32 copy of a large embedding would be as large as a small model
ROPE_FACTORS = "rope_freqs.weight"

# From Hugging Face's name of a tensor to llama.cpp's, one after the other.
RENAMED = (
    ("model.layers.", "blk."), ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"), ("lm_head", "output"),
)  # fmt: skip
NAMES = {path: functools.reduce(lambda name, pair: name.replace(*pair), RENAMED, name) for path, name in huggingface.NAMES.items()}

# Metadata below the family's name that is read here, or changes nothing of the forward pass. Any other is refused.
READ = {
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
}  # fmt: skip
HARMLESS = {"context_length", "vocab_size"}
FIXED = {"rope.scaling.type": "none", "rope.scale_linear": 1.0}

# How text is cut before the merges, by tokenizer.ggml.pre. Qwen2's and Llama 3's patterns differ in how many digits go together.
PATTERNS = {
    name: rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for name, digits in (("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}"))
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}


@dataclasses.dataclass(frozen=True)
class File:
  """An opened GGUF file.

  Attributes:
    path: where it lies.
    metadata: key → value; arrays are lists.
    tensors: name → `gguf.ReaderTensor`, its bytes still on disk.
  """

  path: pathlib.Path
  metadata: dict[str, Any] = dataclasses.field(repr=False)
  tensors: dict[str, Any] = dataclasses.field(repr=False)


def read(path: str | os.PathLike) -> File:
  """Opens a GGUF file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged or cut; or tensors have a type that is not read here, which are named with it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; config.policy.weights must be a GGUF file or a folder with a Hugging Face model")
  try:
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except (ValueError, LookupError, TypeError, OverflowError) as error:  # what the package happens to stumble over
    raise ValueError(f"{path}: damaged, cut, or newer than the gguf package ({type(error).__name__}: {error})") from error
  wrong = [f"{tensor.name} is {tensor.tensor_type.name}" for tensor in reader.tensors if tensor.tensor_type not in TYPES]
  if wrong:
    shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    raise ValueError(f"{path}: {shown}: of the types of tensors, {', '.join(known.name for known in TYPES)} are read here")
  return File(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def read_architecture(file: File) -> Architecture:
  """The shapes that the metadata give; the vocabulary and whether the head is tied come from the tensors.

  Raises:
    ValueError: metadata are missing, or say something that this decoder does not do; names the key and its value.
  """
  family = file.metadata.get("general.architecture")
  if family not in FAMILIES:
    raise ValueError(f'{file.path}: "general.architecture" is {family!r}: it must be one of {", ".join(map(repr, FAMILIES))}')
  given = {key.removeprefix(f"{family}."): value for key, value in file.metadata.items() if key.startswith(f"{family}.")}
  for name in READ & given.keys():
    if isinstance(given[name], list):
      raise ValueError(f'{file.path}: "{family}.{name}" is {given[name]!r:.100}: layers that differ are not supported')

  def need(name: str) -> Any:
    if name not in given:
      raise ValueError(f'{file.path}: "{family}.{name}" is missing')
    return given[name]

  if NAMES["embed/embedding"] not in file.tensors:
    raise ValueError(f"{file.path}: {NAMES['embed/embedding']} is missing")
  width, heads = need("embedding_length"), need("attention.head_count")
  size = given.get("attention.key_length", width // heads)
  fixed = FIXED | {"attention.value_length": size, "rope.dimension_count": size}
  for name, value in given.items():
    if name in fixed and value != fixed[name]:
      raise ValueError(f'{file.path}: "{family}.{name}" is {value!r}: only {fixed[name]!r} is supported')
    if name not in READ | HARMLESS and name not in fixed and value not in (0, ""):
      raise ValueError(f'{file.path}: "{family}.{name}" is {value!r:.100}: this decoder does not know it')
  theta = _plain(given.get("rope.freq_base", 10000.0))
  return Architecture(
      vocabulary=int(file.tensors[NAMES["embed/embedding"]].shape[-1]), width=width, layers=need("block_count"), heads=heads,
      kv_heads=given.get("attention.head_count_kv", heads), head_size=size, feedforward=need("feed_forward_length"), rope_theta=theta,
      rope_scaling=_scaling(file, size, theta) if family == "llama" else None, norm_eps=_plain(need("attention.layer_norm_rms_epsilon")),
      qk_norm=family == "qwen3", qkv_bias=family == "qwen2", tied_head=NAMES["head/kernel"] not in file.tensors,
  )  # fmt: skip


def _plain(value: float) -> float:
  """The shortest number that is this float32: 1e-5, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _scaling(file: File, size: int, theta: float) -> Llama3Scaling | None:
  """Llama 3's scaling, which GGUF keeps only as what each frequency is divided by. Every release differs in the factor alone."""
  if ROPE_FACTORS not in file.tensors:
    return None
  found = _values(file.tensors[ROPE_FACTORS], np.float32)
  scaling = Llama3Scaling(round(float(found.max()), 3), 1.0, 4.0, 8192.0)  # rounded, for it is a quotient of float32 numbers
  right = np.asarray(frequencies(size, theta) / frequencies(size, theta, scaling))
  if found.shape != right.shape or not np.allclose(found, right, rtol=1e-3):
    raise ValueError(
        f"{file.path}: {ROPE_FACTORS} is not Llama 3's scaling of rotary positions ({scaling}), which is the only one that is supported"
    )
  return scaling


def config_fields(file: File) -> dict[str, int]:
  """What the metadata say for a Hugging Face config.json beyond the architecture: context length, first and last token."""
  keys = {"max_position_embeddings": f"{file.metadata['general.architecture']}.context_length"}
  keys |= {name: f"tokenizer.ggml.{name}" for name in ("bos_token_id", "eos_token_id")}
  return {name: file.metadata[key] for name, key in keys.items() if key in file.metadata}


def _values(tensor: Any, dtype: Any) -> np.ndarray:
  """A tensor's numbers, [out, in]; a slice of rows at a time through float32."""
  shape = tuple(int(size) for size in reversed(tensor.shape))
  rows = tensor.data.reshape(-1, tensor.data.shape[-1])
  values = np.empty((len(rows), shape[-1]), dtype)
  step = max(1, SLICE // shape[-1])
  for start in range(0, len(rows), step):
    values[start : start + step] = gguf.dequantize(rows[start : start + step], tensor.tensor_type)
  return values.reshape(shape)


def load(file: File, architecture: Architecture, *, dtype: Any = np.float32, shardings: Any = None) -> Any:
  """Reads the parameters, tensor by tensor, each straight to its devices.

  Args:
    file: from `read`.
    architecture: from `read_architecture`.
    dtype: of the parameters returned.
    shardings: tree of shardings (`mesh.param_shardings`); None for the default device.

  Returns:
    The parameter tree of `model.init`, layers stacked.

  Raises:
    ValueError: tensors are missing, unknown or misshaped: one error lists them all; or one holds
      numbers that are not finite.
  """
  interleaved = {
      NAMES[f"layers/attention/{x}/kernel"].format(layer): heads
      for x, heads in (("q", architecture.heads), ("k", architecture.kv_heads)) for layer in range(architecture.layers)
      if file.metadata["general.architecture"] == "llama"
  }  # fmt: skip

  def take(name: str) -> np.ndarray:
    found = finite.checked(file.path, name, _values(file.tensors[name], dtype))
    if name not in interleaved:
      return found
    # llama.cpp rotates neighbouring rows of a llama's heads against each other, we the two halves of a head.
    return found.reshape(interleaved[name], -1, 2, found.shape[1]).swapaxes(1, 2).reshape(found.shape)

  shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in file.tensors.items()}
  if architecture.rope_scaling:
    del shapes[ROPE_FACTORS]
  complaint = f"{file.path}: the tensors do not fit the metadata"
  return huggingface.assemble(complaint, shapes, take, architecture, NAMES, dtype=dtype, shardings=shardings)


def tokenizer(file: File) -> transformers.PreTrainedTokenizerFast:
  """The file's byte-level BPE vocabulary, with its chat template, as a `transformers` tokenizer.

  Built here rather than by `transformers`, whose reader of GGUF wants torch and cuts SmolLM's digits wrongly. A token that the file
  marks as control is special, one that it marks as the user's is an added token; nothing is put before or after an encoded text.

  Raises:
    ValueError: another kind of vocabulary or of cutting text, or metadata are missing; names the key and its value.
  """
  prefix = "tokenizer.ggml."
  given = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
  if given.get("model") != "gpt2":
    raise ValueError(f'{file.path}: "{prefix}model" is {given.get("model")!r}: only "gpt2", byte-level BPE, is supported')
  missing = [name for name in ("tokens", "token_type", "merges", "eos_token_id") if name not in given]
  if missing:
    raise ValueError(f"{file.path}: {', '.join(prefix + name for name in missing)} missing: there is no tokenizer to read")
  ids = {token: i for i, token in enumerate(given["tokens"])}
  merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
  whole = given.get("pre") == "llama-bpe"  # Llama 3 takes a word that is a token as that token, whatever the merges make of it
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=whole))
  backend.pre_tokenizer = _cutting(file.path, given.get("pre"))
  backend.decoder = tokenizers.decoders.ByteLevel()
  for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
    add([
        tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, found in zip(given["tokens"], given["token_type"], strict=True) if found == kind
    ])  # fmt: skip
  named = {ours: given["tokens"][given[theirs]] for ours, theirs in SPECIAL.items() if theirs in given}
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, chat_template=file.metadata.get("tokenizer.chat_template"), clean_up_tokenization_spaces=False, **named
  )  # fmt: skip


def _cutting(path: pathlib.Path, name: str | None) -> tokenizers.pre_tokenizers.PreTokenizer:
  split, byte_level = tokenizers.pre_tokenizers.Split, tokenizers.pre_tokenizers.ByteLevel
  if name == "smollm":
    parts = [tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False, use_regex=True)]
  elif name in PATTERNS:
    parts = [split(tokenizers.Regex(PATTERNS[name]), behavior="isolated"), byte_level(add_prefix_space=False, use_regex=False)]
  else:
    known = ", ".join(map(repr, ("smollm", *PATTERNS)))
    raise ValueError(f'{path}: "tokenizer.ggml.pre" is {name!r}: of the ways to cut text, only {known} are supported')
  return tokenizers.pre_tokenizers.Sequence(parts)
