"""Whole responses from a language model: `sampler` is the face; `scheduler` and `slot_table` decide
on the host who sits where, `engine` has the jitted programs, `driver` runs them as is decided;
`kv_cache` is attention over the circular cache, `token_sampling` the draw.
"""
