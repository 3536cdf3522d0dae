"""`python -m jaxgrad` runs the exercise's main job, `jaxgrad/exercise/job`."""

import sys

from jaxgrad.exercise.job.command import run_program

if __name__ == "__main__":
    sys.exit(run_program())
