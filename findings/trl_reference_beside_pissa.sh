#!/usr/bin/env bash
# trl 1.16.0 (with peft 0.21.2, transformers 5.24.0): with LoRA begun by PiSSA or OLoRA the reference of DPO and GRPO is not the model that training begins from.
#
# A guess: without a ref_model of one's own the reference is the model as it was given, so before the first step DPO's loss is log 2 = 0.6931, with margins of 0,
# and GRPO's KL is 0, however the adapter begins. Seen: the reference is the model with its adapter switched off. Plain LoRA begins at zero, so that is the
# model. PiSSA and OLoRA take the weights' main part out of the base and put it into the adapter: together they are the model, off alone the rest
# of it, which nobody ever had and which is 3 nats a token away in this small model. So DPO's margins begin at 0.2, not at 0, and count as won or lost what
# was taken out; GRPO's KL begins at 2.4 and more, and its penalty draws the policy towards the rest. Neither trl nor peft says anything. A copy of the model
# as ref_model mends DPO. Tried: steps at a learning rate of 0 on a small random model.
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
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<end>"] + [f"w{i}" for i in range(60)]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left")
COMMON = dict(
  output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, max_steps=1,
  per_device_train_batch_size=8, gradient_checkpointing=False, learning_rate=0.0,
)  # fmt: skip


def model():
  torch.manual_seed(0)
  shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
  return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), initializer_range=0.5, pad_token_id=0, eos_token_id=1, **shape))


def text(start, many):
  return " ".join(f"w{(7 * start + j * j) % 60}" for j in range(many)) + " "


def lora(begin):
  return LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=begin)


def dpo(begin, **given):
  data = Dataset.from_list([{"prompt": text(i, 5), "chosen": text(i + 3, 6), "rejected": text(i + 11, 6)} for i in range(8)])
  trainer = DPOTrainer(model=model(), args=DPOConfig(**COMMON), train_dataset=data, processing_class=tokenizer, peft_config=lora(begin), **given)
  trainer.train()
  log = trainer.state.log_history[0]
  return f"DPO: loss {float(log['loss']):.4f}, margin {abs(float(log['rewards/margins'])):.3f}"


def grpo(begin):
  args = GRPOConfig(**COMMON, num_generations=4, max_completion_length=8, beta=0.1)
  data = Dataset.from_list([{"prompt": text(i, 5)} for i in range(8)])
  trainer = GRPOTrainer(
    model=model(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora(begin)
  )  # fmt: skip
  trainer.train()
  return f"GRPO: KL {float(trainer.state.log_history[0]['kl']):.2f}"


def differs(begin):
  ids, given = torch.arange(2, 22)[None], model().eval()
  with torch.no_grad():
    before = given(ids).logits.log_softmax(-1)
    adapted = get_peft_model(given, lora(begin)).eval()
    with_adapter = adapted(ids).logits.log_softmax(-1)
    with adapted.disable_adapter():
      without = adapted(ids).logits.log_softmax(-1)
  kl = [(before.exp() * (before - other)).sum(-1).mean().abs() for other in (with_adapter, without)]
  return f"KL to the given model with the adapter {kl[0]:.2f}, without {kl[1]:.2f}"


for begin in (True, "gaussian", "pissa", "olora"):
  print("seen", begin, differs(begin), dpo(begin), grpo(begin), sep=" | ")
print("seen", "pissa, ref_model given", dpo("pissa", ref_model=model()), sep=" | ")
PYTHON
CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/train.py" "$folder/out" 2> "$folder/errors" > "$folder/printed" || { cat "$folder/errors"; exit 1; }
grep ^seen "$folder/printed" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seen | True | KL to the given model with the adapter 0.00, without 0.00 | DPO: loss 0.6931, margin 0.000 | GRPO: KL 0.00
seen | gaussian | KL to the given model with the adapter 0.00, without 0.00 | DPO: loss 0.6931, margin 0.000 | GRPO: KL 0.00
seen | pissa | KL to the given model with the adapter 0.00, without 3.38 | DPO: loss 0.7016, margin 0.230 | GRPO: KL 2.37
seen | olora | KL to the given model with the adapter 0.00, without 3.07 | DPO: loss 0.7040, margin 0.176 | GRPO: KL 2.74
seen | pissa, ref_model given | DPO: loss 0.6931, margin 0.000
SEEN
