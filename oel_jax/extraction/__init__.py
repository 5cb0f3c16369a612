"""Trajectories → knowledge, on the user side (OEL section 3)."""

from oel_jax.extraction.extract import extract, raw_knowledge
from oel_jax.extraction.knowledge import Item, Knowledge

__all__ = ["Item", "Knowledge", "extract", "raw_knowledge"]
