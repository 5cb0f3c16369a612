"""The deployed policy where config.deployment.endpoint says that it is, behind a server."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from oel_jax.conversations.schema import Message
from oel_jax.policy.answers import Asked, Unanswered
from oel_jax.policy.endpoint import connection
from oel_jax.policy.endpoint.endpoint import NOBODY, Endpoint, key_of_environment
from oel_jax.policy.sampling.sampler import Sampling
from oel_jax.stages.run import Run

PROBE_TOKENS = 16  # of the answer to the first question, which is about nothing
PROBE_RETRIES = 3  # while nobody listens there: who gave a wrong port should not wait for minutes


def of(config: Any, tokenizer: Any = None) -> Endpoint | None:
  """What config.deployment.endpoint names; None if that is "".

  Args:
    config: of the whole run.
    tokenizer: counts the tokens of answers where the server does not; None: nobody counts.

  Raises:
    ValueError: the key of the environment cannot be one; or the run is one of several processes,
      which would each play games of their own.
  """
  config = config.deployment
  if not config.endpoint:
    return None
  if jax.process_count() > 1:
    raise ValueError(
      f"config.deployment.endpoint is set, and this run has {jax.process_count()} processes: give "
      "--stage=deploy in one process, and carry what it leaves to the others"
    )
  return Endpoint(
    connection.address(config.endpoint),
    config.endpoint_model,
    Sampling(config.temperature, config.top_p, config.top_k),
    config.max_response_tokens,
    timeout=config.endpoint_timeout,
    retries=config.endpoint_retries,
    count_tokens=lambda text: len(tokenizer.encode(text)) if tokenizer else 0,
    key=key_of_environment(),
  )


def reach(config: Any, workdir: str | os.PathLike) -> None:
  """Asks the endpoint one thing, before the run directory is made and hours of other work are done;
  nothing if no round in there is still to be deployed.

  Raises:
    ValueError: it refuses what it is sent.
    RuntimeError: it does not answer.
  """
  found = Run(config, pathlib.Path(workdir), None, None)
  rounds = range(1, config.rounds + 1)
  endpoint = of(config)
  if endpoint is None or all(found.prompts(number).exists() for number in rounds):
    return
  asked = Asked((Message("user", "Are you there?"),), [], seed=0)
  # Who listens may be loading the model, and is waited for as ever.
  for retries in (min(endpoint.retries, PROBE_RETRIES), endpoint.retries):
    came = []
    short = dataclasses.replace(endpoint, max_tokens=PROBE_TOKENS, retries=retries)
    short.answer([asked], lambda _, said: came.append(said))
    if not isinstance(came[0], Unanswered):
      return
    if set(endpoint.counts.faults) == {NOBODY}:
      break
  raise RuntimeError(
    f"config.deployment.endpoint is {endpoint.name}, and it does not answer: {came[0].why}"
  )


def remind(endpoint: Endpoint, number: int) -> None:
  """Says what nobody here can see: whether the server has followed the rounds before."""
  if number > 1:
    logging.warning(
      "round %d: %s must serve the weights that round %d ended with, which --stage=export writes",
      number,
      endpoint.name,
      number - 1,
    )


def tell(endpoint: Endpoint) -> dict[str, float]:
  """Says what came of asking, where not all went well; returns it as a stage's numbers."""
  counts = endpoint.counts
  if counts.faults:
    logging.warning(
      "%s: of %d requests %d had no answer (%s); %d of %d prompts were left unanswered",
      endpoint.name,
      counts.requests,
      counts.faults.total(),
      _listed(counts.faults),
      counts.unanswered,
      counts.answered + counts.unanswered,
    )
  if counts.cut_short:
    logging.warning(
      "%s: %d of %d answers were cut by the server before they had "
      "config.deployment.max_response_tokens (%d): what it holds of a conversation is too short",
      endpoint.name,
      counts.cut_short,
      counts.answered,
      endpoint.max_tokens,
    )
  return dict(requests=counts.requests, faults=counts.faults.total(), unanswered=counts.unanswered)


def _listed(faults: Mapping[str, int]) -> str:
  return ", ".join(f"{kind}: {count}" for kind, count in collections.Counter(faults).most_common())
