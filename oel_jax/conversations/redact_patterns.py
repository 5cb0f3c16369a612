"""What e-mail addresses, keys, account and phone numbers look like: patterns, and finders that
check what a pattern cannot.

No pattern may take quadratic time: repetitions are bounded, or begin where nothing before fits.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

Spans = Iterator[tuple[int, int]]  # where to cut, from and to, in order

# Keys, by what their makers put in front of them.
_KEYS = (
  r"sk-(?=[\w-]{0,40}\d)[\w-]{16,}",  # OpenAI, Anthropic and many others
  r"(?:sk|rk|pk)_(?:live|test)_\w{10,}|whsec_\w{16,}",  # Stripe
  r"gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}",  # GitHub, GitLab
  r"(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS
  r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}",  # Google
  r"xox[abeoprs]-[\w-]{10,}|xapp-[\w-]{10,}",  # Slack
  r"hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|gsk_[A-Za-z0-9]{20,}",
  r"SG\.[\w-]{16,}\.[\w-]{16,}|dop_v1_[0-9a-f]{30,}|dapi[0-9a-f]{32}|glsa_\w{30,}",
  r"(?:AC|SK)[0-9a-f]{32}(?![A-Za-z0-9])|\d{8,10}:AA[\w-]{30,}",  # Twilio, Telegram
  r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?",  # JSON Web Tokens
)
_KEY = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_KEYS)})", re.ASCII)
_SLACK = re.compile(r"https://hooks\.slack\.com/services/[\w/]{16,}")
# The end may be missing, and newlines may be written \n.
_PEM = re.compile(
  r"-----BEGIN [A-Z0-9 ]{1,60}-----"
  r"(?:[A-Za-z0-9+/=\s\\:,.-]{0,8000}?-----END [A-Z0-9 ]{1,60}-----"
  r"|(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{16,})*)"
)

# What stands behind a word that announces a secret.
_VALUE = (
  r"(?:[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # a UUID
  r"|(?=[a-fA-F]*\d)[0-9a-fA-F]{16,}"
  r"|(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}"
  r"|(?=[A-Za-z+/_~-]*\d)(?=[A-Z0-9+/_~-]*[a-z])(?=[a-z0-9+/_~-]*[A-Z])[A-Za-z0-9+/_~-]{20,}"
  r"(?:\.[A-Za-z0-9+/_~-]{8,})*={0,3})"
  r"(?![A-Za-z0-9])"
)
_ANNOUNCED = re.compile(
  r"(?P<word>(?i:key|token|secret|credential|signature|password|passwd|pwd|auth|cookie)"
  r"[\w-]{0,30}[\"'`\]]{0,2}(?:\s{1,3}(?:is|was))?\s{0,3}(?::=|=>|[:=]|\s)\s{0,3}[\"'`]?)"
  rf"{_VALUE}"
)
# A word that is what a password would be in an example, in a form or in code.
_NO_PASSWORD = (
  r"(?!(?i:string|required|optional|null|none|true|false|undefined|password)\b)"
  r"(?![$%<*{\[]|[A-Za-z_][\w.]*[(\[{])"
)
_PASSWORD = re.compile(
  r"(?P<word>(?i:passwor[dt]s?|passwd|passphrase|passcode|pwd|kennwort|contraseña|mot de passe"
  r"|пароль|密码|密碼|パスワード)[\w-]{0,20}"
  r"(?:(?:\s{1,3}\w{1,20}){0,4}?\s{1,3}(?i:is|was)\s{1,3}(?::\s{0,3})?"
  r"|[\"'`\]]{0,2}\s{0,3}(?::=|=>|[:=：])\s{0,3}))"
  rf"(?P<quote>[\"'`]?){_NO_PASSWORD}"
  r"(?:(?<=[\"'`])(?:[^\s\"'`]{4,200}|(?=[^\"'`\n]*\d)[^\"'`\n]{6,200})(?=[\"'`])"
  r"|(?=[^\s\"'`,;]*[\d@#$%^&*~])[^\s\"'`,;]{4,200}[^\s\"'`,;.!?:)\]}])"
)
_HEADER = re.compile(
  r"(?P<word>(?i:\bauthorization)[\"'`]?\s{0,3}[:=]\s{0,3}[\"'`]?"
  r"(?:(?i:basic|bearer|token|digest|apikey)\s{1,3})?)[^\s\"'`,;\[\]<>{}$]{8,}"
)
_BEARER = re.compile(r"(?P<word>\b(?i:bearer)\s{1,3})(?=[\w.~+/-]{0,400}\d)[\w.~+/-]{8,}=*")
_ADDRESS_PASSWORD = re.compile(r"(?<=://)[^\s/:@\"'<>]{0,128}:[^\s/@\"'<>]{1,256}(?=@)")

_LOCAL = r"(?<![\w.%+-])(?!git@)[\w.%+'-]{1,64}"
_DOMAIN = r"[^\W_](?:[\w-]{0,62}\.){1,8}[^\W\d_]{2,24}(?![\w@])"
_EMAIL = re.compile(rf"{_LOCAL}(?:@|%40){_DOMAIN}")
_AT = r"\s{0,2}[\[({]\s?(?i:at)\s?[\])}]\s{0,2}"
_DOT = r"\s{0,2}(?:[\[({]\s?(?i:dot)\s?[\])}]|\b(?i:dot)\b)\s{0,2}"
_SPELLED = re.compile(
  rf"{_LOCAL}(?:{_AT}{_DOMAIN}"
  rf"|(?:\s{{0,2}}@\s{{0,2}}|{_AT}|\s{{1,2}}(?i:at)\s{{1,2}})"
  rf"(?:[\w-]{{1,62}}{_DOT}){{1,4}}[^\W\d_]{{2,24}}\b)"
)


def _holds(pattern: str) -> Callable[[str], object]:
  return re.compile(pattern).search


# (kind, whether a text may hold it, pattern, what stands in its place), in the order in which they
# are applied. The quick look in front spares most texts the pattern.
PATTERNS = (
  ("KEY", _holds("-----BEGIN "), _PEM, "[KEY]"),
  ("KEY", _holds(r"\d"), _KEY, "[KEY]"),
  ("KEY", _holds(r"hooks\.slack"), _SLACK, "[KEY]"),
  ("SECRET", _holds("://"), _ADDRESS_PASSWORD, "[SECRET]"),
  ("SECRET", _holds("(?i)uthorization"), _HEADER, r"\g<word>[SECRET]"),
  ("SECRET", _holds("(?i)earer"), _BEARER, r"\g<word>[SECRET]"),
  ("SECRET", _holds(r"\d[^\s]{7}|[^\s]{7}\d"), _ANNOUNCED, r"\g<word>[SECRET]"),
  (
    "SECRET",
    _holds("(?i)pass|pwd|kennwort|contrase|пароль|密|パスワード"),
    _PASSWORD,
    r"\g<word>\g<quote>[SECRET]",
  ),
  ("EMAIL", _holds("@|%40"), _EMAIL, "[EMAIL]"),
  ("EMAIL", _holds(r"(?i)\bdot\b|[\[({]\s?at\s?[\])}]"), _SPELLED, "[EMAIL]"),
)

# Numbers.

_SEPARATOR = r"[ \u00a0\u202f.\u2010-\u2013-]"
_LENGTHS = """AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18
DO28 EE20 EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27
JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24
PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SD18 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22
VG24 XK20"""
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _LENGTHS.split()}
_IBAN = re.compile(rf"(?<![^\W_])[A-Za-z]{{2}}{_SEPARATOR}?\d{_SEPARATOR}?\d", re.ASCII)


def ibans(text: str) -> Spans:
  """Where international bank account numbers stand (ISO 13616), in groups or not."""
  done = 0
  for match in _IBAN.finditer(text):
    length = _IBAN_LENGTHS.get(match[0][:2].upper())
    if match.start() < done or length is None:
      continue
    signs, ends = _run(text, match.start(), length, letters=True)
    end = ends.get(length)
    if end is not None and _mod_97(signs):
      yield match.start(), (done := end)


def _mod_97(iban: str) -> bool:
  """Whether the check digits are right: letters are 10 to 35, the first four signs stand last."""
  return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97 == 1


# Groups of three digits at least, but for the last.
_LONG = re.compile(rf"(?<![^\W_])(?<!\d[.,])\d{{3,}}(?:{_SEPARATOR}{{1,2}}\d{{2,}})*")
_START = re.compile(r"(?<![^\W_])[2-6]\d\d")
# What issuers' numbers begin with, by length.
_ISSUERS = re.compile(
  r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
  r"|3[47]\d{13}|6(?:011|5\d\d|4[4-9]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}"
  r"|62\d{14,17}|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{9,15}"
)


def cards(text: str) -> Spans:
  """Where numbers of payment cards stand (ISO/IEC 7812), in groups or not."""
  for region in _LONG.finditer(text):
    done = region.start() if region.end() - region.start() > 12 else region.end()
    for match in _START.finditer(text, region.start(), region.end()):
      if match.start() < done:
        continue
      digits, ends = _run(text, match.start(), 19)
      for length in range(19, 12, -1):
        end = ends.get(length)
        if end is not None and _is_card(digits[:length], text[match.start() : end]):
          yield match.start(), (done := end)
          break


def _is_card(digits: str, written: str) -> bool:
  if "." in written and not re.fullmatch(r"\d{4}(\.\d{4}){3}", written):
    return False  # a decimal number
  doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
  total = sum(number - 9 * (number > 9) for number in doubled)
  return total % 10 == 0 and _ISSUERS.fullmatch(digits) is not None


def _run(text: str, start: int, count: int, *, letters: bool = False) -> tuple[str, dict[int, int]]:
  """Up to `count` digits from `start` on, two separators at most between them; and by the number of
  digits where they end, if a word ends there, too.
  """
  signs, ends, place, gap = [], {}, start, 0
  while place < len(text) and len(signs) < count:
    sign = text[place]
    if sign.isdecimal() or (letters and sign.isascii() and sign.isalpha()):
      signs.append(str(int(sign)) if sign.isdecimal() else sign)
      gap = 0
      if place + 1 == len(text) or not text[place + 1].isalnum():
        ends[len(signs)] = place + 1
    elif gap < 2 and re.match(_SEPARATOR, sign):
      gap += 1
    else:
      break
    place += 1
  return "".join(signs), ends


_GAP = r"[ \u00a0\u202f.\u2010-\u2013/-]"
_PHONES = (
  rf"(?<![\w+])(?:\+\s?|00(?=[1-9]\d{{0,2}}{_GAP}))[1-9]"
  rf"(?:(?!\. ){_GAP}{{0,2}}(?:\d|\(\d{{1,4}}\))){{6,14}}(?!\d)",
  # 415-555-2671, (415) 555-2671, 1.415.555.2671; with spaces alone, as numbers there begin
  r"(?<![\w.+-])(?:1[ .-])?(?:\(\d{3}\)[ .-]?\d{3}[ .-]|\d{3}[.-]\d{3}[.-]|[2-9]\d\d [2-9]\d\d[ -])"
  r"\d{4}(?![\w-]|\.\d)",
  # 020 7946 0958, 030/901820, (0)30 901820, 06 12 34 56 78
  r"(?<![\w.,:/+-])\(?0[1-9]\d{0,4}\)?(?:[ \u00a0/-]{1,3}\d{2,8}){1,5}(?!\w|[/:.]\d)",
)
_WORDS = (
  r"phone|tel(?:ephone|\.)?|mobile|cell|fax|whats ?app|sms|telefon\w*|t[ée]l[ée]phone|tel[ée]fono"
  r"|m[óo]vil|handy\w*"
  r"|(?:call|dial|ring)(?=\s{1,2}\(?\d{2,4}[) .-])|(?:call|reach) (?:me|us|him|her|them)"
  r"|text (?:me|us)"
)
_PHONE = re.compile("|".join(_PHONES))
_CALLED = re.compile(
  rf"(?:\b(?i:{_WORDS})\b|电话|手机|電話|전화|тел)[^\d\n+(,;{{}}\[\]]{{0,24}}"
  rf"(?P<number>\+?\(?\d(?:(?!\. ){_GAP}{{0,2}}[()]?\d){{6,14}})(?!\d)"
)
_MANY = re.compile(rf"\d(?:{_GAP}{{0,2}}[()]{{0,2}}\d){{6}}")
_DATE = re.compile(r"\d{1,2}([ ./-])\d{1,2}\1\d{4}(?!\d)")


def phones(text: str) -> Spans:
  """Where phone numbers stand that can be told from other numbers."""
  if not _MANY.search(text):
    return
  found = [match.span("number") for match in _CALLED.finditer(text)]
  for match in _PHONE.finditer(text):
    written = match[0]
    while _digits(written) > 17:  # another number stands behind it
      written = _GROUP.sub("", written)
    if _digits(written) >= (8 if written[0] == "+" else 9) and not _DATE.match(written):
      found.append((match.start(), match.start() + len(written)))
  done = 0
  for start, end in sorted(found):
    if start >= done:
      yield start, (done := end)


_GROUP = re.compile(rf"{_GAP}*[()]?\d+\)?$")  # the last one


def _digits(written: str) -> int:
  return sum(sign.isdecimal() for sign in written)


# Names.


class Names:
  """Finds the names of a list as whole words, in capitals or not, however they are composed."""

  def __init__(self, names: Sequence[str]):
    self._longest, self._known, signs = 0, set(), []
    for name in names:
      words = tuple(_folded(word[0]) for word in _WORD.finditer(name))
      if any("\u3040" <= sign <= "\ud7af" for sign in name):  # nothing stands between their words
        signs.append(re.escape(name))
      elif words:
        self._known.add(words)
        self._longest = max(self._longest, len(words))
    self._first = {words[0] for words in self._known}
    self._signs = re.compile("|".join(sorted(signs, key=len, reverse=True))) if signs else None

  def find(self, text: str) -> Spans:
    """Where names stand, the longest of those that begin at one place."""
    found = [match.span() for match in self._signs.finditer(text)] if self._signs else []
    if self._known:
      found += self._words(text)
    done = 0
    for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
      if start >= done:
        yield start, (done := end)

  def _words(self, text: str) -> Spans:
    words = [(_folded(match[0]), *match.span()) for match in _WORD.finditer(text)]
    for place, (word, start, _) in enumerate(words):
      if word not in self._first:
        continue
      for count in range(min(self._longest, len(words) - place), 0, -1):
        near = words[place : place + count]
        if tuple(each[0] for each in near) in self._known and all(
          after[1] - before[2] <= 3 for before, after in zip(near, near[1:])
        ):
          yield start, near[-1][2]
          break


_WORD = re.compile("[^\\W_](?:[^\\W_]|[\u0300-\u036f])*")


def _folded(word: str) -> str:
  return unicodedata.normalize("NFC", word).casefold()
