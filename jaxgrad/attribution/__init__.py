"""Which examples matter: scores, similarities and influence from per-example gradients.

The modules and their public names:

    Functions of a batch of gradients
        influence     self_influence: influence of each example on its own loss
                      influence: influence of training examples on test losses
        through       influence_through: influence through solves with any curvature matrix, such as EK-FAC
                      influence_by_cg: influence through any curvature matrix, from products with the matrix
        scores        cosine_similarity: cosines between all pairs of gradients
                      noise_scale: how much of a mean gradient is noise, and at which batch size noise equals signal
        noise         leaf_noise_scale: the same for each parameter; total_noise_scale: for some of them together;
                      noise_recorder: averages over a training run; noise_scale_from_norms: from norms and a mean
        projection    project: a few numbers per example with about the same inner products, by two matrices per weight
                      random_projection: the same by one large matrix, with fewer numbers and far more operations
        sides         random_sides: the two matrices; normalized: the matrices divided by an optimizer's second moments
    Functions of a loss or a model
        checkpoints   grand: mean norms over several checkpoints; tracin: sums of inner products over them
                      trak: as tracin, with the inverse of the kernel; log_odds: what trak explains of a classifier
        projection    per_example_projection: the numbers of `project`, in about a plain gradient's memory
        positions     per_position_projection: the same for each term of a loss, such as the positions of a sequence
        kernel        ntk: the empirical neural tangent kernel, in blocks for large batches
    Functions of scores
        evaluation    linear_datamodeling_score: do scores predict retraining on subsets, such as random_subsets;
                      leave_one_out_correlation: do they predict retraining on leave_one_out_subsets;
                      mislabeled_auc: do they find wrong labels

`jaxgrad.streams` has Gram matrices and influence for data sets whose gradients do not fit in memory. B is the number of
training examples, and C the number of test examples.
"""

from jaxgrad.attribution.checkpoints import grand, log_odds, tracin, trak
from jaxgrad.attribution.evaluation import (
    leave_one_out_correlation,
    leave_one_out_subsets,
    linear_datamodeling_score,
    mislabeled_auc,
    random_subsets,
)
from jaxgrad.attribution.influence import influence, self_influence
from jaxgrad.attribution.kernel import ntk
from jaxgrad.attribution.noise import (
    NoiseRecord,
    NoiseRecorder,
    leaf_noise_scale,
    noise_recorder,
    noise_scale_from_norms,
    total_noise_scale,
)
from jaxgrad.attribution.positions import per_position_projection
from jaxgrad.attribution.projection import per_example_projection, project, random_projection
from jaxgrad.attribution.scores import NoiseScale, cosine_similarity, noise_scale
from jaxgrad.attribution.sides import normalized, random_sides
from jaxgrad.attribution.through import InfluenceByCG, influence_by_cg, influence_through
from jaxgrad.per_example.algebra.projection_sides import Sides

__all__ = [
    "InfluenceByCG",
    "NoiseRecord",
    "NoiseRecorder",
    "NoiseScale",
    "Sides",
    "cosine_similarity",
    "grand",
    "influence",
    "influence_by_cg",
    "influence_through",
    "leaf_noise_scale",
    "leave_one_out_correlation",
    "leave_one_out_subsets",
    "linear_datamodeling_score",
    "log_odds",
    "mislabeled_auc",
    "noise_recorder",
    "noise_scale",
    "noise_scale_from_norms",
    "normalized",
    "ntk",
    "per_example_projection",
    "per_position_projection",
    "project",
    "random_projection",
    "random_sides",
    "random_subsets",
    "self_influence",
    "total_noise_scale",
    "tracin",
    "trak",
]
