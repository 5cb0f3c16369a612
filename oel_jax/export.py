"""A run's newest weights as a Hugging Face folder, which `transformers`, vLLM or SGLang serve: `python -m oel_jax.main --stage=export ...`."""

import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp

from oel_jax import config as config_lib
from oel_jax import rounds
from oel_jax.consolidation import train
from oel_jax.policy import huggingface
from oel_jax.runtime import files, mesh

GENERATION = "generation_config.json"
# What a folder holds beside config.json and weights; copied as it is, since versions of `transformers` write it differently.
COMPANIONS = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", GENERATION)


def run(config: Any, workdir: str, *, dtype: str = "bfloat16") -> pathlib.Path:
  """Writes the weights of the last consolidated round into `workdir`/export; returns that folder.

  Args:
    config: of the run; config.policy.weights is still where it was, for tokenizer and companions.
    workdir: the run's directory.
    dtype: of the tensors written: "bfloat16", "float16" or "float32".

  Raises:
    ValueError: no round has been consolidated; or the policy is of no Hugging Face family.
    OSError: a file cannot be written.
  """
  config_lib.validate(config)
  devices = mesh.make_mesh(config.mesh)
  policy = rounds.load_policy(config.policy, devices)
  folder = files.local(workdir, "--workdir").absolute()
  if not hasattr(policy.tokenizer, "save"):
    raise ValueError(f"config.policy.weights is {config.policy.weights!r}: only a model that came from Hugging Face can go back there")
  for number in range(config.rounds, 0, -1):
    params = train.trained_params(config.consolidation, policy, folder / f"round_{number}" / "checkpoints", devices)
    if params is not None:
      break
  else:
    raise ValueError(f"{folder}: no round has been consolidated to the end, so there are no new weights: run it without --stage first")
  source, target = pathlib.Path(config.policy.weights).expanduser(), folder / "export"
  target.mkdir(exist_ok=True)
  fields = _companions(source, target, policy.tokenizer)
  huggingface.save(target, params, policy.architecture, dtype=jnp.dtype(dtype), config=fields)
  return target


def _companions(source: pathlib.Path, target: pathlib.Path, tokenizer: Any) -> dict[str, Any]:
  """Puts tokenizer and generation config beside the weights; returns the fields of the source's config.json, or a GGUF file's like."""
  if source.is_dir():
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
      shutil.copyfile(path, target / path.name)
  else:
    tokenizer.save(target)
  if not (target / GENERATION).exists():
    files.write_json(target / GENERATION, {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id})
  if source.is_dir():
    return json.loads((source / "config.json").read_text(encoding="utf-8"))
  from oel_jax.policy import gguf  # here, for it needs packages of the extra "hf"

  return gguf.config_fields(gguf.read(source))
