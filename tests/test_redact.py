"""What must not cross does not, and all else stays: made-up conversations with planted items."""

import json
import random
import re
import string
import time

import pytest

from oel_jax.conversations import redact_patterns
from oel_jax.conversations.jsonl import write_jsonl
from oel_jax.conversations.redact import Redactor, read_names
from oel_jax.conversations.schema import (
  Conversation,
  Message,
  Prompt,
  Source,
  ToolCall,
  cut_prompts,
)

NAMES = ["Zoë Lindqvist", "O'Brien", "Priya", "Jean-Luc Moreau", "王小明"]
DIGITS, HEX = string.digits, "0123456789abcdef"
ALNUM = string.ascii_letters + DIGITS


def some(rng, signs: str, count: int) -> str:
  return "".join(rng.choices(signs, k=count))


# What is planted, made here by its own rules.


def email(rng):
  name = some(rng, string.ascii_lowercase, 6)
  host = rng.choice(["example.com", "mail.example.co.uk", "firma.example", "ex-ample.org"])
  form = rng.choice(["{}@{}", "{}.b_1+tag@{}", "{} (at) {}", "{}%40{}", "<{}@{}>", "mailto:{}@{}"])
  if rng.random() < 0.1:
    return f"{name} at {host}".replace(".", " dot ")
  return form.format(name, host)


def luhn(digits: str) -> str:
  """The digits and their check digit."""
  total = 0
  for place, digit in enumerate(reversed(digits)):
    number = int(digit) * 2 if place % 2 == 0 else int(digit)
    total += number // 10 + number % 10
  return digits + str(-total % 10)


def card(rng):
  begin, length = rng.choice([("4", 16), ("4", 13), ("51", 16), ("2221", 16), ("37", 15),
    ("6011", 16), ("3530", 16), ("36", 14), ("62", 19)])  # fmt: skip
  number = luhn(begin + some(rng, DIGITS, length - 1 - len(begin)))
  between = rng.choice(["", " ", "-", "\u00a0"])
  return between.join(number[at : at + 4] for at in range(0, length, 4))


def iban(rng):
  country, length = rng.choice([("DE", 22), ("GB", 22), ("FR", 27), ("NO", 15), ("MT", 31)])
  signs = DIGITS if country in ("DE", "NO") else DIGITS + string.ascii_uppercase
  rest = some(rng, signs, length - 4)
  number = "".join(str(int(sign, 36)) for sign in f"{rest}{country}00")
  whole = f"{country}{98 - int(number) % 97:02}{rest}"
  between = rng.choice(["", " ", "-"])
  whole = between.join(whole[at : at + 4] for at in range(0, length, 4))
  return whole.lower() if rng.random() < 0.2 else whole


def phone(rng):
  n = lambda count: some(rng, "23456789", count)
  return rng.choice([
    f"+1 {n(3)} {n(3)} {n(4)}", f"+1{n(10)}", f"({n(3)}) {n(3)}-{n(4)}", f"{n(3)}-{n(3)}-{n(4)}",
    f"{n(3)}.{n(3)}.{n(4)}", f"+44 20 {n(4)} {n(4)}", f"020 {n(4)} {n(4)}", f"07{n(3)} {n(6)}",
    f"+49 (0){n(2)} {n(6)}", f"0{n(2)}/{n(6)}{n(1)}", f"0049 {n(2)} {n(7)}",
    f"06 {n(2)} {n(2)} {n(2)} {n(2)}", f"+86 1{n(2)} {n(4)} {n(4)}", f"1-{n(3)}-{n(3)}-{n(4)}",
  ])  # fmt: skip


def key(rng):
  token = lambda count, signs=ALNUM: some(rng, signs, count - 2) + "7a"
  return rng.choice([
    f"sk-{token(40)}", f"sk-proj-{token(30)}_{token(12)}", f"sk-ant-api03-{token(50)}",
    f"ghp_{token(36)}", f"github_pat_{token(40)}", f"AKIA{some(rng, DIGITS + 'ABCDEFG', 16)}",
    f"AIza{token(35)}", f"xoxb-{token(11, DIGITS)}-{token(24)}", f"hf_{token(34)}",
    f"sk_live_{token(24)}", f"glpat-{token(20)}", f"npm_{token(36)}",
    f"eyJ{token(20)}.eyJ{token(40)}.{token(43)}",
    f"-----BEGIN PRIVATE KEY-----\n{token(64)}\n{token(64)}==\n-----END PRIVATE KEY-----",
    f"-----BEGIN RSA PRIVATE KEY-----\\n{token(64)}\\n{token(30)}",
  ])  # fmt: skip


