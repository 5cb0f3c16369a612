"""A run's newest weights as a Hugging Face folder, which `transformers`, vLLM or SGLang serve:
`python -m oel_jax.main --stage=export ...`.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from oel_jax import choices
from oel_jax import config as config_lib
from oel_jax.consolidation import restore
from oel_jax.policy import load
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.policy.weights import huggingface, peft
from oel_jax.runtime import distributed, files, mesh, schema, together
from oel_jax.runtime.workdir import file_digests, locked, read_config

ADAPTER = "adapter"
GENERATION = "generation_config.json"
# What a folder holds beside config.json and weights; copied as it is, since versions of
# `transformers` write it differently.
COMPANIONS = (
  "tokenizer*",
  "vocab.*",
  "merges.txt",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template*",
  GENERATION,
)


def run(config: Any, workdir: str, *, dtype: str = "bfloat16") -> pathlib.Path:
  """Writes the weights of the run's newest consolidated round into `workdir`/export, and prints
  which it is; returns that folder. Where adapters were trained, ADAPTER in it holds them, too. Of
  several processes the first one calls it, the others `follow`.

  Args:
    config: its `mesh` says where the weights are held, and its policy.weights where they lie if
      they have been moved since; all else goes by the run's own config.json.
    workdir: the run's directory.
    dtype: of the tensors written: "bfloat16", "float16" or "float32".

  Raises:
    ValueError: no run, or no round that has been consolidated; config.policy.weights are others
      than the run's; the policy is of no Hugging Face family; or a file stands in the folder's
      place.
    OSError: another process is running in the directory, or a file cannot be read or written.
  """
  folder = run_folder(workdir)
  with locked(folder):
    own, devices, policy = _begin(config, folder)
    with together.leading(**_shared(own, devices, policy)):
      number, params = _newest(own, policy, folder, devices)
      source, target = pathlib.Path(own.policy.weights).expanduser(), folder / "export"
      if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file: move it, for the weights go to a folder there")
      target.mkdir(exist_ok=True)
      if (target / ADAPTER).exists():  # of other weights, if this export is cut off or writes none
        shutil.rmtree(target / ADAPTER)
      fields = _companions(source, target, policy.tokenizer)
      huggingface.save(target, params, policy.architecture, dtype=jnp.dtype(dtype), config=fields)
      if own.consolidation.lora_rank:
        _save_adapter(target / ADAPTER, own, policy, number, params)
  steps = config_lib.consolidation(own, number).steps
  print(f"exported: weights of round {number} of {folder}, after {steps} steps", flush=True)
  return target


def _save_adapter(folder: pathlib.Path, own: Any, policy: Policy, number: int, params: Any) -> None:
  """What the rounds up to `number` added to the weights that the run began with."""
  if distributed.count() > 1:
    logging.warning("%s: not written by several processes: export again with one", folder)
    return
  name, rank = own.policy.weights, number * own.consolidation.lora_rank
  missed = peft.save(folder, policy.params, params, policy.architecture, rank=rank, name=name)
  told = f"exported: what was added, to rank {rank}, which misses {missed:.2%} of it, to {folder}"
  print(told, flush=True)


def follow(config: Any, workdir: str) -> None:
  """What all processes but the first do: they hold their part of the weights.

  Raises:
    ValueError: as `run`.
    OSError: a file cannot be read here.
  """
  own, devices, policy = _begin(config, run_folder(workdir))
  together.follow(**_shared(own, devices, policy))


def run_folder(workdir: str) -> pathlib.Path:
  """The run's directory as an absolute path; ValueError if there is no run in it."""
  folder = files.local(workdir, "--workdir").absolute()
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder}: not a run directory: it has no config.json")
  return folder


def _begin(config: Any, folder: pathlib.Path) -> tuple[Any, jax.sharding.Mesh, Policy]:
  """The run's own configuration, the mesh, and the policy that the run began with on it."""
  if "policy" not in config:
    raise ValueError(
      "the configuration has no `policy`: only runs of rounds or of distill are exported"
    )
  own = _own_config(config, folder)
  devices = mesh.make_mesh(config.mesh)
  narrow = own.consolidation.lora_rank > 0
  if narrow and own.policy.compute_dtype == "auto":
    # Its weights are in the type of the devices that it ran on, which this machine may not have.
    own.policy.compute_dtype = choices.kept(folder).get("compute_dtype", "auto")
  policy = load.load_policy(config_lib.policy(own), devices, narrow=narrow)
  if not hasattr(policy.tokenizer, "save"):
    raise ValueError(
      f"config.policy.weights is {own.policy.weights!r}: only a model that came from Hugging "
      "Face can go back there"
    )
  return own, devices, policy


