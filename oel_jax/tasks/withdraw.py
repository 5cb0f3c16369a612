"""Takes conversations out of a run: `python -m oel_jax.main --stage=withdraw
--config.withdraw=ID,user:NAME ...`.

Their items leave the knowledge, their prompts leave prompts.jsonl and user/held_out.jsonl, and
DIR/withdrawn.json keeps later rounds from them. What was built on them is set aside, the weights
first, and the same command as before makes it again without them; where they were only measured on,
it measures again. Nothing is deleted: what is printed says what lies where.

A name that redaction changed is found as the logs have it, and as the files in user/ do.

An item that a newer one had taken the place of (extraction.newest_wins) stands again where that is
withdrawn: knowledge/ is then made anew from the steps of the extraction, by the same command as
before. An item that the extractor wrote of another conversation, when it had a withdrawn one's
before it, stays. So does what the run's logs and user/ hold.
"""

import dataclasses
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from oel_jax import report
from oel_jax.conversations.jsonl import read_conversations, read_prompts, write_jsonl
from oel_jax.conversations.schema import LOG, Conversation, Prompt, Source, conversation_of
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction import provenance
from oel_jax.extraction import state as extraction_state
from oel_jax.extraction.extract import orders
from oel_jax.runtime import files, mirror, schema
from oel_jax.runtime.counted import counted
from oel_jax.runtime.manifest import Manifest
from oel_jax.runtime.workdir import locked, read_config
from oel_jax.stages import collect, withdrawn
from oel_jax.stages.run import (
  ANSWERS,
  CHECKPOINTS,
  DEPLOYED,
  EVALUATION,
  GATE,
  HELD_OUT,
  ITEMS,
  KNOWLEDGE,
  OLD_PROMPTS,
  PROMPT_GAMES,
  PROMPTS,
  STATE,
  USERS,
)

MAX_SHOWN = 20  # items that are printed, of those that went
# What a round built on its knowledge and prompts, in the order in which it is set aside.
BUILT = (CHECKPOINTS, EVALUATION, GATE, "user/gate_with.jsonl", *ANSWERS.values())


def run(config: Any, workdir: str) -> None:
  """Takes out what config.withdraw names; says what went, which weights held it, what lies where.

  Given again after a kill it does the rest.

  Args:
    config: of it only `withdraw` is read; the rest is the run's own.
    workdir: a run's directory, or the server side's part of it.

  Raises:
    ValueError: nothing is named, it is no directory of a run of rounds, or a file in it is damaged.
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
    if own.get("task"):
      raise ValueError(
        f"--stage=withdraw: {folder} is of config.task {own['task']!r}, and only a run of rounds "
        "learns from conversations: take them out of the files that the configuration names, and "
        "give another --workdir"
      )
    copied = own.get("mirror", "")
    mirror.restore(copied, folder)  # looks whether it is this directory's
    _withdraw(folder, named, own)
    if (folder / "report").exists():
      report.write(folder)
    mirror.update(copied, folder)


def _withdraw(folder: pathlib.Path, named: Sequence[str], own: dict[str, Any]) -> None:
  """`own` is the run's configuration."""
  rounds, rules = _rounds(folder), own.get("extraction", {})
  for path in rounds.values():
    Manifest(path).verify()
  written = _as_written(own, named)
  ids, unknown = _resolve(rounds, written)
  withdrawn.add(folder, ids | {forms[-1] for forms in written.values()})
  held = {n: _held(path, ids, rules) for n, path in rounds.items()}
  touched = [n for n, found in held.items() if found.items or found.prompts]
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
    _tell(first, held[first], weights)
  for n, path in rounds.items():
    if path.exists():
      aside += _rebuild(path, ids, rules, held[n])
      aside += _leave_unmeasured(n, path, ids, held[n])
  _tell_what_is_left(folder, aside, touched)


def _rounds(folder: pathlib.Path) -> dict[int, pathlib.Path]:
  found = {}
  for path in folder.iterdir():
    if path.is_dir() and (match := re.fullmatch(r"round_([1-9]\d*)", path.name)):
      found[int(match[1])] = path
  return dict(sorted(found.items()))


def _as_written(own: dict[str, Any], named: Sequence[str]) -> dict[str, tuple[str, ...]]:
  """Each name → the forms that it may have in the run's files: as given, and last as redaction of
  logs leaves it.
  """
  if not own.get("logs", {}).get("path"):
    return {name: (name,) for name in named}
  try:
    redact = collect.redactor(ml_collections.ConfigDict(own))
  except (OSError, ValueError) as error:  # on the server side, where its file of names is not
    logging.warning("names are taken as they are given, not as redaction left them: %s", error)
    return {name: (name,) for name in named}

  def redacted(name: str) -> str:
    user = name.removeprefix(withdrawn.USER)
    said = redact(Conversation(name, (), Source(LOG, ""), user=user))
    return said.id if user == name else f"{withdrawn.USER}{said.user}"

  return {name: tuple(dict.fromkeys((name, redacted(name)))) for name in named}


