#!/usr/bin/env bash
# math-verify 0.9.0: a capital letter is the small one: 2R is right for 2r, and the ring between the radii R and r has the area 0.
#
# A guess: letters are symbols, so R and r are two of them, as they are in sympy and on paper. Seen: all letters are made small before they are compared, those of
# the gold answer, too, and Greek ones as well. So whatever a formula says with both, the two are one: R - r is 0, n N is n squared, m / (M + m) is one half,
# and an answer that swaps the radii, which turns its sign, is right. (Other letters are told apart.) It is a default of the package that reads
# the LaTeX, lowercase_symbols, and no setting of parse() reaches it. A policy that is rewarded by verify() on formulas is paid for mixing up radii, masses, or
# a volume and a velocity.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
from math_verify import parse, verify

for what, gold, answer in (
  ("the other radius", "$2R$", "$2r$"),
  ("a ring of no area", r"$\pi (R^2 - r^2)$", "$0$"),
  ("the sign of a ring", r"$\pi (R^2 - r^2)$", r"$\pi (r^2 - R^2)$"),
  ("a difference", "$R - r$", "$0$"),
  ("a volume, a velocity", r"$\frac{V}{t}$", r"$\frac{v}{t}$"),
  ("a volume over a velocity", r"$\frac{V}{v}$", "$1$"),
  ("a product", "$nN$", "$n^2$"),
  ("with an index", "$R_1$", "$r_1$"),
  ("in a box", r"\boxed{\frac{m}{M + m}}", r"\boxed{\frac{1}{2}}"),
  ("another letter", "$2R$", "$2s$"),
  ("Greek", r"$\Delta$", r"$\delta$"),
  ("Greek", r"$\Omega$", r"$\omega$"),
):
  print(f"{what}: {gold} against {answer}: {verify(parse(gold), parse(answer))}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the other radius: $2R$ against $2r$: True
a ring of no area: $\pi (R^2 - r^2)$ against $0$: True
the sign of a ring: $\pi (R^2 - r^2)$ against $\pi (r^2 - R^2)$: True
a difference: $R - r$ against $0$: True
a volume, a velocity: $\frac{V}{t}$ against $\frac{v}{t}$: True
a volume over a velocity: $\frac{V}{v}$ against $1$: True
a product: $nN$ against $n^2$: True
with an index: $R_1$ against $r_1$: True
in a box: \boxed{\frac{m}{M + m}} against \boxed{\frac{1}{2}}: True
another letter: $2R$ against $2s$: False
Greek: $\Delta$ against $\delta$: True
Greek: $\Omega$ against $\omega$: True
SEEN
