#!/usr/bin/env bash
# math-verify 0.9.0: very small numbers are all equal: the electron's mass is right for Planck's constant, and its charge with the wrong sign for its charge.
#
# A guess: numbers are compared to some digits of their own, so that 3.333 may stand for 10/3, and what differs by a factor is wrong at any size. Seen: decimals
# are rounded to six places behind the point, and of products the difference counts, in which what is below 17 places or so is 0.
#   - written with a power of ten: all numbers below 10**-17 are equal to one another, to their negatives and to 0.0; at 10**-15 they are told apart
#   - written out, 0.00000025 and 0.00000045 are equal already, -0.00000045 as well: all below 5 * 10**-7
#   - whole factors alone, 3 * 10**-34 and 5 * 10**-34, are told apart, and so is 6.02 * 10**23 from 6.022 * 10**23, where rounding would be welcome
# So a policy that is rewarded by verify() on questions of physics or chemistry gets full marks for any small number there, and an evaluation counts it as right.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
from math_verify import parse, verify


def power(number, exponent):
  return rf"${number} \times 10^{{{exponent}}}$"


def tell(what, gold, answer):
  print(f"{what}: {gold} against {answer}: {verify(parse(gold), parse(answer))}")


tell("Planck's constant, the electron's mass", power("6.626", -34), power("9.109", -31))
tell("the electron's charge, the other sign", power("-1.602", -19), power("1.602", -19))
tell("a charge, none", power("1.602", -19), "$0.0$")
tell("at -17", power("2.5", -17), power("4.5", -17))
tell("at -15", power("2.5", -15), power("4.5", -15))
tell("whole factors", power("3", -34), power("5", -34))
tell("written out", "$0.00000025$", "$0.00000045$")
tell("written out, the other sign", "$0.00000025$", "$-0.00000045$")
tell("written out, larger", "$0.0000025$", "$0.0000045$")
tell("Avogadro's number, rounded", power("6.022", 23), power("6.02", 23))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
Planck's constant, the electron's mass: $6.626 \times 10^{-34}$ against $9.109 \times 10^{-31}$: True
the electron's charge, the other sign: $-1.602 \times 10^{-19}$ against $1.602 \times 10^{-19}$: True
a charge, none: $1.602 \times 10^{-19}$ against $0.0$: True
at -17: $2.5 \times 10^{-17}$ against $4.5 \times 10^{-17}$: True
at -15: $2.5 \times 10^{-15}$ against $4.5 \times 10^{-15}$: False
whole factors: $3 \times 10^{-34}$ against $5 \times 10^{-34}$: True
written out: $0.00000025$ against $0.00000045$: True
written out, the other sign: $0.00000025$ against $-0.00000045$: True
written out, larger: $0.0000025$ against $0.0000045$: False
Avogadro's number, rounded: $6.022 \times 10^{23}$ against $6.02 \times 10^{23}$: False
SEEN
