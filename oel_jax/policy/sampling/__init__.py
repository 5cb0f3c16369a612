"""Whole responses from a language model: the sampler, its jitted programs, its cache, the draw."""
