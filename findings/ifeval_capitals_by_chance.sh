#!/usr/bin/env bash
# lm-eval 0.4.13 (langdetect 1.0.9): IFEval's check "in English and in all capital letters" fails short answers that are both, some of them by chance.
#
# A guess: instructions that a program checks have one verdict for one answer, and what is English in small letters is English in capitals. Seen: the check
# asks langdetect, which draws random numbers that lm-eval does not seed, and which knows languages by their letters, capitals and small ones apart.
# Of eight English sentences in capitals four pass never, two now and then in one process (about half and four fifths of the calls), two always. Their small
# letters pass the check for small letters each time, and as written all pass that for the language. So a model that does as it was told
# loses the point where its answer is one short sentence, and the same file of answers is scored differently from one run to the next. Longer answers
# are mostly safe. langdetect.DetectorFactory.seed makes the verdict one, not right.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lm-eval==0.4.13 langdetect==1.0.9 immutabledict==4.3.1 nltk==3.10.4 numpy==2.4.6
mkdir -p "$folder/nltk/tokenizers/punkt_tab"  # not used by these checks, but fetched from the net if it is not there
NLTK_DATA="$folder/nltk" "$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
from lm_eval.tasks.ifeval import instructions

SENTENCES = (
  "The train leaves at nine.",
  "Gravity pulls objects toward each other.",
  "Invest early, diversify, and keep costs low.",
  "Dinosaurs lived millions of years ago.",
  "Mix flour, water and salt, then knead the dough and bake it for half an hour.",
  "We will meet at the station on Monday morning.",
  "The answer is forty-two, because six times seven is forty-two.",
  "Dear Anna, thank you for your letter. I will write back soon. Best wishes, Tom.",
)
CALLS = 300


def passes(checker, answer):
  share = sum(checker.check_following(answer) for _ in range(CALLS)) / CALLS
  return "never" if share < 0.03 else "always" if share > 0.97 else "now and then"


capitals, small, language = (
  made("")
  for made in (
    instructions.CapitalLettersEnglishChecker,
    instructions.LowercaseLettersEnglishChecker,
    instructions.ResponseLanguageChecker,
  )
)
capitals.build_description()
small.build_description()
language.build_description(language="en")
for sentence in SENTENCES:
  found = [passes(*of) for of in ((capitals, sentence.upper()), (small, sentence.lower()), (language, sentence))]
  print("capitals {}, small {}, as written {}:".format(*found), sentence)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
capitals never, small always, as written always: The train leaves at nine.
capitals never, small always, as written always: Gravity pulls objects toward each other.
capitals never, small always, as written always: Invest early, diversify, and keep costs low.
capitals never, small always, as written always: Dinosaurs lived millions of years ago.
capitals now and then, small always, as written always: Mix flour, water and salt, then knead the dough and bake it for half an hour.
capitals now and then, small always, as written always: We will meet at the station on Monday morning.
capitals always, small always, as written always: The answer is forty-two, because six times seven is forty-two.
capitals always, small always, as written always: Dear Anna, thank you for your letter. I will write back soon. Best wishes, Tom.
SEEN
