#!/usr/bin/env bash
# statsmodels 0.15.0: one p-value that is NaN makes all of multipletests' corrected p-values NaN, or leaves nothing significant, by the method chosen.
#
# A guess: a NaN stays NaN and the others are corrected without it, or it is refused, as scipy's false_discovery_control does. A NaN is what a paired test
# gives where two models agree on every item, so a table of many tasks soon holds one. Seen, for 0.001, 0.02, 0.3 and a NaN beside the same with 1 in its place:
#   - bonferroni, sidak, holm and holm-sidak: the NaN counts as one more test, and the others are what they are with 1
#   - simes-hochberg, fdr_bh, fdr_by, fdr_tsbh: EVERY corrected p-value is NaN, while `reject` is what it is with 1
#   - hommel: every one is NaN, and `reject` is False for all, 0.001 (corrected: 0.004) among them
# So for one result the two halves of what is returned tell different things: "corrected < 0.05" finds nothing where `reject` finds two.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q statsmodels==0.15.0 scipy==1.17.1 numpy==2.4.6 pandas==3.1.1
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import warnings

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

warnings.simplefilter("ignore")  # log(0), of the p-value 1; scipy warns of the equal answers
KNOWN = [0.001, 0.02, 0.3]


def told(values, method):
  rejected, corrected, *_ = multipletests(values, alpha=0.05, method=method)
  return f"{' '.join(f'{value:.4g}' for value in corrected)}, rejects {int(rejected.sum())}, below 0.05 {int((corrected < 0.05).sum())}"


for method in ("bonferroni", "sidak", "holm", "holm-sidak", "simes-hochberg", "hommel", "fdr_bh", "fdr_by", "fdr_tsbh"):
  print(f"{method}: with NaN {told([*KNOWN, np.nan], method)} | with 1 {told([*KNOWN, 1.0], method)}")
try:
  stats.false_discovery_control([*KNOWN, np.nan])
except ValueError:
  print("scipy refuses it")
answers = np.array([1.0, 0.0, 1.0, 1.0])
print("ttest_rel of equal answers:", stats.ttest_rel(answers, answers).pvalue)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
bonferroni: with NaN 0.004 0.08 1 nan, rejects 1, below 0.05 1 | with 1 0.004 0.08 1 1, rejects 1, below 0.05 1
sidak: with NaN 0.003994 0.07763 0.7599 nan, rejects 1, below 0.05 1 | with 1 0.003994 0.07763 0.7599 1, rejects 1, below 0.05 1
holm: with NaN 0.004 0.06 0.6 nan, rejects 1, below 0.05 1 | with 1 0.004 0.06 0.6 1, rejects 1, below 0.05 1
holm-sidak: with NaN 0.003994 0.05881 0.51 nan, rejects 1, below 0.05 1 | with 1 0.003994 0.05881 0.51 1, rejects 1, below 0.05 1
simes-hochberg: with NaN nan nan nan nan, rejects 1, below 0.05 0 | with 1 0.004 0.06 0.6 1, rejects 1, below 0.05 1
hommel: with NaN nan nan nan nan, rejects 0, below 0.05 0 | with 1 0.004 0.06 0.6 1, rejects 1, below 0.05 1
fdr_bh: with NaN nan nan nan nan, rejects 2, below 0.05 0 | with 1 0.004 0.04 0.4 1, rejects 2, below 0.05 2
fdr_by: with NaN nan nan nan nan, rejects 1, below 0.05 0 | with 1 0.008333 0.08333 0.8333 1, rejects 1, below 0.05 1
fdr_tsbh: with NaN nan nan nan nan, rejects 2, below 0.05 0 | with 1 0.002 0.02 0.2 0.5, rejects 2, below 0.05 2
scipy refuses it
ttest_rel of equal answers: nan
SEEN
