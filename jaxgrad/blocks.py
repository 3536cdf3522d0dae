"""Gram matrices, influence and nearest examples for data sets whose gradients do not fit in memory.

Data are passed as a sequence of batches (`streams.Batches`, which takes memory-mapped arrays too). The factors of two
batches are held at a time, and gradients are recomputed when they are needed again.

The module's public names:

    gram         inner products of all pairs of gradients
    influence    influence of every training example on every test loss
    top_k        the largest scores; only one batch's scores are in memory at a time
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.solve import checked_damping, damped_solve, in_full_precision
from jaxgrad.errors import called, naming
from jaxgrad.per_example.arguments import checked_batch
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.per_example.transform import per_example_grad
from jaxgrad.progress import shown

__all__ = ["TopK", "gram", "influence", "top_k"]

Batch = tuple[Any, ...]


@naming("blocks.gram")
def gram(
    loss: Callable[..., Any],
    params: PyTree,
    batches: Sequence[Batch],
    others: Sequence[Batch] | None = None,
    *,
    progress: bool = False,
    in_axes: Any = 0,
) -> Float[np.ndarray, "N M"]:
    """Gram matrix GGᵀ of N examples, or GG′ᵀ of N examples and M others, computed from batches.

    Memory: the result, briefly twice, and the factors of two batches. Cost: every gradient of `others` is computed once
    for each batch in `batches`; without `others`, half of that.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        params: parameters at which to take the gradients.
        batches, others: sequences of tuples, the loss's other arguments. Give all batches but the last one size,
            because every size is compiled separately. `others` defaults to `batches`.
        progress: True shows a progress bar (needs rich).
        in_axes: as in `per_example_grad`.

    Returns:
        [N, M], a NumPy array.

    Raises:
        TypeError: batches that cannot be counted and read again, such as a generator; a batch that is not a tuple.
        ValueError: no batches; and as `per_example_grad`.

    Example:
        >>> batches = jg.streams.Batches(np.eye(3, dtype=np.float32), size=2)
        >>> gram(lambda w, x: w @ x, jnp.zeros(3), batches).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return _gram(loss, params, batches, others, progress, in_axes, 1.0)


def _gram(
    loss: Callable[..., Any],
    params: PyTree,
    batches: Sequence[Batch],
    others: Sequence[Batch] | None,
    progress: bool,
    in_axes: Any,
    unit: float,
) -> np.ndarray:
    """Return the Gram matrix of the gradients divided by `unit`."""
    _checked_sequences(batches=batches, **({} if others is None else {"others": others}))
    if not len(batches) or (others is not None and not len(others)):
        raise ValueError(f"{called()}: expected at least one batch on each side, got none.")

    @jax.jit
    def jitted(params: PyTree, batch: Batch) -> PerExampleGrads:
        g = per_example_grad(loss, in_axes=in_axes)(params, *batch)
        return g.scale(jnp.full(g.batch_size, 1 / unit))

    def gradients(batch: Batch) -> PerExampleGrads:
        return jitted(params, checked_batch("a batch", batch))

    product = jax.jit(lambda g, g_: g.gram(g_))
    second = batches if others is None else others
    blocks: list[list[np.ndarray]] = []
    for i, batch in enumerate(shown((batches[i] for i in range(len(batches))), len(batches), progress=progress)):
        g = gradients(batch)
        row = [blocks[j][i].T for j in range(i)] if others is None else []
        row += [np.asarray(product(g, gradients(second[j]))) for j in range(len(row), len(second))]
        blocks.append(row)
    return np.block(blocks)


def _checked_sequences(**given: Any) -> None:
    for name, batches in given.items():
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")):
            raise TypeError(
                f"{called()}: expected a sequence of batches as {name}, because they are counted and reread, got "
                f"{type(batches).__name__}. Pass a list, or jg.streams.Batches(x, y, size=...)."
            )


