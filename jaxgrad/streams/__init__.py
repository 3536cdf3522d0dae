"""More data than fits in memory: results over all batches, and over all pairs of examples.

Every function here takes a loss, or a function of one batch, and returns a function of the parameters and of a sequence
of batches, such as `Batches`. The factors of one batch, or of two, are held at a time. Each of these functions jits its
own step, because it loops in Python.

The modules and their public names:

    batches      Batches: arrays, memory-mapped ones too, as a sequence of batches
    run          run: apply a function to every batch; write rows for every example, and sums, to disk; restartable
    functions    norms, second_moments, inner_products: functions for `run`
    pairs        gram: inner products of all pairs of gradients; influence: of every training example on every test loss
    largest      top_k: the largest scores; only one batch's scores are in memory at a time
"""

from jaxgrad.streams.batches import Batches
from jaxgrad.streams.functions import inner_products, norms, second_moments
from jaxgrad.streams.largest import TopK, top_k
from jaxgrad.streams.pairs import gram, influence
from jaxgrad.streams.run import Part, Results, run

__all__ = [
    "Batches",
    "Part",
    "Results",
    "TopK",
    "gram",
    "influence",
    "inner_products",
    "norms",
    "run",
    "second_moments",
    "top_k",
]
