"""The kinds of instruction that a program can check, and what they are about.

A kind is a function of a random generator; it returns a prompt of one user message and the check of
an answer to it (`instruction_checks`). What is asked for is short, so that a limit on the tokens of
a response ends few answers.
"""

import random
from collections.abc import Callable
from functools import partial

from oel_jax.evaluation import instruction_checks as checks

Check = Callable[[str], bool]

SUBJECTS = (
  "the sea",
  "winter",
  "a bicycle",
  "bread",
  "a railway station",
  "the moon",
  "a garden",
  "coffee",
  "a library",
  "rain",
  "a market",
  "a lighthouse",
  "music",
  "a bridge",
  "the forest",
  "a kitchen",
  "sleep",
  "a river",
  "football",
  "a map",
  "honey",
  "an old house",
  "glass",
  "a school",
)
THINGS = (  # no two begin with the same letter
  "apple bottle candle door engine feather guitar hammer island jacket kettle lemon mirror needle "
  "orange pencil queen ribbon shovel tomato umbrella violin window yard"
).split()
SHORT = "cat dog sun map cup hat pen box car net bag jam leg win tip rod".split()
ANIMALS = "horse tiger rabbit sheep camel eagle".split()
TOOLS = "hammer saw spade wrench drill chisel".split()
WHO = ("The baker", "My sister", "Nobody", "Her brother", "An old man", "Our neighbour")
DID = (
  "painted the kitchen door",
  "waited for the bus",
  "sold seven umbrellas",
  "planted two small trees",
  "found the letter under the carpet",
  "repaired the clock in the hall",
)
WHEN = ("last week", "before six in the morning", "on a rainy day", "after lunch", "in March")
FOREIGN = (
  "Il pleut depuis hier soir.",
  "Der Schlüssel liegt auf dem Tisch.",
  "Mañana vamos a la playa.",
  "La stazione è molto lontana.",
  "O café está frio.",
  "De winkel is vandaag gesloten.",
  "Nous avons perdu la clé.",
  "Der Zug kommt um neun.",
  "¿Dónde está mi sombrero?",
  "Il gatto dorme sotto la sedia.",
)
SENTENCE = f"one sentence of at least {checks.MIN_WORDS} words"
UNITS = "zero one two three four five six seven eight nine".split()
TENS = {30: "thirty", 40: "forty", 60: "sixty", 70: "seventy", 90: "ninety"}
NAMES = ("Baker", "Osei", "Lindqvist", "Romero", "Tanaka", "Haddad")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def word_count(rng: random.Random) -> tuple[str, Check]:
  count, about = rng.randint(5, 9), rng.choice(SUBJECTS)
  told = f"Write one sentence about {about}. It must have exactly {count} words."
  return told, partial(checks.word_count, least=count, most=count)


def at_most_words(rng: random.Random) -> tuple[str, Check]:
  most, about = rng.randint(10, 16), rng.choice(SUBJECTS)
  least = checks.MIN_WORDS
  told = f"What is special about {about}? Answer with at least {least} and at most {most} words."
  return told, partial(checks.word_count, least=least, most=most)


def sentence_count(rng: random.Random) -> tuple[str, Check]:
  count, about = rng.randint(2, 4), rng.choice(SUBJECTS)
  told = f"Write exactly {count} short sentences about {about}, without abbreviations."
  return told, partial(checks.sentence_count, count=count)


def line_count(rng: random.Random) -> tuple[str, Check]:
  count, about = rng.randint(2, 5), rng.choice(SUBJECTS)
  told = f"Write a poem of exactly {count} lines about {about}. Give it no title."
  return told, partial(checks.line_count, count=count)


def first_word(rng: random.Random) -> tuple[str, Check]:
  word = rng.choice(("Maybe", "Often", "Yesterday", "Nobody", "However", "Sometimes"))
  about = rng.choice(SUBJECTS)
  told = f'Write {SENTENCE} about {about}. The first word of your answer must be "{word}".'
  return told, partial(checks.first_word, word=word)


def last_word(rng: random.Random) -> tuple[str, Check]:
  word = rng.choice(("today", "there", "again", "people", "time", "everyone"))
  about = rng.choice(SUBJECTS)
  told = f'Write {SENTENCE} about {about}. The last word of your answer must be "{word}".'
  return told, partial(checks.last_word, word=word)


def upper(rng: random.Random) -> tuple[str, Check]:
  told = f"Write {SENTENCE} about {rng.choice(SUBJECTS)}. "
  return told + "WRITE ALL OF IT IN CAPITAL LETTERS, LIKE THIS.", checks.upper


