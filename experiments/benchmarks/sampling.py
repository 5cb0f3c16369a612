"""How fast the sampler is: tokens a second, the share of what the memory allows, and transformers'
generate beside it.

    python experiments/benchmarks/sampling.py --architecture=qwen3-1.7b --json=sampling.json
    python experiments/benchmarks/sampling.py --architecture=qwen3-1.7b \\
        --rows=goals,growth,mixed --peer
    python experiments/benchmarks/sampling.py --architecture=qwen3-1.7b --rows=goals --devices=2
    python experiments/benchmarks/sampling.py --architecture=qwen3-8b --devices=2 --sample_tensor=2
    python experiments/benchmarks/sampling.py --architecture=pocket --rows=episodes

    python experiments/benchmarks/sampling.py --architecture=qwen3-4b --rows=shared

`shared`: prompts behind texts that many of them begin with. Beside it, run this file in a checkout
whose sampler keeps a copy of the text in every slot.

With several devices each of them gets as many prompts, from weights that are spread over them; with
--sample_tensor each group of so many devices, which hold the sampler's weights together.

The limit is the time in which the device reads the weights, the texts and the filled part of the
cache once a token, at the speed of a copy that is measured first. "decode" is without the prefill:
the whole call's time less that of the same call for one token. Weights are random.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import figures_file
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from measure import seconds

from oel_jax import config as config_lib
from oel_jax.environments import Episode, game_spec, play
from oel_jax.pocket import load as pocket
from oel_jax.policy import transformer
from oel_jax.policy.architecture import ARCHITECTURES, Architecture, named
from oel_jax.policy.sampling.sampler import generate
from oel_jax.policy.sampling.token_sampling import Sampling
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.seeds import derive

# (batch, prompt, new tokens), and for prompts behind texts how many texts and their tokens
ROWS = {
  "goals": ((1, 600, 256), (64, 600, 256), (256, 600, 256)),
  "growth": tuple((batch, 512, 64) for batch in (1, 4, 16, 64, 256, 512))
  + tuple((4, context, 64) for context in (1024, 2048, 4096, 8192, 16384)),
  "shared": ((64, 200, 256, 1, 8192), (256, 200, 256, 1, 8192), (64, 200, 256, 10, 8192)),
  "desk": ((64, 85, 96),),  # a step of experiments/help_desk.py, as long as its longest response
  "tiny": ((1, 20, 8), (4, 20, 8)),
}


def bandwidth(size: int, repeats: int) -> float:
  """Bytes a second of a copy of `size` bytes, those read and those written."""
  array, copy = jnp.ones((size // 4,), jnp.float32), jax.jit(lambda x: x + 1)
  return 2 * size / seconds(lambda: copy(array).block_until_ready(), repeats=repeats)


def random_params(shape: Architecture, dtype: Any, devices: int = 1) -> Any:
  init = lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), transformer.init(shape, key))
  if devices == 1:
    return jax.jit(init)(jax.random.key(0))
  sizes = ml_collections.ConfigDict({"data": 1, "fsdp": devices, "tensor": 1})
  return mesh_lib.sharded_init(
    init, mesh_lib.make_mesh(sizes, jax.devices()[:devices]), jax.random.key(0)
  )


def prompts_of(
  vocabulary: int, lengths: list[int], texts: tuple[int, int] = (0, 0)
) -> list[list[int]]:
  """Prompts of these lengths, of random ids. Before each stands one of so many texts of so many
  tokens.
  """
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
  if texts[0]:
    before = rng.integers(0, vocabulary, texts).tolist()
    prompts = [before[i % texts[0]] + prompt for i, prompt in enumerate(prompts)]
  return prompts


def mixed_lengths(count: int) -> dict[str, list[int]]:
  """Lengths of 50 to 1,000 tokens, geometric, and as many equal ones that are as long together."""
  lengths = np.random.default_rng(1).permutation(np.geomspace(50, 1000, count).astype(int)).tolist()
  return {"mixed": lengths, "equal": [round(sum(lengths) / count)] * count}


def rates(batch: int, new: int, whole: float, prefill: float) -> dict[str, float]:
  """What a call of so many seconds says, and of one token `prefill`, by the names of a row."""
  step = (whole - prefill) / (new - 1)
  return {
    "call_tokens_per_s": batch * new / whole,
    "prefill_s": prefill,
    "decode_ms": 1e3 * step,
    "decode_tokens_per_s": batch / step,
  }


def sampled(
  params: Any,
  shape: Architecture,
  lengths: list[int],
  new: int,
  dtype: Any,
  slots: int | None = None,
  texts: tuple[int, int] = (0, 0),
  together: int = 1,
) -> Callable[[], Any]:
  """A call of `generate` on `prompts_of` these lengths; no response ends before `new` tokens."""
  prompts = prompts_of(shape.vocabulary, lengths, texts)
  how = dict(
    sampling=Sampling(0.7), max_new_tokens=new, eos_ids=(), pad_id=0, dtype=dtype, slots=slots
  )
  return lambda: generate(
    params, shape, prompts, range(len(prompts)), sample_tensor=together, **how
  )


def measure(
  params: Any,
  shape: Architecture,
  batch: int,
  prompt: int,
  new: int,
  speed: float,
  dtype: Any,
  repeats: int,
  devices: int = 1,
  texts: tuple[int, int] = (0, 0),
  together: int = 1,
) -> dict[str, Any]:
  """One row of the table; `batch` prompts a device, or group of devices that sample `together`,
  behind texts through as many slots as fit.
  """
  everywhere = devices // together * batch
  slots = None if texts[0] else everywhere
  run = lambda tokens: seconds(
    sampled(params, shape, [prompt] * everywhere, tokens, dtype, slots, texts, together),
    repeats=repeats,
  )
  whole, prefill = run(new), run(1)
  size = jnp.dtype(dtype).itemsize
  read = size * sum(leaf.size for leaf in jax.tree.leaves(params)) - (
    0 if shape.tied_head else size * shape.vocabulary * shape.width
  )
  token = 2 * shape.layers * shape.kv_heads * shape.head_size * size
  cache = (texts[0] * texts[1] + batch * (prompt + new / 2)) * token
  limit = (read + cache) / (together * speed)
  found = rates(everywhere, new, whole, prefill)
  return {
    "batch": everywhere,
    "texts": texts[0],
    "prompt": texts[1] + prompt,
    "new": new,
    **found,
    "limit_ms": 1e3 * limit,
    "limit_tokens_per_s": everywhere / limit,
    "share": 1e3 * limit / found["decode_ms"],
  }


def mixed(
  params: Any, shape: Architecture, dtype: Any, repeats: int, new: int = 256, count: int = 512
) -> dict[str, float]:
  """Prompts of `mixed_lengths` through 64 slots."""
  times = {
    name: seconds(sampled(params, shape, lengths, new, dtype, slots=64), repeats=repeats)
    for name, lengths in mixed_lengths(count).items()
  }
  rates = {f"{name}_tokens_per_s": count * new / spent for name, spent in times.items()}
  return rates | {"share": times["equal"] / times["mixed"]}


def episodes(count: int, repeats: int) -> dict[str, float]:
  """Games of Frozen Lake on the embedded policy, as deployment plays them."""
  policy, spec = pocket.load(), game_spec(config_lib.default().deployment)
  games = [Episode(f"e{i}", derive("map", i), derive("sample", i)) for i in range(count)]
  run = lambda: play(
    policy,
    spec,
    episodes=games,
    sampling=Sampling(0.7),
    max_response_tokens=96,
    max_prompt_tokens=1024,
    slots=64,
    thinking=True,
  )
  return {
    "episodes": count,
    "seconds": seconds(run, repeats=repeats),
    "tokens": sum(answer.response_tokens for game in run() for answer in game.answers),
  }


def peer(shape: Architecture, batch: int, prompt: int, new: int) -> float:
  """Tokens a second of transformers' generate on the same shapes and device."""
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
  with torch.device(device):
    net = transformers.Qwen3ForCausalLM(
      transformers.Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feedforward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied_head,
        eos_token_id=None,
        bos_token_id=None,
      )
    ).eval()
    ids = torch.randint(0, shape.vocabulary, (batch, prompt))

  def run() -> None:
    net.generate(
      ids,
      max_new_tokens=new,
      min_new_tokens=new,
      do_sample=True,
      temperature=0.7,
      top_k=0,
      pad_token_id=0,
    )[0, 0].item()

  return batch * new / seconds(run, repeats=1)


