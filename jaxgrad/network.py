"""The import name of the exercise: `jaxgrad.network` has every public name of `jaxgrad.exercise`."""

import sys

from jaxgrad import exercise
from jaxgrad.exercise import *  # noqa: F403  imports its __all__, which is copied below
from jaxgrad.exercise import activations, autodiff, checks, closed_form, derivation, labels, model, params

for module in (activations, autodiff, checks, closed_form, derivation, labels, model, params):
    sys.modules[f"{__name__}.{module.__name__.rpartition('.')[2]}"] = module  # for `import jaxgrad.network.closed_form`
__all__ = exercise.__all__
