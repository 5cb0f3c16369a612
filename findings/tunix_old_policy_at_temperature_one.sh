#!/usr/bin/env bash
# google-tunix 0.1.7: with num_iterations of 2 or more GRPOLearner compares its policy at the rollouts' temperature with the old policy at temperature 1.
#
# A guess: before the first update the policy IS the old policy, so every ratio is 1, nothing is clipped, and the first update is that of
# num_iterations=1. Seen: the loss divides the logits by RolloutConfig's temperature (0.9 by default), the reference's are, too, and the old
# policy's are not. With a policy of bigrams the ratios before any update are 0.51 to 1.12 at 0.9, and 0.06 to 1.72 at 0.6, where 72% of the tokens
# lie outside the range of clipping (0.8 to 1.2): likely tokens count as raised already, unlikely ones as lowered. At 0.6 the first update has a
# cosine of 0.33 with that of one iteration. At temperature 1 the two are one. The metric pg_clipfrac tells of it as of a policy that moves fast.
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


class Seen(GRPOLearner):
  def _generate_and_compute_advantage(self, *given):
    self.example = super()._generate_and_compute_advantage(*given)
    return self.example


def first_update(iterations, temperature):
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  only_the_first = optax.sgd(lambda step: jnp.where(step == 0, 1.0, 0.0))
  config = ClusterConfig(
    role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
    training_config=RLTrainingConfig(actor_optimizer=only_the_first, max_steps=1, eval_every_n_steps=1000),
    rollout_config=RolloutConfig(max_tokens_to_generate=LIMIT, max_prompt_length=2, temperature=temperature),
  )
  cluster = RLCluster(actor=Bigrams(0), reference=Bigrams(0), tokenizer=Words(), cluster_config=config)
  learner = Seen(
    rl_cluster=cluster,
    algo_config=GRPOConfig(num_generations=64, num_iterations=iterations, beta=0.0),
    reward_fns=lambda prompts, completions, **others: [float("7" in text.split()) for text in completions],
  )
  learner.train([{"prompts": np.array(["3", "4", "5", "6"])}])
  return np.float64(cluster.actor_trainer.model.logits[...] - Bigrams(0).logits[...]), learner.example


def log_shares(temperature):
  logits = np.float64(Bigrams(0).logits[...]) / temperature
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


for temperature in (1.0, 0.9, 0.6):
  once, _ = first_update(1, temperature)
  twice, example = first_update(2, temperature)
  ids, kept = np.asarray(example.completion_ids), np.asarray(example.completion_mask)
  before = np.concatenate([np.asarray(example.prompt_ids)[:, -1:], ids[:, :-1]], 1)
  old = np.asarray(example.old_per_token_logps)
  unlike = {t: np.abs(old - log_shares(t)[before, ids])[kept].max() for t in (1.0, temperature)}
  ratio = np.exp(log_shares(temperature)[before, ids] - old)[kept]
  alike = (once * twice).sum() / np.linalg.norm(once) / np.linalg.norm(twice)
  print(f"temperature {temperature}: old log-probabilities, unlike those at {temperature} by {unlike[temperature]:.2f}, at 1 by {unlike[1.0]:.2f}")
  print(f"temperature {temperature}: ratios before any update {ratio.min():.2f} to {ratio.max():.2f}, {np.mean(np.abs(ratio - 1) > 0.2):.0%} outside 0.8 to 1.2")
  print(f"temperature {temperature}: first update of two beside the one of one: cosine {alike:.3f}, norm {np.linalg.norm(twice) / np.linalg.norm(once):.3f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
temperature 1.0: old log-probabilities, unlike those at 1.0 by 0.00, at 1 by 0.00
temperature 1.0: ratios before any update 1.00 to 1.00, 0% outside 0.8 to 1.2
temperature 1.0: first update of two beside the one of one: cosine 1.000, norm 1.000
temperature 0.9: old log-probabilities, unlike those at 0.9 by 0.67, at 1 by 0.00
temperature 0.9: ratios before any update 0.51 to 1.12, 4% outside 0.8 to 1.2
temperature 0.9: first update of two beside the one of one: cosine 0.993, norm 1.036
temperature 0.6: old log-probabilities, unlike those at 0.6 by 2.81, at 1 by 0.00
temperature 0.6: ratios before any update 0.06 to 1.72, 72% outside 0.8 to 1.2
temperature 0.6: first update of two beside the one of one: cosine 0.329, norm 1.416
SEEN
