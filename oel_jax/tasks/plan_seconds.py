"""Seconds of a round, by arithmetic: its work over what the device's maker says that it can do, by
the share of that which was measured on one H200 (experiments/benchmarks/README.md). Other devices
are taken to reach the same share: they were not measured.

It is the most that a round may take: every game goes to its last turn, and every response is as
long as it may be. What it leaves out: compiling, what devices exchange, and the host's own work.
"""

import dataclasses
from typing import Any

from oel_jax.policy.architecture import Architecture
from oel_jax.runtime.target import Device
from oel_jax.tasks.plan_shapes import Work

# Of the maker's figures, 989.5 TFLOP/s and 4.8 TB/s. The step of Qwen3-1.7B with a knowledge of
# 2,048: 1.46 PFLOP, nothing counted that is computed again, in 2.71 s; of Qwen3-4B the same share.
STEP_SHARE = 0.545
# 64 prompts of 600 tokens of Qwen3-1.7B: 111 TFLOP in 0.246 s.
PREFILL_SHARE = 0.456
# Weights and filled cache read once a token; 64 sequences of Qwen3-1.7B. 256 reach 0.63, one 0.51.
DECODE_SHARE = 0.60


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Responses of a stage.

  Attributes:
    count: of them.
    prompt, response: tokens of each.
    beside: most that are drawn side by side, on all devices together.
  """

  count: int
  prompt: int
  response: int
  beside: int


def matrix_sizes(a: Architecture) -> tuple[int, int]:
  """Numbers in a layer's matrices, and in the head."""
  attend = a.width * a.head_size * (2 * a.heads + 2 * a.kv_heads)
  return attend + 3 * a.width * a.feedforward, a.width * a.vocabulary


def step_flops(
  a: Architecture, samples: int, prompt: int, response: int, knowledge: int
) -> tuple[float, float]:
  """Of the teacher's pass and of the update: matrix products and attention, forward once, backward
  twice, nothing computed again. Each sample has a prompt and a response of so many tokens, and the
  teacher's a knowledge.
  """
  layer, head = matrix_sizes(a)
  length = prompt + response
  tokens = samples * length
  scores = lambda keys: 4 * a.heads * a.head_size * tokens * keys
  forward = a.layers * (2 * layer * tokens + scores(length / 2))
  logits = 2 * head * samples * response
  return forward + a.layers * scores(knowledge) + logits, 3 * (forward + logits)


def step_seconds(a: Architecture, device: Device, count: int, work: Work) -> float:
  """Of one optimizer step on so many devices."""
  flops = sum(step_flops(a, work.samples, work.prompt, work.response, work.knowledge))
  return flops / (count * device.flops * STEP_SHARE)


def sampling_seconds(
  a: Architecture, device: Device, count: int, sampled: Sampled, together: int = 1
) -> float:
  """Of a stage's responses, spread evenly over so many devices, each with the weights whole; or
  over groups of `together`, each of which reads and computes as fast as all of its devices.
  """
  count //= together
  bandwidth, flops = together * device.bandwidth, together * device.flops
  layer, head = matrix_sizes(a)
  weights = 2 * (a.layers * layer + head)  # bfloat16
  a_token = 2 * 2 * a.layers * a.kv_heads * a.head_size
  own = -(-sampled.count // count)
  beside = min(own, max(1, sampled.beside // count))
  filled = sampled.prompt + sampled.response / 2
  a_step = (weights + beside * filled * a_token) / (bandwidth * DECODE_SHARE)
  read = own * sampled.prompt
  prefill = 2 * a.layers * (layer * read + a.heads * a.head_size * read * sampled.prompt)
  return -(-own // beside) * sampled.response * a_step + prefill / (flops * PREFILL_SHARE)


def sampled(config: Any, work: Work) -> dict[str, list[Sampled]]:
  """What each stage of a round samples, at the most."""
  deployment, extraction, consolidation = config.deployment, config.extraction, config.consolidation
  response, prompt, informed = work.response, work.prompt, work.prompt + work.knowledge

  def games(count: int, prompt: int) -> Sampled:
    return Sampled(count * deployment.max_turns, prompt, response, deployment.slots)

  plays = bool(deployment.environment)
  # Before and after, and from the second round on with the first one's knowledge.
  kinds = (2 + (work.copies > 1)) * config.evaluation.in_context
  written = extraction.texts * extraction.trajectories * (extraction.source == "extracted")
  found = {
    "deploy": [games(extraction.trajectories + deployment.episodes, prompt)]
    if plays and not config.logs.path
    else [],
    "extract": [Sampled(written, informed, extraction.max_response_tokens, extraction.texts)],
    "gate": [games(consolidation.gate_episodes, length) for length in (prompt, informed)]
    if plays
    else [],
    "consolidate": [
      Sampled(work.samples, prompt, response, work.samples) for _ in range(consolidation.steps)
    ],
    "evaluate": [games(config.evaluation.episodes, prompt)]
    + [games(config.evaluation.episodes, informed)] * kinds
    if plays
    else [],
  }
  return {name: [one for one in each if one.count] for name, each in found.items()}


def stages(
  config: Any, a: Architecture, device: Device, count: int, work: Work
) -> list[dict[str, Any]]:
  """A round's stages: responses, tokens of them at the most, and seconds at the most."""
  found, together = [], config.mesh.sample_tensor
  for name, each in sampled(config, work).items():
    seconds = sum(sampling_seconds(a, device, count, one, together) for one in each)
    if name == "consolidate":
      seconds += config.consolidation.steps * step_seconds(a, device, count, work)
    found.append(
      {
        "stage": name,
        "responses": sum(one.count for one in each),
        "tokens": sum(one.count * one.response for one in each),
        "seconds": seconds,
      }
    )
  return found
