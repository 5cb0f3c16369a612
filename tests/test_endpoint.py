"""A policy behind a server: what is asked, what its answers mean, and what becomes of those that do
not come. The servers are real ones, in threads; what a real engine says is in the last tests.
"""

import datetime
import email.utils
import json
import pathlib
import threading
import time
import types

import pytest
from chat_server import completion, send, serving, trickle

from oel_jax.conversations.schema import Message, ToolCall, knowledge_message
from oel_jax.policy.answers import Asked, Unanswered
from oel_jax.policy.endpoint import completions, connection
from oel_jax.policy.endpoint import endpoint as endpoint_lib

SAMPLING = types.SimpleNamespace(temperature=0.7, top_p=0.9, top_k=0)
KEY = "sk-planted-0123456789abcdef"
ASKED = Asked((Message("user", "Where is G?"),), [1], 5)


@pytest.fixture(name="pauses")
def fixture_pauses(monkeypatch):
  """The pauses between tries, in seconds, in place of which no time passes."""
  seconds = []
  monkeypatch.setattr(endpoint_lib, "_pause", lambda stopped, wait: seconds.append(wait))
  return seconds


def endpoint(url, **changes):
  how = dict(
    model="m",
    sampling=SAMPLING,
    max_tokens=32,
    timeout=5.0,
    retries=2,
    count_tokens=lambda text: len(text.split()),
    key=KEY,
  )
  return endpoint_lib.Endpoint(connection.address(url), **how | changes)


def ask(one, *asked):
  """What each prompt is answered with."""
  said = {}
  one.answer(asked or [ASKED], lambda number, answer: said.update({number: answer}))
  return [said[number] for number in range(len(said))]


# What is asked.


