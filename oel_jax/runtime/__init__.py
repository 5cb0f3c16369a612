"""Hosts, files and clocks: mesh and shardings, checkpoints, metrics, progress, seeds and the run
directory.
"""