def lower(rng: random.Random) -> tuple[str, Check]:
  told = f"Write {SENTENCE} about {rng.choice(SUBJECTS)}. "
  told += "Write all of it in small letters, the first letter of the sentence, too."
  return told, checks.lower


def without_word(rng: random.Random) -> tuple[str, Check]:
  word, about = rng.choice(("the", "is", "and", "of", "a")), rng.choice(SUBJECTS)
  told = f'Write {SENTENCE} about {about}. Never use the word "{word}".'
  return told, partial(checks.without_word, word=word)


def without_letter(rng: random.Random) -> tuple[str, Check]:
  letter, about = rng.choice("bdgkpvwy"), rng.choice(SUBJECTS)
  told = f"Write {SENTENCE} about {about}. "
  told += f'The letter "{letter}" must not occur in it.'
  return told, partial(checks.without_text, text=letter)


def without_commas(rng: random.Random) -> tuple[str, Check]:
  told = f"Describe {rng.choice(SUBJECTS)} in two short sentences. Do not use any comma."
  return told, partial(checks.without_text, text=",")


def word_times(rng: random.Random) -> tuple[str, Check]:
  word, count = rng.choice(("green", "friend", "always", "small", "light")), rng.randint(2, 3)
  told = f"Write a short text about {rng.choice(SUBJECTS)}. "
  told += f'Use the word "{word}" exactly {count} times.'
  return told, partial(checks.word_times, word=word, count=count)


def question(rng: random.Random) -> tuple[str, Check]:
  told = f"Ask me one question about {rng.choice(SUBJECTS)}. Your answer must be that question and "
  return told + "nothing else.", checks.question


def quoted(rng: random.Random) -> tuple[str, Check]:
  told = f"Write one sentence about {rng.choice(SUBJECTS)}, all of it in double quotes. Write "
  told += "nothing outside the quotes, and use no other quotes in it."
  return told, partial(checks.wrapped, before='"', after='"')


def wrapped(rng: random.Random) -> tuple[str, Check]:
  before, after = rng.choice((("<<", ">>"), ("[[", "]]"), ("{{", "}}")))
  told = f"Give me a title for a story about {rng.choice(SUBJECTS)}. Write it between {before} and "
  return told + f"{after} and write nothing else.", partial(
    checks.wrapped, before=before, after=after
  )


def separated(rng: random.Random) -> tuple[str, Check]:
  count, separator = rng.randint(3, 5), rng.choice((";", "|", "/"))
  told = (
    f"Name {count} things that have to do with {rng.choice(SUBJECTS)}. Write all of them on one "
  )
  form = f" {separator} ".join(["thing"] * count)
  told += f"line, with {separator} between them and nothing else, in this form: {form}"
  return told, partial(checks.separated, separator=separator, count=count)


def initials(rng: random.Random) -> tuple[str, Check]:
  letter, count = rng.choice("abcdfghlmprst"), rng.randint(2, 4)
  told = f'Name {count} different words that begin with the letter "{letter}". Write them on one '
  told += "line with commas between them and nothing else."
  return told, partial(checks.initials, letter=letter, count=count)


def divided(rng: random.Random) -> tuple[str, Check]:
  divider, about = rng.choice(("***", "---", "====")), rng.choice(SUBJECTS)
  told = f"Write exactly three lines: a sentence about {about}, then a line that holds only "
  return told + f"{divider} and then another sentence.", partial(checks.divided, divider=divider)


def numbered(rng: random.Random) -> tuple[str, Check]:
  count, about = rng.randint(3, 5), rng.choice(SUBJECTS)
  told = f"Give me a numbered list of exactly {count} things that have to do with {about}, one a "
  told += 'line, in the form "1. thing". Write nothing before or after the list.'
  return told, partial(checks.numbered, count=count)


def bullets(rng: random.Random) -> tuple[str, Check]:
  mark, count = rng.choice("-*+"), rng.randint(2, 4)
  told = f"Write exactly {count} bullet points about {rng.choice(SUBJECTS)}. Each is one line and "
  told += f'begins with "{mark} ". Write nothing before or after them.'
  return told, partial(checks.bullets, mark=mark, count=count)


def closing_line(rng: random.Random) -> tuple[str, Check]:
  line, about = rng.choice(("That is all.", "End of message", "Goodbye!")), rng.choice(SUBJECTS)
  told = f"Write one sentence about {about}. Then, on a line of its own, end your answer with: "
  return told + line, partial(checks.closing_line, line=line)


def json_object(rng: random.Random) -> tuple[str, Check]:
  keys = rng.sample(("name", "colour", "place", "use", "size", "season"), rng.randint(2, 3))
  listed = " and ".join(f'"{key}"' for key in keys)
  told = f"Describe {rng.choice(SUBJECTS)} as one JSON object with exactly the keys {listed}; each "
  told += "value is a text. Write nothing but the JSON."
  return told, partial(checks.json_object, keys=tuple(keys))