def test_a_request_holds_the_messages_the_sampling_and_the_key():
  call = ToolCall("c1", "look", '{"at": 1}')
  asked = Asked(
    (
      knowledge_message("G is the goal.", "games"),
      Message("system", "Be brief."),
      Message("user", "Grüße, 🧭 and half \ud83d"),
      Message("assistant", "", tool_calls=(call,)),
      Message("tool", "a wall", tool_call_id="c1", name="look"),
    ),
    [],
    2**32 - 1,
  )
  with serving(lambda handler, number, body: send(handler, completion("[up]", tokens=4))) as server:
    [answer] = ask(endpoint(server.url, sampling=types.SimpleNamespace(**vars(SAMPLING))), asked)
    [(path, headers, body)] = server.asked
  assert answer == Message("assistant", "[up]", response_tokens=4)
  assert path == "/v1/chat/completions"
  assert headers["Authorization"] == f"Bearer {KEY}"
  assert headers["Content-Type"] == "application/json"
  assert body == {
    "model": "m",
    "temperature": 0.7,
    "top_p": 0.9,
    "max_tokens": 32,
    "seed": 2**31 - 1,  # signed 32 bits are what some servers have
    "messages": [
      {
        "role": "system",
        "content": "Be brief.\n\n" + knowledge_message("G is the goal.", "games").content,
      },
      {"role": "user", "content": "Grüße, 🧭 and half ?"},
      {
        "role": "assistant",
        "content": "",
        "tool_calls": [
          {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
        ],
      },
      {"role": "tool", "content": "a wall", "tool_call_id": "c1", "name": "look"},
    ],
  }


def test_without_a_key_there_is_no_header_and_top_k_is_sent_where_it_is_on():
  with serving(lambda handler, number, body: send(handler, completion("[up]"))) as server:
    sampling = types.SimpleNamespace(**vars(SAMPLING) | {"top_k": 20})
    ask(endpoint(server.url, key="", sampling=sampling))
    [(_, headers, body)] = server.asked
  assert "Authorization" not in headers and body["top_k"] == 20


@pytest.mark.parametrize(
  "url, shown",
  [
    ("http://127.0.0.1:80/v1", "http://127.0.0.1:80/v1"),
    ("https://api.example.com/v1/", "https://api.example.com/v1"),
    ("http://[::1]:8080", "http://[::1]:8080"),
    ("https://h/openai/v1/chat/completions", "https://h/openai/v1"),
  ],
)
def test_an_address_is_the_base_of_what_is_given(url, shown):
  assert str(connection.address(url)) == shown


@pytest.mark.parametrize(
  "url",
  [
    "",
    "api.example.com/v1",
    "ftp://h/v1",
    "http:///v1",
    "http://h:port/v1",
    "http://me:hunter2@h/v1",
    "https://h/v1?key=hunter2",
    "https://h/v1#hunter2",
    "http://h/v 1",
    "http://h/v\n1",
    "http://h/ä",
    "http://[::1/v1",
  ],
)
def test_what_is_no_address_is_refused_and_not_shown(url):
  with pytest.raises(ValueError, match='a base URL as "https://HOST/v1"') as error:
    connection.address(url)
  assert "hunter2" not in str(error.value)


# Many at once.


def test_prompts_are_asked_side_by_side_and_replies_come_one_at_a_time():
  barrier, threads = threading.Barrier(8, timeout=10), set()

  def behave(handler, number, body):
    barrier.wait()  # nobody is answered until eight have asked
    text = body["messages"][0]["content"]
    send(handler, completion(f"answer to {text}", tokens=3))

  said = []

  def reply(number, answer):
    threads.add(threading.get_ident())
    said.append((number, answer.content))
    turn = sum(one == number for one, _ in said)
    return Asked((Message("user", f"{number}.{turn}"),), [], 0) if turn < 3 else None

  with serving(behave) as server:
    one = endpoint(server.url)
    one.answer([Asked((Message("user", f"{i}.0"),), [], 0) for i in range(8)], reply)
  assert sorted(said) == [(i, f"answer to {i}.{t}") for i in range(8) for t in range(3)]
  assert threads == {threading.get_ident()}
  counts = one.counts
  assert (counts.requests, counts.answered, counts.tokens, counts.faults.total()) == (24, 24, 72, 0)


def test_an_error_of_the_caller_ends_all_requests_soon():
  def behave(handler, number, body):
    if body["messages"][0]["content"] != "first":
      trickle(handler, b"HTTP/1.1 200 OK\r\n\r\n")
    send(handler, completion("yes"))

  def reply(number, answer):
    raise KeyError("a game that fails")

  asked = [Asked((Message("user", text),), [], 0) for text in ("first", "second", "third")]
  with serving(behave) as server:
    began = time.monotonic()
    with pytest.raises(KeyError, match="a game that fails"):
      endpoint(server.url, timeout=60.0).answer(asked, reply)
  assert time.monotonic() - began < 5


# Tries.


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_what_may_get_better_is_tried_again(status, pauses):
  def behave(handler, number, body):
    send(handler, {"error": {"message": "busy"}}, status) if number < 2 else send(
      handler, completion("[up]", tokens=2)
    )

  with serving(behave) as server:
    one = endpoint(server.url)
    [answer] = ask(one)
    bodies = [body for *_, body in server.asked]
  assert answer.content == "[up]" and bodies == [bodies[0]] * 3
  assert one.counts.faults == {f"HTTP {status}": 2} and one.counts.requests == 3
  assert len(pauses) == 2 and 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2


def test_what_does_not_get_better_is_left_unanswered_with_the_reason(pauses):
  with serving(lambda handler, number, body: send(handler, "<h1>Busy</h1>", 503)) as server:
    one = endpoint(server.url, retries=3)
    [answer] = ask(one)
  assert answer == Unanswered("HTTP 503: '<h1>Busy</h1>', after 4 tries")
  assert (one.counts.unanswered, one.counts.answered, one.counts.requests) == (1, 0, 4)
  assert len(pauses) == 3


def test_nobody_there_is_tried_again(pauses):
  with serving(lambda *_: None) as server:
    url = server.url
  one = endpoint(url, retries=1)
  [answer] = ask(one)
  assert answer.why.startswith("broken connection: ") and answer.why.endswith(", after 2 tries")
  assert "refused" in answer.why and len(pauses) == 1


def test_pauses_double_with_chance_and_end_at_a_minute():
  for tries in range(1, 50):
    own = [endpoint_lib.pause(tries) for _ in range(20)]
    top = min(2 ** (tries - 1), 60)
    assert top / 2 <= min(own) < max(own) <= top
  assert 20 <= endpoint_lib.pause(1, 20.0) <= 22
  assert endpoint_lib.pause(1, 1e9) == 60 >= endpoint_lib.pause(10**9) >= 30


def test_the_chance_of_pauses_is_not_the_games():
  import random

  random.seed(1)
  state = random.getstate()
  endpoint_lib.pause(3)
  assert random.getstate() == state


@pytest.mark.parametrize(
  "text, seconds",
  [("3", 3), ("0.5", 0.5), (" 7 ", 7), ("", 0), ("soon", 0), ("-5", 0), ("nan", 0), ("²", 0)],
)
def test_retry_after_in_seconds(text, seconds):
  assert endpoint_lib.asked_pause(text) == seconds


def test_retry_after_as_a_date():
  now = datetime.datetime.now(datetime.UTC)
  later = email.utils.format_datetime(now + datetime.timedelta(seconds=30), usegmt=True)
  assert 25 < endpoint_lib.asked_pause(later) <= 30
  assert endpoint_lib.asked_pause("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("asked, low, high", [("7", 7, 7.7), ("86400", 60, 60), ("0", 0.5, 1)])
def test_retry_after_is_honoured_up_to_a_minute(asked, low, high, pauses):
  def behave(handler, number, body):
    send(handler, {}, 429, Retry_After=asked) if not number else send(handler, completion("a"))

  with serving(behave) as server:
    ask(endpoint(server.url))
  assert len(pauses) == 1 and low <= pauses[0] <= high


# Refusals.


@pytest.mark.parametrize(
  "status, advice",
  [
    (400, "endpoint_model, and at the limits"),
    (401, "OEL_ENDPOINT_KEY, set now"),
    (403, "OEL_ENDPOINT_KEY, set now"),
    (404, "mostly ends in /v1"),
    (422, "endpoint_model"),
  ],
)
def test_what_is_refused_ends_the_run_in_one_sentence(status, advice, pauses):
  words = f"no {KEY} here,\n sorry " + "x" * 500
  with serving(
    lambda handler, number, body: send(handler, {"error": {"message": words}}, status)
  ) as server:
    with pytest.raises(ValueError) as error:
      ask(endpoint(server.url), *[ASKED] * 3)
    told = str(error.value)
    assert told.startswith(f"{server.url}: HTTP {status} from 'm': 'no [key] here, sorry xxx")
  assert advice in told and "\n" not in told and KEY[:12] not in told and len(told) < 500
  assert not pauses


def test_a_redirect_is_not_followed():
  with serving(lambda handler, number, body: send(handler, completion("caught"))) as other:
    with serving(
      lambda handler, number, body: send(handler, "", 307, Location=f"{other.url}?k={KEY}")
    ) as server:
      with pytest.raises(ValueError, match=rf"HTTP 307, a redirect to '{other.url}\?k=\[key\]'"):
        ask(endpoint(server.url))
    assert not other.asked


# Deadlines.


@pytest.mark.parametrize(
  "head",
  [
    b"",
    b"HTTP/1.1 200",
    b"HTTP/1.1 200 OK\r\nX: ",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
  ],
)
def test_an_answer_that_trickles_ends_at_the_deadline(head, pauses):
  part = b"1\r\n \r\n" if b"chunked" in head else b" "
  with serving(lambda handler, number, body: trickle(handler, head, part)) as server:
    began = time.monotonic()
    [answer] = ask(endpoint(server.url, timeout=0.12, retries=0))
  assert time.monotonic() - began < 2
  assert answer == Unanswered("no answer in time: within 0.12 s, after one try")


def test_a_server_that_is_silent_ends_at_the_deadline(pauses):
  over = threading.Event()
  with serving(lambda *_: over.wait(10)) as server:
    [answer] = ask(endpoint(server.url, timeout=0.12, retries=0))
    over.set()
  assert answer.why.startswith("no answer in time")


# Answers.


@pytest.mark.parametrize(
  "body, message, cut",
  [
    (completion("[up]", tokens=3), Message("assistant", "[up]", response_tokens=3), False),
    (completion(" [up]\n", tokens=3), Message("assistant", "[up]", response_tokens=3), False),
    (completion("", tokens=1), Message("assistant", "", response_tokens=1), False),
    (completion("", tokens=0), Message("assistant", "", response_tokens=0), False),
    (completion("[up]"), Message("assistant", "[up]"), False),
    (completion("[up]", tokens=0), Message("assistant", "[up]"), False),
    (completion("[up]", tokens=-3), Message("assistant", "[up]"), False),
    (completion("[up]", tokens=True), Message("assistant", "[up]"), False),
    (
      completion("[u", tokens=9, finish="length"),
      Message("assistant", "[u", response_tokens=9),
      True,
    ),
    (
      completion(None, tokens=9, finish="length"),
      Message("assistant", "", response_tokens=9),
      True,
    ),
    (
      completion([{"type": "text", "text": "[u"}, {"type": "text", "text": "p]"}]),
      Message("assistant", "[up]"),
      False,
    ),
    (completion("G?</think>\n\n[up]"), Message("assistant", "[up]", thinking="G?"), False),
    (
      completion("<think>\na</think>b</think>[up]"),
      Message("assistant", "[up]", thinking="ab"),
      False,
    ),
    (completion("<think>\nUp or [up]"), Message("assistant", "", thinking="Up or [up]"), False),
    (
      completion("\n[up]", reasoning_content="G is\n"),
      Message("assistant", "[up]", thinking="G is"),
      False,
    ),
    (completion(None, reasoning="G is"), Message("assistant", "", thinking="G is"), False),
    (completion(None, refusal="I cannot."), Message("assistant", "I cannot."), False),
    (
      completion(None, tool_calls=[{"id": "1", "function": {"name": "f", "arguments": '{"a":1}'}}]),
      Message("assistant", "", tool_calls=(ToolCall("1", "f", '{"a":1}'),)),
      False,
    ),
    (
      completion("x", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}]),
      Message("assistant", "x", tool_calls=(ToolCall("", "f", '{"a": 1}'),)),
      False,
    ),
    (completion("x", tool_calls=None), Message("assistant", "x"), False),
    (completion("half \ud83d"), Message("assistant", "half ?"), False),
    (completion("x") | {"error": None}, Message("assistant", "x"), False),
  ],
)
def test_what_a_response_says(body, message, cut):
  assert completions.answer(json.dumps(body).encode()) == completions.Answer(message, cut)


