"""Whole responses from a language model: `sampler` is the face; `scheduler` and `slot_table` decide
on the host who sits where, `sizes` and `slot_room` in programs of which sizes; `engine` has the
jitted programs, `driver` runs them as is decided; `model` is the forward pass on weights made ready
for it, `groups` how devices hold these together, `kv_cache` attention over the circular cache,
`token_sampling` the draw.
"""
