"""The name that code imports the exercise by: `jaxgrad.network` is what `jaxgrad.exercise` has."""

import sys

from jaxgrad import exercise
from jaxgrad.exercise import *  # noqa: F403  its __all__, which is taken over below
from jaxgrad.exercise import activations, autodiff, checks, closed_form, derivation, labels, model, params

for module in (activations, autodiff, checks, closed_form, derivation, labels, model, params):
    sys.modules[f"{__name__}.{module.__name__.rpartition('.')[2]}"] = module  # for `import jaxgrad.network.closed_form`
__all__ = exercise.__all__