def json_texts(rng: random.Random) -> tuple[str, Check]:
  count, about = rng.randint(3, 5), rng.choice(SUBJECTS)
  told = f"Name {count} things that have to do with {about} as a JSON array of {count} texts. "
  told += "Write nothing but the JSON."
  return told, partial(checks.json_texts, count=count)


def yes_or_no(rng: random.Random) -> tuple[str, Check]:
  a, b = rng.sample(range(11, 99), 2)
  told = f"Is {a} greater than {b}? Answer with yes or no and nothing else."
  return told, partial(checks.alone, wanted="yes" if a > b else "no")


def arithmetic(rng: random.Random) -> tuple[str, Check]:
  a, b, sign = rng.randint(21, 79), rng.randint(2, 9), rng.choice("+-")
  told = f"What is {a} {sign} {b}? Answer with the number in digits and nothing else."
  return told, partial(checks.alone, wanted=str(a + b if sign == "+" else a - b))


def in_digits(rng: random.Random) -> tuple[str, Check]:
  ten, unit = rng.choice(list(TENS)), rng.randint(1, 9)
  told = f'Write "{TENS[ten]}-{UNITS[unit]}" in digits. Answer with the digits and nothing else.'
  return told, partial(checks.alone, wanted=str(ten + unit))


def alphabetical(rng: random.Random) -> tuple[str, Check]:
  given = rng.sample(THINGS, 3)
  told = "Put these words in alphabetical order. Answer with the words on one line, with a comma "
  told += f"and a space between them, and nothing else: {', '.join(given)}"
  return told, partial(checks.alone, wanted=", ".join(sorted(given)))


def backwards(rng: random.Random) -> tuple[str, Check]:
  given = rng.sample(SHORT, 3)
  told = (
    "Write these words in reverse order, the last one first. Answer with the words on one line, "
  )
  told += f"with spaces between them, and nothing else: {' '.join(given)}"
  return told, partial(checks.alone, wanted=" ".join(reversed(given)))


def extract(rng: random.Random) -> tuple[str, Check]:
  name, day, number = rng.choice(NAMES), rng.choice(DAYS), rng.randint(2000, 9999)
  about = f"Order {number} was sent to Ms {name} on {day}; she has not received it yet."
  asked, wanted = rng.choice(
    (("What is the order's number", str(number)), ("On which day was it sent", day))
  )
  told = f"{about} {asked}? Answer with that {'number' if wanted.isdigit() else 'day'} and "
  return told + "nothing else.", partial(checks.alone, wanted=wanted)


def pick(rng: random.Random) -> tuple[str, Check]:
  animal = rng.choice(ANIMALS)
  given = [animal, *rng.sample(TOOLS, 3)]
  rng.shuffle(given)
  told = f"Which of these is an animal: {', '.join(given)}? Answer with one word of the list and "
  return told + "nothing else.", partial(checks.alone, wanted=animal)


def _statement(rng: random.Random) -> str:
  return f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHEN)}."


def repeat(rng: random.Random) -> tuple[str, Check]:
  said = _statement(rng)
  return f"Repeat this sentence exactly and write nothing else: {said}", partial(
    checks.exactly, wanted=said
  )


def not_translated(rng: random.Random) -> tuple[str, Check]:
  said = rng.choice(FOREIGN)
  told = "Do not translate the following sentence and do not explain it. Only write it once more, "
  return told + f"exactly as it is: {said}", partial(checks.exactly, wanted=said)


def replaced(rng: random.Random) -> tuple[str, Check]:
  said, new = _statement(rng), rng.choice(THINGS)
  old = rng.choice([word for word in said.split()[1:-1] if len(word) > 3 and said.count(word) == 1])
  told = f'Copy this sentence, but write "{new}" in the place of "{old}". Change nothing else, and '
  return told + f"answer with the sentence alone: {said}", partial(
    checks.exactly, wanted=said.replace(old, new)
  )


_KINDS = (
  word_count,
  at_most_words,
  sentence_count,
  line_count,
  first_word,
  last_word,
  upper,
  lower,
  without_word,
  without_letter,
  without_commas,
  word_times,
  question,
  quoted,
  wrapped,
  separated,
  initials,
  divided,
  numbered,
  bullets,
  closing_line,
  json_object,
  json_texts,
  yes_or_no,
  arithmetic,
  in_digits,
  alphabetical,
  backwards,
  extract,
  pick,
  repeat,
  not_translated,
  replaced,
)
KINDS = {kind.__name__: kind for kind in _KINDS}