def secret(rng):
  """(words before it, the secret)."""
  token = lambda count, signs=ALNUM: some(rng, signs, count - 3) + "7aZ"
  return rng.choice([
    ("password: ", f"{token(9)}"), ("my password is ", f"{token(6)}!x"), ("PASSWORD=", token(12)),
    ('"password": "', some(rng, string.ascii_lowercase, 8)), ("pwd := ", f"{token(7)}#"),
    ("passphrase for the vault is ", token(14)), ("api_key = '", some(rng, HEX, 31) + "7"),
    ("X-Api-Key: ", some(rng, HEX, 31) + "7"), ("client_secret=", token(32)),
    ("token: ", token(40)), ("secret key is ", token(24)), ("Authorization: Bearer ", token(30)),
    ("Authorization: Basic ", token(22) + "=="), ("postgres://app:", token(12) + "@db.example/x"),
    ("access_token=", f"{some(rng, HEX, 8)}-1234-{some(rng, HEX, 4)}-ab12-{some(rng, HEX, 12)}"),
  ])  # fmt: skip


def name(rng):
  form = rng.choice([str, str.lower, str.upper])
  return form(rng.choice(NAMES))


def planted(rng, pool) -> list[tuple[str, str]]:
  """(value, text around it), one of every kind."""
  found = []
  for make in (email, card, iban, phone, key, name):
    value = rng.choice(pool[make])
    around = rng.choice(["{} please", "it is {}.", "({})", "see: {}, ok?"])
    found.append((value, around.format(value)))
  before, value = rng.choice(pool[secret])
  quote = before[-1] if before[-1] in "'\"" else ""
  after = value.partition("@db")[2] and "@db.example/x"
  value = value.partition("@db")[0]
  return found + [(value, f"Use {before}{value}{after or quote} for it")]


# What must stay: ordinary numbers and code.


def innocent(rng) -> str:
  n = lambda count: some(rng, DIGITS, count)
  return rng.choice([
    f"order {n(12)}", f"order no. 1{n(9)}", f"#{n(6)}", "2026-11-29 18:12:05", "29.11.2026",
    "11/29/2026 10:30", "29-11-2026", f"v1.{n(2)}.{n(3)}-rc1", "192.168.100.200",
    "10.0.0.255:8080", f"{n(3)},{n(3)},{n(3)} rows", f"0.{n(12)}", f"3.{n(15)}", f"17{n(8)}",
    f"17{n(11)}",
    f"commit {some(rng, HEX, 40)}", f"550e8400-e29b-41d4-a716-{n(12)}", "def key(a): 1",
    "password = input('Password: ')", "the password is wrong", "Forgot password?", "[1, 2, 3, 40]",
    "for i in range(1000000):", f"EUR {n(3)}.{n(2)}", f"{n(2)} x {n(2)} x {n(2)} cm", "x = a@b",
    "@dataclass(frozen=True)", "pip install lodash@4.17.21", "git@github.com:org/repo.git",
    "ISBN 978-3-16-148410-0", "token: str = ''", "key: value", "sorted(d, key=lambda x: x[1])",
    f"SKU-{n(4)}-{n(4)}", f"invoice 2026-{n(6)}", f"build+{n(8)}", f"{n(4)} {n(4)}", "1 000 000",
    "key = some_function_name_of_ours(x)", "tokenizer = HuggingFaceTokenizer('qwen2')",
    "Authorization: Bearer <your_key>", "token = self.config2.readTokenFromServer()",
    "50% of 1200 is 600", "https://example.com/a/12345678", "a#log.jsonl:16",
    "meet me at example street", "look at page 12", "from 8 to 12 at 20 degrees", f"room {n(3)}",
    "monkey: banana", "secret santa on 24.12.", "sk-learn", "class=\"sk-folding-cube-item\"",
    "O(n log n)", "SELECT id FROM t WHERE key = 12", "+00:00", "1e-10", f"ticket {n(7)}", "A4, B5",
  ])  # fmt: skip


def talk(rng, pool, number: int) -> tuple[Conversation, list[str], list[str]]:
  """(conversation, what is planted in it, what must stay)."""
  items, stays = planted(rng, pool), rng.choices(pool[innocent], k=6)
  rng.shuffle(items)
  a, b, c, d, e, f, g = (text for _, text in items)
  query = {"query": c, "list": [d, {"x": stays[0]}], email(rng): 3}
  arguments = json.dumps(query, ensure_ascii=bool(number % 2))
  messages = (
    Message("system", f"Help. {stays[1]}"),
    Message("user", f"Hello, {a}\n{stays[2]} {b}", name=name(rng)),
    Message("assistant", stays[3], (ToolCall("c1", "find", arguments),), thinking=f"So {e}"),
    Message("tool", json.dumps({"found": f, "rows": stays[4]}), tool_call_id="c1", name="find"),
    Message("assistant", f"It says {g} {stays[5]}"),
    Message("user", f"Thanks {e}"),
    Message("assistant", "Bye."),
  )
  whole = Conversation(f"t{number}", messages, Source("log", "x"), feedback=f"thanks! {b}")
  return whole, [value for value, _ in items], stays


