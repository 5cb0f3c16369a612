#!/usr/bin/env bash
# google-tunix 0.1.7: the distillation loss (DistillationTrainer with LogitStrategy) has no mask: padding is distilled as much as text is.
#
# A guess: a TrainingInput brings an input_mask beside its tokens, so the loss is the mean over the tokens that the mask keeps, and is the same however
# far a batch is padded. Seen: the mask goes to the caller's own functions alone (both models and the labels); `compute_loss` never gets it, and takes
# the mean over every place of the array. The same six tokens, padded to 64, have the loss of the padding: what the teacher would say behind
# a pad token is nine tenths of what is trained on. Nothing that the caller gives can keep prompts out of that loss, either. The cross-entropy, whose labels the caller can
# set to zeros on padding, is divided by the padded length all the same: at 64 it is a tenth of itself.
# By the way: with distill_top_k both sides are rescaled over those k, so what the student puts elsewhere costs nothing.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation import DistillationTrainer, TrainingConfig, TrainingInput
from tunix.distillation.strategies import LogitStrategy

VOCABULARY, TEXT = 50, [3, 9, 27, 31, 43, 29]


class Bigrams(nnx.Module):
  def __init__(self, seed):
    self.logits = nnx.Param(jax.random.normal(jax.random.key(seed), (VOCABULARY, VOCABULARY)))


def forward(model, input_tokens, input_mask):
  return model.logits[...][input_tokens]


def labels(input_tokens, input_mask):
  following, there = jnp.roll(input_tokens, -1, 1), jnp.roll(input_mask, -1, 1)
  return jax.nn.one_hot(following, VOCABULARY) * there[..., None]


def losses(length):
  tokens, mask = np.zeros((2, 1, length), np.int32)
  tokens[0, : len(TEXT)], mask[0, : len(TEXT)] = TEXT, 1
  strategy = LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0)
  config = TrainingConfig(eval_every_n_steps=100, max_steps=1)
  trainer = DistillationTrainer(Bigrams(0), Bigrams(1), strategy, optax.sgd(0.1), config)
  inputs = trainer._prepare_inputs(TrainingInput(input_tokens=tokens, input_mask=mask))
  given = {"input_tokens": inputs.input_tokens, "input_mask": inputs.input_mask}
  _, metrics = trainer.get_train_loss(trainer.model, inputs.teacher_output, given)
  return metrics["distill/soft_loss"], metrics["distill/hard_loss"]


log_p, log_q = (np.asarray(jax.nn.log_softmax(Bigrams(seed).logits[...]), np.float64) for seed in (0, 1))
right = (np.exp(log_q) * (log_q - log_p)).sum(-1)
print(f"by hand: of the six tokens {right[TEXT].mean():.4f}, of the pad token {right[0]:.4f}")
for length in (6, 12, 64):
  soft, hard = losses(length)
  print(f"padded to {length}: distillation {soft:.4f}, cross-entropy {hard:.4f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
by hand: of the six tokens 1.0055, of the pad token 0.8314
padded to 6: distillation 1.0055, cross-entropy 4.5764
padded to 12: distillation 0.9184, cross-entropy 2.4289
padded to 64: distillation 0.8477, cross-entropy 0.4554
SEEN
