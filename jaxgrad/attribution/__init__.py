"""Which examples matter: scores, similarities and influence from per-example gradients.

The modules and their public names:

    Functions of a batch of gradients
        influence     self_influence: of each example on its own loss; influence: of training on test examples
        through       influence_through: influence through solves with any curvature matrix, such as EK-FAC;
                      influence_by_cg: from its products
        scores        cosine_similarity: of all pairs of gradients; noise_scale: how much of a mean gradient is noise,
                      and the batch size at which noise and signal are equal
        projection    random_projection: a few numbers per example that preserve inner products
    Functions of a loss or a model
        checkpoints   grand: mean norms over several checkpoints; tracin: sums of inner products over them; trak: the
                      same with the inverse kernel; log_odds: the output that trak explains of a classifier
        kernel        ntk: the empirical neural tangent kernel, in blocks for large batches
    Functions of scores
        evaluation    linear_datamodeling_score: do scores predict retraining on subsets, which random_subsets and
                      leave_one_out_subsets draw; mislabeled_auc: do they find wrong labels

`jaxgrad.streams` has Gram matrices and influence for data sets whose gradients do not fit in memory. B is the number of
training examples, and C the number of test examples.
"""

from jaxgrad.attribution.checkpoints import grand, log_odds, tracin, trak
from jaxgrad.attribution.evaluation import (
    leave_one_out_subsets,
    linear_datamodeling_score,
    mislabeled_auc,
    random_subsets,
)
from jaxgrad.attribution.influence import influence, self_influence
from jaxgrad.attribution.kernel import ntk
from jaxgrad.attribution.projection import random_projection
from jaxgrad.attribution.scores import NoiseScale, cosine_similarity, noise_scale
from jaxgrad.attribution.through import InfluenceByCG, influence_by_cg, influence_through

__all__ = [
    "InfluenceByCG",
    "NoiseScale",
    "cosine_similarity",
    "grand",
    "influence",
    "influence_by_cg",
    "influence_through",
    "leave_one_out_subsets",
    "linear_datamodeling_score",
    "log_odds",
    "mislabeled_auc",
    "noise_scale",
    "ntk",
    "random_projection",
    "random_subsets",
    "self_influence",
    "tracin",
    "trak",
]
