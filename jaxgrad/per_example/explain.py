"""explain: what per_example_grad does with each parameter, before anything is computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.per_example.algebra.factors import arrays
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.mapped import of_examples
from jaxgrad.per_example.algebra.pairs import way
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.transform import Route, Transformed


@dataclass(frozen=True)
class Row:
    """What is done for one parameter.

    Attributes:
        path: as `jax.tree_util.keystr` writes it.
        shape: the parameter's.
        dtype: the parameter's.
        how: "factored"; "formed", a product that is smaller than its operands; "vector", at most one axis,
            written out as it is no larger than an activation; "unused"; "direct", written out as
            vmap(jax.grad) would.
        factors: the kinds and shapes of what is held, with the example axis.
        norm: how the norm is computed, a part for each pair of factors.
        nbytes: bytes held.
        materialized_nbytes: bytes of the gradients written out.
        primitive: of a direct route, the primitive where the gradient ceases to be a product; empty otherwise.
        source: its file and line in the loss.
        why: the reason.

    Example:
        >>> row = explain(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((30, 20)), jnp.ones((4, 20))).rows[0]
        >>> row.how, row.factors
        ('factored', ('Outer([4, 1, 1, 30], [4, 1, 1, 20])',))
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    how: str
    factors: tuple[str, ...]
    norm: tuple[str, ...]
    nbytes: int
    materialized_nbytes: int
    primitive: str = ""
    source: str = ""
    why: str = ""


@dataclass(frozen=True)
class Explanation:
    """A row for each parameter; printed, a table.

    Attributes:
        rows: in the order of the parameters' tree.
        batch_size: B.

    Example:
        >>> loss = lambda params, x: params["out"] @ jnp.tanh(params["in"] @ x)
        >>> told = explain(loss)({"in": jnp.ones((30, 20)), "out": jnp.ones(30)}, jnp.ones((4, 20)))
        >>> told["['out']"].how, told.nbytes < told.materialized_nbytes
        ('vector', True)
    """

    rows: tuple[Row, ...]
    batch_size: int

    @property
    def nbytes(self) -> int:
        """Bytes held for all parameters."""
        return sum(row.nbytes for row in self.rows)

    @property
    def materialized_nbytes(self) -> int:
        """Bytes of all gradients written out."""
        return sum(row.materialized_nbytes for row in self.rows)

    @property
    def direct(self) -> tuple[Row, ...]:
        """The parameters that take the direct route."""
        return tuple(row for row in self.rows if row.how == "direct")

    def __getitem__(self, path: str) -> Row:
        """The row of the parameter at `path`."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"{path}: expected one of {', '.join(row.path for row in self.rows)}")

    def __str__(self) -> str:
        head = ("parameter", "shape", "how", "held as", "norm", "held", "written out")
        lines = [head, *(_cells(row) for row in self.rows)]
        lines.append(("all", "", "", "", "", _bytes(self.nbytes), _bytes(self.materialized_nbytes)))
        widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        table.insert(1, "-" * max(len(line) for line in table))
        for row in self.direct:
            at = f" at {row.source}" if row.source else " in a function of JAX that the loss calls"
            table.append(f"{row.path or 'parameter'}: written out, for {row.primitive}{at}: {row.why}")
        return "\n".join([f"{self.batch_size} examples", *table])


def explain(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, *, in_axes: Any = 0, has_aux: bool = False
) -> Callable[..., Explanation]:
    """What `per_example_grad(fun)` does with each parameter: a function of its arguments, that computes nothing.

    How to read the table. `how`: "factored", kept as a product; "formed", a product that is smaller carried out than as
    factors; "vector", at most one axis, written out as it is no larger than an activation; "unused"; "direct", written
    out as `vmap(jax.grad)` would. `held as`, B examples, T positions, G groups: Outer(left [B, G, T, F], right
    [B, G, T, K]) for Σ_t left ⊗ right; Rows(ids [B, T], values [B, T, K]) for rows of a table, values [B, 1, K] for a
    mean of rows; Windows(cotangents, image) for a convolution; Mapped(the arrays of other factors, and those that all
    examples share) for a weight that passes a map before it is used; Common(number, array) for a penalty; Dense for the
    gradient itself. `norm`: from "sides", ‖left‖·‖right‖; "positions", inner products of T × T positions; "matrix", the
    product carried out, a few examples at a time; "direction", a product with an array that all examples share; "map",
    what is behind a map; or its "entries".

    Args:
        fun, argnums, in_axes, has_aux: as in `per_example_grad`.

    Returns:
        A function of the same arguments (arrays, or `jax.ShapeDtypeStruct`s) that returns an `Explanation`.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> loss = lambda W, x: jnp.tanh(jnp.exp(W) @ x).sum() + (W**2).sum()
        >>> row = explain(loss)(jnp.ones((30, 20)), jnp.ones((4, 20))).rows[0]
        >>> row.how, row.norm
        ('factored', ('direction', 'direction', 'map'))
    """
    transformed = Transformed("explain", fun, argnums, in_axes, has_aux)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        arguments = transformed.arguments(args, kwargs)
        # What all examples share stays as it is, for the loss may look at its values, unless it has none.
        absent = [k for k, leaf in enumerate(arguments.shared) if isinstance(leaf, jax.ShapeDtypeStruct)]

        def run(params: list[Any], batch: list[Any], shapes: list[Any]) -> tuple[PerExampleGrads, list[Route]]:
            traced = dict(zip(absent, shapes, strict=True))
            shared = [traced.get(k, leaf) for k, leaf in enumerate(arguments.shared)]
            return transformed.evaluated(replace(arguments, params=params, batch=batch, shared=shared))[2:]

        g, routes = jax.eval_shape(run, arguments.params, arguments.batch, [arguments.shared[k] for k in absent])
        rows = [
            _row(path, leaf.factors, route)
            for path, leaf, route in zip(g.paths, jax.tree.leaves(g, is_leaf=_is_leaf), routes, strict=True)
        ]
        return Explanation(tuple(rows), g.batch_size)

    return explained


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Leaf)


def _row(path: str, factors: Sequence[Any], route: Route) -> Row:
    layout = factors[0].layout
    held = [a for f in factors for a in arrays(f)]
    B = of_examples(factors)[0].shape[0]
    reason = route.reason
    norm = tuple(way(f, f_) for i, f in enumerate(factors) for f_ in factors[: i + 1])
    return Row(
        path=path,
        shape=layout.shape,
        dtype=layout.dtype,
        how=route.how,
        factors=tuple(f"{type(f).__name__}({', '.join(str(list(a.shape)) for a in arrays(f))})" for f in factors),
        norm=norm,
        nbytes=sum(math.prod(a.shape) * a.dtype.itemsize for a in held),
        materialized_nbytes=B * layout.size * layout.dtype.itemsize,
        **({} if reason is None else {"primitive": reason.primitive, "source": reason.source, "why": reason.why}),
    )


def _cells(row: Row) -> tuple[str, ...]:
    kinds = " + ".join(row.factors)
    norm = ", ".join(dict.fromkeys(row.norm))
    return (
        row.path or "parameter",
        str(list(row.shape)),
        row.how,
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
