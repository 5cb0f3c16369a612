#!/usr/bin/env bash
# The paper's tables and figures in one setting, published figures beside ours, one below the other; all of it stands in DIRECTORY/papers.md, too.
#   JOBS=8 bash experiments/papers.sh SETTING DIRECTORY [--weights=WEIGHTS] [--seeds=0,1,2] [--config.FIELD=VALUE ...]
# --print prints what is there and runs nothing. Figure 7 and Table 2's other writers need more weights: give their files' own commands, with
# DIRECTORY/NAME for the directory, and this one prints them, too. PYTHON may be set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: JOBS=8 bash experiments/papers.sh SETTING DIRECTORY [--weights=WEIGHTS] [--config.FIELD=VALUE ...]" >&2; exit 2; }
SETTING=$1 DIRECTORY=$2 PYTHON=${PYTHON:-.venv/bin/python} failed=0
shift 2
mkdir -p "$DIRECTORY"
for name in oel_table1 oel_table2 oel_figure4 oel_figure5 oel_figure6 opcd_tables; do
  "$PYTHON" "experiments/$name.py" "$SETTING" "$DIRECTORY/$name" "$@" || failed=1
  echo
done > "$DIRECTORY/papers.md.partial"
"$PYTHON" experiments/oel_figure7.py "$SETTING" "$DIRECTORY/oel_figure7" --print >> "$DIRECTORY/papers.md.partial" || failed=1
mv "$DIRECTORY/papers.md.partial" "$DIRECTORY/papers.md"
cat "$DIRECTORY/papers.md"
exit $failed