def table(result: dict[str, Any]) -> str:
  """The rows as Markdown."""
  lines = [
    "| batch | prompt | new | transformers, tokens/s | whole call, tokens/s | decode, tokens/s | "
    "limit, tokens/s | decode / limit |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in result["rows"]:
    rate = lambda name: f"{row[name]:,.0f}" if row.get(name) else "–"
    rates = [rate(f"{name}_tokens_per_s") for name in ("peer", "call", "decode", "limit")]
    lines.append(
      "| "
      + " | ".join(
        [str(row["batch"]), str(row["prompt"]), str(row["new"]), *rates, f"{row['share']:.0%}"]
      )
      + " |"
    )
  return "\n".join(lines)


def main(arguments: list[str]) -> dict[str, Any]:
  """Runs what the flags ask for, prints the table and returns all figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--architecture", default="qwen3-1.7b", choices=list(ARCHITECTURES))
  parser.add_argument(
    "--rows", default="goals", help="of goals, growth, shared, tiny, mixed, episodes, with commas"
  )
  parser.add_argument("--devices", type=int, default=1, help="so many of those that there are")
  parser.add_argument("--sample_tensor", type=int, default=1, help="of these so many a group")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--copy_bytes", type=int, default=1 << 32)
  parser.add_argument(
    "--peer", action="store_true", help="also run transformers on each row, in a process of its own"
  )
  parser.add_argument("--peer_row", help=argparse.SUPPRESS)
  parser.add_argument("--json", type=figures_file.to_write, help="file for the figures")
  flags = parser.parse_args(arguments)
  shape, names = named(flags.architecture), flags.rows.split(",")
  if unknown := [name for name in names if name not in (*ROWS, "mixed", "episodes")]:
    parser.error(f"--rows has {unknown[0]!r}: they are {', '.join(ROWS)}, mixed, episodes")
  if flags.peer_row:
    print(peer(shape, *map(int, flags.peer_row.split(","))))
    return {}
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  device, speed = jax.devices()[0], bandwidth(flags.copy_bytes, flags.repeats)
  result: dict[str, Any] = {
    "device": device.device_kind,
    "devices": flags.devices,
    "sample_tensor": flags.sample_tensor,
    "architecture": flags.architecture,
    "bytes_per_s": speed,
    "rows": [],
  }
  print(
    f"{device.device_kind}: a copy moves {speed / 1e12:.2f} TB/s; {flags.architecture}, "
    f"{jnp.dtype(dtype).name}",
    flush=True,
  )
  params = random_params(shape, dtype, flags.devices)
  for batch, prompt, new, *texts in (row for name in names for row in ROWS.get(name, ())):
    how = dict(devices=flags.devices, texts=tuple(texts) or (0, 0), together=flags.sample_tensor)
    row = measure(params, shape, batch, prompt, new, speed, dtype, flags.repeats, **how)
    if flags.peer:
      call = [
        sys.executable,
        __file__,
        f"--architecture={flags.architecture}",
        f"--peer_row={batch},{row['prompt']},{min(new, 64)}",
      ]
      row["peer_tokens_per_s"] = float(
        subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1]
      )
    result["rows"].append(row)
    print(json.dumps(row), flush=True)
  if "mixed" in names:
    result["mixed"] = mixed(params, shape, dtype, flags.repeats)
  if "episodes" in names:
    result["episodes"] = episodes(64, flags.repeats)
  print(
    table(result),
    *(f"{name}: {json.dumps(result[name])}" for name in ("mixed", "episodes") if name in result),
    sep="\n",
  )
  if flags.json:
    with open(flags.json, "w", encoding="utf-8") as file:
      json.dump(result, file, indent=1)
  return result


if __name__ == "__main__":
  main(sys.argv[1:])
