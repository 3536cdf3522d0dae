"""What is claimed about speed, measured: `python -m benchmarks` runs every theme, one table each."""