DAMAGED = [
  ("<html>Log in</html>", "no JSON but '<html>Log in</html>'"),
  ("", "no JSON but nothing"),
  (b"\xff\xfe{", "no JSON but"),
  ("[" * 100_000, "nested too deeply"),
  ('data: {"choices": []}\n\n', "no JSON but 'data:"),
  ("null", "no object but 'null'"),
  ({}, "no choice with a message"),
  ({"choices": []}, "no choice with a message"),
  ({"choices": {}}, "no choice with a message"),
  ({"choices": [None]}, "no choice with a message"),
  ({"choices": [{"text": "[up]"}]}, "no choice with a message"),
  ({"error": {"message": "model crashed", "code": 500}}, "an error: 'model crashed'"),
  ({"error": "model crashed"}, "an error: 'model crashed'"),
  (completion(None), "content is null"),
  (completion({"text": "x"}), "content that is no text"),
  (completion([{"type": "image_url"}]), "content that is no text"),
  (completion(7), "content that is no text"),
  (completion("", finish="content_filter"), "withheld"),
  (completion("x", tool_calls=[{"function": {}}]), "a tool call without a name"),
  (completion("x", tool_calls=[7]), "a tool call without a name"),
  (completion("x", tool_calls=7), "tool calls that are no list"),
]


