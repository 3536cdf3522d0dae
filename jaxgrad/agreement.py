"""Hold a hand-written gradient against `jax.grad`, example by example and leaf by leaf."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Gradient = Callable[..., PyTree]

RTOL = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How far a leaf may be off, relative to the norm of the same example's reference gradient, by the leaf's dtype."""

_NOISE = 32  # a reference is not trusted below this many eps of the leaf's largest gradient


@dataclass(frozen=True)
class LeafAgreement:
    """One row of a report: what one leaf of the tree showed.

    Attributes:
        path: the leaf's path in the parameter tree, as `jax.tree_util.keystr` writes it.
        shape, dtype: of the candidate's leaf, without the example axis ("missing" if it has none).
        expected_shape, expected_dtype: of the parameter.
        max_abs: largest absolute difference of any entry, over all examples.
        max_rel: largest ‖candidate - reference‖ / ‖reference‖ over the examples (0 where both are 0), the floor
            standing in for a reference below it.
        worst_example: index of the example that is furthest beyond its tolerance, or None in an empty batch.
        rtol: the tolerance that applied.
        excess: that example's ‖difference‖ in units of its tolerance: above 1 it disagrees, NaN if not finite.
        problem: empty when the leaf agrees, otherwise what is wrong in a few words.
    """

    path: str
    shape: tuple[int, ...] | str
    dtype: str
    expected_shape: tuple[int, ...]
    expected_dtype: str
    max_abs: float
    max_rel: float
    worst_example: int | None
    rtol: float
    excess: float
    problem: str


@dataclass(frozen=True)
class AgreementReport:
    """What `check_gradient` found; `str()` is a table, `agrees` the verdict, `leaves` the rows."""

    leaves: tuple[LeafAgreement, ...]
    examples: int
    reference: str

    @property
    def agrees(self) -> bool:
        """True if every leaf agrees."""
        return not any(leaf.problem for leaf in self.leaves)

    def assert_agrees(self) -> None:
        """Raise AssertionError, with this table and chex's message, unless every leaf agrees."""
        shapes = {leaf.path: (leaf.shape, leaf.dtype) for leaf in self.leaves}
        expected = {leaf.path: (leaf.expected_shape, leaf.expected_dtype) for leaf in self.leaves}
        excess = {leaf.path: np.float64(leaf.excess) for leaf in self.leaves}
        try:
            chex.assert_equal(shapes, expected)
            chex.assert_tree_all_finite(excess)
            chex.assert_trees_all_close(excess, jax.tree.map(np.zeros_like, excess), rtol=0, atol=1)
        except AssertionError as error:
            raise AssertionError(
                f"the gradients disagree.\n{self}\n"
                f"chex, on shapes, dtypes and ‖Δ‖ in units of the tolerance (at most 1):\n{error}"
            ) from None

    def __str__(self) -> str:
        rows = [("leaf", "shape", "dtype", "max |Δ|", "max ‖Δ‖/‖ref‖", "tolerance", "worst example", "verdict")]
        for leaf in self.leaves:
            rows.append(
                (
                    leaf.path,
                    str(leaf.shape),
                    leaf.dtype,
                    f"{leaf.max_abs:.2e}",
                    f"{leaf.max_rel:.2e}",
                    f"{leaf.rtol:.0e}",
                    str(leaf.worst_example),
                    leaf.problem or "agrees",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        verdict = "agrees" if self.agrees else "DISAGREES"
        return "\n".join([*lines, f"{verdict} with {self.reference} on {self.examples} examples"])


def check_gradient(
    candidate: Gradient,
    loss: Callable[..., Any],
    params: PyTree,
    *batch: PyTree,
    oracle: str | None = None,
    rtol: float | None = None,
    batched: bool | None = None,
    batch_size: int | None = None,
) -> AgreementReport:
    """Compare a gradient you derived by hand with `jax.grad`, for every example of a batch.

    Formula: for example i and leaf l, with c the candidate's gradient and r the reference vmap(jax.grad(loss)), the
    leaf agrees if ‖c_il - r_il‖ ≤ rtol·‖r_il‖ + floor, floor = 32·eps·max_i ‖r_il‖ + √size·tiny. Below the first term
    `jax.grad` itself has no digits (eps is that of the reference's dtype, float32 or float64); the second is what
    underflow takes (tiny is the smallest number that the leaf's dtype holds). Norms are over the entries of a leaf.
    Both sides are computed and written out in full: B × parameters numbers at once, or batch_size × parameters.

    Args:
        candidate: candidate(params, *example) → tree of gradients, or candidate(params, *batch) → the same with a
            leading example axis (a tree of arrays, or anything whose `materialize()` returns one).
        loss: loss(params, *example) → scalar, a pure JAX function of ONE example.
        params: tree of floating arrays.
        *batch: arrays or trees of them, axis 0 the example axis.
        oracle: "float64" computes the reference in float64 from the same numbers; None in the dtypes that are there,
            float16 and bfloat16 as float32.
        rtol: relative tolerance for every leaf; by default by the leaf's dtype: float64 1e-9, float32 1e-4,
            float16 1e-2, bfloat16 5e-2 (`agreement.RTOL`).
        batched: whether `candidate` takes a batch (True) or one example (False); None tries one example first, and
            takes the form whose result has the shapes of a gradient.
        batch_size: how many examples to compute at once; None for all.

    Returns:
        AgreementReport: a row a leaf, by its path. It does not agree when a leaf is missing or unexpected, has another
        shape or dtype than its parameter, differs beyond the tolerance, or is NaN or infinite on either side.

    Raises:
        ValueError: batch arguments without a common leading axis; a candidate that can be called neither way.
        TypeError: parameters that are not floating; an unknown oracle.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> by_hand = lambda w, x, y: 2 * (w @ x - y) * x
        >>> w, X, Y = jnp.ones(3), jnp.arange(12.0).reshape(4, 3), jnp.ones(4)
        >>> check_gradient(by_hand, loss, w, X, Y).agrees
        True
        >>> wrong_sign = lambda w, x, y: -by_hand(w, x, y)
        >>> check_gradient(wrong_sign, loss, w, X, Y).leaves[0].max_rel
        2.0
    """
    if oracle not in (None, "float64"):
        raise TypeError(f'check_gradient: expected oracle to be None or "float64", got {oracle!r}.')
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"check_gradient: expected batch_size ≥ 1, got {batch_size}. None computes all at once.")
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    examples = _batch_size(batch)
    paths = _paths(params)
    tree: Any = jax.tree.structure(params)
    for path, leaf in paths.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"check_gradient: expected floating parameters, got {leaf.dtype} at params{path}. "
                "Close over what is not differentiated, or pass it with the batch."
            )
    if batched is None:
        batched = _takes_a_batch(candidate, params, batch)
    together = candidate if batched else jax.vmap(candidate, in_axes=(None, *[0] * len(batch)))

    step = batch_size or max(examples, 1)
    parts = []
    for start in range(0, max(examples, 1), step):
        part = jax.tree.map(lambda leaf, start=start: leaf[start : start + step], batch)
        gradients, reference = _materialized(together(params, *part)), _reference(loss, params, part, oracle)
        found = _paths(gradients)
        rows = [_compare(path, paths[path], found.get(path), reference[path], rtol, start) for path in paths]
        rows += [_unexpected(path, leaf) for path, leaf in found.items() if path not in paths]
        if found.keys() == paths.keys() and jax.tree.structure(gradients) != tree:
            rows.append(_other_tree(gradients, params))
        parts.append(rows)
    name = "jax.grad" + (f" in {oracle}" if oracle else "")
    return AgreementReport(tuple(_worst(rows) for rows in zip(*parts, strict=True)), examples, name)


