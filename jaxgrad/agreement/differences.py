"""Central differences of the loss in float64: a reference that uses no rule of differentiation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

DIRECTIONS = 2  # random directions for each leaf
_STEP = np.finfo(np.float64).eps ** (1 / 3)  # relative to the leaf's root mean square; balances truncation and rounding
_NOISE = 64  # the loss is taken to be accurate to this many eps of float64


class Slope(NamedTuple):
    """The slope of the loss along one direction in one leaf, for every example.

    Attributes:
        leaf: index of the leaf.
        direction: entries with the leaf's shape, of mean square 1.
        slope: [B], extrapolated from two central differences.
        error: [B], a bound on the slope's own error. It is large where the loss has a kink or curves sharply.
    """

    leaf: int
    direction: np.ndarray
    slope: np.ndarray
    error: np.ndarray


def slopes(values: Callable[[list[np.ndarray]], PyTree], params: Sequence[Any]) -> Iterator[Slope]:
    """Slopes along `DIRECTIONS` random directions in every leaf; the directions are the same at every call.

    Formula: with D(h) = (f(p + hv) - f(p - hv)) / 2h, the slope is (4D(h/2) - D(h)) / 3. Its error is bounded by
    |D(h) - D(h/2)|, the difference of the two one-sided slopes, and the rounding of f.

    Args:
        values: parameters in float64 → the loss of every example [B], in float64.
        params: the parameters' leaves.
    """
    rng = np.random.default_rng(0)
    start = [np.asarray(p, np.float64) for p in params]
    middle = np.asarray(values(start))
    for k, p in enumerate(start):
        size = np.sqrt(np.mean(p**2)) if p.size else 0.0
        h = _STEP * (size if size > 0 and np.isfinite(size) else 1.0)
        for _ in range(DIRECTIONS):
            v = rng.standard_normal(p.shape)

            def values_along(t: float, k: int = k, v: np.ndarray = v) -> np.ndarray:
                return np.asarray(values([q + t * v if i == k else q for i, q in enumerate(start)]))

            yield Slope(k, v, *_slope(middle, values_along, h))


def _slope(middle: np.ndarray, values_along: Callable[[float], np.ndarray], h: float) -> tuple[np.ndarray, np.ndarray]:
    """(the slope, a bound on its error), from values of the loss along a direction; `middle` is values_along(0)."""
    full_step, half_step = [(values_along(t), values_along(-t)) for t in (h, h / 2)]
    with np.errstate(invalid="ignore", over="ignore"):
        coarse, fine = (full_step[0] - full_step[1]) / (2 * h), (half_step[0] - half_step[1]) / h
        kink = np.abs(half_step[0] - 2 * middle + half_step[1]) / (h / 2)
        largest = np.max(np.abs([middle, *full_step, *half_step]), axis=0)
        error = np.abs(coarse - fine) + kink + _NOISE * np.finfo(np.float64).eps * largest / h
        return (4 * fine - coarse) / 3, error