def plain(text: str) -> str:
  """The text without what may stand between the groups of a number."""
  return re.sub(r"[ \u00a0().\-/]", "", text).lower()


def test_of_1000_conversations_nothing_that_was_planted_crosses_and_all_else_does(tmp_path):
  rng, redactor = random.Random(5), Redactor(NAMES)
  kinds = (email, card, iban, phone, key, name, secret, innocent)
  pool = {make: [make(rng) for _ in range(400)] for make in kinds}
  values, stays, lost, prompts = 0, 0, [], []
  for number in range(1000):
    whole, items, innocents = talk(rng, pool, number)
    clean = redactor(whole)
    prompts += (cut := cut_prompts(clean))
    if number % 20 == 0:
      assert [Redactor(NAMES)(prompt) for prompt in cut_prompts(whole)] == cut
    kept = clean.feedback + " ".join(
      m.content + m.name + m.thinking + "".join(call.arguments for call in m.tool_calls)
      for m in clean.messages
    )  # fmt: skip
    kept += kept.encode().decode("unicode_escape", "replace") if "\\u" in kept else ""
    bare = plain(kept)
    for value in items:
      values += 1
      assert value not in kept and plain(value) not in bare, (number, value)
    for text in innocents:
      stays += 1
      lost += [text] * (text not in kept and json.dumps(text)[1:-1] not in kept)
  write_jsonl(tmp_path / "prompts.jsonl", prompts)
  written = (tmp_path / "prompts.jsonl").read_text().lower()
  assert not [name for name in ("lindqvist", "priya", "moreau", "王小明") if name in written]
  assert len(lost) <= stays * 0.002, lost  # 12 of 6,000
  assert values == 7000 and set(redactor.counts) == {
    "EMAIL", "CARD", "IBAN", "PHONE", "KEY", "SECRET", "NAME"
  }  # fmt: skip


@pytest.mark.parametrize("make", [email, card, iban, phone, key, name])
def test_each_kind_is_found_alone_and_once(make):
  rng, redactor = random.Random(7), Redactor(NAMES)
  kind = {"email": "EMAIL", "name": "NAME", "key": "KEY"}.get(make.__name__, make.__name__.upper())
  for _ in range(300):
    value = make(rng)
    clean = redactor.text(f"so {value} then")
    assert clean in (f"so [{kind}] then", f"so <[{kind}]> then", f"so mailto:[{kind}] then"), value
    assert redactor.text(clean) == clean
  assert redactor.counts == {kind: 300}


def test_wrong_check_digits_are_ordinary_numbers():
  redactor = Redactor()
  for text in ("4111 1111 1111 1112", "GB82 WEST 1234 5698 7654 33", "1234567890123456", "0" * 30):
    assert redactor.text(text) == text
  assert redactor.text("4111 1111 1111 1111 12/26 123") == "[CARD] 12/26 123"
  assert redactor.text("GB82 WEST 1234 5698 7654 32 THANKS") == "[IBAN] THANKS"
  assert not redact_patterns.Names([]).find("x") is None


def test_numbers_behind_words_that_announce_them():
  redactor = Redactor()
  for text, clean in (
    ("phone: 5552671", "phone: [PHONE]"),
    ("call me at 4155552671 tonight", "call me at [PHONE] tonight"),
    ("手机 13812345678", "手机 [PHONE]"),
    ('{"phone": 4155552671, "n": 4155552671}', '{"phone": "[PHONE]", "n": 4155552671}'),
    ('{"password": "abcdefgh"}', '{"password": "[SECRET]"}'),
    ("token: 4155552671", "token: 4155552671"),
    ("Dial 555-2671 now", "Dial [PHONE] now"),
    ("密码：abc12345", "密码：[SECRET]"),
    ("mot de passe: Soleil22", "mot de passe: [SECRET]"),
  ):
    assert redactor.text(text) == clean


