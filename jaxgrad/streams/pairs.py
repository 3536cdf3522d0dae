"""Gram matrices and influence over all pairs of examples; gradients are recomputed when they are needed again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jaxgrad.curvature.damping import Relative, checked_damping
from jaxgrad.curvature.solve import damped_solve, in_full_precision
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.transform import per_example_grad
from jaxgrad.progress import counted
from jaxgrad.streams.batches import Batch, checked, checked_sequences


def gram(
    loss: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
    progress: bool = False,
) -> Callable[..., Float[np.ndarray, "N M"]]:
    """The Gram matrix GGᵀ of N examples, or GG′ᵀ of N examples and M other examples, computed from batches.

    Memory: up to twice the result (its blocks, and the array into which they are joined), and the factors of two
    batches. Cost: each gradient of `others` is computed once for each batch in `batches`. Without `others`, the cost is
    half that of `others=batches`.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.
        progress: True shows a progress bar (needs rich).

    Returns:
        A function of (params, batches, others=None) that returns [N, M], a NumPy array in float32 or wider. `batches`
        and `others` are sequences of batches; a batch is a tuple of the loss's arguments other than the parameters. All
        batches but the last should have the same size, because every size is compiled separately. `others` defaults to
        `batches`.

    Raises:
        TypeError: `batches` cannot be counted and read again, as with a generator; a batch is not a tuple; otherwise as
            in `per_example_grad`.
        ValueError: there are no batches; otherwise as in `per_example_grad`.

    Example:
        >>> batches = jg.streams.Batches(np.eye(3, dtype=np.float32), size=2)
        >>> gram(lambda w, x: w @ x)(jnp.zeros(3), batches).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    blocks = _Blocks(per_example_grad(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name), progress)

    @naming("streams.gram")
    def matrix(params: PyTree, batches: Sequence[Batch], others: Sequence[Batch] | None = None) -> np.ndarray:
        return blocks.gram(params, batches, others)

    return matrix


def influence(
    loss: Callable[..., Any],
    damping: Any,
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
    progress: bool = False,
) -> Callable[..., Float[np.ndarray, "C B"]]:
    """`attribution.influence` of B training examples on C test examples, computed from batches.

    The inverse is not approximated, for any number of parameters. Memory: a few arrays of B × B and B × C numbers, and
    the factors of two batches. Cost: the norms of the training gradients, two Gram matrices (training with training
    examples, and training with test examples), and a B × B solve.

    Args:
        loss, argnums, in_axes, spmd_axis_name, progress: as in `gram`.
        damping: μ ≥ 0, or `jg.curvature.relative(ratio)`.

    Returns:
        A function of (params, train, test) that returns [C, B], a NumPy array; a score > 0 means that the training
        example is helpful. `train` and `test` are sequences of batches, as in `gram`.

    Raises:
        TypeError: as in `gram`.
        ValueError: the damping is not a number ≥ 0; otherwise as in `gram`.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> train = jg.streams.Batches(np.eye(2), np.array([2.0, 3.0]), size=1)
        >>> test = jg.streams.Batches(np.eye(2), np.array([3.0, 0.0]), size=2)
        >>> influence(loss, 0.0)(jnp.ones(2), train, test).round(3).tolist()
        [[2.0, 0.0], [0.0, -0.5]]
    """
    with naming("streams.influence"):
        checked_damping(damping)
    blocks = _Blocks(per_example_grad(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name), progress)

    @naming("streams.influence")
    @in_full_precision
    def scores(params: PyTree, train: Sequence[Batch], test: Sequence[Batch]) -> np.ndarray:
        checked_sequences(train=train, test=test)
        norms = [blocks.largest_norm(params, train[k]) for k in range(len(train))]
        count = sum(len(jax.tree.leaves(train[k])[0]) for k in range(len(train)))
        root = 0.0 if isinstance(damping, Relative) else math.sqrt(float(damping)) * math.sqrt(count)
        exponent = math.frexp(max([*norms, root]))[1] if np.isfinite(norms).all() else 0
        unit = 2.0**exponent
        K = blocks.gram(params, train, None, unit)
        products = blocks.gram(params, train, test, unit)
        if isinstance(damping, Relative):
            return np.asarray(jax.jit(damped_solve)(K, products, damping)).T
        ridge = jnp.asarray(float(damping) / unit * len(K) / unit, K.dtype)
        return np.asarray(jax.jit(damped_solve)(K, products, ridge)).T

    return scores


class _Blocks:
    """Blocks of a Gram matrix, each from the gradients of two batches; every step is compiled once for a batch size."""

    def __init__(self, gradients: Callable[..., PerExampleGrads], progress: bool):
        def scaled(params: PyTree, batch: Batch, unit: Any) -> PerExampleGrads:
            g = gradients(params, *batch)
            return g.scale(jnp.full(g.batch_size, 1 / unit))

        self._scaled, self._product = jax.jit(scaled, static_argnums=2), jax.jit(lambda g, g_: g.gram(g_))
        self._largest = jax.jit(lambda params, batch: gradients(params, *batch).norms().max())
        self._progress = progress

    def largest_norm(self, params: PyTree, batch: Batch) -> float:
        """The largest norm of a gradient in the batch."""
        return float(self._largest(params, checked(batch)))

    def gram(
        self, params: PyTree, batches: Sequence[Batch], others: Sequence[Batch] | None, unit: float = 1.0
    ) -> np.ndarray:
        """The Gram matrix of the gradients, which are divided by `unit` first.

        Args:
            params, batches, others: as in `gram`.
            unit: a power of two.
        """
        checked_sequences(batches=batches, **({} if others is None else {"others": others}))
        if not len(batches) or (others is not None and not len(others)):
            raise ValueError(f"{caller()}: expected at least one batch on each side, got none.")
        second = batches if others is None else others
        blocks: list[list[np.ndarray]] = []
        in_order = (batches[i] for i in range(len(batches)))
        for i, batch in enumerate(counted(in_order, len(batches), progress=self._progress)):
            g = self._scaled(params, checked(batch), unit)
            row = [blocks[j][i].T for j in range(i)] if others is None else []
            for j in range(len(row), len(second)):
                row.append(np.asarray(self._product(g, self._scaled(params, checked(second[j]), unit))))
            blocks.append(row)
        return np.block(blocks)
