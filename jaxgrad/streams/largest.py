"""The largest scores over all batches, and inner products with stored rows: the largest of them, or all."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxgrad.errors import caller, naming
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.precision import contracted, working_dtype
from jaxgrad.progress import counted
from jaxgrad.streams.batches import Batch, Batches, as_partial, checked, jitted_call


@named_tuple
class TopK(NamedTuple):
    """The largest scores of every test example, in descending order.

    Attributes:
        values: [C, k].
        indices: [C, k], example indices, counted over all batches; [C, k, 2], pairs of an example's and a position's
            index, where every example has a score for each of its positions.

    Example:
        >>> batches = jg.streams.Batches(np.array([1.0, 3.0, 2.0]), size=2)
        >>> found = top_k(lambda params, x: x[None], 2)(None, batches)
        >>> found.values.tolist(), found.indices.tolist()
        ([[3.0, 2.0]], [[1, 2]])
    """

    values: Float[Array, "C k"]
    indices: Array


def top_k(scores: Callable[..., Float[Array, "C b *T"]], k: int, *, progress: bool = False) -> Callable[..., TopK]:
    """The k training examples with the largest scores for each test example.

    Only the scores of one batch are in memory at a time.

    Args:
        scores: scores(params, *batch) → [C, b] for a batch of b examples, or [C, b, T] for T positions of each of them.
            To find the smallest scores, return the negative scores. To pass more arrays to the function, make it a
            `jax.tree_util.Partial`.
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
            batch_best = _best_of_batch(values, count, k)
            count += values.shape[1]
            best = batch_best if best is None else _best(_concatenated(best, batch_best), k)
        if best is None:
            raise ValueError("streams.top_k: expected at least one batch, got none.")
        return best

    return largest


def search(k: int, *, size: int = 8192, progress: bool = False) -> Callable[..., TopK]:
    """The k rows with the largest inner products with each query.

    The rows are read once, a block at a time, in any floating dtype; products are accumulated in float32 or wider. A
    memory-mapped file of any length takes no more memory than two blocks.

    Args:
        k, progress: as in `top_k`.
        size: number of rows in a block, rounded down to whole examples; at least those of one example.

    Returns:
        A function of (queries [C, S], rows, where=None) that returns `TopK`. The rows are [N, S], and the indices
        [C, k] are theirs; or they are [N, T, S], with a row for each position of each example, and the indices
        [C, k, 2] are pairs (example, position). `where`, booleans [N] or [N, T], says which rows count, such as those
        that are not padding: the others have the score -inf, and are found only where fewer than k rows count.

    Raises:
        ValueError: k or the size is below 1, there are no rows, the rows have another number of axes, the queries have
            another length, or `where` has another shape than the rows.

    Example:
        >>> rows = np.float16([[1, 0], [0, 3], [2, 0]])           # or jg.streams.load(folder).rows["projections"]
        >>> search(2)(jnp.eye(2), rows).indices.tolist()
        [[2, 0], [1, 0]]
        >>> search(1)(jnp.eye(2), rows[:2, None], where=np.array([[True], [False]])).indices.tolist()
        [[[0, 0]], [[0, 0]]]
    """
    with naming("streams.search"):
        largest = top_k(_scores, k, progress=progress)
        Batches(np.zeros(0), size=size)

    @naming("streams.search")
    def found(queries: Float[Any, "C S"], rows: Float[Any, " N *T S"], where: Bool[Any, " N *T"] | None = None) -> TopK:
        return largest(*_in_blocks(queries, rows, where, size))

    return found


def scores(
    *, size: int = 8192, progress: bool = False
) -> Callable[[Float[Any, "C S"], Float[Any, " N *T S"]], Float[np.ndarray, "C N *T"]]:
    """All inner products of queries with rows, which are read as in `search`.

    Args:
        size, progress: as in `search`.

    Returns:
        A function of (queries [C, S], rows [N, S] or [N, T, S]) that returns [C, N] or [C, N, T], a NumPy array in
        float32 or wider.

    Raises:
        ValueError: the size is below 1, or there are no rows; otherwise as in `search`.

    Example:
        >>> scores()(jnp.eye(2), np.float16([[1, 0], [0, 3], [2, 0]])).tolist()
        [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]
    """
    Batches(np.zeros(0), size=size)
    partial = as_partial(_scores)

    @naming("streams.scores")
    def products(queries: Float[Any, "C S"], rows: Float[Any, " N *T S"]) -> np.ndarray:
        arrays, batches = _in_blocks(queries, rows, None, size)
        if not len(batches):
            raise ValueError("streams.scores: expected at least one row, got none.")
        blocks = (batches[i] for i in range(len(batches)))
        each = counted(blocks, len(batches), progress=progress)
        return np.concatenate([np.asarray(jitted_call(partial, arrays, block)) for (block,) in each], 1)

    return products


def _scores(queries: Array, rows: Array, where: Array | None = None) -> Array:
    """The inner products [C, b] or [C, b, T] of queries with a block of rows; -inf where `where` is False."""
    spec = "cs,bs->cb" if rows.ndim == 2 else "cs,bts->cbt"
    products = contracted(spec, queries, rows, working_dtype(queries.dtype, rows.dtype))
    return products if where is None else jnp.where(where[None], products, jnp.full_like(products, -jnp.inf))


def _in_blocks(queries: Any, rows: Any, where: Any, size: int) -> tuple[Array, Batches]:
    """(the queries, blocks of about `size` rows of whole examples), after a check of all shapes."""
    queries, shape = jnp.asarray(queries), np.shape(rows)
    if len(shape) not in (2, 3) or queries.ndim != 2 or queries.shape[1] != shape[-1]:
        raise ValueError(
            f"{caller()}: expected queries [C, S] and rows [N, S], or [N, T, S] for T positions of each example, got "
            f"shapes {list(queries.shape)} and {list(shape)}. Project both with the same sides."
        )
    if where is not None and np.shape(where) != shape[:-1]:
        raise ValueError(
            f"{caller()}: expected where of shape {list(shape[:-1])}, with a boolean for each row, got "
            f"{list(np.shape(where))}."
        )
    arrays = (rows,) if where is None else (rows, where)
    return queries, Batches(*arrays, size=max(1, size // math.prod(shape[1:-1])))


def _concatenated(a: TopK, b: TopK) -> TopK:
    return TopK(jnp.concatenate([a.values, b.values], 1), jnp.concatenate([a.indices, b.indices], 1))


def _best(scores: TopK, k: int) -> TopK:
    values, places = lax.top_k(scores.values, min(k, scores.values.shape[1]))
    return TopK(values, jax.vmap(lambda indices, chosen: indices[chosen])(scores.indices, places))


def _best_of_batch(scores: Array, count: int, k: int) -> TopK:
    """The largest scores [C, b] or [C, b, T] of a batch, whose first example has the index `count`."""
    C, *sizes = scores.shape
    flat = scores.reshape(C, math.prod(sizes))
    values, places = lax.top_k(flat, min(k, flat.shape[1]))
    example, *position = jnp.unravel_index(places, sizes)
    return TopK(values, jnp.stack([count + example, *position], -1) if position else count + example)
