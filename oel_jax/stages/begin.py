"""The beginning of a run, or of one stage of it: the policy is read, the directory held and
compared.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from oel_jax import choices
from oel_jax import config as config_lib
from oel_jax.consolidation import placement
from oel_jax.policy import load
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import mesh
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.workdir import opened
from oel_jax.stages import resume
from oel_jax.stages.run import Run


@contextlib.contextmanager
def begin(
  config: Any, workdir: str | os.PathLike, resume_anyway: bool
) -> Iterator[tuple[Run, Policy]]:
  """Holds the run directory; yields the run, and the policy that it begins with.

  What can be wrong with the configuration shows before the directory belongs to it.

  Raises:
    ValueError: the configuration, the policy or what is in the directory is wrong.
    OSError: another process runs in `workdir`, or it cannot be written.
  """
  devices = mesh.make_mesh(config.mesh)
  longest = max(config.deployment.max_response_tokens, config.extraction.max_response_tokens)
  policy = load.load_policy(config_lib.policy(config), devices, response_tokens=longest)
  placement.unroll(config.consolidation, policy, devices)
  knowledge = dict(texts=config.extraction.texts, tokens=config.extraction.max_knowledge_tokens)
  chosen = choices.choose(config, policy, devices, **knowledge, exact=False)
  with opened(config, workdir, resume_anyway) as folder, Metrics(folder, config) as metrics:
    run = Run(config, folder, metrics, devices, policy)
    resume.check(run, policy)
    choices.tell(folder, chosen)  # a run that is refused changes no file
    yield run, policy
