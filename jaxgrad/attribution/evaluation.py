"""How good scores are: what they predict about retraining, and whether they find wrong labels."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.precision import working_dtype


@naming("random_subsets")
def random_subsets(key: Array, count: int, size: int, fraction: float = 0.5) -> Bool[Array, "M B"]:
    """Random subsets of the training examples, all of the same size, as masks.

    Args:
        key: a key of `jax.random`.
        count: M, the number of subsets.
        size: B, the number of training examples.
        fraction: the part of the examples that is in each subset, between 0 and 1.

    Returns:
        [M, B], True for the examples of the subset.

    Raises:
        ValueError: the fraction is not between 0 and 1.

    Example:
        >>> subsets = random_subsets(jax.random.key(0), 20, 10, fraction=0.3)
        >>> subsets.shape, set(subsets.sum(1).tolist())
        ((20, 10), {3})
    """
    if not 0 < fraction < 1:
        raise ValueError(f"{caller()}: expected a fraction between 0 and 1, got {fraction}.")
    ranks = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(key, count))
    return ranks < round(fraction * size)


@naming("leave_one_out_subsets")
def leave_one_out_subsets(size: int, examples: Any = None) -> Bool[Array, "M B"]:
    """The subsets that leave out one training example each, as masks.

    With these subsets, `leave_one_out_correlation` is the correlation of the scores with the effects of leaving one
    example out, and `linear_datamodeling_score` is their rank correlation.

    Args:
        size: B, the number of training examples.
        examples: [M], the indices of the examples that are left out; None for all.

    Returns:
        [M, B], True for the examples of the subset.

    Example:
        >>> leave_one_out_subsets(3, [2, 0]).tolist()
        [[True, True, False], [False, True, True]]
    """
    left_out = jnp.arange(size) if examples is None else jnp.asarray(examples)
    return left_out[:, None] != jnp.arange(size, dtype=left_out.dtype)[None]


@naming("linear_datamodeling_score")
def linear_datamodeling_score(
    scores: Float[Array, "C B"], subsets: Bool[Array, "M B"], outputs: Float[Array, "M C"]
) -> Float[Array, " C"]:
    """How well sums of scores predict the outputs of models that are trained on subsets (LDS); average it over tests.

    Formula: for each test example, the rank correlation (Spearman) over the subsets S of Σ_{b ∈ S} score_b with the
    output of a model that was trained on S. Equal values have the mean of their ranks. The standard error of each
    number is about 1/√M.

    Args:
        scores: [C, B], > 0 for a training example that helps the test example.
        subsets: [M, B], True for the examples of the subset.
        outputs: [M, C], the outputs on the test examples after training on each subset, higher for better: the
            `log_odds` of the right label, or minus the loss. Average over several seeds where training is random.

    Returns:
        [C], between -1 and 1; NaN for a test example whose scores, or whose outputs, are all equal.

    Raises:
        ValueError: the shapes do not fit together.

    Example:
        >>> subsets = leave_one_out_subsets(3)
        >>> linear_datamodeling_score(jnp.array([[0.1, 0.5, -0.2]]), subsets, jnp.array([[2.0], [1.0], [3.0]])).tolist()
        [1.0]

    Source: Park et al. 2023, definition 2.4; Ilyas et al. 2022.
    """
    return _correlation(_ranks(_predicted(scores, subsets, outputs)), _ranks(outputs))


@naming("leave_one_out_correlation")
def leave_one_out_correlation(
    scores: Float[Array, "C B"], subsets: Bool[Array, "M B"], outputs: Float[Array, "M C"]
) -> Float[Array, " C"]:
    """How well scores predict what leaving out one training example changes; average it over tests.

    Formula: for each test example, the correlation (Pearson) over the examples b that are left out of score_b with
    minus the output of a model that was trained on all others. It is also the correlation with the change of the
    output, because the output of the model that was trained on all examples is the same number in every change.

    Most examples change almost nothing, and this correlation depends on the few that change most. The rank correlation
    counts all equally: it is the `linear_datamodeling_score` of the same arguments.

    Args:
        scores: [C, B], > 0 for a training example that helps the test example.
        subsets: [M, B], True for the examples that each model was trained on: those of `leave_one_out_subsets`.
        outputs: [M, C], the outputs on the test examples after training on each subset, higher for better, as in
            `linear_datamodeling_score`. Train deterministically, or average over seeds until the noise is smaller than
            the effect of one example.

    Returns:
        [C], between -1 and 1; NaN for a test example whose scores, or whose outputs, are all equal.

    Raises:
        ValueError: the shapes do not fit together.

    Example:
        >>> subsets = leave_one_out_subsets(3)
        >>> scores, outputs = jnp.array([[0.1, 0.5, -0.2]]), jnp.array([[1.9], [1.5], [2.2]])  # all three: 2.0
        >>> leave_one_out_correlation(scores, subsets, outputs).round(3).tolist()
        [1.0]

    Source: Koh and Liang 2017, section 4.1.
    """
    predicted, dtype = _predicted(scores, subsets, outputs), working_dtype(scores.dtype, outputs.dtype)
    return _correlation(*(_within_one(a.astype(dtype)) for a in (predicted, outputs)))


@naming("mislabeled_auc")
def mislabeled_auc(scores: Float[Array, " B"], wrong: Bool[Array, " B"]) -> Float[Array, ""]:
    """The probability that a mislabeled example has a higher score than one with the right label (area under the ROC).

    Args:
        scores: [B], high for suspicious examples: `self_influence`, `grand`, or minus the influence on other examples.
        wrong: [B], True where the label is wrong.

    Returns:
        A number between 0 and 1: 1 if all mislabeled examples come first, 0.5 for random scores; a tie counts half. NaN
        if no label or every label is wrong.

    Raises:
        ValueError: the shapes do not fit together.

    Example:
        >>> mislabeled_auc(jnp.array([3.0, 0.5, 2.0, 1.0]), jnp.array([True, False, False, True])).item()
        0.75

    Source: Mann and Whitney 1947.
    """
    if scores.ndim != 1 or wrong.shape != scores.shape:
        raise ValueError(f"{caller()}: expected scores [B] and wrong [B], got shapes {scores.shape} and {wrong.shape}.")
    ranks = _ranks(scores)
    positive = wrong.sum().astype(ranks.dtype)
    wins = jnp.where(wrong, ranks, jnp.zeros_like(ranks)).sum() - positive * (positive + 1) / 2
    return wins / (positive * (len(scores) - positive))


def _predicted(scores: Array, subsets: Array, outputs: Array) -> Array:
    """[M, C]: the sums of the scores over each subset, up to a constant for each test example."""
    (C, B), M = scores.shape, subsets.shape[0]
    if subsets.shape != (M, B) or outputs.shape != (M, C):
        raise ValueError(
            f"{caller()}: expected scores [C, B], subsets [M, B] and outputs [M, C], got shapes {scores.shape}, "
            f"{subsets.shape} and {outputs.shape}."
        )
    # Minus the sum over the others differs by a constant; where one example is left out it does not cancel.
    scores = scores.astype(working_dtype(scores.dtype))
    return -jnp.matmul((~subsets).astype(scores.dtype), scores.T, precision=jax.lax.Precision.HIGHEST)


def _within_one(a: Array) -> Array:
    """Differences from the first row, divided so that no square of them overflows or underflows."""
    a = a - a[:1]
    return a / power_of_two(jnp.abs(a).max(0, keepdims=True, initial=0))


def _ranks(a: Array) -> Array:
    """The ranks along axis 0 from 1, NaN where the column has a NaN; equal values have the mean of their ranks."""
    ranks = jax.scipy.stats.rankdata(a, axis=0).astype(working_dtype(a.dtype))
    return jnp.where(jnp.isnan(a).any(0, keepdims=True), jnp.full_like(ranks, jnp.nan), ranks)


def _correlation(a: Array, b: Array) -> Array:
    """Pearson's correlation along axis 0."""
    a, b = (x - x.mean(0, keepdims=True) for x in (a, b))
    dtype = working_dtype(a.dtype, b.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    return (a * b).sum(0) / jnp.sqrt((a * a).sum(0) * (b * b).sum(0))
