"""What a run showed: its records, its results.json, plots, and one page."""

from oel_jax.report.results import rows, write

__all__ = ["rows", "write"]