def _shared(own: Any, devices: jax.sharding.Mesh, policy: Policy) -> dict[str, Any]:
  """What each process has of its own, by the names that stand for it in calls."""
  return {"config": own, "mesh": devices, "policy": policy}


def _own_config(config: Any, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """The run's own configuration, with a warning where the one given differs; policy.weights are the
  run's, wherever they lie now.
  """
  path = folder / "config.json"
  found = read_config(path)
  own = ml_collections.ConfigDict(_over(config.to_dict(), found["config"], f"{path}: config"))
  config_lib.validate(own)
  names = ("policy", "consolidation", "rounds")
  different = [
    name for name in names if name in config and config.to_dict()[name] != own.to_dict()[name]
  ]
  if different:
    logging.warning(
      "%s: goes by the run's own config.json; what was given for config.%s differs and is not used",
      folder,
      ", config.".join(different),
    )
  if config.policy.weights:
    own.policy.weights = config.policy.weights
  noted, now = (digests.get("policy.weights") for digests in (found["files"], file_digests(own)))
  if noted and now != noted:  # an earlier version noted nothing
    raise ValueError(
      f"config.policy.weights is {own.policy.weights!r}: these are not the files that the run "
      "began "
      f"with ({found['config']['policy']['weights']!r}, digest {noted}, now {now}): restore them, "
      "or give the folder or file that holds them now"
    )
  return own


def _over(fields: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
  """`own` over `fields`, group by group: an earlier version's run lacks fields that came since.

  Raises:
    ValueError: a value is not of the type of the field; `where` begins its name.
  """
  merged = dict(fields)
  for name, value in own.items():
    like = fields.get(name)
    kinds = {float: (float, int), tuple: (list,)}.get(type(like), (type(like),))
    if like is not None and value is not None:
      right = f"of type {kinds[0].__name__}"
      schema.need(type(value) in kinds, f"{where}.{name}", value, right)
    nested = isinstance(value, dict) and isinstance(like, dict)
    merged[name] = _over(like, value, f"{where}.{name}") if nested else value
  return merged


def _newest(
  own: Any, policy: Policy, folder: pathlib.Path, devices: jax.sharding.Mesh
) -> tuple[int, Any]:
  """Number and parameters of the newest round that has been consolidated to the end; says so where
  a newer one has only begun.
  """
  for number in range(own.rounds, 0, -1):
    checkpoints = folder / f"round_{number}" / "checkpoints"
    params = _trained(own, number, policy, checkpoints, devices)
    if params is not None:
      return number, params
    if steps := restore.steps_done(checkpoints):
      logging.warning(
        "%s: round %d has been consolidated for %d of %d steps only: not exported",
        folder,
        number,
        steps,
        config_lib.consolidation(own, number).steps,
      )
  raise ValueError(
    f"{folder}: no round has been consolidated to the end, so there are no new weights: run it "
    "without --stage first"
  )


@together.everywhere
def _trained(
  own: Any, number: int, policy: Policy, checkpoints: pathlib.Path, devices: jax.sharding.Mesh
) -> Any:
  """The round's `restore.trained_params`, which get a name."""
  training = config_lib.consolidation(own, number)
  params = restore.trained_params(training, policy, checkpoints, devices)
  if params is not None:
    together.share(together.WEIGHTS, params)
  return params


def _companions(source: pathlib.Path, target: pathlib.Path, tokenizer: Any) -> dict[str, Any]:
  """Puts tokenizer and generation config beside the weights; returns the fields of the source's
  config.json, or a GGUF file's like.
  """
  if source.is_dir():
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
      shutil.copyfile(path, target / path.name)
  else:
    tokenizer.save(target)
    _name_known_class(target / "tokenizer_config.json")
  if not (source / GENERATION).is_file():
    files.write_json(
      target / GENERATION,
      {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id},
    )
  if source.is_dir():
    return files.read_json(source / "config.json", advice="restore the model's folder")
  from oel_jax.policy.weights import gguf  # here, for it needs packages of the extra "hf"

  return gguf.config_fields(gguf.read(source))


def _name_known_class(path: pathlib.Path) -> None:
  """Names the tokenizer's class as every version of `transformers` knows it.

  The class that version 5 writes is unknown to version 4, and the name of version 4 known to both.
  """
  fields = json.loads(path.read_text(encoding="utf-8"))
  files.write_json(path, fields | {"tokenizer_class": "PreTrainedTokenizerFast"})
