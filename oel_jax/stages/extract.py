"""Extraction: what the deployed games teach, in words (OEL section 3)."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from oel_jax import config as config_lib
from oel_jax.conversations.jsonl import read_conversations
from oel_jax.conversations.schema import EMPTY, Conversation
from oel_jax.extraction import knowledge as knowledge_lib
from oel_jax.extraction import provenance
from oel_jax.extraction.extract import extract as accumulate
from oel_jax.extraction.extract import raw_knowledge
from oel_jax.policy import load
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import files, named, schema, together
from oel_jax.runtime.checksum import fingerprint
from oel_jax.stages import collect, deploy, knowledge, resume, withdrawn
from oel_jax.stages.run import DEPLOYED, ITEMS, KNOWLEDGE, STATE, Meter, Run

Advance = Callable[..., None]
Texts = list[knowledge_lib.Knowledge]


def extract(run: Run, number: int, policy: Policy) -> list[str]:
  """Lets the policy, or the model of config.extraction.weights, write down what the policy's
  deployed games teach; returns the texts of the round that enter prompts, at most K.

  Raises:
    ValueError: what is there was made by other weights; or no text says anything.
  """
  resume.refuse_other_weights(run, number, policy)
  if not knowledge.read(run, number):
    path = run.round(number) / DEPLOYED
    if not path.exists() and run.config.logs.path:
      raise ValueError(
        f"{path}: is not there, and the knowledge is drawn from it: remove {run.prompts(number)}, "
        "too, to have the logs read again"
      )
    there = path.exists()  # and made by this policy, or it would have been refused
    games = read_conversations(path, max_damaged=0.0) if there else None
    _write(run, number, policy, games or deploy.play_for_knowledge(run, number, policy))
  return knowledge.texts(run, number)


def texts_after(run: Run, number: int, step: int, policy: Policy) -> list[str]:
  """A round's texts as they stood after `step` trajectories, without those that its gate left out;
  nothing is sampled. `policy` is the one that wrote them.
  """
  games = read_conversations(run.round(number) / DEPLOYED, max_damaged=0.0)
  with _writer(run, policy) as writer:
    whole = _accumulate(run, number, writer, games, lambda n: None)
  texts, _ = _limited(run, number, whole, step, policy, games)
  out = knowledge.left_out(run, number)
  return [text.text for i, text in enumerate(texts) if text.text and i not in out] or [EMPTY]


def _write(run: Run, number: int, policy: Policy, games: Sequence[Conversation]) -> None:
  config, folder = run.config.extraction, run.round(number) / "knowledge"
  made_from = {"weights": fingerprint(policy.params)}
  steps = len(_read(run, number, games)) if config.source == "extracted" else 0
  with (
    _writer(run, policy) as writer,
    run.stage(number, "extract", writer, steps) as (meter, advance),
  ):
    whole = _accumulate(run, number, meter, games, advance)
    if writer is not policy:
      made_from["extractor"] = fingerprint(writer.params)
  texts, origins = _limited(run, number, whole, config.use, policy, games)
  for i, text in enumerate(texts):
    knowledge_lib.write(folder, i, text)
  made_from[DEPLOYED] = files.sha256(run.round(number) / DEPLOYED)[:16]
  if _carries(run, number):
    before = [text.text for text in knowledge.carried(run, number - 1)]
    made_from["previous knowledge"] = schema.digest(before)
  names = [f"knowledge/{i:02d}.{kind}" for i in range(len(texts)) for kind in ("jsonl", "md")]
  if origins:
    provenance.write(run.round(number) / ITEMS, origins)
    names.append(ITEMS)
  run.manifest(number).record(names, made_from)
  run.log(number, "extract", items=sum(len(text.items) for text in texts) / len(texts))
  files.write_text(run.round(number) / KNOWLEDGE, "")


@contextlib.contextmanager
def _writer(run: Run, policy: Policy) -> Iterator[Policy]:
  """Who writes the knowledge down; another model than the policy's is held for the block alone."""
  config = run.config.extraction
  if not config.weights or config.source != "extracted":
    yield policy
    return
  yield _load_writer(run)
  _let_writer_go(run)


@together.everywhere
def _load_writer(run: Run) -> Policy:
  """The model of config.extraction.weights."""
  how, longest = config_lib.extractor(run.config), run.config.extraction.max_response_tokens
  found = load.load_policy(
    how,
    run.mesh,
    response_tokens=longest,
    field="extraction.weights",
    sample_tensor=run.config.mesh.sample_tensor,
  )
  together.share("writer", found)
  together.share("writer's parameters", found.params)
  return found


@together.everywhere
def _let_writer_go(run: Run) -> None:
  """Frees its memory in all processes, where nothing else holds it."""
  together.share("writer", None)
  together.share("writer's parameters", None)


