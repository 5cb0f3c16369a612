#!/usr/bin/env bash
# trl 1.16.0 (with transformers 5.24.0): GKDTrainer divides the loss of what the student samples by the number of tokens of the data's answers.
#
# A guess: with lmbda=1 the answers in the data are not used, so they have no say in the loss, which is the mean over the sampled tokens. Seen: the Trainer
# counts `num_items_in_batch` when it takes a batch from the data; the student's samples are put in that batch's place afterwards, and the sum of their
# divergences is divided by that count. 64 sampled tokens whose mean is 3.472 have the loss 13.886 where the data's four answers have 16 tokens, and 0.868
# where they have 256; the gradient grows and shrinks with it. With lmbda=0, the data's own answers, the loss is right. So what one learns
# on-policy is weighted by how long the unused answers happen to be, batch by batch, and against the off-policy batches of the same run; data
# whose answers are placeholders of a word trains at many times the rate. (A scale that stays the same is taken out by Adam, and cut by clipping.)
# By the way: `temperature` is that of sampling alone; the loss is taken at 1.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

WORDS = ["<pad>", "<end>", "<user>", "<model>"] + [f"w{i}" for i in range(60)]
TEMPLATE = """{% for message in messages %}{{ '<' + message.role.replace('assistant', 'model') + '> ' + message.content + ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<model> ' }}{% endif %}"""
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE)


def model(seed):
  torch.manual_seed(seed)
  shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
  return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), initializer_range=0.5, pad_token_id=0, eos_token_id=1, **shape))


class Seen(GKDTrainer):
  def compute_loss(self, model, inputs, *others, **named):
    self.trained_on = {name: inputs[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    return super().compute_loss(model, inputs, *others, **named)


def chat(i, length):
  question, answer = (" ".join(f"w{(start + j) % 60}" for j in range(many)) for start, many in ((i, 6), (7 * i, length)))
  return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def reverse_kl(batch):
  inputs, kept = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"][:, 1:] != -100
  with torch.no_grad():
    p, q = (model(seed)(**inputs).logits[:, :-1].double().log_softmax(-1) for seed in (0, 1))
  return int(kept.sum()), (p.exp() * (p - q)).sum(-1)[kept].mean()


for lmbda in (0.0, 1.0):
  for length in (4, 16, 64):
    config = GKDConfig(
      output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, max_steps=1,
      per_device_train_batch_size=4, gradient_checkpointing=False, lmbda=lmbda, beta=1.0, temperature=1.0, max_new_tokens=16, max_length=200,
    )  # fmt: skip
    data = Dataset.from_list([chat(i, length) for i in range(4)])
    trainer = Seen(model=model(0), teacher_model=model(1), args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    tokens, right = reverse_kl(trainer.trained_on)
    print(f"lmbda {lmbda:.0f}, 4 answers of {length}: {tokens} tokens trained on, mean {right:.3f}, loss {trainer.state.log_history[0]['loss']:.3f}")
PYTHON
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/train.py" "$folder/out" 2> "$folder/errors" > "$folder/printed" || { cat "$folder/errors"; exit 1; }
grep ^lmbda "$folder/printed" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
lmbda 0, 4 answers of 4: 16 tokens trained on, mean 3.389, loss 3.389
lmbda 0, 4 answers of 16: 64 tokens trained on, mean 3.415, loss 3.415
lmbda 0, 4 answers of 64: 256 tokens trained on, mean 3.488, loss 3.488
lmbda 1, 4 answers of 4: 64 tokens trained on, mean 3.472, loss 13.886
lmbda 1, 4 answers of 16: 64 tokens trained on, mean 3.472, loss 3.472
lmbda 1, 4 answers of 64: 64 tokens trained on, mean 3.472, loss 0.868
SEEN
