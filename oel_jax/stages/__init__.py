"""The stages of a run, each a function (run, round, policy, …) that writes its own files below
DIR/round_N, whole or not at all, and does nothing where it finds them.

`deploy`, `extract`, `gate` and `evaluate` are the user side. `consolidate` is the server side: it
reads knowledge/ and prompts.jsonl and imports no environment.
"""
