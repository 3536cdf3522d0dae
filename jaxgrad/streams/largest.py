"""The largest scores over all batches, and inner products with stored rows: the largest of them, or all."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import naming
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.precision import contracted, working_dtype
from jaxgrad.progress import counted
from jaxgrad.streams.batches import Batch, Batches, as_partial, checked, jitted_call


@named_tuple
class TopK(NamedTuple):
    """The largest scores of every test example, in descending order.

    Attributes:
        values: [C, k].
        indices: [C, k], example indices, counted over all batches.

    Example:
        >>> batches = jg.streams.Batches(np.array([1.0, 3.0, 2.0]), size=2)
        >>> found = top_k(lambda params, x: x[None], 2)(None, batches)
        >>> found.values.tolist(), found.indices.tolist()
        ([[3.0, 2.0]], [[1, 2]])
    """

    values: Float[Array, "C k"]
    indices: Array


def top_k(scores: Callable[..., Float[Array, "C b"]], k: int, *, progress: bool = False) -> Callable[..., TopK]:
    """The k training examples with the largest scores for each test example.

    Only the scores of one batch are in memory at a time.

    Args:
        scores: scores(params, *batch) → [C, b] for a batch of b examples. To find the smallest scores, return the
            negative scores. To pass more arrays to the function, make it a `jax.tree_util.Partial`.
        k: number of examples to return for each test example; if there are fewer examples, all are returned.
        progress: True shows a progress bar (needs rich).

    Returns:
        A function of (params, batches) that returns `TopK`. Each batch is a tuple of the arguments of `scores` other
        than the parameters. If scores are equal, the earlier example comes first. NaN counts as the largest score, so
        that it is not missed.

    Raises:
        TypeError: a batch is not a tuple.
        ValueError: k is below 1, or there are no batches.

    Example:
        >>> gradients = jg.per_example_grad(lambda w, x: jnp.sin(w @ x))
        >>> test = gradients(jnp.zeros(3), jnp.ones((1, 3)))
        >>> scores = jax.tree_util.Partial(lambda test, w, x: test.gram(gradients(w, x)), test)
        >>> top_k(scores, 2)(jnp.zeros(3), jg.streams.Batches(np.diag([1.0, 3.0, 2.0]), size=2)).indices.tolist()
        [[1, 2]]
    """
    if operator.index(k) < 1:
        raise ValueError(f"streams.top_k: expected k of at least 1, got {k}.")
    partial = as_partial(scores)

    @naming("streams.top_k")
    def largest(params: PyTree, batches: Iterable[Batch]) -> TopK:
        best: TopK | None = None
        count = 0
        for batch in counted(batches, len(batches) if isinstance(batches, Sequence) else None, progress=progress):
            values = jitted_call(partial, params, *checked(batch))
            indices = jnp.broadcast_to(count + jnp.arange(values.shape[1]), values.shape)
            count += values.shape[1]
            batch_scores = TopK(values, indices)
            best = _best(batch_scores if best is None else _concatenated(best, batch_scores), k)
        if best is None:
            raise ValueError("streams.top_k: expected at least one batch, got none.")
        return best

    return largest


def search(
    k: int, *, size: int = 8192, progress: bool = False
) -> Callable[[Float[Any, "C S"], Float[Any, "N S"]], TopK]:
    """The k rows with the largest inner products with each query.

    The rows are read once, a block at a time, in any floating dtype; products are accumulated in float32 or wider. A
    memory-mapped file of any length takes no more memory than two blocks.

    Args:
        k, progress: as in `top_k`.
        size: number of rows in a block.

    Returns:
        A function of (queries [C, S], rows [N, S]) that returns `TopK`, whose indices are those of rows.

    Raises:
        ValueError: k or the size is below 1, or there are no rows.

    Example:
        >>> rows = np.float16([[1, 0], [0, 3], [2, 0]])           # or jg.streams.load(folder).rows["projections"]
        >>> search(2)(jnp.eye(2), rows).indices.tolist()
        [[2, 0], [1, 0]]
    """
    with naming("streams.search"):
        largest = top_k(_inner_products, k, progress=progress)
        Batches(np.zeros(0), size=size)

    @naming("streams.search")
    def found(queries: Float[Any, "C S"], rows: Float[Any, "N S"]) -> TopK:
        return largest(jnp.asarray(queries), Batches(rows, size=size))

    return found


def scores(
    *, size: int = 8192, progress: bool = False
) -> Callable[[Float[Any, "C S"], Float[Any, "N S"]], Float[np.ndarray, "C N"]]:
    """All inner products of queries with rows, which are read as in `search`.

    Args:
        size, progress: as in `search`.

    Returns:
        A function of (queries [C, S], rows [N, S]) that returns [C, N], a NumPy array in float32 or wider.

    Raises:
        ValueError: the size is below 1, or there are no rows.

    Example:
        >>> scores()(jnp.eye(2), np.float16([[1, 0], [0, 3], [2, 0]])).tolist()
        [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]
    """
    Batches(np.zeros(0), size=size)
    partial = as_partial(_inner_products)

    @naming("streams.scores")
    def products(queries: Float[Any, "C S"], rows: Float[Any, "N S"]) -> np.ndarray:
        batches, queries = Batches(rows, size=size), jnp.asarray(queries)
        if not len(batches):
            raise ValueError("streams.scores: expected at least one row, got none.")
        blocks = (batches[i] for i in range(len(batches)))
        each = counted(blocks, len(batches), progress=progress)
        return np.concatenate([np.asarray(jitted_call(partial, queries, block)) for (block,) in each], 1)

    return products


def _inner_products(queries: Array, rows: Array) -> Array:
    return contracted("cs,bs->cb", queries, rows, working_dtype(queries.dtype, rows.dtype))


def _concatenated(a: TopK, b: TopK) -> TopK:
    return TopK(jnp.concatenate([a.values, b.values], 1), jnp.concatenate([a.indices, b.indices], 1))


def _best(scores: TopK, k: int) -> TopK:
    values, positions = lax.top_k(scores.values, min(k, scores.values.shape[1]))
    return TopK(values, jnp.take_along_axis(scores.indices, positions, 1))
