"""Which examples matter: scores, similarities and influence from per-example gradients.

The files, and the names:

    Of a batch of gradients
        influence     self_influence, influence: on an example's own loss, and of training examples on test losses
        scores        cosine_similarity of every pair of gradients; noise_scale, how much of a gradient is noise, and
                      the batch size at which that is half
        projection    random_projection: a few numbers an example that keep inner products
    Of a loss or a model
        checkpoints   grand, tracin: norms and inner products over several checkpoints
        kernel        ntk: the empirical neural tangent kernel, in blocks for large batches

For more examples than fit into memory see `blocks`. B counts training examples, C test examples.
"""

from jaxgrad.attribution.checkpoints import grand, tracin
from jaxgrad.attribution.influence import influence, self_influence
from jaxgrad.attribution.kernel import ntk
from jaxgrad.attribution.projection import random_projection
from jaxgrad.attribution.scores import NoiseScale, cosine_similarity, noise_scale

__all__ = [
    "NoiseScale",
    "cosine_similarity",
    "grand",
    "influence",
    "noise_scale",
    "ntk",
    "random_projection",
    "self_influence",
    "tracin",
]
