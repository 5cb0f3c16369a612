"""Takes conversations out of a run: `python -m oel_jax.main --stage=withdraw
--config.withdraw=ID,user:NAME ...`.

Their items leave the knowledge, their prompts leave prompts.jsonl, and DIR/withdrawn.json keeps
later rounds from them. What was built on them is set aside, the weights first, and the same command
as before makes it again without them. Nothing is deleted: what is printed says what lies where.

An item that the extractor wrote of another conversation, when it had a withdrawn one's before it,
stays. So does what the run's logs and user/ hold.
"""

import pathlib
import re
import time
from collections.abc import Collection
from typing import Any

from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction import provenance
from oel_jax.extraction import state as extraction_state
from oel_jax.extraction.extract import orders
from oel_jax.runtime import files
from oel_jax.runtime.manifest import Manifest
from oel_jax.runtime.workdir import locked, read_config
from oel_jax.stages import withdrawn
from oel_jax.stages.run import (
  CHECKPOINTS,
  DEPLOYED,
  EVALUATION,
  GATE,
  ITEMS,
  KNOWLEDGE,
  OLD_PROMPTS,
  PROMPT_GAMES,
  PROMPTS,
)

MAX_SHOWN = 20  # items that are printed, of those that went
STATE = "user/extraction.jsonl"
# What a round built on its knowledge and prompts, in the order in which it is set aside.
BUILT = (CHECKPOINTS, EVALUATION, GATE, "user/gate_with.jsonl")


def run(config: Any, workdir: str) -> None:
  """Takes out what config.withdraw names; says what went, which weights held it, what lies where.

  Given again after a kill it does the rest.

  Args:
    config: of it only `withdraw` is read; the rest is the run's own.
    workdir: a run's directory, or the server side's part of it.

  Raises:
    ValueError: nothing is named, it is no run directory, or a file in it is damaged.
    OSError: another process is running in it, or it cannot be written.
  """
  named = [name.strip() for name in config.get("withdraw", "").split(",") if name.strip()]
  if not named:
    raise ValueError(
      "config.withdraw is '': for --stage=withdraw it must name conversations by their ids, or a "
      "user's as user:NAME, with commas between"
    )
  folder = files.local(workdir, "--workdir").absolute()
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder}: not a run directory: it has no config.json")
  with locked(folder):
    own = read_config(folder / "config.json")["config"]
    _withdraw(folder, named, own.get("extraction", {}).get("min_support", 1))


def _withdraw(folder: pathlib.Path, named: Collection[str], min_support: int) -> None:
  rounds = _rounds(folder)
  for path in rounds.values():
    Manifest(path).verify()
  ids, unknown = _resolve(rounds, named)
  withdrawn.add(folder, ids)
  held = {n: _held(path, ids, min_support) for n, path in rounds.items()}
  touched = [n for n, (items, prompts) in held.items() if items or prompts]
  print(f"withdrawn: {', '.join(sorted(ids)) or 'no conversation'}", flush=True)
  for name in unknown:
    print(f"in no round so far: {name}; later ones leave it out", flush=True)
  aside = []
  if touched:
    first = min(touched)
    weights = [n for n in rounds if n >= first and (rounds[n] / CHECKPOINTS).is_dir()]
    # The weights first: whatever a kill leaves undone is then found again, and never trained on.
    aside += [_aside(rounds[n]) for n in sorted(rounds) if n > first]
    aside += [_aside(rounds[first] / name) for name in BUILT if (rounds[first] / name).exists()]
    _tell(first, *held[first], weights)
  for n, path in rounds.items():
    if path.exists():
      aside += _rebuild(path, ids, min_support, *held[n])
  _tell_what_is_left(folder, aside, touched)


def _rounds(folder: pathlib.Path) -> dict[int, pathlib.Path]:
  found = {}
  for path in folder.iterdir():
    if path.is_dir() and (match := re.fullmatch(r"round_([1-9]\d*)", path.name)):
      found[int(match[1])] = path
  return dict(sorted(found.items()))


def _resolve(rounds: dict[int, pathlib.Path], named: Collection[str]) -> tuple[set[str], list[str]]:
  """The conversations that are named, by themselves or by their user; and those names that no
  round knows.
  """
  users: dict[str, set[str]] = {}
  known: set[str] = set()
  for path in rounds.values():
    for name in (DEPLOYED, PROMPT_GAMES):
      for said in read_conversations(path / name) if (path / name).exists() else ():
        known.add(said.id)
        users.setdefault(f"user:{said.user}", set()).add(said.id)
    known |= {item.trajectory for text in _texts(path) for item in text.items}
    known |= {withdrawn.conversation_of(prompt) for prompt in _prompts(path)}
  ids = {name for name in named if not name.startswith("user:")}
  ids |= {id for name in named for id in users.get(name, ())}
  return ids, [name for name in named if name not in known and name not in users]


def _texts(path: pathlib.Path) -> list[knowledge_lib.Knowledge]:
  """The round's texts; [] if they are not all there."""
  if not (path / KNOWLEDGE).exists():
    return []
  count = len(list((path / "knowledge").glob("[0-9]*.jsonl")))
  return [knowledge_lib.read(path / "knowledge", i) for i in range(count)]


