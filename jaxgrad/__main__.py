"""`python -m jaxgrad`: the exercise's main job, which is in `jaxgrad/exercise/job`."""

import sys

from jaxgrad.exercise.job.command import run_program

if __name__ == "__main__":
    sys.exit(run_program())
