#!/usr/bin/env bash
# datasets 5.2.0: an answer such as "2024-01-05" in a JSON Lines file is read as a date, and as another text, if all other rows have one there, too.
#
# A guess: what stands in quotes is a text and comes back as it is; the loader takes pains that rows of different shapes do so. Seen: where every row of a field
# holds a date, with or without a time, the field is one of timestamps, inside lists and messages as well. As a text
#   - 2024-01-05 is then "2024-01-05 00:00:00", 10:00 is 10:00:00, the T and the Z are gone
#   - 10:00 at +02:00 is 08:00 of the same day, and +02:00 is gone: another answer, not another spelling
#   - one row with anything else in that field ("soon", or nothing between the quotes) leaves them all as they are
# So a task whose answers are dates trains and grades on texts that nobody wrote, a chat template writes them into the assistant's turn, and one
# more row, or another shard, changes all of them. `features` that say "string" come too late: they turn the dates into the new texts. Dataset.from_list keeps
# what was written.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 jinja2==3.1.6
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore - "$folder" > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import itertools
import json
import sys

import jinja2
from datasets import Dataset, Features, Value, load_dataset

TEMPLATE = jinja2.Template("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
paths = (f"{sys.argv[1]}/{i}.jsonl" for i in itertools.count())


def loaded(rows, **how):
  path = next(paths)
  with open(path, "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  return load_dataset("json", data_files=path, split="train", **how)


def rows(answers):
  return [{"question": "When?", "answer": answer} for answer in answers]


for answers in (
  ["2024-01-05", "2023-02-03"],
  ["2024-01-05", "2023-02-03", "soon"],
  ["2024-01-05", "2023-02-03", ""],
  ["2024-01-05 10:00", "2023-02-03 11:30"],
  ["2024-01-05T10:00:00Z"],
  ["2024-01-05T10:00:00+02:00"],
  ["2024-01"],
):
  print(answers, "are read as", [str(row["answer"]) for row in loaded(rows(answers))])
dates = rows(["2024-01-05", "2023-02-03"])
print("from_list:", [str(row["answer"]) for row in Dataset.from_list(dates)])
features = Features({"question": Value("string"), "answer": Value("string")})
print("features:", [str(row["answer"]) for row in loaded(dates, features=features)])
chat = {"prompt": [{"role": "user", "content": "When?"}], "completion": [{"role": "assistant", "content": "2024-01-05"}]}
row = loaded([chat])[0]
print("in a chat template:", TEMPLATE.render(messages=row["prompt"] + row["completion"]))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
['2024-01-05', '2023-02-03'] are read as ['2024-01-05 00:00:00', '2023-02-03 00:00:00']
['2024-01-05', '2023-02-03', 'soon'] are read as ['2024-01-05', '2023-02-03', 'soon']
['2024-01-05', '2023-02-03', ''] are read as ['2024-01-05', '2023-02-03', '']
['2024-01-05 10:00', '2023-02-03 11:30'] are read as ['2024-01-05 10:00:00', '2023-02-03 11:30:00']
['2024-01-05T10:00:00Z'] are read as ['2024-01-05 10:00:00']
['2024-01-05T10:00:00+02:00'] are read as ['2024-01-05 08:00:00']
['2024-01'] are read as ['2024-01']
from_list: ['2024-01-05', '2023-02-03']
features: ['2024-01-05 00:00:00', '2023-02-03 00:00:00']
in a chat template: <user>When?<assistant>2024-01-05 00:00:00
SEEN
