#!/usr/bin/env bash
# google-tunix 0.1.7: GRPOLearner with its default rollouts never trains the token that ends an answer, and empty answers have no part in its loss.
#
# A guess: an answer's tokens are those that the policy drew, the end among them, as in TRL, so a reward for ending in time raises the probability
# of ending where it was drawn. Seen: the sampler cuts each answer in front of its end token, and the loss is taken over what is left. One step on
# 1,024 answers of a policy of bigrams, which ends after each word with probability 0.05, is what one reckons by hand without the ends. All that
# moves the ends is the softmax's sum, as the other words are pushed up or down: the pull on them is a fortieth of what it is by hand with the ends
# where the reward is for ending within 16 words, a seventeenth where it is for not being empty, and of the other SIGN where it is for five words
# and no more. The rarer the end, the less is left. An answer of no words, the policy's shortest way to fail, is in the rewards' mean, but it is
# neither pushed away nor counted among the answers that the loss is divided by.
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
  def __init__(self):
    self.config = Shape()
    logits = jnp.full((VOCABULARY, VOCABULARY), jnp.log(0.95 / (VOCABULARY - 3))).at[:, END].set(jnp.log(0.05))
    self.logits = nnx.Param(logits.at[:, :END].set(-1e9))

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


def trained(reward):
  seen = []

  def kept(prompts, completions, **others):
    seen.extend([int(word) for word in text.split()] for text in completions)
    return [reward(len(text.split())) for text in completions]

  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  config = ClusterConfig(
    role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
    training_config=RLTrainingConfig(actor_optimizer=optax.sgd(1.0), max_steps=1, eval_every_n_steps=1000),
    rollout_config=RolloutConfig(max_tokens_to_generate=LIMIT, max_prompt_length=2, temperature=1.0),
  )
  cluster = RLCluster(actor=Bigrams(), reference=Bigrams(), tokenizer=Words(), cluster_config=config)
  learner = GRPOLearner(rl_cluster=cluster, algo_config=GRPOConfig(num_generations=1024, beta=0.0), reward_fns=kept)
  learner.train([{"prompts": np.array(["3"])}])
  return np.float64(cluster.actor_trainer.model.logits[...] - Bigrams().logits[...]), seen


def by_hand(answers, rewards, with_end):
  logits = np.float64(Bigrams().logits[...])
  shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
  answers = [words + [END] if with_end and len(words) < LIMIT else words for words in answers]
  change, some = np.zeros_like(logits), sum(map(bool, answers))
  for words, advantage in zip(answers, advantages):
    for before, word in zip([3, *words], words):
      change[before] += advantage / len(words) / some * ((np.arange(VOCABULARY) == word) - shares[before])
  return change


rewards = {
  "1 for an answer that ends": lambda words: float(words < LIMIT),
  "1 for an answer of five words": lambda words: float(words == 5),
  "1 for an answer of a word or more": lambda words: float(words > 0),
}
for name, reward in rewards.items():
  change, answers = trained(reward)
  lengths = np.array([len(words) for words in answers])
  left, whole = (by_hand(answers, np.array([reward(n) for n in lengths]), with_end) for with_end in (False, True))
  print(f"{name}: {np.mean(lengths < LIMIT):.0%} of 1024 ended, {np.sum(lengths == 0)} empty")
  print(f"{name}: seen is by hand without the ends {np.allclose(change, left, atol=1e-6)}")
  print(f"{name}: pull on ending {change[:, END].sum():+.4f}, by hand with the ends {whole[:, END].sum():+.4f}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
1 for an answer that ends: 54% of 1024 ended, 66 empty
1 for an answer that ends: seen is by hand without the ends True
1 for an answer that ends: pull on ending +0.0032, by hand with the ends +0.1368
1 for an answer of five words: 54% of 1024 ended, 66 empty
1 for an answer of five words: seen is by hand without the ends True
1 for an answer of five words: pull on ending -0.0006, by hand with the ends +0.0031
1 for an answer of a word or more: 54% of 1024 ended, 66 empty
1 for an answer of a word or more: seen is by hand without the ends True
1 for an answer of a word or more: pull on ending -0.0131, by hand with the ends -0.2234
SEEN
