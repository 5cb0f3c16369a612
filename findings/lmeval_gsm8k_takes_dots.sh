#!/usr/bin/env bash
# lm-eval 0.4.13: GSM8K's "flexible-extract" takes three dots, or "$." and "i.e.,", for the number, and 18.00 for another number than 18.
#
# A guess: the last number of an answer is found wherever it stands and compared as a number, so that answers count for what they say and "strict-match" for
# their form. Seen, with the filters and the metric of the task's own file: what is looked for is any two or more of digits, dots, commas and dollar signs, and
# the last such run is compared as a text.
#   - an answer that has dots or a comma behind its number ("18 dollars...", "She earns 18 $.", "18, i.e., eighteen") is wrong
#   - $18.00 and 18.0 are wrong, "18." and "$18" are right; the strict filter takes "#### 18.00", too, for wrong
#   - "10-18" is minus 18, "18 (= 9 * 2)" is 2
# So a model that writes prices as one does, or ends a sentence with dots, loses points by its style, and training that changes the style alone
# moves the score.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q lm-eval==0.4.13 evaluate==0.4.6 datasets==5.2.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import pathlib

import lm_eval
import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

with open(pathlib.Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml") as file:
  TASK = yaml.safe_load(file)
METRIC = {name: TASK["metric_list"][0][name] for name in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
FILTERS = {}
for listed in TASK["filter_list"]:
  settings = {name: value for name, value in listed["filter"][0].items() if name != "function"}
  FILTERS[listed["name"]] = RegexFilter(**settings)


def verdict(name, answer):
  (found,) = FILTERS[name].apply([[answer]], [{}])[0]
  right = exact_match_hf_evaluate([found], ["Nine times two is 18.\n#### 18"], **METRIC)["exact_match"]
  return f"{found!r} {'right' if right else 'wrong'}"


for answer in (
  "The answer is 18.",
  "She makes $18.",
  "She makes $18.00 a day.",
  "18.0",
  "She makes 18 dollars...",
  "She earns 18 $.",
  "It is 18, i.e., eighteen.",
  "10-18",
  "18 (= 9 * 2)",
  "#### 18",
  "#### 18.00",
):
  print(f"{answer!r}: flexible {verdict('flexible-extract', answer)}, strict {verdict('strict-match', answer)}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
'The answer is 18.': flexible '18.' right, strict '[invalid]' wrong
'She makes $18.': flexible '$18.' right, strict '[invalid]' wrong
'She makes $18.00 a day.': flexible '$18.00' wrong, strict '[invalid]' wrong
'18.0': flexible '18.0' wrong, strict '[invalid]' wrong
'She makes 18 dollars...': flexible '...' wrong, strict '[invalid]' wrong
'She earns 18 $.': flexible '$.' wrong, strict '[invalid]' wrong
'It is 18, i.e., eighteen.': flexible '.,' wrong, strict '[invalid]' wrong
'10-18': flexible '-18' wrong, strict '[invalid]' wrong
'18 (= 9 * 2)': flexible '2' wrong, strict '[invalid]' wrong
'#### 18': flexible '18' right, strict '18' right
'#### 18.00': flexible '18.00' wrong, strict '18.00' wrong
SEEN
