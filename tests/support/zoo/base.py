"""What an entry of the zoo is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Loss:
    """A loss of one example, and how `per_example_grad` must hold its gradients.

    Attributes:
        loss: loss(params, *example) -> scalar.
        params: float64 arrays.
        batch: the arguments of the examples, with the example axes that `in_axes` names.
        factored: paths, as from `jax.tree_util.keystr`, of the parameters whose gradients must stay factored.
        products: paths of the parameters whose gradients are products: factored, or materialized if that is smaller.
        in_axes: one entry for each argument of the batch; None for 0 throughout.
        rtol: the relative error that is allowed.
    """

    name: str
    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    factored: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    in_axes: tuple[Any, ...] | None = None
    rtol: float = 1e-12


def collection() -> tuple[list[Loss], Callable[..., Any]]:
    """A list of losses, and the decorator that adds a function to it under its name."""
    entries: list[Loss] = []

    def entry(params, batch, factored=(), products=(), in_axes=None, rtol=1e-12):
        def add(loss):
            entries.append(Loss(loss.__name__, loss, params, batch, factored, products, in_axes, rtol))
            return loss

        return add

    return entries, entry


def paths(*names: str) -> tuple[str, ...]:
    """The paths of keys of a dict."""
    return tuple(f"['{name}']" for name in names)


class Draws:
    """Arrays from one seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape)

    def weight(self, *shape: int) -> np.ndarray:
        """Scaled so that a product over any one or two of its axes stays near 1."""
        return self.rng.normal(size=shape) / math.prod(shape) ** (0.5 / max(len(shape) - 1, 1))

    def positive(self, *shape: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, size=shape)

    def ids(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, high, size=shape)

    def booleans(self, *shape: int) -> np.ndarray:
        return self.rng.random(size=shape) < 0.6

    def signs(self, *shape: int) -> np.ndarray:
        return self.rng.choice([-1.0, 1.0], size=shape)