@pytest.mark.parametrize("body, told", DAMAGED)
def test_a_damaged_answer_is_asked_for_again(body, told, pauses):
  def behave(handler, number, _):
    send(handler, completion("[up]") if number else body, kind="text/html")

  with serving(behave) as server:
    one = endpoint(server.url)
    [answer] = ask(one)
    assert answer.content == "[up]" and one.counts.faults == {"damaged answer": 1}
  with serving(lambda handler, number, _: send(handler, body, kind="text/html")) as server:
    [answer] = ask(endpoint(server.url, retries=0))
  assert answer.why.startswith("damaged answer: ") and told in answer.why
  assert "content type 'text/html'" in answer.why and len(answer.why) < 400


@pytest.mark.parametrize(
  "raw",
  [
    b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + json.dumps(completion("x")).encode(),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    b"220 mail.example.com ESMTP\r\n",
    b"",
  ],
)
def test_a_response_that_is_cut_off_is_asked_for_again(raw, pauses):
  def behave(handler, number, body):
    handler.wfile.write(raw) if not number else send(handler, completion("[up]"))

  with serving(behave) as server:
    one = endpoint(server.url)
    assert ask(one)[0].content == "[up]"
  [kind] = one.counts.faults
  assert kind in ("broken connection", "damaged answer") and len(pauses) == 1