def _resolve(
  rounds: dict[int, pathlib.Path], written: dict[str, tuple[str, ...]]
) -> tuple[set[str], list[str]]:
  """The conversations that are named, by themselves or by their user; and those names that no
  round knows.
  """
  users: dict[str, set[str]] = {}
  called: dict[str, set[str]] = {}
  known: set[str] = set()
  for path in rounds.values():
    for name in (DEPLOYED, PROMPT_GAMES):
      for said in read_conversations(path / name) if (path / name).exists() else ():
        known.add(said.id)
        users.setdefault(f"{withdrawn.USER}{said.user}", set()).add(said.id)
    for id, user in _users(path).items():
      users.setdefault(f"{withdrawn.USER}{user}", set()).add(id)
    known |= {item.trajectory for text in _texts(path) for item in text.items}
    files_of_prompts = (_prompt_file(path), path / HELD_OUT)
    known |= {conversation_of(one.id) for file in files_of_prompts for one in _prompts(file)}
  known |= set().union(*users.values())
  for id in known:  # one whose name came before in the logs goes with it
    for name in withdrawn.own_ids(id):
      called.setdefault(name, set()).add(id)
  found = {
    name: {id for form in each for id in called.get(form, set()) | users.get(form, set())}
    for name, each in written.items()
  }
  return set().union(*found.values()), [name for name, ids in found.items() if not ids]


def _users(path: pathlib.Path) -> dict[str, str]:
  """Conversation → user, of the logs that the round began from; {} by an earlier version."""
  file = path / USERS
  return files.read_json(file, _parse_users) if file.exists() else {}


def _parse_users(value: Any) -> dict[str, str]:
  users = schema.get(value, "users", schema.TOP, dict)
  right = all(type(user) is str for user in users.values())
  schema.need(right, "users", users, "an object of texts")
  return users


def _texts(path: pathlib.Path) -> list[knowledge_lib.Knowledge]:
  """The round's texts; [] if they are not all there."""
  if not (path / KNOWLEDGE).exists():
    return []
  count = len(list((path / "knowledge").glob("[0-9]*.jsonl")))
  return [knowledge_lib.read(path / "knowledge", i) for i in range(count)]


def _prompt_file(path: pathlib.Path) -> pathlib.Path:
  return path / (OLD_PROMPTS if (path / OLD_PROMPTS).exists() else PROMPTS)


def _prompts(file: pathlib.Path) -> list[Prompt]:
  return read_prompts(file, max_damaged=0.0) if file.exists() else []


def _left(
  path: pathlib.Path, ids: Collection[str], rules: Mapping[str, Any]
) -> Callable[[knowledge_lib.Item], knowledge_lib.Item | None]:
  """What is left of an item of the round's texts. None: it came from one of these conversations, or
  without them too few gave it, or another is the newest of its case (extraction.newest_wins). One
  that stands for all that gave it (extraction.repeats, of the run's `rules`, is off) stays, and
  counts as the latest other's.
  """
  origins = _origins(path, ids, rules)

  def left(item: knowledge_lib.Item) -> knowledge_lib.Item | None:
    origin = origins.get(provenance.normalised(item.text))
    if origin and origin.left_out in (*provenance.TOO_WEAK, provenance.NEWER):
      return None
    if item.trajectory not in ids:
      return item
    if origin is None or rules.get("repeats", True):
      return None
    latest = max(origin.seen, key=lambda one: (one.round, one.place))
    return dataclasses.replace(item, trajectory=latest.conversation)

  return left


def _origins(
  path: pathlib.Path, ids: Collection[str], rules: Mapping[str, Any]
) -> provenance.Origins:
  return provenance.without(
    provenance.read(path / ITEMS),
    ids,
    min_support=rules.get("min_support", 1),
    newest_wins=rules.get("newest_wins", False),
    told_by_others=rules.get("told_by_others", False),
  )


def _stand_again(path: pathlib.Path, ids: Collection[str], rules: Mapping[str, Any]) -> list[str]:
  """Items that newer ones had taken the place of, which without these conversations are the newest
  of their cases.
  """
  before = provenance.read(path / ITEMS)
  return [
    origin.text
    for name, origin in _origins(path, ids, rules).items()
    if before[name].left_out == provenance.NEWER and not origin.left_out
  ]


@dataclasses.dataclass(frozen=True)
class _Held:
  """What goes from a round: items of its texts, each once, be it that another conversation gave the
  same, and how many prompts, of those that are trained on and of those that are measured on.
  """

  items: list[str]
  prompts: int
  held_out: int


def _held(path: pathlib.Path, ids: Collection[str], rules: Mapping[str, Any]) -> _Held:
  left = _left(path, ids, rules)
  items = [item.text for text in _texts(path) for item in text.items if left(item) != item]
  files_of_prompts = (_prompt_file(path), path / HELD_OUT)
  count = lambda file: sum(conversation_of(one.id) in ids for one in _prompts(file))
  return _Held(list(dict.fromkeys(items)), *map(count, files_of_prompts))


