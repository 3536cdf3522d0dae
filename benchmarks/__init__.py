"""What is claimed about speed, measured: `python -m benchmarks` runs every theme, one table each."""

import os

# Before NumPy and SciPy are loaded: beside XLA's threads those of OpenBLAS, by which JAX solves on a CPU, may stall.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