def test_json_hides_nothing():
  redactor = Redactor(["Zoë"])
  inner = json.dumps({"to": "ann@example.com", "who": "Zoë"})
  hidden = inner.replace("@", "\\u0040")
  text = json.dumps({"a": hidden, "ann@example.com": 1, "bob@example.com": 2.5, "n": [None, True]})
  clean = json.loads(redactor.text(text))
  assert json.loads(clean.pop("a")) == {"to": "[EMAIL]", "who": "[NAME]"}
  assert clean == {"[EMAIL]": 1, "[EMAIL]'": 2.5, "n": [None, True]}
  untouched = '{"b":  1.50, "a": "x"}'
  assert redactor.text(untouched) == untouched  # not even its spaces
  assert redactor.text('{"broken": "ann@example.com') == '{"broken": "[EMAIL]'
  part = 'It gave {"who": "Zo\\u00eb", "to": "ann\\u0040example.com"} back'
  assert redactor.text(part) == 'It gave {"who": "[NAME]", "to": "[EMAIL]"} back'
  assert redactor.text(r"print('\u00eb \ud83d\u0022')") == r"print('\u00eb \ud83d\u0022')"
  deep = "[" * 5000 + '"ann@example.com"' + "]" * 5000
  assert "[EMAIL]" in redactor.text(deep)


def test_ids_stay_apart_and_calls_keep_their_answers():
  redactor = Redactor()
  one, other = (Prompt(f"{who}@example.com-0", (Message("user", "x"),)) for who in ("ann", "bob"))
  assert redactor(one).id.startswith("[EMAIL]-") and redactor(one).id != redactor(other).id
  assert redactor(one) == redactor(one) and "ann" not in redactor(one).id
  names = ("ann@example.com#a@b.org:2", "ann@example.com")
  again, alone = (Conversation(name, (), Source("log", "x")) for name in names)
  assert redactor(again).id.startswith(f"{redactor(alone).id}#[EMAIL]-")
  assert redactor(again).id.endswith(":2")
  call = Message("assistant", "", (ToolCall("sk-abcdefghij0123456789", "f", "{}"),))
  answer = Message("tool", "x", tool_call_id="sk-abcdefghij0123456789")
  clean = redactor(call).tool_calls[0].id
  assert clean.startswith("[KEY]-") and redactor(answer).tool_call_id == clean
  users = [
    redactor(Conversation("a", one.messages, Source("log", "x"), user=f"{who}@example.com")).user
    for who in ("ann", "bob", "ann")
  ]
  assert users[0] == users[2] != users[1] and users[0].startswith("[EMAIL]-")
  same = Message("user", "nothing here")
  assert redactor(same) is same


def test_a_function_of_the_users_own(tmp_path):
  file = tmp_path / "own.py"
  file.write_text(
    "import re\n"
    "def clean(text):\n  return re.sub('PX-\\\\d+', '[PROJECT]', text)\n"
    "def none(text):\n  pass\n"
    "def fails(text):\n  return text[10**9]\n"
    "def tells(text):\n  return {}[text]\n"
  )
  redactor = Redactor(hook=f"{file}:clean")
  assert redactor.text("PX-77 by ann@example.com") == "[PROJECT] by [EMAIL]"
  assert redactor.counts == {"OWN": 1, "EMAIL": 1}
  with pytest.raises(ValueError, match="config.logs.redact_hook is '.*:none': it returns NoneType"):
    Redactor(hook=f"{file}:none").text("x")
  with pytest.raises(ValueError, match="redact_hook is '.*:fails': it fails .IndexError.*own.py:7"):
    Redactor(hook=f"{file}:fails").text("x")
  with pytest.raises(
    ValueError, match="redact_hook is '.*:tells': it fails .KeyError, at"
  ) as error:
    Redactor(hook=f"{file}:tells").text("my SECRET word")
  assert "SECRET" not in str(error.value)
  with pytest.raises(ValueError, match="the file has no function clan"):
    Redactor(hook=f"{file}:clan")


def test_names_of_a_file(tmp_path):
  path = tmp_path / "names.txt"
  path.write_text("Zoë Lindqvist\n\n  Priya \n")
  assert read_names(str(path)) == ["Zoë Lindqvist", "Priya"]
  redactor = Redactor(read_names(str(path)))
  decomposed = "ZOE\u0308  lindqvist's"
  assert redactor.text(f"{decomposed} Lindqvist, priya_s and Priyanka") == (
    "[NAME]'s Lindqvist, [NAME]_s and Priyanka"
  )
  path.write_text("Ann\nB\n")
  with pytest.raises(ValueError, match="redact_names: line 2 of .*names.txt is one letter"):
    read_names(str(path))
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match="redact_names: .* is not a text in UTF-8"):
    read_names(str(path))


@pytest.mark.parametrize(
  "unit",
  ["a", "a-", "a.", "a@", "1", "1 ", "0 ", "+1", "password ", "key=", "-----BEGIN A-----\n",
   "DE12 ", "//a:", "a at ", "call me ", "Bearer ", "(0", "a%40", "eyJ"],
)  # fmt: skip
def test_no_text_takes_long(unit):
  begun = time.process_time()
  Redactor(["Ann"]).text(unit * (40_000 // len(unit)))
  once = time.process_time() - begun
  assert once < 2, once
