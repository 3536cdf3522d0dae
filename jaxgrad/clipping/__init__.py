"""Sums of clipped gradients, for private and robust training: no example moves the sum by more than a stated bound.

The modules and their public names:

    transform     clipped_grad, which returns a ClippedGrad; calling that returns the sum and a ClipInfo
    weightings    automatic: a weighting for clipped_grad
    by_layer      bounds for every layer of a stack, clipped inside the loop over the layers
    costs         Costs: memory and operations of one pass and of two, from the method `costs` of ClippedGrad
"""

from jaxgrad.clipping.costs import Cost, Costs
from jaxgrad.clipping.transform import ClipInfo, ClippedGrad, clipped_grad
from jaxgrad.clipping.weightings import Weighting, automatic

__all__ = ["ClipInfo", "ClippedGrad", "Cost", "Costs", "Weighting", "automatic", "clipped_grad"]
