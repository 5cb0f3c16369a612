"""JSONL files of conversations and prompts: round trips, damage, crashes while appending, a full
disk.
"""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys

import pytest
from fakes import game_of, turn_of

from oel_jax.conversations import jsonl as t
from oel_jax.conversations.schema import Conversation, Message, Prompt, cut_prompts


def episode(number: int, observation: str = "| P | H |") -> Conversation:
  turns = (
    turn_of(observation, 'Try </think> √\u2028 "left"?', "I go [left]\nnow", "[left]", 12),
    turn_of("You hit a wall!", "", "", "", 1024),
  )
  return game_of(
    f"r1-deploy-{number:05d}",
    "FrozenLake-v0-raw",
    2**32 - 1,
    turns,
    "The end.",
    0.1,
    False,
    "invalid",
  )


def test_a_game_is_one_json_line_of_chat_messages(tmp_path):
  t.write_jsonl(tmp_path / "new folder" / "a.jsonl", [episode(7)])
  (line,) = (tmp_path / "new folder" / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
  written = json.loads(line)
  # By hand, from the description: SHA-256 of the rest with sorted keys and no spaces.
  rest = json.dumps(
    {name: value for name, value in written.items() if name != "digest"},
    sort_keys=True,
    separators=(",", ":"),
    ensure_ascii=False,
  )
  assert (
    list(written)[-1] == "digest"
    and written.pop("digest") == hashlib.sha256(rest.encode()).hexdigest()[:16]
  )
  assert written == {
    "schema": 2,
    "id": "r1-deploy-00007",
    "source": {"kind": "game", "name": "FrozenLake-v0-raw", "seed": 4294967295},
    "messages": [
      {"role": "user", "content": "| P | H |"},
      {
        "role": "assistant",
        "content": "I go [left]\nnow",
        "thinking": 'Try </think> √\u2028 "left"?',
        "action": "[left]",
        "response_tokens": 12,
      },
      {"role": "user", "content": "You hit a wall!"},
      {"role": "assistant", "content": "", "thinking": "", "action": "", "response_tokens": 1024},
    ],
    "outcome": "The end.",
    "reward": 0.1,
    "passed": False,
    "ended": "invalid",
  }


def test_what_is_written_is_read_back_equal(tmp_path):
  episodes = [
    episode(number, observation)
    for number, observation in enumerate(["a", "", "<|im_start|>user", "\r\n\t\x00 漢字"])
  ]
  t.write_jsonl(tmp_path / "whole.jsonl", episodes)
  for one in episodes:
    t.append_jsonl(tmp_path / "appended.jsonl", one)
  assert t.read_conversations(tmp_path / "whole.jsonl") == episodes
  assert (tmp_path / "appended.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
  assert sorted(os.listdir(tmp_path)) == ["appended.jsonl", "whole.jsonl"]

  prefixes = [prefix for one in episodes for prefix in cut_prompts(one)]
  t.write_jsonl(tmp_path / "prefixes.jsonl", prefixes)
  assert t.read_prompts(tmp_path / "prefixes.jsonl") == prefixes
  assert prefixes[1].messages == (
    Message("user", "a"),
    Message("assistant", "I go [left]\nnow"),
    Message("user", "You hit a wall!"),
  )


def test_half_a_surrogate_pair_loses_one_character_not_the_episode(tmp_path):
  t.append_jsonl(tmp_path / "a.jsonl", episode(0, "a\ud83d b"))
  assert t.read_conversations(tmp_path / "a.jsonl") == [episode(0, "a? b")]


def test_plain_dictionaries_get_the_schema(tmp_path):
  t.append_jsonl(tmp_path / "a.jsonl", {"text": "x"})
  assert (tmp_path / "a.jsonl").read_text().startswith('{"schema": 2, "text": "x", "digest": "')


def changed(**fields) -> bytes:
  data = json.loads(t.to_line(episode(99)))
  del data["digest"]  # as a line that was written by hand
  for name, value in fields.items():
    if value is None:
      del data[name]
    else:
      data[name] = value
  return json.dumps(data).encode()


user, assistant = json.loads(t.to_line(episode(99)))["messages"][:2]

DAMAGED = {
  "not JSON": (b"{nonsense", "Expecting property name"),
  "cut off": (changed()[:-30], "line 1 column"),
  "not UTF-8": (b'{"schema": 1, "id": "\xff"}', "not UTF-8 at byte 21"),
  "no object": (b"[1, 2]", "a JSON object is needed"),
  "nested too deeply": (b"[" * 100_000, "recursion"),
  "missing field": (changed(outcome=None), "field 'outcome' is missing"),
  "no schema": (changed(schema=None), "field 'schema' is missing"),
  "schema of the future": (
    changed(schema=3),
    "schema version 3, this version of oel_jax reads 1 and 2",
  ),
  "true is no version": (changed(schema=True), "field 'schema' is True"),
  "text for a number": (
    changed(reward="1.0"),
    "field 'reward' is '1.0': it must be of type float or int",
  ),
  "number for true": (changed(passed=1), "field 'passed' is 1: it must be of type bool"),
  "edited under its digest": (
    t.to_line(episode(98)).replace(b"[left]", b"[lift]"),
    'what its field "digest" was made of',
  ),
  "one letter": (
    t.to_line(episode(98)).replace(b"hit", b"hat"),
    'what its field "digest" was made of',
  ),
  "more than a float": (changed().replace(b"0.1", b"1e999"), "the number 1e999 is beyond a float"),
  "more than 64 bits": (
    changed(source={"kind": "game", "name": "g", "seed": 2**63}),
    "the number 9223372036854775808 is beyond 64 bits",
  ),
  "more digits than Python reads": (changed().replace(b"0.1", b"1" * 5000), "is beyond 64 bits"),
  "a name twice": (
    changed().replace(b'"reward"', b'"id"'),
    "the name 'id' occurs twice in one object",
  ),
  "fewer than no tokens": (
    changed(messages=[user, {**assistant, "response_tokens": -1}]),
    "'response_tokens' of message 2 is -1",
  ),
  "no number": (changed().replace(b"0.1", b"NaN"), "NaN is not JSON"),
  "unknown end": (changed(ended="won"), "field 'ended' is 'won'"),
  "no turns": (changed(messages=[]), "field 'messages' is []"),
  "an answer is missing": (
    changed(messages=[user, assistant, user]),
    "must be user and assistant in turn",
  ),
  "wrong order": (changed(messages=[assistant, user]), "must be user and assistant in turn"),
  "no tokens": (
    changed(messages=[user, {**assistant, "response_tokens": 1.5}]),
    "field 'response_tokens' is 1.5",
  ),
  "no thinking": (
    changed(messages=[user, user | {"role": "assistant"}]),
    "field 'thinking' is missing",
  ),
  "message no object": (changed(messages=["hello", assistant]), "field 'role' is missing"),
}


@pytest.mark.parametrize("line, reason", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_line_is_skipped_and_reported(tmp_path, caplog, line, reason):
  path = tmp_path / "a.jsonl"
  good = [t.to_line(episode(number)) for number in range(19)]
  path.write_bytes(b"".join(good[:4]) + line + b"\n\n" + b"".join(good[4:]))
  with caplog.at_level(logging.WARNING, logger="absl"):
    assert t.read_conversations(path) == [episode(number) for number in range(19)]
  assert f"{path}:5: skipped a damaged line: " in caplog.text and reason in caplog.text
  assert "skipped 1 damaged lines of 20" in caplog.text

  path.write_bytes(b"".join(good[:18]) + line)  # 1 of 19 is more than 5%
  with pytest.raises(
    ValueError, match="1 of 19 lines are damaged, more than 5%.* the first is line 19"
  ) as raised:
    t.read_conversations(path)
  assert str(path) in str(raised.value) and reason in str(raised.value)


def test_damaged_prefixes(tmp_path):
  lines = ['{"schema": 1, "id": "a", "messages": [{"role": "user", "content": "x"}]}'] * 60
  for line in (
    '{"schema": 1, "id": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", '
    '"content": "y"}]}',
    '{"schema": 1, "id": "a", "messages": []}',
    '{"schema": 1, "id": "a", "messages": [{"role": "narrator", "content": "x"}, {"role": "user", '
    '"content": "x"}]}',
  ):
    lines.append(line)
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  assert t.read_prompts(tmp_path / "a.jsonl") == [Prompt("a", (Message("user", "x"),))] * 60
  (tmp_path / "a.jsonl").write_text("\n".join(lines[4:]))  # 3 of 59
  with pytest.raises(ValueError, match="3 of 59 lines are damaged.* the first is line 57"):
    t.read_prompts(tmp_path / "a.jsonl")


def test_appending_after_a_crash_starts_a_fresh_line_wherever_the_crash_cut(tmp_path):
  line = t.to_line(episode(1))
  for cut in range(len(line) + 1):
    path = tmp_path / "a.jsonl"
    path.write_bytes(t.to_line(episode(0)) + line[:cut])
    t.append_jsonl(path, episode(2))
    expected = [episode(0)] + ([episode(1)] if cut >= len(line) - 1 else []) + [episode(2)]
    assert t.read_conversations(path, max_damaged=1.0) == expected


def test_a_full_disk_while_appending_keeps_the_lines_before(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  t.append_jsonl(path, episode(0))
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError) as raised:
      t.append_jsonl(path, episode(1))
  assert raised.value.errno == errno.ENOSPC
  assert str(path) in str(raised.value) and "free some space" in str(raised.value)
  path.write_bytes(path.read_bytes()[:-40])  # the line that did not fit
  t.append_jsonl(path, episode(2))
  assert t.read_conversations(path, max_damaged=1.0) == [episode(0), episode(2)]


@pytest.mark.skipif(
  not os.path.exists("/dev/full"), reason="a device that is always full, Linux only"
)
def test_a_disk_that_is_really_full(tmp_path):
  (tmp_path / "a.jsonl").symlink_to("/dev/full")
  with pytest.raises(OSError, match="free some space.*a.jsonl"):
    t.append_jsonl(tmp_path / "a.jsonl", episode(0))


def test_a_full_disk_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  t.write_jsonl(path, [episode(0)])
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="free some space.*a.jsonl"):
      t.write_jsonl(path, [episode(1)])
  assert t.read_conversations(path) == [episode(0)]
  assert os.listdir(tmp_path) == ["a.jsonl"]  # the half-written file gave its space back


def full_disk(_):
  raise OSError(errno.ENOSPC, "No space left on device")


# Streams, and records by number.


def test_a_stream_reads_a_record_when_it_is_asked_for_and_counts_the_damage(tmp_path, caplog):
  path = tmp_path / "a.jsonl"
  good = [t.to_line(episode(number)) for number in range(60)]
  path.write_bytes(b"".join(good[:30]) + b"\n{nonsense\n" + b"".join(good[30:]))
  parsed = []

  def parse(data, line):
    parsed.append(line)
    return data["id"], line

  file = t.JsonLines(path, parse)
  stream = iter(file)
  assert next(stream) == ("r1-deploy-00000", 1) and parsed == [1]
  assert next(stream) == ("r1-deploy-00001", 2) and parsed == [1, 2]
  rest = list(stream)
  # An empty line and a damaged one stand between.
  assert [line for _, line in rest] == [*range(3, 31), *range(33, 63)] and file.damaged == 1
  assert f"{path}:32: skipped a damaged line" in caplog.text
  parsed.clear()
  assert len(file) == 60
  assert [file[i] for i in (59, 0, 30)] == [
    ("r1-deploy-00059", 62),
    ("r1-deploy-00000", 1),
    ("r1-deploy-00030", 33),
  ]
  assert parsed == [62, 1, 33]  # each read alone
  with pytest.raises(IndexError):
    file[60]


def test_records_by_number_without_a_pass_before(tmp_path):
  episodes = [episode(number) for number in range(5)]
  t.write_jsonl(tmp_path / "a.jsonl", episodes)
  file = t.conversations(tmp_path / "a.jsonl")
  assert file[3] == episodes[3] and len(file) == 5 and list(file) == episodes
  prompts = t.prompts(tmp_path / "b.jsonl")
  t.write_jsonl(tmp_path / "b.jsonl", cut_prompts(episodes[0]))
  assert prompts[1] == cut_prompts(episodes[0])[1]
  t.write_jsonl(tmp_path / "a.jsonl", [episode(7, "longer than before"), *episodes])
  with pytest.raises(ValueError, match="a.jsonl:4: changed since it was first read"):
    file[3]


def test_only_the_first_damaged_lines_are_named(tmp_path, caplog):
  path = tmp_path / "a.jsonl"
  path.write_bytes(t.to_line(episode(0)) + b"{nonsense\n" * 500)
  assert t.read_conversations(path, max_damaged=1.0) == [episode(0)]
  assert caplog.text.count("skipped a damaged line") == t.MAX_NAMED
  assert "skipped 500 damaged lines of 501" in caplog.text


def test_a_file_is_written_a_record_at_a_time_and_not_at_all_if_one_fails(tmp_path):
  path = tmp_path / "a.jsonl"
  t.write_jsonl(path, [episode(0)])

  def fails():
    yield episode(1)
    raise RuntimeError("no more")

  with pytest.raises(RuntimeError, match="no more"):
    t.write_jsonl(path, fails())
  assert t.read_conversations(path) == [episode(0)] and os.listdir(tmp_path) == ["a.jsonl"]


LINES = 40_000
READS = """
import resource, sys
from oel_jax.conversations import jsonl
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, count = peak(), sum(1 for _ in jsonl.JsonLines(sys.argv[1], lambda data, line: line))
print(count, before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_file(tmp_path):
  path = tmp_path / "a.jsonl"
  line = t.to_line(episode(0, "x" * 2000))
  path.write_bytes(line * LINES)  # about 100 MB
  found = subprocess.run(
    [sys.executable, "-c", READS, str(path)], capture_output=True, text=True, check=True
  )
  count, before, peak = map(int, found.stdout.split())
  assert count == LINES and path.stat().st_size > 80e6
  assert peak - before < 10_000  # KiB
