"""explain: how per_example_grad holds the gradient of each parameter, reported before anything is computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.per_example.algebra.factors import arrays, shown
from jaxgrad.per_example.algebra.inner_products import plan_name
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.mapped import of_examples
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.transform import Route, Transformed


@dataclass(frozen=True)
class ExplanationRow:
    """How one parameter's gradient is held, and why.

    Attributes:
        path: the parameter's path, as `jax.tree_util.keystr` writes it.
        shape: the parameter's shape.
        dtype: the parameter's dtype.
        how: "factored", "materialized" or "unused".
        factors: the kinds and shapes of the factors, with the example axis.
        norm: how the norm is computed, one entry for each pair of factors.
        nbytes: bytes that the factors of all examples hold.
        materialized_nbytes: bytes of the materialized gradients of all examples.
        why: why the gradient is materialized; empty if it is not. "vector" means that the parameter has at most one
            axis, so that its gradient is no larger than an activation; "smaller" means that the gradient is no larger
            than the arrays that it is computed from. On the direct route, why says what `primitive` does that keeps the
            gradient from being a product.
        primitive: the primitive that causes the direct route; empty on other routes.
        source: the file and line where the loss uses the primitive; empty if JAX does not know them.

    Example:
        >>> row = explain(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((30, 20)), jnp.ones((4, 20))).rows[0]
        >>> row.how, row.factors
        ('factored', ('Outer([4, 30], [4, 20])',))
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    how: str
    factors: tuple[str, ...]
    norm: tuple[str, ...]
    nbytes: int
    materialized_nbytes: int
    why: str = ""
    primitive: str = ""
    source: str = ""


@dataclass(frozen=True)
class Explanation:
    """How the gradient of each parameter is held: one row per parameter, printed as a table.

    Attributes:
        rows: the rows, in the order of the parameters' tree.
        batch_size: B.

    Example:
        >>> loss = lambda params, x: params["out"] @ jnp.tanh(params["in"] @ x)
        >>> table = explain(loss)({"in": jnp.ones((30, 20)), "out": jnp.ones(30)}, jnp.ones((4, 20)))
        >>> table["['out']"].why, table.nbytes < table.materialized_nbytes
        ('vector', True)
    """

    rows: tuple[ExplanationRow, ...]
    batch_size: int

    @property
    def nbytes(self) -> int:
        """The number of bytes that the factors of all parameters hold."""
        return sum(row.nbytes for row in self.rows)

    @property
    def materialized_nbytes(self) -> int:
        """The number of bytes that the materialized gradients of all parameters would take."""
        return sum(row.materialized_nbytes for row in self.rows)

    @property
    def direct(self) -> tuple[ExplanationRow, ...]:
        """The rows of the parameters that take the direct route."""
        return tuple(row for row in self.rows if row.primitive)

    def __getitem__(self, path: str) -> ExplanationRow:
        """The row of the parameter at `path`.

        Raises:
            KeyError: no parameter has this path.
        """
        for row in self.rows:
            if row.path == path:
                return row
        paths = ", ".join(row.path or "''" for row in self.rows)
        raise KeyError(f"Explanation[...]: expected one of the paths {paths}, got {path}.")

    def __str__(self) -> str:
        head = ("parameter", "shape", "how", "why", "held as", "norm", "held", "materialized")
        lines = [head, *(_cells(row) for row in self.rows)]
        lines.append(("all", "", "", "", "", "", _bytes(self.nbytes), _bytes(self.materialized_nbytes)))
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        table.insert(1, "-" * max(len(line) for line in table))
        for row in self.direct:
            place = f" at {row.source}" if row.source else " in a function of JAX that the loss calls"
            table.append(f"{row.path or 'parameter'}: materialized because of {row.primitive}{place}: {row.why}")
        return "\n".join([f"{self.batch_size} examples", *table])


