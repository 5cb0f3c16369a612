"""Answers from a server that speaks OpenAI's chat completions: many requests at once, each with a
deadline, tried again where that may help.
"""

import collections
import dataclasses
import email.utils
import functools
import http.client
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from oel_jax.conversations.schema import Message
from oel_jax.policy.answers import Asked, Reply, Unanswered
from oel_jax.policy.endpoint import completions, connection

if TYPE_CHECKING:
  from oel_jax.policy.sampling.token_sampling import Sampling

KEY = "OEL_ENDPOINT_KEY"  # the environment variable that the key is read from
REDACTED_ANYWHERE = 12  # letters; a shorter key may be a word ("EMPTY") that answers have, too
FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds; each pause is twice the one before
RETRIED = (408, 409, 429)  # and 500 and above; of the others none gets better by itself
NOBODY = "broken connection"  # the kind of fault where no HTTP came back

# Not the global generator, which games have states of.
_chance = random.Random()


class Fault(Exception):
  """A request without an answer, which may have one when it is tried again.

  Attributes:
    kind: in few words, for counting.
    pause: seconds that the server wants to pass before; 0.0 if it did not say.
  """

  def __init__(self, kind: str, why: str, pause: float = 0.0):
    super().__init__(f"{kind}: {why}" if why else kind)
    self.kind, self.pause = kind, pause


class _Outcome(NamedTuple):
  """What came of asking one prompt; `faults` are the kinds of what went wrong before or instead."""

  answer: completions.Answer | Unanswered
  faults: list[str]


