"""Data sets that do not fit in memory: results over all batches, and over all pairs of examples.

`gram`, `influence`, `run` and `top_k` take a loss or a function of one batch, and return a function of the parameters
and of a sequence of batches, such as `Batches`. They hold the factors of at most two batches at a time. They loop over
batches in Python and jit each step themselves, so do not jit them.

The modules and their public names:

    batches      Batches: arrays, memory-mapped or not, as a sequence of batches
    run          run: apply a function to every batch, and write its rows and sums to disk; a stopped run can continue
                 load: open what a run has written, and check its checksums
    functions    norms, second_moments, inner_products, projections, position_projections: functions for `run`
    pairs        gram: inner products of all pairs of gradients
                 influence: influence of every training example on every test loss
    largest      top_k: the largest scores, with the scores of one batch in memory at a time
                 search: the stored rows that have the largest inner products with queries
                 scores: all inner products of stored rows with queries
"""

from jaxgrad.streams.batches import Batches
from jaxgrad.streams.functions import inner_products, norms, position_projections, projections, second_moments
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
    "position_projections",
    "projections",
    "run",
    "scores",
    "search",
    "second_moments",
    "top_k",
]
