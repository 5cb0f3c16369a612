"""The beginning of a run, or of one stage of it: the policy is read, the directory held and
compared.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from oel_jax import choices
from oel_jax import config as config_lib
from oel_jax.consolidation import placement
from oel_jax.policy import load
from oel_jax.policy.sampling.sampler import Policy
from oel_jax.runtime import files, mesh, mirror, named, together
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
  mirror.check(config.mirror, workdir)
  named.edit(config.consolidation.anchor_edit, "config.consolidation.anchor_edit")
  devices, policy = _policy(config)
  placement.unroll(config.consolidation, policy, devices)
  knowledge = dict(texts=config.extraction.texts, tokens=config.extraction.max_knowledge_tokens)
  chosen = choices.choose(config, policy, devices, **knowledge, exact=False)
  with opened(config, workdir, resume_anyway) as folder, Metrics(folder, config) as metrics:
    run = Run(config, folder, metrics, devices, policy)
    with together.leading(**_shared(run)):
      resume.check(run, policy)
      choices.tell(folder, chosen)  # a run that is refused changes no file
      yield run, policy


def follow(config: Any, workdir: str | os.PathLike) -> None:
  """What all processes but the first do: their part of what process 0 calls, until its end.

  Raises:
    ValueError: the configuration or the policy is wrong.
    OSError: a file of the policy is missing here.
  """
  config_lib.validate(config)
  devices, policy = _policy(config)
  folder = files.local(workdir, "--workdir").absolute()
  with Metrics(folder, config) as metrics:  # which writes nothing here
    together.follow(**_shared(Run(config, folder, metrics, devices, policy)))


def _policy(config: Any) -> tuple[jax.sharding.Mesh, Policy]:
  """The mesh, and the policy that the run begins with on it."""
  devices = mesh.make_mesh(config.mesh)
  longest = max(config.deployment.max_response_tokens, config.extraction.max_response_tokens)
  how = dict(response_tokens=longest, sample_tensor=config.mesh.sample_tensor)
  how |= dict(narrow=config.consolidation.lora_rank > 0)
  return devices, load.load_policy(config_lib.policy(config), devices, **how)


def _shared(run: Run) -> dict[str, Any]:
  """What each process has of its own, by the names that stand for it in calls."""
  return {"run": run, "policy": run.base, "base": run.base.params}
