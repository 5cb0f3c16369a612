"""Divergences that a round was measured on, in nats a token: from the teacher where nothing was
learned, and from the base where nothing was to be learned; and how sure it is of its own answers.
"""

import dataclasses
from typing import Any

from oel_jax.report.measures import Measure, read_mean, read_share
from oel_jax.runtime import schema
from oel_jax.runtime.schema import get, need, whole


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """How far the policy is from the one that has the knowledge in its prompt, on `prompts` prompts
  of conversations that nothing was learned from (`stages.held_out`): before the round and after, in
  nats a token, and the share of the first that is gone; answers that the limit cut, None by an
  earlier version; and how many prompts were `withdrawn` since the logs were read.
  """

  prompts: int
  kl_before: float
  kl_after: float
  closer: float | None
  response_tokens_before: Measure
  response_tokens_after: Measure
  cut_before: Measure | None = None
  cut_after: Measure | None = None
  withdrawn: int = 0


@dataclasses.dataclass(frozen=True)
class Unrelated:
  """How far the policy is from the one that the run began with, on `prompts` prompts that have
  nothing to do with what it learned (`stages.unrelated`), `kl` nats a token; `response_tokens` is a
  mean over answers.
  """

  prompts: int
  kl: float
  response_tokens: Measure


@dataclasses.dataclass(frozen=True)
class OwnAnswers:
  """How sure the policy is of its own answers to `prompts` first prompts of held-out games
  (`stages.own_answers`): `entropy` and `kl`, from the one that the run began with, in nats a token;
  `topk_mass`, the share of the mass on the `k` likeliest tokens.
  """

  prompts: int
  entropy: float
  k: int
  topk_mass: float
  kl: float


def own_answers(value: Any) -> OwnAnswers:
  """The "own_answers" of an evaluation.json; raises ValueError naming the field."""
  where = "own_answers"
  numbers = {name: get(value, name, where) for name in ("entropy", "topk_mass", "kl")}
  for name, number in numbers.items():
    need(schema.is_number(number), f"{where}.{name}", number, "a number")
  return OwnAnswers(whole(value, "prompts", where), k=whole(value, "k", where), **numbers)


def held_out(value: Any) -> HeldOut:
  """The "held_out" of an evaluation.json; raises ValueError naming the field."""
  numbers = {name: get(value, name, "held_out") for name in ("kl_before", "kl_after")}
  numbers["closer"] = value.get("closer")
  for name, number in numbers.items():
    known = schema.is_number(number) or (name == "closer" and number is None)
    need(known, f"held_out.{name}", number, "a number")
  means = {
    name: read_mean(get(value, name, "held_out"), f"held_out.{name}")
    for name in ("response_tokens_before", "response_tokens_after")
  }
  cuts = {
    name: read_share(value[name], f"held_out.{name}")
    for name in ("cut_before", "cut_after")
    if name in value
  }
  gone = whole({"withdrawn": 0} | value, "withdrawn", "held_out")
  return HeldOut(whole(value, "prompts", "held_out"), **numbers, **means, **cuts, withdrawn=gone)


def unrelated(value: Any) -> Unrelated:
  """The "unrelated" of an evaluation.json; raises ValueError naming the field."""
  kl = get(value, "kl", "unrelated")
  need(schema.is_number(kl), "unrelated.kl", kl, "a number")
  where = "unrelated.response_tokens"
  tokens = read_mean(get(value, "response_tokens", "unrelated"), where)
  return Unrelated(whole(value, "prompts", "unrelated"), kl, tokens)