def _prompt_file(path: pathlib.Path) -> pathlib.Path:
  return path / (OLD_PROMPTS if (path / OLD_PROMPTS).exists() else PROMPTS)


def _prompts(path: pathlib.Path) -> list[Any]:
  file = _prompt_file(path)
  return read_prompts(file, max_damaged=0.0) if file.exists() else []


def _goes(path: pathlib.Path, ids: Collection[str], min_support: int) -> Any:
  """The rule by which an item of the round's texts goes: it came from one of these conversations,
  or without them too few are left.
  """
  origins = provenance.without(provenance.read(path / ITEMS), ids, min_support)
  weak = {name for name, origin in origins.items() if origin.left_out == provenance.SUPPORT}
  return lambda item: item.trajectory in ids or provenance.normalised(item.text) in weak


def _held(path: pathlib.Path, ids: Collection[str], min_support: int) -> tuple[list[str], int]:
  """The items that go from a round's texts, each once, and how many prompts do."""
  goes = _goes(path, ids, min_support)
  items = [item.text for text in _texts(path) for item in text.items if goes(item)]
  prompts = sum(withdrawn.conversation_of(prompt) in ids for prompt in _prompts(path))
  return list(dict.fromkeys(items)), prompts


def _rebuild(
  path: pathlib.Path, ids: Collection[str], min_support: int, items: list[str], prompts: int
) -> list[pathlib.Path]:
  """Writes the round's files without what came from these conversations; returns what is kept
  aside.
  """
  manifest, goes, aside = Manifest(path), _goes(path, ids, min_support), []
  aside += _forget(path, ids)
  if items:
    texts = [
      knowledge_lib.Knowledge(tuple(item for item in text.items if not goes(item)))
      for text in _texts(path)
    ]
    made_from = manifest.made_from("knowledge/00.jsonl")
    aside.append(_aside(path / "knowledge"))
    for i, text in enumerate(texts):
      knowledge_lib.write(path / "knowledge", i, text)
    origins = provenance.without(provenance.read(path / ITEMS), ids, min_support)
    names = [f"knowledge/{i:02d}.{kind}" for i in range(len(texts)) for kind in ("jsonl", "md")]
    if (path / ITEMS).exists():
      aside.append(_aside(path / ITEMS))
      provenance.write(path / ITEMS, provenance.placed(origins, texts))
      names.append(ITEMS)
    if made_from is not None:
      manifest.record(names, made_from)
    files.write_text(path / KNOWLEDGE, "")
  if prompts:
    file = _prompt_file(path)
    kept = [prompt for prompt in _prompts(path) if withdrawn.conversation_of(prompt) not in ids]
    made_from = manifest.made_from(file.name)
    aside.append(_aside(file))
    write_jsonl(file, kept)
    if made_from is not None:
      manifest.record([file.name], made_from)
  return aside


def _forget(path: pathlib.Path, ids: Collection[str]) -> list[pathlib.Path]:
  """Empties the steps of the round's extraction that read these conversations; one that has not
  ended is set aside, to begin anew without them.
  """
  state = path / STATE
  if not state.exists():
    return []
  header, *steps = extraction_state.read(state)
  read = header["trajectories"]
  if not ids & set(read):
    return []
  if not (path / KNOWLEDGE).exists():
    return [_aside(state)]
  by_text = orders(len(read), header["texts"], header["seed"], header["round"])
  changed = False
  for number, step in enumerate(steps):
    for text, order in enumerate(by_text):
      if read[order[number]] in ids and step["items"][text]:
        step["items"][text], changed = [], True
  if not changed:
    return []
  aside = _aside(state)
  write_jsonl(state, [header, *steps])
  return [aside]


def _aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a file or a folder to NAME.replaced-TIME; returns where it is."""
  there = path.with_name(f"{path.name}.replaced-{time.time_ns() // 10**6}")
  path.rename(there)
  return there


def _tell(first: int, items: list[str], prompts: int, weights: list[int]) -> None:
  print(f"round {first}: {len(items)} items went from knowledge/, and {prompts} prompts")
  for text in items[:MAX_SHOWN]:
    print(f"  {text}")
  if len(items) > MAX_SHOWN:
    print(f"  and {len(items) - MAX_SHOWN} more")
  if weights:
    names = ", ".join(f"round_{n}/{CHECKPOINTS}" for n in weights)
    print(f"these weights held them, and are set aside: {names}", flush=True)


def _tell_what_is_left(folder: pathlib.Path, aside: list[pathlib.Path], touched: list[int]) -> None:
  if aside:
    print("nothing was deleted; what held them lies in these, until you remove them (rm -r):")
    for path in aside:
      print(f"  {path}")
  print(
    "the conversations themselves still stand in round_*/user and in your logs; report/ and "
    "export/ are of before: make them anew, or remove them"
  )
  if touched:
    print(
      f"the same command as before, without --stage, does round {min(touched)} and later ones "
      "again from there",
      flush=True,
    )
