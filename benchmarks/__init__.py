"""Measure every claim about speed: `python -m benchmarks` runs all themes and prints one table for each."""

import os

# Set this before NumPy and SciPy are loaded: JAX's solvers on a CPU call OpenBLAS, whose threads can stall XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
