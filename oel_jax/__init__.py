"""Online Experiential Learning in JAX and Flax: language models that keep improving from their own
deployment.

The public names below are imported when first used, so that the losses alone pull in jax and flax
only.
"""

import importlib

_PUBLIC = {
  "divergence": "oel_jax.consolidation.losses",
  "linear_divergence": "oel_jax.consolidation.fused",
  "make_step": "oel_jax.consolidation.step",
  "init_state": "oel_jax.consolidation.step",
  "generate": "oel_jax.policy.sampling.sampler",
  "Policy": "oel_jax.policy.sampling.sampler",
  "Sampling": "oel_jax.policy.sampling.sampler",
  "Architecture": "oel_jax.policy.architecture",
  "play": "oel_jax.environments.rollout",
  "extract": "oel_jax.extraction.extract",
  "run": "oel_jax.loop",
}
_MODULES = {"distill": "oel_jax.tasks.distill", "export": "oel_jax.tasks.export"}
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(_MODULES[name])
  if name not in _PUBLIC:
    raise AttributeError(f"module 'oel_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)
