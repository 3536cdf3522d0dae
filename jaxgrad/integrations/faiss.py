"""FAISS indexes of stored rows, for approximate or repeated searches."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxgrad.errors import caller, naming
from jaxgrad.progress import counted
from jaxgrad.streams.batches import Batches

__all__ = ["index"]


@naming("faiss.index")
def index(
    rows: Float[Any, " N *T S"],
    description: str = "Flat",
    *,
    where: Bool[Any, " N *T"] | None = None,
    size: int = 8192,
    train: int = 65536,
    progress: bool = False,
) -> Any:
    """Build a FAISS index of stored rows, to find those with the largest inner products with queries.

    `jg.streams.search` reads all rows at each call and is exact. An index of FAISS stays in memory, and most kinds of
    it are compressed, look at a part of the rows only, or both. The index "Flat" is exact: it finds what
    `jg.streams.search` finds, up to rounding.

    The rows are read in blocks and converted to float32, the only dtype that FAISS takes. The memory is that of the
    index, of one block, and of the rows that it is trained on.

    Args:
        rows: [N, S], in any floating dtype, memory-mapped or not; or [N, T, S], with a row for each position of each
            example.
        description: of an index, in the language of `faiss.index_factory`: "Flat" for 4·S bytes for each row, "SQfp16"
            for 2·S, "IVF4096,PQ64" for 64 bytes and a search in a few of 4096 clusters.
        where: booleans, [N] or [N, T]: the rows that are added; the others, such as padding, are left out. None adds
            all.
        size: number of rows in a block, at least those of one example.
        train: largest number of rows, drawn at random with the seed 0, on which clusters and codes are trained.
        progress: True shows a progress bar (needs rich).

    Returns:
        The `faiss.Index`. Its `search(queries, k)` takes a NumPy array of float32, [C, S], and returns (inner products
        [C, k], indices [C, k]). The indices count all rows, those left out too; where fewer than k rows are found, an
        index is -1. With positions, `np.unravel_index(indices, (N, T))` turns them into examples and positions.
        `faiss.write_index` and `faiss.read_index` store it.

    Raises:
        ModuleNotFoundError: FAISS is not installed.
        ValueError: the rows have another number of axes; `where` has another shape; a row that is added is not finite
            in float32, since FAISS would never find it; a number is below 1; or FAISS does not know the description, or
            cannot train it on so few rows.

    Example:
        >>> rows = np.float16([[1, 0], [0, 3], [2, 0]])           # or jg.streams.load(folder).rows["projections"]
        >>> values, indices = index(rows).search(np.eye(2, dtype=np.float32), 2)
        >>> indices.tolist()
        [[2, 0], [1, 0]]

    Source: Douze et al. 2024 (FAISS).
    """
    shape = np.shape(rows)
    if len(shape) not in (2, 3) or (where is not None and np.shape(where) != shape[:-1]):
        raise ValueError(
            f"{caller()}: expected rows [N, S] or [N, T, S] and, as where, a boolean for each row, got shapes "
            f"{list(shape)} and {None if where is None else list(np.shape(where))}."
        )
    if operator.index(train) < 1:
        raise ValueError(f"{caller()}: expected to train on at least 1 row, got {train}.")
    mask = [] if where is None else [where]
    T = math.prod(shape[1:-1])
    blocks = Batches(rows, *mask, size=size if T <= 1 else max(1, size // T))
    found = _trained(description, rows, where, train)
    for k, block in enumerate(counted((blocks[i] for i in range(len(blocks))), len(blocks), progress=progress)):
        values = _float32(block[0].reshape(-1, shape[-1]))
        names = k * blocks.size * T + np.arange(len(values), dtype=np.int64)
        if where is not None:
            values, names = values[block[1].reshape(-1)], names[block[1].reshape(-1)]
        _check_finite(values, names, shape)
        _ = found.add(values) if where is None else found.add_with_ids(values, names)
    return found


def _trained(description: str, rows: Any, where: Any, count: int) -> Any:
    """An empty index, trained on at most `count` rows if it needs any."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller()}: expected the package FAISS, which is not installed. Run pip install faiss-cpu, or "
            f"pip install '.[faiss]' in a clone of jaxgrad.",
            name="faiss",
        ) from error
    rows = np.asarray(rows).reshape(-1, np.shape(rows)[-1])
    try:
        found = faiss.index_factory(rows.shape[1], description, faiss.METRIC_INNER_PRODUCT)
        if not found.is_trained:
            candidates = None if where is None else np.flatnonzero(np.asarray(where))
            n = len(rows) if candidates is None else len(candidates)
            chosen = np.random.default_rng(0).choice(n, min(n, count), replace=False)
            chosen = np.sort(chosen if candidates is None else candidates[chosen])
            found.train(_float32(rows[chosen]))
    except RuntimeError as error:
        raise ValueError(
            f"{caller()}: expected the description of an index that FAISS can build from {len(rows)} rows of "
            f"{rows.shape[1]} numbers, got {description!r}. FAISS says: {str(error).strip().splitlines()[-1]}"
        ) from error
    return found if where is None else faiss.IndexIDMap2(found)


def _float32(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.float32)


def _check_finite(values: np.ndarray, names: np.ndarray, shape: Sequence[int]) -> None:
    """Raise ValueError unless all rows are finite."""
    if np.isfinite(values).all():
        return
    first = names[np.argmin(np.isfinite(values).all(1))]
    row = [int(i) for i in np.unravel_index(first, shape[:-1])]
    raise ValueError(
        f"{caller()}: expected rows that are finite in float32, got another at rows{row}. Leave it out by where=."
    )
