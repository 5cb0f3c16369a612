#!/usr/bin/env bash
# langchain-core 1.8.1: convert_to_openai_messages puts what a user says with tools' results before the results, between the call and its answer.
#
# A guess: what stands in Anthropic's order, results first and then text, comes out in OpenAI's, the tools' messages behind the call and the user's behind
# them: its docstring names contents in Anthropic's form, and OpenAI's chat endpoint takes tools' messages only right behind the message that called. Seen: whatever the order
# of the parts, the user's message comes first. A client of Anthropic's writes such a message wherever a user speaks while tools run (Claude Code does), so
# a log of them, converted, holds calls that nobody answered, then results that nobody asked for; a reader that goes by the order takes the text for what
# the user said before the tools were done.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q langchain-core==1.8.1
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
from langchain_core.messages import AIMessage, HumanMessage, convert_to_openai_messages

USE = {"type": "tool_use", "id": "a", "name": "clock", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "12:00"}
TEXT = {"type": "text", "text": "And tomorrow?"}

for name, parts in (("result, text", [RESULT, TEXT]), ("text, result", [TEXT, RESULT]), ("result alone", [RESULT])):
  said = convert_to_openai_messages([HumanMessage("What time is it?"), AIMessage([USE]), HumanMessage(parts)])
  print(f"{name}: {', '.join(message['role'] for message in said)}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
result, text: user, assistant, user, tool
text, result: user, assistant, user, tool
result alone: user, assistant, tool
SEEN