@naming("blocks.influence")
@in_full_precision
def influence(
    loss: Callable[..., Any],
    params: PyTree,
    train: Sequence[Batch],
    test: Sequence[Batch],
    damping: Any,
    *,
    progress: bool = False,
    in_axes: Any = 0,
) -> Float[np.ndarray, "C B"]:
    """`attribution.influence` of B training examples on C test examples, from batches: exact for any parameter count.

    Memory: a few arrays of B × B and B × C numbers, and the factors of two batches. Cost: twice that of `gram`, and the
    norms.

    Args:
        loss, params, progress, in_axes: as in `gram`.
        train, test: as `batches` in `gram`.
        damping: μ ≥ 0.

    Returns:
        [C, B], a NumPy array; > 0 means helpful.

    Raises:
        TypeError: as `gram`.
        ValueError: a damping that is not a number ≥ 0; no batches; and as `per_example_grad`.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> train = jg.streams.Batches(np.eye(2), np.array([2.0, 3.0]), size=1)
        >>> test = jg.streams.Batches(np.eye(2), np.array([3.0, 0.0]), size=2)
        >>> influence(loss, jnp.ones(2), train, test, 0.0).round(3).tolist()
        [[2.0, 0.0], [0.0, -0.5]]
    """
    checked_damping(damping)
    _checked_sequences(train=train, test=test)
    largest = jax.jit(lambda params, batch: per_example_grad(loss, in_axes=in_axes)(params, *batch).norms().max())
    each = (checked_batch("a batch", train[k]) for k in range(len(train)))
    norms = [float(largest(params, batch)) for batch in each]
    root = math.sqrt(float(damping)) * math.sqrt(sum(len(jax.tree.leaves(train[k])[0]) for k in range(len(train))))
    exponent = math.frexp(max([*norms, root]))[1] if np.isfinite(norms).all() else 0
    unit = 2.0**exponent
    K = _gram(loss, params, train, None, progress, in_axes, unit)
    across = _gram(loss, params, train, test, progress, in_axes, unit)
    ridge = jnp.asarray(float(damping) / unit * len(K) / unit, K.dtype)
    return np.asarray(jax.jit(damped_solve)(K, across, ridge)).T


@named_tuple
class TopK(NamedTuple):
    """The largest scores of every test example, in descending order.

    Attributes:
        values: [C, k].
        indices: [C, k], example indices, counted over all batches.

    Example:
        >>> found = top_k(lambda x: x[None], jg.streams.Batches(np.array([1.0, 3.0, 2.0]), size=2), 2)
        >>> found.values.tolist(), found.indices.tolist()
        ([[3.0, 2.0]], [[1, 2]])
    """

    values: Float[Array, "C k"]
    indices: Array


@naming("blocks.top_k")
def top_k(
    scores: Callable[..., Float[Array, "C b"]], batches: Iterable[Batch], k: int, *, progress: bool = False
) -> TopK:
    """The k training examples with the largest scores for each test example; holds one batch's scores at a time.

    Args:
        scores: scores(*batch) → [C, b] for a batch of b examples; negate it for the smallest. Jit it.
        batches: tuples, the arguments of `scores`.
        k: number of examples to return; fewer are returned if there are fewer examples.
        progress: True shows a progress bar (needs rich).

    Returns:
        `TopK`; among equal scores the earlier example comes first. NaN counts as the largest score, so that it is seen.

    Raises:
        TypeError: a batch that is not a tuple.
        ValueError: k below 1, or no batches.

    Example:
        >>> loss = lambda w, x: jnp.sin(w @ x)
        >>> test = jg.per_example_grad(loss)(jnp.zeros(3), jnp.ones((1, 3)))
        >>> scores = lambda x: test.gram(jg.per_example_grad(loss)(jnp.zeros(3), x))
        >>> top_k(scores, jg.streams.Batches(np.diag([1.0, 3.0, 2.0]), size=2), 2).indices.tolist()
        [[1, 2]]
    """
    if operator.index(k) < 1:
        raise ValueError(f"{called()}: expected k of at least 1, got {k}.")
    best: TopK | None = None
    count = 0
    for batch in shown(batches, len(batches) if isinstance(batches, Sequence) else None, progress=progress):
        values = scores(*checked_batch("a batch", batch))
        indices = jnp.broadcast_to(count + jnp.arange(values.shape[1]), values.shape)
        count += values.shape[1]
        best = _merged(TopK(values, indices) if best is None else _joined(best, TopK(values, indices)), k)
    if best is None:
        raise ValueError(f"{called()}: expected at least one batch, got none.")
    return best


def _joined(a: TopK, b: TopK) -> TopK:
    return TopK(jnp.concatenate([a.values, b.values], 1), jnp.concatenate([a.indices, b.indices], 1))


def _merged(both: TopK, k: int) -> TopK:
    values, places = lax.top_k(both.values, min(k, both.values.shape[1]))
    return TopK(values, jnp.take_along_axis(both.indices, places, 1))
