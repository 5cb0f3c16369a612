"""What the embedded policy must not lose, as tasks for config.evaluation.tasks: writing knowledge
down, other worlds with knowledge in context, role-symmetric ones, other tasks.
"""

import functools

from oel_jax.pocket import probes

extraction = probes.extraction
worlds = probes.play_worlds
symmetric = functools.partial(probes.play_worlds, layout="symmetric")
other = probes.other_tasks
