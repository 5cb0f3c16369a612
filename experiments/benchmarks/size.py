"""Large logs and many prompts in several processes: what each holds in memory, how long it takes,
and whether what comes out is what one process makes.

    JAX_PLATFORMS=cpu python experiments/benchmarks/size.py --json=size.json
    JAX_PLATFORMS=cpu python experiments/benchmarks/size.py --tiny     # seconds, measures nothing

A log of 1,000,000 lines is written, as a proxy writes it: calls of two users' turns, some of them
the beginning of the next line's, some said twice, one in 1,000 damaged. Then one process, and four
that have come together, do what a round does, by its own functions: they read the log, leave out
what says the same, and draw the conversations whose turns become prompts (`collect`); make token
ids of them; sample a response to every prompt, step by step (`samples.sample_batch`); and play
games (`play`). The policy is made up: it answers at once, by a prompt's ids and its seed. No number
of prompts, samples or games divides by four.

"peak MB" is the highest resident memory of a process, imports and all; "idle MB" what it was before
the log was opened. The machine's processes share its cores.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import figures_file
import jax
import ml_collections
import numpy as np

from oel_jax import config as config_lib
from oel_jax.consolidation import samples
from oel_jax.conversations import dataset
from oel_jax.policy import transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.sampling import spread
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import distributed, files, progress, together
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import collect, consolidate, play
from oel_jax.stages.run import DEPLOYED, HELD_OUT, LOGS, PROMPTS, Run

HERE = pathlib.Path(__file__).resolve()
TOP = HERE.parents[2]
DAMAGED, AGAIN = 1000, 50  # one line in so many
VOCABULARY, LONGEST = 50_000, 32
WORDS = (
  "order parcel invoice late refund week address shop sent call again thanks name code".split()
)
GAMES = "user/games.jsonl"


# The log.


def lines(count: int) -> Iterator[bytes]:
  """The log, the same at every call: three lines in four are a conversation's last call, the fourth
  the call before that of the line which follows it.
  """
  for number in range(count):
    draw = random.Random(number // AGAIN * AGAIN if number % AGAIN == AGAIN - 1 else number)
    if number % DAMAGED == DAMAGED - 1:
      yield b'{"messages": [{"role": "user", "con\n'
      continue
    whole = number % 4 != 2
    draw = draw if whole else random.Random(number + 1)
    said = [{"role": "system", "content": "You answer for a shop."}]
    for turn in range(2):
      words = " ".join(draw.choices(WORDS, k=24))
      said.append({"role": "user", "content": f"{turn}: {words} {draw.random()}"})
      said.append({"role": "assistant", "content": " ".join(draw.choices(WORDS, k=16))})
    user = f"user-{draw.randrange(count // 5 + 1)}"
    said = said if whole else said[:3]
    yield json.dumps({"id": f"call-{number}", "user": user, "messages": said}).encode() + b"\n"


# The policy.


class Words:
  """A token is a word; each has one of VOCABULARY numbers."""

  vocabulary, pad_id, eos_ids = VOCABULARY, 0, (1,)

  def encode(self, text: str) -> list[int]:
    return [2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in text.split()]

  def chat(self, messages: Any, tools: Any = (), thinking: bool = True) -> list[int]:
    system = [m for m in messages if m.role not in ("user", "assistant")]
    system.sort(key=lambda message: message.role != "system")
    rest = [message for message in messages if message.role in ("user", "assistant")]
    return [i for m in (*system, *rest) for i in self._message(m)] + [1]

  def knowledge_prefix(
    self, message: Any, *, system: Any = None, tools: Any = (), thinking: bool = True
  ) -> tuple[int, list[int]]:
    before = self._message(system) if system else []
    return len(before), before + self._message(message)

  def split_response(self, ids: Sequence[int], **_: Any) -> tuple[str, str]:
    return "", f"[{ids[0] % 20}]"

  def _message(self, message: Any) -> list[int]:
    return [*self.encode(f"{message.role}:"), *self.encode(message.content), 1]


class MadeUp(Policy):
  """Answers at once; in several processes each to its share, as a model does."""

  def sample(self, prompts, seeds, *, sampling, max_new_tokens, logprobs=False, reply=None):
    assert not logprobs, "what is made up has none"
    if spread.is_spread(self.params):
      return spread.sample(self, list(prompts), list(seeds), sampling, max_new_tokens)
    found = []
    for place, asked in enumerate(zip(prompts, seeds, strict=True)):
      while asked is not None:
        prompt, seed = asked
        draw = np.random.default_rng([seed, len(prompt), prompt[-2]])
        ids = draw.integers(2, VOCABULARY, draw.integers(1, max_new_tokens)).tolist()
        asked = reply(place, ids) if reply else None
      found.append(ids)
    return found


# The work.


def configuration(given: argparse.Namespace) -> ml_collections.ConfigDict:
  config = config_lib.default()
  with config.unlocked():
    config.rounds = 1
    config.logs.update(path=str(given.log), held_out=0.1)
    # Half of the prompts: each conversation has two turns.
    config.deployment.update(
      environment=f"{TOP}/experiments/own_environment.py:EvenNumber",
      player="",
      actions="[number], such as [7]",
      action_pattern=r"\[\s*(\d+)\s*\]",
      max_turns=4,
      episodes=-(-given.prompts // 2),
      max_response_tokens=LONGEST,
    )
    config.deployment.game_args = ml_collections.ConfigDict(dict(most=20))
    config.extraction.update(trajectories=101, wording="conversations", max_knowledge_tokens=64)
    config.evaluation.episodes = 101
    config.consolidation.batch_size = given.batch
    config.policy.max_prompt_tokens = 512
  return config


def work(given: argparse.Namespace) -> None:
  """One process's part; leaves its figures beside what the run left."""
  how = dict(coordinator=f"127.0.0.1:{given.port}", processes=given.processes, process=given.me)
  distributed.start(detect=False, timeout=120, **how)
  config, folder = configuration(given), given.folder
  mesh = mesh_lib.make_mesh(dict(data=1, fsdp=given.processes, tensor=1))
  a = Architecture(VOCABULARY, 16, 1, 2, 1, 8, 16)
  init = functools.partial(transformer.init, a)
  params = mesh_lib.sharded_init(init, mesh, jax.random.key(0))
  policy = MadeUp(a, params, Words())
  idle, spent = memory(), {}
  with Metrics(folder) as metrics:
    run = Run(config, folder, metrics, mesh, policy)
    shared = dict(run=run, policy=policy, base=params)
    if given.me:
      together.follow(**shared)
    else:
      with together.leading(**shared):
        lead(run, given, spent)
  clock = time.monotonic()
  found = {"samples": sample(run, given)}
  spent["sampling"] = time.monotonic() - clock
  found |= {"idle MB": idle, "peak MB": memory(), "seconds": spent}
  files.write_json(folder / f"process_{given.me}.json", found)
  distributed.finish()


