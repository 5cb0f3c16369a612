#!/usr/bin/env bash
# trl 1.16.0: GOLD's loss between two tokenizers (ULD, by default "observed") never trains an answer's first token, and takes a token's repetition for the token.
#
# A guess: logits at a place say what comes next, so an answer's distillation begins at the last place of the prompt, and where the student needs two tokens
# for the teacher's one, they are merged by p(first) p(second | first), "the conditional probabilities of the actual later tokens" in the configuration's
# words. Seen: the logits are cut at the answer's own places, one too late.
#   - what the student would begin its answer with is not in the loss: no gradient at the prompt's last place, whatever the student says there
#   - the first of two tokens is left out of the merged probability, and the second is counted as p(second | first, second): the chance that it comes twice.
#     The loss moves with that, for which the text gives no reason
# With uld_token_merge_strategy="bayesian" the places are right, but that is not the default; the cross-entropy beside it, off by default, is right as well.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.24.0 torch==2.13.0 datasets==5.2.0 accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

# The student reads <user> ? <model> s un <end>, the teacher <user> ? <model> sun <end>: the answer's bytes are 0 to 3.
USER, ASK, MODEL, S, UN, END = range(6)
STUDENT, TEACHER = [USER, ASK, MODEL, S, UN, END], [USER, ASK, MODEL, S, END]  # the teacher's token 3 is "sun"
NONE = [0, 0]


def chances(length, said):
  """Logits [1, length, 6]: at each place of `said` its token has the chance given there, all else is shared out evenly."""
  p = torch.full((1, length, 6), 1 / 6)
  for place, (token, chance) in said.items():
    p[0, place] = (1 - chance) / 5
    p[0, place, token] = chance
  return p.log().requires_grad_()


def loss_of(strategy, **chance):
  config = GOLDConfig(
    output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to=[], use_uld_loss=True, teacher_tokenizer_name_or_path="not opened here",
    uld_crossentropy_weight=0.0, **({"uld_token_merge_strategy": strategy} if strategy else {}),
  )  # fmt: skip
  chance = {"first": 0.5, "second": 0.8, "again": 0.2} | chance
  student = chances(6, {2: (S, chance["first"]), 3: (UN, chance["second"]), 4: (UN, chance["again"])})
  teacher = chances(5, {2: (S, 0.9), 3: (END, 0.9)})
  ids, labels, offsets = [], [], []
  for tokens, spans in ((STUDENT, [[0, 1], [1, 3], [3, 3]]), (TEACHER, [[0, 3], [3, 3]])):
    ids.append(torch.tensor([tokens]))
    labels.append(torch.tensor([[-100] * 3 + tokens[3:]]))
    offsets.append(torch.tensor([[NONE] * 3 + spans]))
  loss = ULDLoss(config)(student, teacher, *labels, *ids, *offsets)
  loss.backward()
  return loss.item(), [STUDENT_WORDS[i] for i in student.grad[0].abs().sum(-1).nonzero().flatten()]


STUDENT_WORDS = ["<user>", "?", "<model>", "s", "un", "<end>"]
for strategy in (None, "bayesian"):
  name = strategy or "by default"
  print(f"SEEN {name}: gradient behind {' and '.join(loss_of(strategy)[1])}")
  for what, says in (("first", 's behind "<model>"'), ("second", 'un behind "s"'), ("again", 'un behind "s un"')):
    small, large = (loss_of(strategy, **{what: chance})[0] for chance in (0.3, 0.7))
    print(f"SEEN {name}: chance of {says} from 0.3 to 0.7: loss {small:.3f} to {large:.3f}")
PYTHON
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder/out" 2> "$folder/errors" > "$folder/printed" || { cat "$folder/errors"; exit 1; }
grep ^SEEN "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
by default: gradient behind s and un
by default: chance of s behind "<model>" from 0.3 to 0.7: loss 0.800 to 0.800
by default: chance of un behind "s" from 0.3 to 0.7: loss 0.880 to 0.800
by default: chance of un behind "s un" from 0.3 to 0.7: loss 0.700 to 0.380
bayesian: gradient behind <model> and s
bayesian: chance of s behind "<model>" from 0.3 to 0.7: loss 0.700 to 0.380
bayesian: chance of un behind "s" from 0.3 to 0.7: loss 1.000 to 0.600
bayesian: chance of un behind "s un" from 0.3 to 0.7: loss 0.500 to 0.500
SEEN