@dataclasses.dataclass
class Counts:
  """What was asked and what came of it.

  Attributes:
    requests: each try of its own.
    faults: by kind, the requests that had no answer.
    answered, unanswered: prompts.
    tokens: of the answers.
    cut_short: answers that the server ended by a limit of its own, below ours.
  """

  requests: int = 0
  faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  answered: int = 0
  unanswered: int = 0
  tokens: int = 0
  cut_short: int = 0


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A policy that is asked over HTTP.

  Attributes:
    to: the address of its server (`connection.address`).
    model: as the server calls it.
    sampling: temperature, top_p, top_k.
    max_tokens: of an answer, thinking included.
    timeout: seconds for one request, its answer read whole.
    retries: how often a request is tried again.
    count_tokens: of a text, where the server does not say how many it drew.
    key: sent as the bearer's; "" for none. No error and no `repr` shows it.
    counts: of all calls of `answer`.
  """

  to: connection.Address
  model: str
  sampling: "Sampling"
  max_tokens: int
  timeout: float
  retries: int
  count_tokens: Callable[[str], int]
  key: str = dataclasses.field(default="", repr=False)
  counts: Counts = dataclasses.field(default_factory=Counts)

  @property
  def name(self) -> str:
    """The address and the model."""
    return f"{self.to} ({self.model})"

  def answer(self, asked: Sequence[Asked], reply: Reply) -> None:
    """Answers all prompts side by side, and what `reply` asks then; `policy.answers.Answering`.

    Each request has a thread; `reply` is called in the caller's alone.

    Raises:
      ValueError: the server refuses what it is sent.
    """
    stopped = threading.Event()
    with futures.ThreadPoolExecutor(max(len(asked), 1)) as pool:
      send = lambda one: pool.submit(self._ask, one, stopped)
      waiting = {send(one): number for number, one in enumerate(asked)}
      try:
        while waiting:
          done, _ = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
          for future in sorted(done, key=waiting.__getitem__):
            number = waiting.pop(future)
            following = reply(number, self._counted(future.result()))
            if following is not None:
              waiting[send(following)] = number
      finally:
        stopped.set()

  def _counted(self, outcome: _Outcome) -> Message | Unanswered:
    counts, found = self.counts, outcome.answer
    counts.faults.update(outcome.faults)
    counts.requests += len(outcome.faults)
    if isinstance(found, Unanswered):
      counts.unanswered += 1
      return found
    message = found.message
    if message.response_tokens is None:
      # The id that ended it is one more.
      said = (
        message.thinking,
        message.content,
        *(f"{c.name}{c.arguments}" for c in message.tool_calls),
      )
      own = sum(map(self.count_tokens, said))
      message = dataclasses.replace(message, response_tokens=own + (not found.cut))
    counts.requests += 1
    counts.answered += 1
    counts.tokens += message.response_tokens
    counts.cut_short += found.cut and message.response_tokens < self.max_tokens
    return message

  def _ask(self, asked: Asked, stopped: threading.Event) -> _Outcome:
    """Asks until there is an answer, or no retry is left."""
    body = completions.request(
      self.model,
      asked.messages,
      asked.seed,
      tools=asked.tools,
      sampling=self.sampling,
      max_tokens=self.max_tokens,
    )
    faults = []
    while True:
      try:
        return _Outcome(self._once(body, bool(asked.tools), stopped), faults)
      except connection.Stopped:
        return _Outcome(Unanswered("the run stopped"), faults)
      except Fault as fault:
        faults.append(fault.kind)
        if len(faults) > self.retries or stopped.is_set():
          tries = f"{len(faults)} tries" if len(faults) > 1 else "one try"
          return _Outcome(Unanswered(f"{fault}, after {tries}"), faults)
        _pause(stopped, pause(len(faults), fault.pause))

  def _once(self, body: bytes, tools: bool, stopped: threading.Event) -> completions.Answer:
    """Sends one request; `tools`: whether any are offered.

    Raises:
      Fault: it may be tried again.
      ValueError: it need not.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
    post = functools.partial(connection.post, self.to, "/chat/completions", body, headers)
    try:
      response = self._clean(post(seconds=self.timeout, stopped=stopped))
    except ssl.SSLCertVerificationError as error:
      raise ValueError(f"{self.to}: its certificate is not trusted: {error}") from error
    except TimeoutError as error:
      raise Fault("no answer in time", f"within {self.timeout:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
      told = self._without_key(str(error) or type(error).__name__)
      raise Fault(NOBODY, told) from error
    if not 200 <= response.status < 300:
      self._refused(response)
    try:
      found = completions.answer(response.body)
      if found.message.tool_calls and not tools:
        raise ValueError("a call of a tool, and none was offered")
      return found
    except ValueError as error:
      kind = response.headers.get("content-type", "none")[:80]
      told = self._without_key(f"{error}; content type {kind!r}")
      raise Fault("damaged answer", told) from error

  def _refused(self, response: connection.Response) -> NoReturn:
    """Raises what a status other than 2xx means: Fault or ValueError."""
    status, words = response.status, self._without_key(completions.said(response.body))
    if status in RETRIED or status >= 500:
      raise Fault(f"HTTP {status}", words, asked_pause(response.headers.get("retry-after", "")))
    if 300 <= status < 400:
      target = completions.shortened(response.headers.get("location", "").encode())
      raise ValueError(
        f"{self.to}: HTTP {status}, a redirect to {self._without_key(target)}, which is not "
        "followed, for the key would go along: give the right URL as config.deployment.endpoint"
      )
    advice = "look at config.deployment.endpoint_model, and at the limits of the server"
    if status in (401, 403):
      advice = f"the key is what the environment has as {KEY}, {'set' if self.key else 'unset'} now"
    elif status == 404:
      advice = (
        "config.deployment.endpoint must be the base URL, which mostly ends in /v1, and "
        "config.deployment.endpoint_model a model that is there"
      )
    raise ValueError(f"{self.to}: HTTP {status} from {self.model!r}: {words}; {advice}")

  def _clean(self, response: connection.Response) -> connection.Response:
    """The response, without the key if the server says it back: before anything is cut short, of
    which half a key could stay.
    """
    if len(self.key) < REDACTED_ANYWHERE:
      return response
    body = response.body
    for form in (self.key, self.key.replace("/", "\\/")):  # as JSON may write it
      body = body.replace(form.encode(), b"[key]")
    headers = {name: self._without_key(value) for name, value in response.headers.items()}
    return connection.Response(response.status, headers, body)

  def _without_key(self, text: str) -> str:
    return text.replace(self.key, "[key]") if self.key else text


def key_of_environment() -> str:
  """The key, "" if there is none.

  Raises:
    ValueError: it cannot stand in a header; shows nothing of it.
  """
  key = os.environ.get(KEY, "").strip()
  if not (key.isascii() and key.isprintable() and " " not in key):
    raise ValueError(
      f"the environment's {KEY} holds spaces, control characters or letters beyond ASCII: it must "
      "be the endpoint's key alone"
    )
  return key


def pause(tries: int, wanted: float = 0.0) -> float:
  """Seconds until the next try, after so many: twice as long each time, by chance up to half of it
  shorter, so that many requests do not come back at once; not before what the server wanted, but
  never beyond MAX_PAUSE.
  """
  own = min(FIRST_PAUSE * 2 ** min(tries - 1, 30), MAX_PAUSE)
  own *= 1 - _chance.random() / 2
  return min(max(own, wanted * (1 + _chance.random() / 10)), MAX_PAUSE)


def asked_pause(retry_after: str) -> float:
  """Seconds that a header Retry-After asks for, in seconds or as a date; 0.0 if it says neither."""
  text = retry_after.strip()
  if text.replace(".", "", 1).isdecimal() and text.isascii():
    return float(text)
  try:
    until = email.utils.parsedate_to_datetime(text).timestamp()
  except (ValueError, TypeError, OverflowError):
    return 0.0
  return max(until - time.time(), 0.0)


def _pause(stopped: threading.Event, seconds: float) -> None:
  stopped.wait(seconds)