def explain(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = 0,
    has_aux: bool = False,
    spmd_axis_name: Any = None,
) -> Callable[..., Explanation]:
    """Report how `per_example_grad(fun)` holds the gradient of each parameter, without computing anything.

    The report prints as a table. Its column `how` is "factored", "materialized" or "unused". The column `why` says why
    a gradient is materialized: "vector" if the parameter has at most one axis, so that its gradient is no larger than
    an activation; "smaller" if the gradient is no larger than the arrays that it is computed from; "direct" if the
    parameter takes the direct route, on which its gradient is computed as `vmap(jax.grad)` would compute it. A line
    below the table gives the reason for each direct route.

    The column `held as` names the kinds of factors and the shapes of their arrays, without axes of size 1. The letters
    stand for B examples, T positions, G groups, F fan-out and K fan-in. Outer(left [B, G, T, F], right [B, G, T, K])
    stands for Σ_t left ⊗ right. Rows(ids [B, T], values [B, T, K]) stands for rows of a table; if the loss uses only
    the mean or the sum of the rows, the values are [B, K]. Windows(cotangents, image) stands for a convolution.
    Mapped(arrays of other factors, shared arrays) stands for a weight that is transformed before it is used.
    Common(number, array) stands for a penalty, and Dense for the gradient itself.

    The column `norm` says how the inner product of each pair of factors, which the norm needs, is computed. "sides" is
    the inner product of the left sides times that of the right sides, if T = 1 (for one factor with itself,
    ‖left‖²·‖right‖²); "positions", the inner products of the sides at all T × T pairs of positions; "matrix", the
    product, materialized for a few examples at a time; "direction", the inner product with an array shared by all
    examples; "map", the gradients after the linear map of a Mapped, materialized for a few examples at a time, or not
    materialized if the map is elementwise and T = 1; "entries", the gradient's entries; "apart", nothing, because the
    two factors occupy different entries of the parameter.

    Args:
        fun, argnums, in_axes, has_aux, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function that takes the arguments of `per_example_grad(fun)`, as arrays or as `jax.ShapeDtypeStruct`s, and
        returns an `Explanation`.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> loss = lambda W, x: jnp.tanh(jnp.exp(W) @ x).sum() + (W**2).sum()
        >>> row = explain(loss)(jnp.ones((30, 20)), jnp.ones((4, 20))).rows[0]
        >>> row.how, row.norm
        ('factored', ('direction', 'direction', 'map'))
    """
    transformed = Transformed("explain", fun, argnums, in_axes, has_aux, spmd_axis_name=spmd_axis_name)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        arguments = transformed.arguments(args, kwargs)
        # The loss may read the values of shared arguments, so only a ShapeDtypeStruct, which has none, is traced.
        valueless = [k for k, leaf in enumerate(arguments.shared) if isinstance(leaf, jax.ShapeDtypeStruct)]

        def run(params: list[Any], batch: list[Any], shapes: list[Any]) -> tuple[PerExampleGrads, list[Route]]:
            traced = dict(zip(valueless, shapes, strict=True))
            shared = [traced.get(k, leaf) for k, leaf in enumerate(arguments.shared)]
            return transformed.evaluated(replace(arguments, params=params, batch=batch, shared=shared))[2:]

        g, routes = jax.eval_shape(run, arguments.params, arguments.batch, [arguments.shared[k] for k in valueless])
        rows = [
            _row(path, leaf.factors, route)
            for path, leaf, route in zip(g.paths, jax.tree.leaves(g, is_leaf=_is_leaf), routes, strict=True)
        ]
        return Explanation(tuple(rows), g.batch_size)

    return explained


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Leaf)


def _row(path: str, factors: Sequence[Any], route: Route) -> ExplanationRow:
    layout = factors[0].layout
    held = [a for f in factors for a in arrays(f)]
    B = of_examples(factors)[0].shape[0]
    norm = tuple(plan_name(f, f_) for i, f in enumerate(factors) for f_ in factors[: i + 1])
    return ExplanationRow(
        path=path,
        shape=layout.shape,
        dtype=layout.dtype,
        how=route.how if route.how in ("factored", "unused") else "materialized",
        factors=tuple(map(shown, factors)),
        norm=norm,
        nbytes=sum(math.prod(a.shape) * a.dtype.itemsize for a in held),
        materialized_nbytes=B * layout.size * layout.dtype.itemsize,
        **_why(route),
    )


def _why(route: Route) -> dict[str, str]:
    if route.how == "direct" and route.reason is not None:
        return {"primitive": route.reason.primitive, "source": route.reason.source, "why": route.reason.why}
    return {"why": {"vector": "vector", "formed": "smaller"}.get(route.how, "")}


def _cells(row: ExplanationRow) -> tuple[str, ...]:
    kinds = " + ".join(row.factors)
    norm = ", ".join(dict.fromkeys(row.norm))
    return (
        row.path or "parameter",
        str(list(row.shape)),
        row.how,
        "direct" if row.primitive else row.why,
        kinds,
        norm,
        _bytes(row.nbytes),
        _bytes(row.materialized_nbytes),
    )


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    return f"{n:.1f} GiB"
