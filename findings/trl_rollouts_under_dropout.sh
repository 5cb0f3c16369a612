#!/usr/bin/env bash
# trl 1.16.0 (with transformers 5.24.0, peft 0.21.2): GRPO samples its answers with dropout on, a fresh draw for each token, where a LoRA adapter has any.
#
# A guess: answers are sampled in evaluation mode, as a served model samples, so that they are the policy's, and what dropout there is acts in the loss alone.
# Seen: the model that generates is the one in training mode. With lora_dropout=0.1 and an adapter that is not zero (here
# it is drawn at random):
#   - eight answers to one question under top_k=1, where all randomness is out of the sampling, are eight different ones; without dropout they are one
#   - at a learning rate of 0 and num_iterations=2 the ratios of the second iteration ought to be 1, with nothing clipped; the old policy's probabilities had
#     a dropout of their own, so three tokens of ten are clipped, with no change of the weights
# So the rewards are those of noisier policies than the one that is kept and served, a new one at each token. Nothing is said. `disable_dropout=True`, off
# by default, mends both; an adapter that has just been made is zero, and hides it.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q trl==1.16.0 transformers==5.24.0 peft==0.21.2 torch==2.13.0 datasets==5.2.0 accelerate==1.15.0 tokenizers==0.23.3 numpy==2.4.6
cat > "$folder/train.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<end>"] + [f"w{i}" for i in range(60)]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left")


def model(dropout, learnt):
  torch.manual_seed(0)
  shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
  base = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), initializer_range=0.3, pad_token_id=0, eos_token_id=1, **shape))
  adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", lora_dropout=dropout))
  for name, weights in adapted.named_parameters():
    if learnt and "lora_B" in name:
      torch.nn.init.normal_(weights, std=0.3)
  return adapted


def train(dropout, learnt=True, steps=1, **settings):
  """Returns the answers of the first step, and what the trainer logged of each step."""
  answers = []

  def reward(completions, **_):
    answers.append(completions)
    return [float(i % 2) for i in range(len(completions))]

  args = GRPOConfig(
    output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, max_steps=steps,
    per_device_train_batch_size=8, num_generations=8, max_completion_length=16, gradient_checkpointing=False, learning_rate=0.0, **settings,
  )  # fmt: skip
  data = Dataset.from_list([{"prompt": "w1 w5 w9 w13"}] * 8)
  trainer = GRPOTrainer(model=model(dropout, learnt), reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer)
  trainer.train()
  return answers[0], trainer.state.log_history


for name, given in {
  "no dropout": dict(dropout=0.0),
  "dropout 0.1": dict(dropout=0.1),
  "dropout 0.1, disable_dropout": dict(dropout=0.1, disable_dropout=True),
  "dropout 0.1, a new adapter": dict(dropout=0.1, learnt=False),
}.items():
  greedy, _ = train(top_k=1, **given)
  _, log = train(steps=2, num_iterations=2, **given)
  clipped = [round(float(step["clip_ratio/region_mean"]), 2) for step in log[:2]]
  print(f"seen {name}: {len(set(greedy))} different of 8 answers with top_k=1; clipped before any update: {clipped[1]}")
PYTHON
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/train.py" "$folder/out" 2> "$folder/errors" > "$folder/printed" || { cat "$folder/errors"; exit 1; }
grep ^seen "$folder/printed" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seen no dropout: 1 different of 8 answers with top_k=1; clipped before any update: 0.0
seen dropout 0.1: 8 different of 8 answers with top_k=1; clipped before any update: 0.3
seen dropout 0.1, disable_dropout: 1 different of 8 answers with top_k=1; clipped before any update: 0.0
seen dropout 0.1, a new adapter: 1 different of 8 answers with top_k=1; clipped before any update: 0.0
SEEN