def test_a_body_without_end_is_given_up(pauses, monkeypatch):
  monkeypatch.setattr(connection, "MAX_BODY", 1 << 20)
  head = b"HTTP/1.1 200 OK\r\n\r\n"
  with serving(lambda handler, number, body: trickle(handler, head, b" " * 2**16, 0)) as server:
    [answer] = ask(endpoint(server.url, retries=0))
  assert "a body of more than 1 MiB" in answer.why


def test_tokens_are_counted_here_where_the_server_does_not():
  def behave(handler, number, body):
    send(handler, completion("a b c", finish="length" if number else "stop", reasoning="d e"))

  with serving(behave) as server:
    one = endpoint(server.url)
    assert [ask(one)[0].response_tokens for _ in range(2)] == [6, 5]  # the end is a token, too
  assert one.counts.tokens == 11 and one.counts.cut_short == 1


def test_a_call_of_a_tool_that_nobody_offered_is_no_answer(pauses):
  calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
  with serving(
    lambda handler, number, body: send(handler, completion("", tool_calls=calls))
  ) as server:
    [answer] = ask(endpoint(server.url, retries=0))
  assert "a call of a tool, and none was offered" in answer.why


# The key.


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, monkeypatch):
  monkeypatch.setenv("OEL_ENDPOINT_KEY", key)
  with pytest.raises(ValueError, match="OEL_ENDPOINT_KEY holds spaces") as error:
    endpoint_lib.key_of_environment()
  assert key not in str(error.value)


def test_the_key_is_the_environments(monkeypatch):
  monkeypatch.setenv("OEL_ENDPOINT_KEY", f"{KEY}\n")
  assert endpoint_lib.key_of_environment() == KEY
  monkeypatch.delenv("OEL_ENDPOINT_KEY")
  assert endpoint_lib.key_of_environment() == ""


@pytest.mark.parametrize(
  "body",
  [
    f"{'x' * 190}{KEY} was wrong",
    json.dumps({"error": {"message": f"{'x' * 190}{KEY} was wrong"}}),
    json.dumps(completion(7) | {"key": KEY}),
  ],
)
def test_no_error_and_no_repr_says_the_key_back(body, pauses):
  for status in (200, 500):
    with serving(lambda handler, number, _: send(handler, body, status, kind=KEY)) as server:
      one = endpoint(server.url, retries=0)
      [answer] = ask(one)
    assert KEY[:8] not in answer.why + repr(one)


def test_a_short_key_stays_out_of_errors_and_changes_no_answer(pauses):
  def behave(handler, number, body):
    send(handler, completion("EMPTY it")) if not number else send(handler, "EMPTY is wrong", 500)

  with serving(behave) as server:
    one = endpoint(server.url, key="EMPTY", retries=0)
    assert ask(one)[0].content == "EMPTY it"
    assert "'[key] is wrong'" in ask(one)[0].why


def test_nothing_of_the_package_reads_the_key_but_one_function():
  top = pathlib.Path(endpoint_lib.__file__).parents[2]
  readers = [path.name for path in top.rglob("*.py") if "OEL_ENDPOINT_KEY" in path.read_text()]
  assert sorted(readers) == ["config.py", "endpoint.py"]


# What llama.cpp's own server said (xllamacpp 2026.10.11549, Qwen2.5-Coder-0.5B), word for word.


def test_an_answer_of_llama_cpp_is_read(pauses):
  body = (
    '{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"Yes"}}],'
    '"created":1795978696,"model":"/work/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",'
    '"system_fingerprint":"b0-unknown","object":"chat.completion","usage":{"completion_tokens":2,'
    '"prompt_tokens":36,"total_tokens":38,"prompt_tokens_details":{"cached_tokens":24}},'
    '"id":"chatcmpl-3IckLuvfHc20O98UZnQF627vHolVa89L"}'
  )
  with serving(
    lambda handler, number, _: send(handler, body, kind="application/json; charset=utf-8")
  ) as server:
    [answer] = ask(endpoint(server.url))
  assert answer == Message("assistant", "Yes", response_tokens=2)  # the end is one of them


def test_a_prompt_beyond_the_context_of_llama_cpp_ends_the_run_with_its_words(pauses):
  body = (
    '{"error":{"code":400,"message":"request (9030 tokens) exceeds the available context size '
    '(2048 tokens), try increasing it","type":"exceed_context_size_error"}}'
  )
  with serving(lambda handler, number, _: send(handler, body, 400)) as server:
    with pytest.raises(ValueError, match=r"HTTP 400 .* available context size \(2048 tokens\)"):
      ask(endpoint(server.url))
  assert not pauses
