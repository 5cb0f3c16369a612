"""How fast vLLM is on the rows of `sampling.py`: the same prompts, the same shapes, random weights.

    pip install vllm            # an environment of its own: vLLM asks for one version of PyTorch
    python experiments/benchmarks/peer_vllm.py --json=vllm.json
    python experiments/benchmarks/peer_vllm.py --rows=mixed --sequences=64
    python experiments/benchmarks/peer_vllm.py --beside=sampling.json

`--beside` puts what `sampling.py --json` wrote into the same table. As there, "decode" is the whole
call's time less that of the same call for one token, both medians after a call that warms up.

Prefix caching is on, as it is by default, so a text that prompts share is read once; before every
call the cache is emptied, for the calls' prompts are the same. `sampling.py` takes `mixed` through
64 slots, which is --sequences=64; without the flag vLLM runs as many at a time as it chooses.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import figures_file
import numpy as np
from sampling import ROWS, mixed_lengths, prompts_of, rates

from oel_jax.policy.architecture import ARCHITECTURES, Architecture, named
from oel_jax.policy.weights.huggingface_config import write_config

MIXED = (512, 256)  # prompts of `mixed_lengths`, and their new tokens


def write_model(folder: pathlib.Path, shape: Architecture, longest: int) -> None:
  """A model's folder without weights, for sequences of up to `longest` tokens."""
  config = write_config(dataclasses.replace(shape, max_positions=longest), np.float32)
  # NumPy has no bfloat16 of its own
  config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
  (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rows_of(names: list[str]) -> list[tuple[int, int, int, int, int]]:
  """Batch, prompt, new tokens, texts and a text's tokens of each row.

  Raises:
    ValueError: a name that is none of `sampling.ROWS`, nor "mixed".
  """
  for name in names:
    if name not in (*ROWS, "mixed"):
      raise ValueError(f"--rows has {name!r}: of {', '.join(ROWS)} and mixed, with commas")
  found = [row for name in names for row in ROWS.get(name, ())]
  return [(*row[:3], *(row[3:] or (0, 0))) for row in found]


def longest_of(rows: list[tuple[int, int, int, int, int]], mixed: bool) -> int:
  """Tokens of the longest sequence, the response in it."""
  count, new = MIXED
  lengths = [prompt + tokens + text for _, prompt, tokens, _, text in rows]
  return max(lengths + ([max(mixed_lengths(count)["mixed"]) + new] if mixed else []))


def empty_cache(llm: Any) -> None:
  """Has vLLM forget the prompts that it read; its engine may take a moment to let go of the last.

  Raises:
    RuntimeError: it has not done so within a second.
  """
  for _ in range(100):
    if llm.reset_prefix_cache():
      return
    time.sleep(0.01)
  raise RuntimeError("vLLM did not empty its prefix cache: later calls would find their prompts")


def generated(llm: Any, prompts: list[list[int]], new: int, repeats: int) -> float:
  """The median seconds of a call for exactly `new` tokens a prompt, after one that warms up.

  Raises:
    RuntimeError: vLLM answered with another number of tokens, or of `empty_cache`.
  """
  from vllm import SamplingParams

  how = SamplingParams(temperature=0.7, max_tokens=new, ignore_eos=True, detokenize=False)
  given, times = [{"prompt_token_ids": prompt} for prompt in prompts], []
  for _ in range(repeats + 1):
    empty_cache(llm)
    started = time.perf_counter()
    answers = llm.generate(given, how, use_tqdm=False)
    times.append(time.perf_counter() - started)
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    if tokens != len(prompts) * new:
      raise RuntimeError(f"vLLM answered with {tokens} tokens: not {len(prompts)} times {new}")
  return statistics.median(times[1:])


def table(rows: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
  """vLLM's rows as Markdown, those of `sampling.py` beside them where it has the same."""
  key = lambda row: tuple(row[name] for name in ("batch", "texts", "prompt", "new"))
  beside = {key(row): row for row in ours}
  rate = lambda row, name: f"{row[name + '_tokens_per_s']:,.0f}" if row else "–"
  lines = [
    "| batch | texts | prompt | new | vLLM, whole call, tokens/s | ours | vLLM, decode, tokens/s "
    "| ours | ours / vLLM |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    own = beside.get(key(row))
    share = own["decode_tokens_per_s"] / row["decode_tokens_per_s"] if own else None
    cells = [*map(str, key(row))]
    cells += [rate(found, name) for name in ("call", "decode") for found in (row, own)]
    lines.append(f"| {' | '.join([*cells, f'{share:.2f}' if share else '–'])} |")
  return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
  """The flags; bad ones end the program."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--architecture", default="qwen3-1.7b", choices=list(ARCHITECTURES))
  parser.add_argument("--rows", default="goals,mixed,shared", help="as sampling.py's")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's that it takes")
  parser.add_argument("--sequences", type=int, help="at a time, at most; vLLM's own choice if none")
  parser.add_argument("--beside", help="what sampling.py --json wrote")
  parser.add_argument("--json", type=figures_file.to_write, help="file for the figures")
  flags = parser.parse_args(arguments)
  flags.rows = flags.rows.split(",")
  try:
    rows_of(flags.rows)
  except ValueError as error:
    parser.error(str(error))
  return flags


def main(arguments: list[str]) -> dict[str, Any]:
  """Runs the rows, prints the table and returns all figures."""
  flags = parse(arguments)
  if importlib.util.find_spec("vllm") is None:
    raise SystemExit("peer_vllm.py measures vLLM, which is not installed here: pip install vllm")
  ours = json.loads(pathlib.Path(flags.beside).read_text()) if flags.beside else {}
  # JAX is imported here, and a process that was forked beside its threads may wait for ever.
  os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
  import torch
  import vllm

  shape, rows = named(flags.architecture), rows_of(flags.rows)
  longest = longest_of(rows, "mixed" in flags.rows)
  most = {} if flags.sequences is None else {"max_num_seqs": flags.sequences}
  with tempfile.TemporaryDirectory() as folder:
    write_model(pathlib.Path(folder), shape, longest)
    llm = vllm.LLM(
      folder,
      load_format="dummy",
      skip_tokenizer_init=True,
      max_model_len=longest,
      gpu_memory_utilization=flags.memory,
      enable_prefix_caching=True,
      **most,
    )
  result: dict[str, Any] = {
    "device": torch.cuda.get_device_name(),
    "vllm": vllm.__version__,
    "architecture": flags.architecture,
    "sequences": flags.sequences,
    "rows": [],
  }
  save = lambda: (
    flags.json and pathlib.Path(flags.json).write_text(json.dumps(result, indent=1), "utf-8")
  )
  for batch, prompt, new, texts, text in rows:
    prompts = prompts_of(shape.vocabulary, [prompt] * batch, (texts, text))
    whole, prefill = (generated(llm, prompts, tokens, flags.repeats) for tokens in (new, 1))
    row = {"batch": batch, "texts": texts, "prompt": text + prompt, "new": new}
    result["rows"].append(row | rates(batch, new, whole, prefill))
    print(json.dumps(result["rows"][-1]), flush=True)
    save()
  if "mixed" in flags.rows:
    count, new = MIXED
    result["mixed"] = {
      f"{name}_tokens_per_s": count
      * new
      / generated(llm, prompts_of(shape.vocabulary, lengths), new, flags.repeats)
      for name, lengths in mixed_lengths(count).items()
    }
    save()
  print(table(result["rows"], ours.get("rows", [])))
  for name, found in (("vLLM", result), ("ours", ours)):
    if "mixed" in found:
      print(f"mixed, {name}: {json.dumps(found['mixed'])}")
  return result


if __name__ == "__main__":
  main(sys.argv[1:])
