"""config.json of a Hugging Face folder ↔ `Architecture`.

Qwen3, Qwen2.5 and Llama (SmolLM2 too) are one decoder here, told apart by two switches: a norm on
query and key heads, and a bias on query, key and value.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from oel_jax.policy.architecture import Architecture, Llama3Scaling
from oel_jax.policy.weights.safetensors_folder import EMBEDDING, HEAD, Tensor, open_folder

FAMILIES = ("qwen3", "qwen2", "llama")

# Fields that change what the model computes, each with the only value that is built here.
FIXED = {
  "hidden_act": "silu",
  "mlp_bias": False,
  "use_sliding_window": False,
  "partial_rotary_factor": 1.0,
  "pretraining_tp": 1,
  "rope_interleaved": False,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
}
READ = {
  "model_type",
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "intermediate_size",
  "rope_theta",
  "rope_scaling",
  "rope_parameters",
  "rms_norm_eps",
  "tie_word_embeddings",
  "attention_bias",
  "layer_types",
  "max_position_embeddings",
}
# Fields that change nothing of the forward pass, nor do those whose names begin with a mark.
HARMLESS = {
  "architectures", "attention_dropout", "attn_implementation", "bos_token_id",
  "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id", "dtype", "eos_token_id",
  "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id",
  "mask_token_id", "max_window_layers", "output_attentions", "output_hidden_states",
  "pad_token_id", "prefix", "problem_type", "return_dict", "sep_token_id", "sliding_window",
  "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "unk_token_id",
  "use_bfloat16", "use_cache",
}  # fmt: skip
MARKS = ("_", "transformers", "unsloth_")
# Settings of sampling, which `transformers` 4 kept in config.json; ours are config.policy's.
SAMPLING = {
  "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
  "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
  "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
  "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
  "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
  "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
QUANTISED = ("quantization_config", "quantization", "compression_config")


def read_architecture(folder: str | os.PathLike) -> Architecture:
  """The shapes that the folder's config.json gives, and whether the head is tied.

  A head that lies beside the embedding although "tie_word_embeddings" is true counts if its numbers
  differ, as in version 5 of `transformers`. The files of weights are opened to see that.

  Raises:
    FileNotFoundError: there is no config.json; or the head is tied and there are no weights.
    ValueError: the folder holds an adapter; or config.json is damaged, a field is missing, or says
      something that this decoder does not do; names the field and its value.
  """
  path = pathlib.Path(folder) / "config.json"
  adapter = path.with_name("adapter_config.json")
  if adapter.is_file():
    raise ValueError(
      f"{adapter}: the folder holds an adapter (LoRA), not a model: merge it into its base, with "
      "PEFT's merge_and_unload, and give that; remove the file if this has been done"
    )
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such file; config.policy.weights must be a folder with a Hugging Face model"
    )
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config["model_type"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path}: not a Hugging Face configuration ({type(error).__name__}: {error})"
    ) from error
  if family not in FAMILIES:
    raise ValueError(
      f'{path}: "model_type" is {family!r}: it must be one of {", ".join(map(repr, FAMILIES))}'
    )
  _refuse(path, config, family)

  def need(name: str, kind: type = int, default: int | None = None) -> Any:
    value = default if config.get(name) is None else config[name]
    if value is None:
      raise ValueError(f'{path}: "{name}" is missing')
    return _number(path, name, value, kind)

  tied = config.get("tie_word_embeddings") or False
  if not isinstance(tied, bool):
    raise ValueError(f'{path}: "tie_word_embeddings" is {tied!r}: it must be true or false')
  theta, scaling = _rope(path, config)
  heads, width = need("num_attention_heads"), need("hidden_size")
  longest = config.get("max_position_embeddings")
  return Architecture(
    vocabulary=need("vocab_size"),
    width=width,
    layers=need("num_hidden_layers"),
    heads=heads,
    kv_heads=need("num_key_value_heads", default=heads),
    head_size=need("head_dim", default=width // heads),
    feedforward=need("intermediate_size"),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=need("rms_norm_eps", float),
    qk_norm=family == "qwen3",
    qkv_bias=family == "qwen2",
    tied_head=tied and _is_tied(open_folder(path.parent)),
    max_positions=longest if longest is None else need("max_position_embeddings"),
  )


def _number(path: pathlib.Path, name: str, value: Any, kind: type) -> Any:
  if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < np.inf:
    raise ValueError(
      f'{path}: "{name}" is {value!r}: it must be a {"whole " if kind is int else ""}number above 0'
    )
  return kind(value)


def _refuse(path: pathlib.Path, config: dict[str, Any], family: str) -> None:
  """Raises ValueError at the first field that would change the model in a way that is not built
  here.
  """
  fixed = FIXED | ({} if family == "qwen2" else {"attention_bias": False})
  for name, value in config.items():
    if name in fixed and value is not None and value != fixed[name]:
      raise ValueError(f'{path}: "{name}" is {value!r}: only {fixed[name]!r} is supported')
    if name == "layer_types" and value is not None and set(value) - {"full_attention"}:
      raise ValueError(
        f'{path}: "layer_types" holds {sorted(set(value) - {"full_attention"})}: only '
        '"full_attention" is supported'
      )
    if name in QUANTISED and value:
      raise ValueError(
        f'{path}: "{name}" is {value!r:.100}: the weights are quantised, and only floating-point '
        "ones are read; give the folder of the model before it was quantised, or a GGUF file"
      )
    known = name in READ | FIXED.keys() | HARMLESS | SAMPLING or name.startswith(MARKS)
    if not known and value not in (None, False, "", [], {}):
      raise ValueError(
        f'{path}: "{name}" is {value!r:.100}: this decoder does not know the field; remove it only '
        "if it changes nothing"
      )


def _rope(path: pathlib.Path, config: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
  """Base and scaling of the rotary frequencies, from the older "rope_theta" and "rope_scaling", the
  newer "rope_parameters", or both.
  """
  given = {
    field: config[field] for field in ("rope_parameters", "rope_scaling") if config.get(field)
  }
  scalings = {field: _scaling(path, field, value) for field, value in given.items()}
  thetas = [
    _number(path, "rope_theta", value["rope_theta"], float)
    for value in (*given.values(), config)
    if value.get("rope_theta") is not None
  ]
  if len(set(scalings.values())) > 1 or len(set(thetas)) > 1:
    said = ", ".join(
      f'"{field}" is {config[field]!r}' for field in (*given, "rope_theta") if field in config
    )
    raise ValueError(f"{path}: {said}: they must say the same")
  return thetas[0] if thetas else 10000.0, next(iter(scalings.values()), None)


def _scaling(path: pathlib.Path, field: str, given: Any) -> Llama3Scaling | None:
  kinds = (
    {given[name] for name in ("rope_type", "type") if given.get(name)}
    if isinstance(given, dict)
    else {None}
  )
  if not kinds <= {"default"} and kinds != {"llama3"}:
    raise ValueError(
      f'{path}: "{field}" is {given!r}: of the ways to scale rotary positions, only "llama3" is '
      "supported"
    )
  names = (
    tuple(part.name for part in dataclasses.fields(Llama3Scaling)) if kinds == {"llama3"} else ()
  )
  for name, value in given.items():
    if name not in ("rope_type", "type", "rope_theta", *names) and value not in (
      None,
      FIXED.get(name),
    ):
      raise ValueError(
        f'{path}: "{field}" holds "{name}", which is {value!r:.100}: this decoder does not know it'
      )
  missing = [name for name in names if given.get(name) is None]
  if missing:
    raise ValueError(f'{path}: "{field}" lacks {", ".join(missing)}')
  return (
    Llama3Scaling(*(_number(path, f"{field}.{name}", given[name], float) for name in names))
    if names
    else None
  )


def _is_tied(tensors: dict[str, Tensor]) -> bool:
  """Whether there is but one matrix for embedding and head, or the same twice."""
  if HEAD not in tensors or EMBEDDING not in tensors:
    return True
  return tensors[HEAD].holds_what(tensors[EMBEDDING])


# The fields of an architecture that a config.json of `write_config` says.
WRITTEN = {
  "vocabulary", "width", "layers", "heads", "kv_heads", "head_size", "feedforward", "rope_theta",
  "norm_eps", "qk_norm", "tied_head", "qkv_bias", "rope_scaling", "max_positions",
}  # fmt: skip


def write_config(architecture: Architecture, dtype: Any) -> dict[str, Any]:
  """The fields of a config.json that `read_architecture` reads back as the same architecture.

  Raises:
    ValueError: no family of `transformers` has this combination of norms, biases and scaling; or a
      field that is not written here is not at its default.
  """
  a = architecture
  for field in dataclasses.fields(a):
    if field.name not in WRITTEN and getattr(a, field.name) != field.default:
      raise ValueError(
        f"Architecture.{field.name} is {getattr(a, field.name)!r}, and `write_config` has no place "
        "for it: a reader would take it for the default; write it there, and add it to WRITTEN"
      )
  if (a.qk_norm and a.qkv_bias) or (a.rope_scaling and (a.qk_norm or a.qkv_bias)):
    raise ValueError(
      f"no Hugging Face family has {a}: qk_norm, qkv_bias and rope_scaling exclude one another"
    )
  family, name = (
    ("qwen3", "Qwen3") if a.qk_norm else ("qwen2", "Qwen2") if a.qkv_bias else ("llama", "Llama")
  )
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
  if a.rope_scaling:
    scaling = dataclasses.asdict(a.rope_scaling)
    rope |= scaling | {
      "rope_type": "llama3",
      "original_max_position_embeddings": int(scaling["original_max_position_embeddings"]),
    }
  # Both spellings: engines built on older versions read rope_theta, rope_scaling and torch_dtype.
  longest = {} if a.max_positions is None else {"max_position_embeddings": a.max_positions}
  return longest | {
    "architectures": [f"{name}ForCausalLM"],
    "model_type": family,
    "vocab_size": a.vocabulary,
    "hidden_size": a.width,
    "num_hidden_layers": a.layers,
    "num_attention_heads": a.heads,
    "num_key_value_heads": a.kv_heads,
    "head_dim": a.head_size,
    "intermediate_size": a.feedforward,
    "rms_norm_eps": a.norm_eps,
    "tie_word_embeddings": a.tied_head,
    "hidden_act": "silu",
    "rope_theta": a.rope_theta,
    "rope_scaling": rope if a.rope_scaling else None,
    "rope_parameters": rope,
    "dtype": np.dtype(dtype).name,
    "torch_dtype": np.dtype(dtype).name,
  }
