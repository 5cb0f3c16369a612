"""What the policy of both games must not lose, as tasks for config.evaluation.tasks: writing
knowledge down, push worlds and Frozen Lakes with knowledge in context, role-symmetric ones, other
tasks.
"""

import functools

from oel_jax.pocket import probes as pocket_probes
from oel_jax.pocket.boards import probes

push_extraction = probes.push_extraction
lake_extraction = probes.lake_extraction
rooms = probes.play_rooms
rooms_symmetric = functools.partial(probes.play_rooms, symmetric=True)
lakes = probes.play_lakes
lakes_symmetric = functools.partial(probes.play_lakes, layout="symmetric")
other = pocket_probes.other_tasks
