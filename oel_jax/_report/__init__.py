"""The parts of `oel_jax.report`: what a run directory holds (run), plots, and the page (page,
parts).
"""