def _rebuild(
  path: pathlib.Path, ids: Collection[str], rules: Mapping[str, Any], held: _Held
) -> list[pathlib.Path]:
  """Writes the round's files without what came from these conversations; returns what is kept
  aside.
  """
  left, origins = _left(path, ids, rules), _origins(path, ids, rules)
  texts = [
    knowledge_lib.Knowledge(tuple(filter(None, map(left, text.items)))) for text in _texts(path)
  ]
  again = _stand_again(path, ids, rules)
  aside = _forget(path, ids)
  if again and (path / KNOWLEDGE).exists() and (path / STATE).exists():
    # Where in a text they stand, extraction knows, which makes the texts again from its steps.
    aside.append(_aside(path / "knowledge"))
    print(
      f"{path.name}: newer items had taken the place of {counted(len(again), 'items')}, and stand "
      "no more: the same command as before writes knowledge/ anew, with the older ones",
      flush=True,
    )
  elif held.items:
    aside.append(_rewrite_texts(path, texts))
  seen = (one for origin in provenance.read(path / ITEMS).values() for one in origin.seen)
  if any(one.conversation in ids for one in seen):
    write = lambda file: provenance.write(file, provenance.placed(origins, texts))
    aside.append(_rewrite(path, ITEMS, ids, write))
  if held.prompts:
    aside.append(_rewrite_prompts(path, _prompt_file(path).name, ids))
  return aside


def _rewrite_texts(path: pathlib.Path, texts: Sequence[knowledge_lib.Knowledge]) -> pathlib.Path:
  """Writes the round's texts; returns where those of before are. Where a kill leaves them undone,
  extraction makes them again from its steps.
  """
  manifest, made_from = Manifest(path), Manifest(path).made_from("knowledge/00.jsonl")
  aside = _aside(path / "knowledge")
  names = [f"knowledge/{i:02d}.{kind}" for i in range(len(texts)) for kind in ("jsonl", "md")]
  for name in names if made_from is not None else ():
    manifest.announce(name, made_from)
  for i, text in enumerate(texts):
    knowledge_lib.write(path / "knowledge", i, text)
  if made_from is not None:
    manifest.record(names, made_from)
  files.write_text(path / KNOWLEDGE, "")
  return aside


def _rewrite_prompts(path: pathlib.Path, name: str, ids: Collection[str]) -> pathlib.Path:
  """Takes their prompts out of a file of the round's; returns the copy of what it was."""
  kept = [prompt for prompt in _prompts(path / name) if conversation_of(prompt.id) not in ids]
  return _rewrite(path, name, ids, lambda file: write_jsonl(file, kept))


def _rewrite(
  path: pathlib.Path, name: str, ids: Collection[str], write: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Has `write` write a file of the round's anew; returns the copy of what it was."""
  aside = _name_aside(path / name)
  shutil.copy2(path / name, aside)
  Manifest(path).rewrite(name, {"withdrawn": schema.digest(sorted(ids))}, write)
  return aside


def _leave_unmeasured(
  number: int, path: pathlib.Path, ids: Collection[str], held: _Held
) -> list[pathlib.Path]:
  """Takes prompts out of those that the round is measured on, and sets aside what it measured on
  them; returns what is kept aside.
  """
  if not held.held_out:
    return []
  names = (EVALUATION, *ANSWERS.values())
  aside = [_aside(path / name) for name in names if (path / name).exists()]
  aside.append(_rewrite_prompts(path, HELD_OUT, ids))
  print(
    f"round {number}: {counted(held.held_out, 'prompts')} went from those that are measured on, "
    f"{counted(len(_prompts(path / HELD_OUT)), 'are left')}: what was measured is set aside, and "
    "the same command as before measures again",
    flush=True,
  )
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
  if len(steps) < len(read):
    return [_aside(state)]
  by_text = orders(len(read), header["texts"], header["seed"], header["round"])
  changed = False
  for number, step in enumerate(steps):
    for text, order in enumerate(by_text):
      if read[order[number]] in ids and step["items"][text]:
        step["items"][text], changed = [], True
  if not changed:
    return []
  return [_rewrite(path, STATE, ids, lambda file: write_jsonl(file, [header, *steps]))]


def _aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a file or a folder to NAME.replaced-TIME; returns where it is."""
  there = _name_aside(path)
  path.rename(there)
  return there


def _name_aside(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.replaced-{time.time_ns() // 10**6}")


def _tell(first: int, held: _Held, weights: list[int]) -> None:
  items = held.items
  gone = counted(len(items), "items")
  print(f"round {first}: {gone} went from knowledge/, and {counted(held.prompts, 'prompts')}")
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
    "the conversations themselves still stand in round_*/user and in your logs; export/ is of "
    "before: make it anew, or remove it; report/, if it is there, is made anew now"
  )
  if touched:
    print(
      f"the same command as before, without --stage, does round {min(touched)} and later ones "
      "again from there",
      flush=True,
    )
