"""Data sets that do not fit in memory: results over all batches, and over all pairs of examples.

`gram`, `influence`, `run` and `top_k` take a loss or a function of one batch, and return a function of the parameters
and a sequence of batches, such as `Batches`. The factors of at most two batches are held at a time. These functions
loop in Python and jit each step themselves.

The modules and their public names:

    batches      Batches: arrays, memory-mapped ones too, as a sequence of batches
    run          run: apply a function to every batch; write rows for every example, and sums, to disk; resumable
                 load: open what it wrote, with its checksums
    functions    norms, second_moments, inner_products, projections: functions for `run`
    pairs        gram: inner products of all pairs of gradients; influence: of every training example on every test loss
    largest      top_k: the largest scores, with the scores of one batch in memory at a time; search: the stored rows
                 with the largest inner products with queries; scores: all these inner products
"""

from jaxgrad.streams.batches import Batches
from jaxgrad.streams.functions import inner_products, norms, projections, second_moments
from jaxgrad.streams.largest import TopK, scores, search, top_k
from jaxgrad.streams.pairs import gram, influence
from jaxgrad.streams.run import Part, Results, load, run

__all__ = [
    "Batches",
    "Part",
    "Results",
    "TopK",
    "gram",
    "influence",
    "inner_products",
    "load",
    "norms",
    "projections",
    "run",
    "scores",
    "search",
    "second_moments",
    "top_k",
]
