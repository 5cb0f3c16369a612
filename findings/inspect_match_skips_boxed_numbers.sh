#!/usr/bin/env bash
# inspect-ai 0.3.285: match(numeric=True) does not see the number in \boxed{18}, <answer>18</answer>, x=18 or 18%, and grades the number before it.
#
# A guess: the scorer takes the last number of the answer, whatever it is wrapped in, for that is how models write their results. Seen: the text is cut at blanks,
# and only a piece that is a number by itself counts, apart from money signs, brackets, quotes, stars and the like around it. What else touches a number
# hides it, and the number before that is taken: "3 + 15 = \boxed{18}" has the answer 15. It is wrong where 18 is asked for and RIGHT where 15 is, as it is
# for any number in the box. "$18$", "(18)", "18 km2" and "18 %" are seen. So one and the same result is right or wrong by its wrapping, a model that was
# trained to put its results into a box or a tag scores near nothing, and some of what it does score are intermediate results.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q inspect-ai==0.3.285
"$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import asyncio

from inspect_ai.model import ModelName, ModelOutput
from inspect_ai.scorer import Target, match
from inspect_ai.solver import TaskState

WORDS = {"C": "right", "I": "wrong"}


def graded(answer, target):
  output = ModelOutput.from_content("mockllm/model", answer)
  state = TaskState(model=ModelName("mockllm/model"), sample_id=1, epoch=1, input="What is 3 + 15?", messages=[], output=output)
  score = asyncio.run(match(numeric=True)(state, Target(target)))
  return f"{score.answer!r} {WORDS[score.value]}"


for answer, target in (
  ("3 + 15 = 18", "18"),
  ("3 + 15 = $18$.", "18"),
  ("3 + 15 = (18)", "18"),
  ("3 + 15 = 18 km2", "18"),
  ("3 + 15 = 18 %", "18"),
  (r"3 + 15 = \boxed{18}", "18"),
  (r"3 + 15 = \boxed{18}", "15"),
  (r"3 + 15 = \boxed{1}", "15"),
  ("3 + 15: <answer>18</answer>", "18"),
  ("3 + 15 is what x is, so x=18.", "18"),
  ("3 + 15 = 18%", "18"),
  ("3 + 15 = 18km", "18"),
  (r"\boxed{18}", "18"),
):
  print(f"{answer} (target {target}): {graded(answer, target)}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
3 + 15 = 18 (target 18): '18' right
3 + 15 = $18$. (target 18): '18' right
3 + 15 = (18) (target 18): '18' right
3 + 15 = 18 km2 (target 18): '18' right
3 + 15 = 18 % (target 18): '18' right
3 + 15 = \boxed{18} (target 18): '15' wrong
3 + 15 = \boxed{18} (target 15): '15' right
3 + 15 = \boxed{1} (target 15): '15' right
3 + 15: <answer>18</answer> (target 18): '15' wrong
3 + 15 is what x is, so x=18. (target 18): '15' wrong
3 + 15 = 18% (target 18): '15' wrong
3 + 15 = 18km (target 18): '15' wrong
\boxed{18} (target 18): '' wrong
SEEN