def assert_agree(candidate: Gradient, loss: Callable[..., Any], params: PyTree, *batch: PyTree, **options: Any) -> None:
    """`check_gradient` as an assertion, for a test.

    Args: as in `check_gradient`.

    Raises:
        AssertionError: the gradients disagree; the message is chex's, with the report's table.

    Example:
        >>> loss = lambda w, x: (w @ x) ** 2
        >>> assert_agree(lambda w, x: 2 * (w @ x) * x, loss, jnp.ones(3), jnp.eye(3))
    """
    check_gradient(candidate, loss, params, *batch, **options).assert_agrees()


def _batch_size(batch: Sequence[PyTree]) -> int:
    sizes = {
        f"batch[{k}]{jax.tree_util.keystr(path)}": leaf.shape[:1]
        for k, argument in enumerate(batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument)
    }
    if len(set(sizes.values())) != 1 or () in sizes.values():
        shown = ", ".join(f"{path}: {size[0] if size else 'a scalar'}" for path, size in sizes.items()) or "no array"
        raise ValueError(
            f"check_gradient: expected batch arguments with a common leading example axis, got {shown}. "
            "Close over what the examples share."
        )
    return next(iter(sizes.values()))[0]


def _paths(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _materialized(gradients: Any) -> PyTree:
    return gradients.materialize() if hasattr(gradients, "materialize") else gradients


def _takes_a_batch(candidate: Gradient, params: PyTree, batch: tuple[PyTree, ...]) -> bool:
    """Which of the two ways of calling gives a gradient; where neither does, the one that can be called at all."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    wanted = {path: leaf.shape for path, leaf in _paths(params).items()}
    size = _batch_size(batch)
    errors, callable_ways = [], []
    for batched, arguments in ((False, one), (True, batch)):
        try:
            shapes = jax.eval_shape(lambda *a: _materialized(candidate(*a)), params, *arguments)
        except Exception as error:  # whatever the user's function raises for the form it was not written for
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        prefix = (size,) if batched else ()
        if {path: leaf.shape for path, leaf in _paths(shapes).items()} == {
            path: prefix + shape for path, shape in wanted.items()
        }:
            return batched
        callable_ways.append(batched)
    if not callable_ways:
        raise ValueError(
            "check_gradient: expected a candidate(params, *example) or candidate(params, *batch), got one that raises "
            f"either way. With one example: {errors[0]}. With the batch: {errors[1]}."
        )
    return callable_ways[0]


def _reference(
    loss: Callable[..., Any], params: PyTree, batch: tuple[PyTree, ...], oracle: str | None
) -> dict[str, np.ndarray]:
    with jax.enable_x64(True) if oracle else nullcontext():
        params, batch = jax.tree.map(_to_float64 if oracle else _to_float32_at_least, (params, batch))
        gradient = jax.vmap(jax.grad(loss), in_axes=(None, *[0] * len(batch)))
        return {path: np.asarray(leaf) for path, leaf in _paths(jax.jit(gradient)(params, *batch)).items()}


def _to_float64(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _to_float32_at_least(leaf: jax.Array) -> jax.Array:
    half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if half else leaf


def _compare(
    path: str, param: jax.Array, found: Any, reference: np.ndarray, rtol: float | None, start: int
) -> LeafAgreement:
    dtype = str(param.dtype)
    tolerance = RTOL.get(dtype, RTOL["bfloat16"]) if rtol is None else rtol
    nan = float("nan")
    if found is None:
        return LeafAgreement(
            path, "missing", "missing", param.shape, dtype, nan, nan, None, tolerance, nan, "is missing"
        )
    shape, found_dtype = tuple(np.shape(found))[1:], str(found.dtype)
    if np.shape(found) != reference.shape:
        problem = f"has shape {np.shape(found)}, expected {reference.shape}"
        return LeafAgreement(path, shape, found_dtype, param.shape, dtype, nan, nan, None, tolerance, nan, problem)
    with np.errstate(invalid="ignore", over="ignore"):
        eps = float(jnp.finfo(reference.dtype).eps)
        width = int(np.prod(param.shape))
        c, r = (np.asarray(a).astype(np.float64).reshape(len(reference), width) for a in (found, reference))
        finite = np.isfinite(c).all(1) & np.isfinite(r).all(1)
        difference, norms = _norms(c - r), _norms(r)
        floor = _NOISE * eps * norms[finite].max(initial=0) + width**0.5 * _smallest(param.dtype)
        relative = _ratio(difference, np.maximum(norms, floor))
        excess = np.where(finite, _ratio(difference, tolerance * norms + floor), np.nan)
    problem = ""
    if found_dtype != dtype:
        problem = f"has dtype {found_dtype}, expected {dtype}"
    elif not finite.all():
        problem = f"is not finite in {int((~finite).sum())} examples"
    elif (excess > 1).any():
        problem = f"differs in {int((excess > 1).sum())} examples"
    worst = int(np.argmax(np.where(finite, excess, np.inf))) if len(excess) else None
    return LeafAgreement(
        path=path,
        shape=shape,
        dtype=found_dtype,
        expected_shape=param.shape,
        expected_dtype=dtype,
        max_abs=float(np.abs(c - r).max(initial=0)),
        max_rel=float(relative.max(initial=0)),
        worst_example=None if worst is None else worst + start,
        rtol=tolerance,
        excess=0.0 if worst is None else float(excess[worst]),
        problem=problem,
    )


def _smallest(dtype: jnp.dtype) -> float:
    """What underflow may take from an entry: a subnormal of float16, a normal number where subnormals are flushed."""
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal) if dtype == jnp.float16 else float(info.smallest_normal)


def _norms(rows: np.ndarray) -> np.ndarray:
    """The norm of every row, scaled so that no square overflows or underflows."""
    largest = np.abs(rows).max(axis=1, initial=0)
    unit = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return unit * np.linalg.norm(rows / unit[:, None], axis=1)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b with 0 / 0 = 0."""
    return np.divide(a, b, out=np.where(a == 0, 0.0, np.inf), where=b > 0)


def _unexpected(path: str, found: Any) -> LeafAgreement:
    nan = float("nan")
    shape = tuple(np.shape(found))[1:]
    return LeafAgreement(path, shape, str(found.dtype), (), "none", nan, nan, None, nan, nan, "is not a parameter")


def _other_tree(gradients: PyTree, params: PyTree) -> LeafAgreement:
    nan, found, expected = float("nan"), type(gradients).__name__, type(params).__name__
    problem = f"is a {found}, expected the parameters' {expected} and the same containers in it"
    return LeafAgreement("the tree", found, "", (), "", nan, nan, None, nan, nan, problem)


def _worst(rows: Sequence[LeafAgreement]) -> LeafAgreement:
    """The same leaf from several parts of a batch, as one row: the first of those furthest off."""
    worst = max(rows, key=lambda row: (bool(row.problem), np.inf if np.isnan(row.excess) else row.excess))
    largest = {
        field: float(np.max([getattr(row, field) for row in rows]))  # NaN wins, as it should
        for field in ("max_abs", "max_rel")
    }
    return LeafAgreement(**(worst.__dict__ | largest))