def _accumulate(
  run: Run, number: int, policy: Policy | Meter, games: Sequence[Conversation], advance: Advance
) -> Texts:
  """All that the K texts gathered in a round, before the limit; sampled once, then read back from
  user/extraction.jsonl.
  """
  config, games = run.config.extraction, _read(run, number, games)
  if config.source == "trajectories":
    return raw_knowledge(
      games,
      texts=config.texts,
      seed=run.config.seed,
      round=number,
      wording=config.wording,
      answered_only=config.answered_only,
      people=collect.people(run.config),
    )
  if config.source == "empty":
    return [knowledge_lib.Knowledge()] * config.texts
  return accumulate(
    policy,
    games,
    texts=config.texts,
    form=config.form,
    see_previous=config.see_previous,
    sampling=run.sampling("extraction"),
    max_response_tokens=config.max_response_tokens,
    max_knowledge_tokens=config.max_knowledge_tokens,
    max_prompt_tokens=run.config.policy.max_prompt_tokens,
    seed=run.config.seed,
    round=number,
    thinking=run.config.policy.thinking,
    wording=config.wording,
    answered_only=config.answered_only,
    people=collect.people(run.config),
    start=knowledge.carried(run, number - 1) if _carries(run, number) else None,
    state_path=run.round(number) / STATE,
    weights=fingerprint(policy.params),
    advance=advance,
  )


def _read(run: Run, number: int, games: Sequence[Conversation]) -> Sequence[Conversation]:
  """What the extraction reads; of steps that are there, they were emptied of what was withdrawn."""
  there = (run.round(number) / STATE).exists()
  return games if there else withdrawn.left(run.folder, games)


def _carries(run: Run, number: int) -> bool:
  return run.config.extraction.start_from == "previous_round" and number > 1


def _limited(
  run: Run,
  number: int,
  whole: Texts,
  step: int,
  policy: Policy,
  games: Sequence[Conversation],
) -> tuple[Texts, provenance.Origins]:
  """The accumulations as they stood after `step` trajectories: without what min_support,
  told_by_others, newest_wins and repeats leave out, within max_knowledge_tokens, and edited if
  config.extraction.edit says so.
  And what stands behind their items, by the words that would cross.
  """
  config, edit = run.config.extraction, _edit(run.config)
  edited = lambda texts: [_edited(text, edit) for text in texts] if edit else texts
  texts = [text.at(step) for text in whole]
  origins = {}
  if config.source == "extracted":  # of other sources there are no items
    said = edited(texts)
    earlier = provenance.read(run.round(number - 1) / ITEMS) if _carries(run, number) else {}
    origins = provenance.sift(
      provenance.gather(said, games, earlier, collect.people(run.config)),
      min_support=config.min_support,
      newest_wins=config.newest_wins,
      told_by_others=config.told_by_others,
    )
    _tell(number, origins, bool(run.config.logs.path))
    how = dict(origins=origins, repeats=config.repeats)
    texts = [_sifted(*pair, **how) for pair in zip(texts, said, strict=True)]
  texts = knowledge_lib.as_of(
    texts,
    step,
    max_tokens=config.max_knowledge_tokens,
    count_tokens=lambda text: len(policy.tokenizer.encode(text)),
  )
  texts = edited(texts)
  return texts, provenance.placed(origins, texts)


def _sifted(
  text: knowledge_lib.Knowledge,
  said: knowledge_lib.Knowledge,
  origins: provenance.Origins,
  repeats: bool,
) -> knowledge_lib.Knowledge:
  """The items of `text` that are not left out, by what they are once edited, `said`; without
  `repeats` each once, the last of it.
  """
  names = [provenance.normalised(item.text) for item in said.items]
  last = {name: place for place, name in enumerate(names)}
  stays = lambda place, name: not origins[name].left_out and (repeats or last[name] == place)
  return knowledge_lib.Knowledge(
    tuple(text.items[place] for place, name in enumerate(names) if stays(place, name))
  )


def _tell(number: int, origins: provenance.Origins, of_logs: bool) -> None:
  """Says how many items are left out, and why."""
  for why in (*provenance.TOO_WEAK, provenance.NEWER):
    if count := sum(origin.left_out == why for origin in origins.values()):
      told = "round %d: %d of %d items left out (%s): they stand in %s"
      logging.warning(told, number, count, len(origins), why, ITEMS)
  if of_logs and any(origin.left_out == provenance.OWN_WORDS for origin in origins.values()):
    logging.warning(
      "round %d: what the assistant of the logs said and nobody else is no knowledge "
      "(extraction.told_by_others); where people answered in its place, config.logs.people says so",
      number,
    )


def _edit(config: Any) -> Callable[[str], str] | None:
  """What changes an item before it crosses: where logs are learned from, whatever must not cross is
  taken out of it, and then config.extraction.edit; None if nothing does.
  """
  edit = named.edit(config.extraction.edit, "config.extraction.edit")
  if not config.logs.path:
    return edit
  redact = collect.redactor(config).text
  return (lambda text: edit(redact(text))) if edit else redact


def _edited(text: knowledge_lib.Knowledge, edit: Callable[[str], str]) -> knowledge_lib.Knowledge:
  """The round's own items edited; those carried over were edited when they were new."""
  own = lambda item: item.step != knowledge_lib.CARRIED
  return knowledge_lib.Knowledge(
    tuple(dataclasses.replace(i, text=edit(i.text)) if own(i) else i for i in text.items)
  )
