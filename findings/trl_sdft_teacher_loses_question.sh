#!/usr/bin/env bash
# trl 1.16.0: by default SDFTTrainer's teacher loses the question, and says nothing of it, when the privileged context is of some 500 tokens or more.
#
# A guess: `max_prompt_length` (512) is for the data's prompts, and a teacher's prompt that is longer because of its context is kept, loses context, or
# is warned of. Seen: student and teacher prompts are cut by the same number, each from the left, after the chat template. The default template puts the
# question first and the context behind it, so with 600 tokens of context the role's marker, all ten words of the question and the first 89 of the context are
# gone; the student keeps its question. It trains on, against a teacher that answers no question: two questions with one context get one and the
# same teacher's prompt. max_prompt_length=None mends it.
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
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

QUESTIONS = [[f"{name}{i}" for i in range(10)] for name in ("first", "second")]
CONTEXT = [f"fact{i}" for i in range(600)]
VOCABULARY = ["<pad>", "<end>", "<user>", "<model>", *QUESTIONS[0], *QUESTIONS[1], *CONTEXT]
TEMPLATE = """{% for message in messages %}{{ '<' + message.role + '> ' + message.content + ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<model> ' }}{% endif %}"""
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE)
shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(VOCABULARY), initializer_range=0.5, pad_token_id=0, eos_token_id=1, **shape))
folder = sys.argv[1]
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)


class Seen(SDFTTrainer):
  def compute_loss(self, model, inputs, *others, **named):
    answers = inputs["completion_ids"].shape[1]
    teacher = inputs["teacher_input_ids"][:, :-answers], inputs["teacher_attention_mask"][:, :-answers]
    student = inputs["prompt_ids"], inputs["prompt_mask"]
    self.prompts = [[row[kept.bool()].tolist() for row, kept in zip(*side)] for side in (student, teacher)]
    return super().compute_loss(model, inputs, *others, **named)


def told(rows):
  distinct = {tuple(tokenizer.convert_ids_to_tokens(row)) for row in rows}
  return len(distinct), [sum(word in {*QUESTIONS[0], *QUESTIONS[1]} for word in row) for row in sorted(distinct)], "<user>" in min(distinct)


for length, limit in ((100, {}), (500, {}), (600, {}), (600, {"max_prompt_length": None})):
  config = SDFTConfig(
    output_dir=folder + "/out", use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=1, num_generations=2,
    per_device_train_batch_size=4, gradient_checkpointing=False, max_completion_length=8, **limit,
  )  # fmt: skip
  context = " ".join(CONTEXT[:length])
  data = Dataset.from_list([{"prompt": [{"role": "user", "content": " ".join(question)}], "privileged_context": context} for question in QUESTIONS])
  trainer = Seen(model=folder, args=config, train_dataset=data, processing_class=tokenizer)
  trainer.train()
  for side, rows in zip(("student", "teacher"), trainer.prompts):
    distinct, asked, begun = told(rows)
    print(f"context {length}, limit {config.max_prompt_length}, {side}: {distinct} prompts, words of the question in each {asked}, <user> {begun}")
PYTHON
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/train.py" "$folder/model" 2> "$folder/errors" > "$folder/printed" || { cat "$folder/errors"; exit 1; }
grep ^context "$folder/printed" > "$folder/seen"
echo "lines that speak of truncation: $(cat "$folder/errors" "$folder/printed" | grep -ci truncat || true)" >> "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
context 100, limit 512, student: 2 prompts, words of the question in each [10, 10], <user> True
context 100, limit 512, teacher: 2 prompts, words of the question in each [10, 10], <user> True
context 500, limit 512, student: 2 prompts, words of the question in each [10, 10], <user> True
context 500, limit 512, teacher: 2 prompts, words of the question in each [10, 10], <user> True
context 600, limit 512, student: 2 prompts, words of the question in each [10, 10], <user> True
context 600, limit 512, teacher: 1 prompts, words of the question in each [0], <user> False
context 600, limit None, student: 2 prompts, words of the question in each [10, 10], <user> True
context 600, limit None, teacher: 2 prompts, words of the question in each [10, 10], <user> True
lines that speak of truncation: 0
SEEN
