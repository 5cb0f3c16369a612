#!/usr/bin/env bash
# google-tunix 0.1.7: the default rollouts of GRPOLearner are drawn with the same random numbers in every step, and in every micro-batch of one step.
#
# A guess: RolloutConfig's seed, None by default, is where a stream of random numbers begins, and each batch of answers is drawn from what follows.
# Seen: each call of the sampler begins anew, from PRNGKey(0) or from the seed given. A policy of bigrams ends after each word with probability 0.1,
# so its answers' mean length is 8.69 (at most 32 words). Ten steps that leave it as it is draw the same 8 answers ten times: 11.12 on average,
# however long one goes on, and 4.88 with the seed 8. With a rate of learning at which it moves, the 80 answers are 11 different ones. One question
# that stands twice in a batch gets one and the same group of answers twice if the rollouts' micro-batches are of one question; different questions
# are answered with the same random numbers, too. So what is learnt and measured rests on one draw of the noise: repeated questions bring no new
# answers, rewards of many steps do not average out, and ways that this noise does not lead to are not tried. A key of jax as the seed, which the
# field is typed as, is an error in the second step, for the first donated its array.
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

PAD, BEGIN, END, VOCABULARY, LIMIT = 0, 1, 2, 40, 32


class Shape:
  num_layers, num_kv_heads, head_dim, dtype = 1, 1, 1, jnp.float32


class Bigrams(nnx.Module):
  def __init__(self):
    self.config = Shape()
    logits = jnp.full((VOCABULARY, VOCABULARY), jnp.log(0.9 / (VOCABULARY - 3))).at[:, END].set(jnp.log(0.1))
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


def answers(questions, steps, rate, seed=None, **sizes):
  seen = []

  def reward(prompts, completions, **others):
    seen.extend(completions)
    return [float(len(text.split()) % 2) for text in completions]

  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  config = ClusterConfig(
    role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
    training_config=RLTrainingConfig(actor_optimizer=optax.sgd(rate), max_steps=steps, eval_every_n_steps=1000, **sizes),
    rollout_config=RolloutConfig(max_tokens_to_generate=LIMIT, max_prompt_length=2, temperature=1.0, seed=seed),
  )
  cluster = RLCluster(actor=Bigrams(), reference=Bigrams(), tokenizer=Words(), cluster_config=config)
  learner = GRPOLearner(rl_cluster=cluster, algo_config=GRPOConfig(num_generations=8), reward_fns=reward)
  learner.train([{"prompts": np.array(questions)}] * steps)
  return f"{len(seen)} answers, {len(set(seen))} different, mean length {np.mean([len(text.split()) for text in seen]):.2f}"


print(f"by hand: mean length {sum(0.9**words for words in range(1, LIMIT + 1)):.2f}")
print("10 steps, nothing learnt:", answers(["3"], 10, 0.0))
print("10 steps, nothing learnt, seed 8:", answers(["3"], 10, 0.0, seed=8))
print("10 steps, learning:", answers(["3"], 10, 1.0))
print("a question twice, one micro-batch:", answers(["3", "3"], 1, 0.0))
ones = dict(mini_batch_size=2, train_micro_batch_size=1, rollout_micro_batch_size=1, compute_logps_micro_batch_size=1)
print("a question twice, micro-batches of one:", answers(["3", "3"], 1, 0.0, **ones))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
by hand: mean length 8.69
10 steps, nothing learnt: 80 answers, 8 different, mean length 11.12
10 steps, nothing learnt, seed 8: 80 answers, 8 different, mean length 4.88
10 steps, learning: 80 answers, 11 different, mean length 10.95
a question twice, one micro-batch: 16 answers, 15 different, mean length 12.00
a question twice, micro-batches of one: 16 answers, 8 different, mean length 11.12
SEEN
