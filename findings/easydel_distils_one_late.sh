#!/usr/bin/env bash
# easydel 0.3.0 (jax 0.9.2): on-policy distillation never trains the first token of a completion, and trains what the models say behind its end.
#
# A guess: logits at a place say what comes next, so the loss over a completion of four tokens is taken at the prompt's last token and the completion's first
# three. Seen: the trainer marks the completion's own tokens, and the loss takes the logits at the marked places as they are, with no shift: the mean is that of
# the four places after which comes the second token, the third, the end, and nothing. How to begin an answer, on which all else hangs, is learnt from
# no sample; what would follow the end token is, as one token of each completion.
# Tried: the trainer's own making of a batch, its sampler replaced by a given completion, and its own step, for evaluation.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q easydel==0.3.0 jax==0.9.2 jaxlib==0.9.2 torch==2.13.0 transformers==5.5.4 pillow==13.0.0 numpy==2.3.5
cat > "$folder/look.py" <<'PYTHON'
import types

import easydel
import jax
import jax.numpy as jnp
import numpy as np
from easydel.trainers.on_policy_distillation_trainer import OnPolicyDistillationTrainer
from easydel.trainers.on_policy_distillation_trainer._fn import on_policy_distillation_step
from flax import nnx
from jax.sharding import PartitionSpec

PROMPT, COMPLETION, END, PAD = [3, 9, 27, 31], [7, 21, 14, 1], 1, 0


class Given(OnPolicyDistillationTrainer):
  """The trainer, with a completion that is given in place of a sampled one."""

  _eos_token_id = [END]

  def __init__(self):
    self.arguments = types.SimpleNamespace(generate_with_teacher=False)

  def generate_unified(self, *, input_ids, attention_mask, **others):
    completion = jnp.array([COMPLETION + [PAD, PAD]])
    return types.SimpleNamespace(prompt_ids=input_ids, prompt_mask=attention_mask, completion_ids=completion, reasoning=None, tool_calls=None)

  def _purify_batch(self, batch):
    return batch

  def _all_gather(self, array):
    return array

  def _log_training_generations_to_wandb(self, **what):
    pass


def model(seed):
  shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
  config = easydel.Qwen3Config(vocab_size=32, max_position_embeddings=64, initializer_range=1.0, attn_mechanism="vanilla", **shape)
  return easydel.Qwen3ForCausalLM(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))


student, teacher = model(0), model(1)
with student.mesh:
  prompts = {"input_ids": jnp.array([PROMPT]), "attention_mask": jnp.ones((1, len(PROMPT)), jnp.int32)}
  batch, _ = Given()._preprocess_batch_input(student.to_state(), prompts, True)
  options = dict(partition_spec=PartitionSpec(), is_training=False, temperature=1.0, alpha=1.0)
  loss = on_policy_distillation_step(student.to_state(), batch, teacher.to_state(), **options).loss
  inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
  log_p, log_q = (np.asarray(jax.nn.log_softmax(of(**inputs).logits), np.float64)[0] for of in (student, teacher))
kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)
print("SEEN tokens", batch["input_ids"][0].tolist(), "marked", batch["completion_mask"][0].tolist())
print("SEEN loss is the mean KL at:")
for name, places in (("the places that predict the completion", slice(3, 7)), ("the completion's own places", slice(4, 8))):
  print(f"SEEN   {name}: {bool(np.isclose(loss, kl[places].mean(), rtol=1e-4))}")
PYTHON
HOME="$folder" CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/look.py" > "$folder/printed" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
grep ^SEEN "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
tokens [3, 9, 27, 31, 7, 21, 14, 1, 0, 0] marked [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
loss is the mean KL at:
  the places that predict the completion: False
  the completion's own places: True
SEEN
