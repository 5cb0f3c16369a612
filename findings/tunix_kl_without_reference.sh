#!/usr/bin/env bash
# google-tunix 0.1.7: the KL penalty that GRPOConfig has by default (beta 0.04, kl_loss_mode "kl") trains the same weights whatever the reference model is.
#
# A guess: the penalty draws the policy to the reference, the more the larger beta is. Seen: what is differentiated is the mean of log p - log r
# over the sampled tokens, and log r, of the reference, is a constant there. Its value is an estimate of KL(p || r); its gradient is that of log p
# alone, whose mean is 0 whatever r is. Twelve steps at beta 1 with rewards that are all equal, so that the penalty is all there is to learn, end in
# the same weights, bit for bit, for two references, and the exact KL to either is where it was to 1%. With "low_var_kl" the weights differ and both
# KLs fall. So by default a run pays for a reference model and logs its KL, and nothing holds the policy by it.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8 qwix==0.1.8 orbax-checkpoint==0.12.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

PAD, BEGIN, END, VOCABULARY, LIMIT = 0, 1, 2, 20, 16


class Shape:
  num_layers, num_kv_heads, head_dim, dtype = 1, 1, 1, jnp.float32


class Bigrams(nnx.Module):
  def __init__(self, seed):
    self.config = Shape()
    self.logits = nnx.Param(2 * jax.random.normal(jax.random.key(seed), (VOCABULARY, VOCABULARY)).at[:, :END].set(-1e9))

  def init_cache(self, *sizes):
    return {}

  def __call__(self, tokens, positions, cache, attention_mask):
    return self.logits[...][tokens], cache


class Words:
  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return " ".join(map(str, ids))

  def bos_id(self):
    return BEGIN

  def eos_id(self):
    return END

  def pad_id(self):
    return PAD


STEPS = 12


def trained(reference, beta, **how):
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  config = ClusterConfig(
    role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
    training_config=RLTrainingConfig(actor_optimizer=optax.sgd(1.0), max_steps=STEPS, eval_every_n_steps=1000),
    rollout_config=RolloutConfig(max_tokens_to_generate=LIMIT, max_prompt_length=2, temperature=1.0),
  )
  cluster = RLCluster(actor=Bigrams(0), reference=Bigrams(reference), tokenizer=Words(), cluster_config=config)
  learner = GRPOLearner(
    rl_cluster=cluster,
    algo_config=GRPOConfig(num_generations=64, beta=beta, **how),
    reward_fns=lambda prompts, completions, **others: [1.0] * len(completions),
  )
  learner.train([{"prompts": np.array(["3", "4", "5", "6"])}] * STEPS)
  return cluster.actor_trainer.model.logits[...]


def exact_kl(logits, reference):
  logits, others = (np.float64(rows)[END:, END:] for rows in (logits, Bigrams(reference).logits[...]))
  log_p, log_r = (rows - np.log(np.exp(rows).sum(-1, keepdims=True)) for rows in (logits, others))
  return (np.exp(log_p) * (log_p - log_r)).sum(-1).mean()


print("at the start: KL to reference 1", *(f"{exact_kl(Bigrams(0).logits[...], r):.2f}{end}" for r, end in ((1, ", to reference 2"), (2, ""))))
for name, how in {"by default": {}, "low_var_kl": {"kl_loss_mode": "low_var_kl"}}.items():
  first, second = (trained(reference, 1.0, **how) for reference in (1, 2))
  print(f"{name}: KL to reference 1 {exact_kl(first, 1):.2f}, to reference 2 {exact_kl(second, 2):.2f}, same weights {np.array_equal(first, second)}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
at the start: KL to reference 1 2.44, to reference 2 2.48
by default: KL to reference 1 2.46, to reference 2 2.47, same weights True
low_var_kl: KL to reference 1 2.30, to reference 2 2.31, same weights False
SEEN
