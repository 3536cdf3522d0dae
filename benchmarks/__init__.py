"""Measure every claim about speed: `python -m benchmarks` runs all themes and prints one table for each."""

import os

# Set before NumPy and SciPy are loaded: JAX solves with OpenBLAS on a CPU, whose threads may stall next to XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