def lead(run: Run, given: argparse.Namespace, spent: dict[str, float]) -> None:
  """What process 0 decides: the logs, and games of which each process plays its share."""
  for name, part in (("logs", read_logs), ("games", play_games)):
    clock = time.monotonic()
    part(run, given)
    spent[name] = time.monotonic() - clock


def read_logs(run: Run, given: argparse.Namespace) -> None:
  collect.collect(run, 1, run.base)


def play_games(run: Run, given: argparse.Namespace) -> None:
  games = play.Games(GAMES, "r1-size", "size", given.games, run.sampling("deployment"))
  with run.stage(1, "games", run.base, given.games) as (meter, advance):
    play.play(run, 1, games, meter, advance)


def sample(run: Run, given: argparse.Namespace) -> str:
  """A digest of a response to every prompt, batch after batch as training lays them out."""
  texts = ["- Ask for the code."] * 3
  task = consolidate._make_task(run, 1, run.base, texts, "task")
  config, found = run.config.consolidation, hashlib.sha256()
  drawn = iter(dataset.batches(range(len(task.prompts)), given.batch, seed=0, round=1))
  for _ in range(-(-len(task.prompts) // given.batch)):
    batch = next(drawn)
    policy = run.base
    how = (task, policy, policy, batch["prompt"], batch["draw"], config, LONGEST, "size")
    made, responses = samples.sample_batch(*how)
    found.update(json.dumps([batch, responses]).encode())
    found.update(b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(made)))
  return f"{len(task.prompts)} prompts: {found.hexdigest()[:16]}"


def memory() -> float:
  """MB: the most that this process has held."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # what getrusage says begins with the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# What starts them.


def started(given: argparse.Namespace, processes: int, folder: pathlib.Path) -> list[dict]:
  """The figures of each of so many processes, which leave a run in `folder`."""
  folder.mkdir()
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  search = os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH"))))
  flags = "--xla_force_host_platform_device_count=1"
  env = os.environ | {"PYTHONPATH": search, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  passed = {name: getattr(given, name) for name in ("log", "prompts", "games", "batch")}
  passed |= dict(processes=processes, folder=folder, port=port)
  command = [sys.executable, str(HERE), *(f"--{name}={value}" for name, value in passed.items())]
  running = [subprocess.Popen([*command, f"--me={me}"], env=env) for me in range(processes)]
  failed = [process.wait() for process in running]
  if any(failed):
    raise RuntimeError(f"{processes} processes ended with {failed}")
  return [json.loads((folder / f"process_{me}.json").read_text()) for me in range(processes)]


def outcome(folder: pathlib.Path) -> dict[str, str]:
  """What the run left, by digest."""
  names = (DEPLOYED, HELD_OUT, PROMPTS, LOGS, GAMES)
  return {name: files.sha256(folder / "round_1" / name) for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--lines", type=int, default=1_000_000)
  parser.add_argument("--prompts", type=int, default=100_001)
  parser.add_argument("--games", type=int, default=2001)
  parser.add_argument("--batch", type=int, default=1001)
  parser.add_argument("--counts", type=int, nargs="+", default=[1, 4], help="of processes")
  parser.add_argument("--tiny", action="store_true", help="2,000 lines, and the rest to fit")
  parser.add_argument("--json", type=figures_file.to_write, default="size.json")
  for name, kind in (("log", pathlib.Path), ("folder", pathlib.Path)):
    parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
  for name in ("processes", "me", "port"):
    parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
  given = parser.parse_args(arguments)
  if given.folder:
    work(given)
    return
  if given.tiny:
    given.lines, given.prompts, given.games, given.batch = 2000, 201, 21, 31
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    given.log = folder / "log.jsonl"
    files.write_chunks(given.log, lines(given.lines))
    found = {"lines": given.lines, "MB": given.log.stat().st_size / 1e6, "rows": []}
    made = []
    for processes in given.counts:
      each = started(given, processes, folder / str(processes))
      made.append([outcome(folder / str(processes)), {one["samples"] for one in each}])
      found["rows"].append(row(each))
    found["samples"] = sorted(set().union(*(samples for _, samples in made)))
    found["the same"] = len(found["samples"]) == 1 and all(one == made[0] for one in made)
  progress.table(found["rows"], f"{given.lines} lines, {found['MB']:.0f} MB")
  print(f"{found['samples'][0]}; the same in all: {found['the same']}", flush=True)
  pathlib.Path(given.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def row(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The line of the table for so many processes."""
  spent = dict(each[0]["seconds"])
  of = lambda name: ", ".join(f"{one[name]:.0f}" for one in each)
  return {
    "processes": len(each),
    **{f"{name} s": seconds for name, seconds in spent.items()},
    "idle MB": of("idle MB"),
    "peak MB": of("peak MB"),
  }


if __name__ == "__main__":
  main()
