#!/usr/bin/env bash
# trl 1.16.0 (with transformers 5.24.0): gradient accumulation over n steps divides GOLD's and IW-OPD's gradient by n, and multiplies that of GOLD's ULD by n.
#
# A guess: the trainers say that their losses are right under gradient accumulation, so eight conversations give one loss and one gradient, be they taken
# at once or one by one in eight steps. Seen, with the very same conversations and a step of plain SGD:
#   - GOLDTrainer with one tokenizer, and IWOPDTrainer with its objective "jsd": loss and gradient are an eighth. The loader hands each step the
#     whole window of n batches, of which the trainer then cuts its slice. The Trainer counts the tokens of all n windows, n times too many, and
#     the sum of the divergences is divided by that
#   - GOLDTrainer with two tokenizers (use_uld_loss): loss and gradient are eightfold. That loss is a mean over its slice and not divided by n, for the Trainer
#     takes a model that accepts `num_items_in_batch` for one whose loss is divided already
# So what one GPU's memory makes one choose sets the strength of training, in opposite directions for the two losses of one trainer. Adam takes a steady factor
# out; SGD, clipping at max_grad_norm and the logged loss do not.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.24.0 torch==2.13.0 datasets==5.2.0 accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
cat > "$folder/train.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

TEMPLATE = """{% for message in messages %}{{ '<' + message.role.replace('assistant', 'model') + '> ' + message.content + ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<model> ' }}{% endif %}"""


def tokenizer(path, merges):
  words = ["<pad>", "<end>", "<user>", "<model>"] + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
  pairs = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
  pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  special = dict(pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<user>", "<model>"])
  made = PreTrainedTokenizerFast(tokenizer_object=pairs, chat_template=TEMPLATE, **special)
  made.save_pretrained(path)
  return made


def model(seed):
  torch.manual_seed(seed)
  shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
  made = Qwen3ForCausalLM(Qwen3Config(vocab_size=261, initializer_range=0.5, pad_token_id=0, eos_token_id=1, **shape))
  made.name_or_path = made.config._name_or_path = sys.argv[1] + "/bytes"
  return made


def chat(i):
  question, answer = (" ".join(f"w{(start + j) % 60}" for j in range(many)) for start, many in ((i, 6), (7 * i, 8)))
  return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


bytes_alone = tokenizer(sys.argv[1] + "/bytes", [])
tokenizer(sys.argv[1] + "/pairs", [("w", "1")])
data = Dataset.from_list([chat(i) for i in range(8)])
uld = dict(use_uld_loss=True, teacher_tokenizer_name_or_path=sys.argv[1] + "/pairs", uld_crossentropy_weight=0.0)
ways = {
  "GOLD, JSD": (GOLDTrainer, GOLDConfig, dict(beta=0.5)),
  "IW-OPD, JSD": (IWOPDTrainer, IWOPDConfig, dict(beta=0.5, distillation_objective="jsd", loss_top_k=0)),
  "GOLD, ULD": (GOLDTrainer, GOLDConfig, uld),
}
for name, (trainer_of, config_of, options) in ways.items():
  for at_once, steps in ((8, 1), (4, 2), (1, 8)):
    config = config_of(
      output_dir=sys.argv[1] + "/out", use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, max_steps=1,
      per_device_train_batch_size=at_once, gradient_accumulation_steps=steps, gradient_checkpointing=False, optim="sgd", learning_rate=1.0,
      lr_scheduler_type="constant", max_grad_norm=0.0, lmbda=0.0, max_length=200, max_completion_length=64, **options,
    )  # fmt: skip
    student = model(0)
    before = torch.nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    trainer = trainer_of(model=student, teacher_model=model(1), args=config, train_dataset=data, processing_class=bytes_alone)
    trainer.train()
    moved = (torch.nn.utils.parameters_to_vector(trainer.model.parameters()) - before).norm()
    print(f"SEEN {name}: 8 conversations in {steps} step{'s' * (steps > 1)} of {at_once}: loss {trainer.state.log_history[0]['loss']:.3f}, weights moved by {moved:.3f}")
PYTHON
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/train.py" "$folder" 2> "$folder/errors" > "$folder/printed" || { cat "$folder/errors"; exit 1; }
grep ^SEEN "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
GOLD, JSD: 8 conversations in 1 step of 8: loss 0.540, weights moved by 0.170
GOLD, JSD: 8 conversations in 2 steps of 4: loss 0.270, weights moved by 0.085
GOLD, JSD: 8 conversations in 8 steps of 1: loss 0.067, weights moved by 0.021
IW-OPD, JSD: 8 conversations in 1 step of 8: loss 0.497, weights moved by 0.180
IW-OPD, JSD: 8 conversations in 2 steps of 4: loss 0.248, weights moved by 0.090
IW-OPD, JSD: 8 conversations in 8 steps of 1: loss 0.062, weights moved by 0.022
GOLD, ULD: 8 conversations in 1 step of 8: loss 0.327, weights moved by 0.563
GOLD, ULD: 8 conversations in 2 steps of 4: loss 0.654, weights moved by 1.126
GOLD, ULD: 8 conversations in 8 steps of 1: loss 2.618, weights moved by 4.502
SEEN
