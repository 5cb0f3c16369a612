#!/usr/bin/env bash
# verl 0.9.1: distillation by policy gradient with the loss mode k3, which is DistillationLossConfig's own default, drives a student away from its teacher.
#
# A guess: k1 and k3 are two estimators of one number, KL(student | teacher), and k3 is the one with less variance; with the negative estimate as the reward
# (use_policy_gradient) both teach the same, k3 more quietly. verl recommends k1 there, refuses k1 without policy gradient, and says nothing of k3. Seen: k3 is
# never negative, so each sampled token is made rarer, those too that the teacher likes better than the student. What is descended is, in expectation and
# short of the clamp at 10, KL(student | teacher) MINUS KL(teacher | student): the gradient is that to a thousandth. Near the teacher the two cancel, and the
# teacher is no resting place: after 400 steps a student that was 0.0025 nats from it is 0.4 away, and one that was 4.1 away is at 1.3. With k1 as the
# reward both end at 0; so they do with k3 as a loss (use_policy_gradient=False, which is what verl's YAML file has). k2 as the reward repels, too.
# Tokens are taken in proportion to the student's probabilities, 4,000 a step, so nothing of this is noise.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 tensordict==0.10.0 transformers==5.10.4 ray==2.60.0 datasets==5.2.0 accelerate==1.15.0 omegaconf==2.3.1 \
  codetiming==1.4.0 dill==0.4.1 pandas==3.1.1 numpy==2.4.6 pillow==13.0.0 requests==2.34.2
"$folder/venv/bin/pip" install -q --no-deps verl==0.9.1
CUDA_VISIBLE_DEVICES= "$folder/venv/bin/python" -W ignore - > "$folder/printed" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import torch
from verl.trainer.distillation.losses import distillation_loss
from verl.workers.config import DistillationConfig, DistillationLossConfig

VOCABULARY, TOKENS, STEPS, RATE = 8, 4000, 400, 0.5
torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
teacher = (2 * torch.randn(VOCABULARY, generator=random)).log_softmax(0)
far = 2 * torch.randn(VOCABULARY, generator=random)
near = teacher + 0.1 * torch.randn(VOCABULARY, generator=random)


class Actor:
  loss_agg_mode, loss_scale_factor = "token-mean", None

  def __init__(self):
    self.global_batch_info = {}


def student_to_teacher(logits):
  log_p = logits.log_softmax(0)
  return (log_p.exp() * (log_p - teacher)).sum()


def teacher_to_student(logits):
  return (teacher.exp() * (teacher - logits.log_softmax(0))).sum()


def gradient_of(value, logits):
  logits = logits.clone().requires_grad_()
  return torch.autograd.grad(value(logits), logits)[0]


def verl_loss(config, logits):
  log_p = logits.log_softmax(0)
  counts = (log_p.detach().exp().double() * TOKENS).round().long()
  response = torch.arange(VOCABULARY).repeat_interleave(counts)
  length, last = len(response), torch.zeros(1)  # each place holds the log-probability of the token that follows
  batch = {
    "prompts": torch.zeros(1, 1, dtype=torch.long),
    "responses": response[None],
    "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
    "response_mask": torch.ones(1, length),
    "old_log_probs": log_p[response].detach()[None],
    "teacher_logprobs": torch.cat([teacher[response], last])[:, None],
    "dp_size": 1,
    "batch_num_tokens": length,
    "global_batch_size": 1,
  }
  return distillation_loss(Actor(), config, {"log_probs": torch.cat([log_p[response], last])}, batch)[0]


default = DistillationLossConfig()
print(f"SEEN by default: loss_mode {default.loss_mode}, use_policy_gradient {default.use_policy_gradient}")
for name, start in (("near", near), ("far", far)):
  for mode, as_reward in (("k1", True), ("k3", True), ("k3", False)):
    config = DistillationConfig(distillation_loss=DistillationLossConfig(loss_mode=mode, use_policy_gradient=as_reward))
    logits = start.clone()
    for step in range(STEPS):
      logits -= RATE * gradient_of(lambda logits: verl_loss(config, logits), logits)
    says = f"{mode} as a {'reward' if as_reward else 'loss'}"
    print(f"SEEN {name}, {says}: KL(student | teacher) {student_to_teacher(start):.4f}, after training {student_to_teacher(logits):.1f}")
config = DistillationConfig(distillation_loss=DistillationLossConfig())
found = gradient_of(lambda logits: verl_loss(config, logits), near)
reverse, forward = gradient_of(student_to_teacher, near), gradient_of(teacher_to_student, near)
for name, right in (("reverse KL", reverse), ("reverse KL minus forward KL", reverse - forward)):
  print(f"SEEN near, k3 as a reward: the gradient is off from that of {name} by {(found - right).norm() / right.norm():.2f} of it")
PYTHON
grep ^SEEN "$folder/printed" | cut -c 6- > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
by default: loss_mode k3, use_policy_gradient True
near, k1 as a reward: KL(student | teacher) 0.0025, after training 0.0
near, k3 as a reward: KL(student | teacher) 0.0025, after training 0.4
near, k3 as a loss: KL(student | teacher) 0.0025, after training 0.0
far, k1 as a reward: KL(student | teacher) 4.1383, after training 0.0
far, k3 as a reward: KL(student | teacher) 4.1383, after training 1.3
far, k3 as a loss: KL(student | teacher) 4.1383, after training 0.0
near, k3 as a reward: the gradient is off from that of reverse KL by 0.96 of it
near, k3 as a reward: the gradient is off from that of reverse KL minus forward KL by 0.00 of it
SEEN
