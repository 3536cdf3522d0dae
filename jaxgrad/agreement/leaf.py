"""Compare the leaves of a gradient with their references, for every example; each leaf gives one row of a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.agreement.differences import Slope

RTOL = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative tolerance by the leaf's dtype: allowed ‖difference‖ / ‖reference‖ for one leaf of one example."""

_IN_A_DIRECTION = 4  # a vector of norm ε has, along a random direction, an entry above 4ε once in 16,000 times
_NOISE = 32  # the reference is taken to be accurate to this many eps of the leaf's largest gradient


@dataclass(frozen=True)
class LeafAgreement:
    """One row of a report: the result for one leaf of the parameter tree.

    Attributes:
        path: the leaf's path in the parameter tree, as `jax.tree_util.keystr` writes it.
        shape: shape of the candidate's leaf, without the example axis; "missing" if there is no such leaf.
        dtype: dtype of the candidate's leaf; "missing" if there is no such leaf.
        expected_shape: shape of the parameter.
        expected_dtype: dtype of the parameter.
        max_abs: largest absolute difference of any entry, over all examples.
        max_rel: largest ‖candidate - reference‖ / ‖reference‖ over the examples, 0 where both are 0; the floor of
            `check_gradient` replaces a smaller reference norm.
        worst_example: index of the example whose difference is largest relative to its tolerance; None if the batch
            is empty.
        rtol: the relative tolerance that was applied.
        excess: ‖difference‖ of the worst example, divided by its tolerance: above 1 the leaf disagrees; NaN if a
            gradient is not finite.
        problem: empty if the leaf agrees, otherwise what is wrong in a few words.
        numerical: largest difference from a slope by central differences, divided by its tolerance; None without
            `numerical`.

    Example:
        >>> by_hand = lambda w, x: 1.5 * x
        >>> leaf = jg.check_gradient(by_hand, lambda w, x: w @ x, jnp.ones(3), jnp.eye(3)).leaves[0]
        >>> leaf.shape, leaf.max_abs, leaf.problem
        ((3,), 0.5, 'differs in 3 examples')
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
    numerical: float | None = None


class Comparison(NamedTuple):
    """The differences of one leaf from its reference, on one part of the batch.

    Attributes:
        path, shape, dtype, problem: as in `LeafAgreement`.
        param: the parameter.
        difference: ‖candidate - reference‖ of every example.
        norms: ‖reference‖ of every example.
        finite: whether both gradients of an example are finite.
        max_abs: largest absolute difference of any entry, for every example.
        eps: of the reference's dtype.
    """

    path: str
    param: Any
    shape: tuple[int, ...]
    dtype: str
    difference: np.ndarray
    norms: np.ndarray
    finite: Any
    max_abs: np.ndarray
    eps: float
    problem: str


class Slopes(NamedTuple):
    """The differences of one leaf from the slope along one direction, on one part of the batch.

    Attributes:
        difference: |⟨candidate, direction⟩ - slope| of every example.
        error: a bound on the error of every example's slope.
    """

    difference: np.ndarray
    error: np.ndarray


def against_slope(row: "Comparison | LeafAgreement", leaf: Any, slope: Slope) -> Slopes | None:
    """Compare a leaf of the candidate with a slope; None if the leaf could not be compared with its reference."""
    if isinstance(row, LeafAgreement):
        return None
    c = np.asarray(leaf)
    c = c.astype(np.complex128 if np.iscomplexobj(c) else np.float64).reshape(len(c), slope.direction.size)
    with np.errstate(invalid="ignore", over="ignore"):
        return Slopes(np.abs(c @ slope.direction.ravel() - slope.slope), slope.error)


def compared(
    params: dict[str, jax.Array], candidate: dict[str, Any], reference: dict[str, np.ndarray]
) -> dict[str, "Comparison | LeafAgreement"]:
    """Compare every leaf on one part of the batch; a leaf that cannot be compared gets its final row at once."""
    rows: dict[str, Comparison | LeafAgreement] = {}
    for path, param in params.items():
        if path not in candidate:
            rows[path] = without_numbers(path, "missing", "missing", param, "is missing")
            continue
        c, r = np.asarray(candidate[path]), reference[path]
        if c.shape != r.shape:
            problem = f"has shape {c.shape}, expected {r.shape}"
            rows[path] = without_numbers(path, c.shape[1:], str(c.dtype), param, problem)
            continue
        problem = "" if c.dtype == param.dtype else f"has dtype {c.dtype}, expected {param.dtype}"
        eps, width = float(jnp.finfo(r.dtype).eps), int(np.prod(param.shape))
        wide = np.complex128 if np.iscomplexobj(c) else np.float64
        shape, dtype = c.shape[1:], str(c.dtype)
        c, r = c.astype(wide).reshape(len(r), width), r.astype(np.float64).reshape(len(r), width)
        finite = np.isfinite(c).all(1) & np.isfinite(r).all(1)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(c - r)
        max_abs = difference.max(axis=1, initial=0)
        rows[path] = Comparison(path, param, shape, dtype, _norms(difference), _norms(r), finite, max_abs, eps, problem)
    for path, leaf in candidate.items():
        if path not in params:
            rows[path] = without_numbers(
                path, np.shape(leaf)[1:], str(np.asarray(leaf).dtype), None, "is not a parameter"
            )
    return rows


def judged(
    parts: "list[Comparison | LeafAgreement]", rtol: float | None, slopes: Sequence[Sequence[Slopes]] = ()
) -> LeafAgreement:
    """Return the row of one leaf, for all parts of the batch together; `slopes` has a list for each part."""
    first = parts[0]
    if isinstance(first, LeafAgreement):
        return first
    comparisons = [part for part in parts if isinstance(part, Comparison)]
    difference, norms, finite, max_abs = (
        np.concatenate([getattr(part, field) for part in comparisons])
        for field in ("difference", "norms", "finite", "max_abs")
    )
    dtype = str(first.param.dtype)
    tolerance = RTOL.get(dtype, RTOL["bfloat16"]) if rtol is None else rtol
    width = int(np.prod(first.param.shape))
    floor = _NOISE * first.eps * norms[finite].max(initial=0) + width**0.5 * _smallest(first.param.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        relative = _ratio(difference, np.maximum(norms, floor))
        excess = np.where(finite, _ratio(difference, tolerance * norms + floor), np.nan)
    problem = first.problem
    if not problem and not finite.all():
        problem = f"is not finite in {int((~finite).sum())} examples"
    elif not problem and (excess > 1).any():
        problem = f"differs in {int((excess > 1).sum())} examples"
    allowed = _IN_A_DIRECTION * (tolerance * norms + floor)
    numerical = [_slope_excess(direction, allowed) for direction in zip(*slopes, strict=True)]
    wrong = sum((~(ratio <= 1) for ratio in numerical), np.zeros(len(norms), bool)).astype(bool)
    if not problem and wrong.any():
        problem = f"differs from central differences in {int(wrong.sum())} examples"
    worst = int(np.argmax(np.where(finite, excess, np.inf))) if len(excess) else None
    return LeafAgreement(
        path=first.path,
        shape=first.shape,
        dtype=first.dtype,
        expected_shape=first.param.shape,
        expected_dtype=dtype,
        max_abs=float(max_abs.max(initial=0)),
        max_rel=float(relative.max(initial=0)),
        worst_example=worst,
        rtol=tolerance,
        excess=0.0 if worst is None else float(excess[worst]),
        problem=problem,
        numerical=float(np.max(numerical, initial=0)) if numerical else None,
    )


def _slope_excess(parts: Sequence[Slopes], allowed: np.ndarray) -> np.ndarray:
    """The difference from the slope of every example, divided by its tolerance, for all parts of the batch."""
    difference, error = (np.concatenate([getattr(part, field) for part in parts]) for field in Slopes._fields)
    with np.errstate(invalid="ignore"):
        return _ratio(difference, allowed + error)


def without_numbers(path: str, shape: tuple[int, ...] | str, dtype: str, param: Any, problem: str) -> LeafAgreement:
    """The row of a leaf that cannot be compared."""
    nan = float("nan")
    expected_shape, expected_dtype = ((), "none") if param is None else (param.shape, str(param.dtype))
    return LeafAgreement(path, shape, dtype, expected_shape, expected_dtype, nan, nan, None, nan, nan, problem)


def _smallest(dtype: jnp.dtype) -> float:
    """The most that an entry loses to underflow: the smallest normal number, as subnormals may be flushed to 0.

    For float16 it is the smallest subnormal.
    """
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal) if dtype == jnp.float16 else float(info.smallest_normal)


def _norms(rows: np.ndarray) -> np.ndarray:
    """The norm of every row; rows are scaled first, so that no square overflows or underflows."""
    largest = np.abs(rows).max(axis=1, initial=0)
    unit = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return unit * np.linalg.norm(rows / unit[:, None], axis=1)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b with 0 / 0 = 0."""
    return np.divide(a, b, out=np.where(a == 0, 0.0, np.inf), where=b > 0)
