"""The derivatives of log ψ for the samples of variational Monte Carlo, as rows of real numbers."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.rows import JacobianRows, Matrix, widened_rows
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra import complexes
from jaxgrad.per_example.algebra.chunks import map_examples, sum_examples
from jaxgrad.per_example.arguments import arguments_of
from jaxgrad.per_example.frameworks import add_advice
from jaxgrad.per_example.jacobian import per_example_jacobian
from jaxgrad.per_example.transform import per_example_grad


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows",), meta_fields=("parts", "tree"))
@dataclass(frozen=True)
class LogDerivatives:
    """O [N, parameters], the derivatives of log ψ for N samples, which `log_derivatives` returns.

    Attributes:
        rows: the real rows: one for each sample if log ψ is real, otherwise two, those of Re log ψ and Im log ψ. They
            are gradients with respect to real numbers: a complex parameter counts as its real and imaginary parts.
        parts: the number of rows of a sample, 1 or 2.
        tree: the structure of the parameters, with a pair in place of every complex one.

    Example:
        >>> log_psi = lambda w, spins: jnp.log(jnp.cosh(w @ spins)).sum()
        >>> O = log_derivatives(log_psi)(jnp.ones((4, 3)), jnp.ones((5, 3)))
        >>> O.samples, O.parts
        (5, 1)
    """

    rows: Any
    parts: int
    tree: Any

    @property
    def samples(self) -> int:
        """The number of samples, N."""
        count: int = self.rows.batch_size // self.parts
        return count

    def tree_of(self, leaves: Sequence[Array]) -> PyTree:
        """A change of the parameters, from its real numbers."""
        return complexes.joined(jax.tree.unflatten(self.tree, leaves), complexes.number)

    def leaves_of(self, change: PyTree) -> list[Array]:
        """The real numbers of a change of the parameters.

        Raises:
            ValueError: the tree or a shape is not that of the parameters.
        """
        leaves: list[Any]
        leaves, structure = jax.tree.flatten(complexes.parts(change))
        shapes = [p.shape for p in self.shapes]
        if structure != self.tree or [jnp.shape(a) for a in leaves] != shapes:
            got = [jnp.shape(a) for a in leaves]
            raise ValueError(
                f"{caller()}: expected a tree like the parameters', {self.tree} with shapes {shapes}, got {structure} "
                f"with shapes {got}."
            )
        return [jnp.asarray(a) for a in leaves]

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes, dtypes and, on an explicit mesh, shardings of the real parameters."""
        if isinstance(self.rows, BlockedRows):
            return [jax.eval_shape(lambda a: a, a) for a in self.rows.params]
        shapes: list[jax.ShapeDtypeStruct] = jax.tree.leaves(jax.eval_shape(self.rows.sum))
        return shapes


def log_derivatives(
    log_amplitude: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
    block_size: int | None = None,
) -> Callable[..., LogDerivatives]:
    """The derivatives O of log ψ for every sample, for `minsr`, `spring` and `scale_by_spring`.

    Args:
        log_amplitude: log_amplitude(params, sample) → log ψ of one sample: a real or complex number, or two real
            numbers, log|ψ| and the phase. The parameters may be real or complex; log ψ need not be holomorphic.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.
        block_size: number of samples whose derivatives are held at once, to bound the memory; None for all. In blocks,
            they are computed again whenever they are needed: for a Gram matrix of K blocks, K + 1 times.

    Returns:
        A function of (params, *samples), arrays with an example axis. It returns `LogDerivatives`.

    Raises:
        TypeError: log ψ is anything else; otherwise as in `per_example_grad`.
        ValueError: the block size is below 1; otherwise as in `per_example_grad`.

    Example:
        >>> log_psi = lambda w, spins: jnp.log(jnp.cosh(w @ spins)).sum()
        >>> w, spins = jnp.ones((4, 3), jnp.complex64), jnp.ones((5, 3))
        >>> O = log_derivatives(log_psi, block_size=2)(w, spins)
        >>> O.samples, O.parts
        (5, 2)
    """
    if block_size is not None and operator.index(block_size) < 1:
        raise ValueError(f"log_derivatives: expected a block size of at least 1 or None, got {block_size}.")

    @naming("log_derivatives")
    def derivatives(params: PyTree, *samples: Any, **kwargs: Any) -> LogDerivatives:
        arguments = arguments_of((params, *samples), kwargs, argnums, in_axes)
        is_array = [hasattr(a, "dtype") for a in arguments.shared]
        others = [None if array else a for a, array in zip(arguments.shared, is_array, strict=True)]

        def outputs(params: Sequence[Any], example: Sequence[Any], shared: Sequence[Any]) -> Array:
            arrays = iter(shared)
            leaves = [next(arrays) if array else a for a, array in zip(others, is_array, strict=True)]
            args, kwargs = arguments.rebuild(params, example, leaves)
            try:
                value = log_amplitude(*args, **kwargs)
            except Exception as error:
                add_advice(error, args)
                raise
            return _real_parts(value)

        shared = [a for a, array in zip(arguments.shared, is_array, strict=True) if array]
        parts = jax.eval_shape(outputs, arguments.params, arguments.example, shared).size
        transform: Any = per_example_grad if parts == 1 else per_example_jacobian

        def rows(params: Sequence[Any], examples: Sequence[Any], shared: Sequence[Any]) -> Matrix:
            in_axes = (None, 0, None)
            found = transform(outputs, in_axes=in_axes, spmd_axis_name=spmd_axis_name)(params, examples, shared)
            return found if parts == 1 else JacobianRows.of(found)

        held: Any
        if block_size is None:
            held = rows(arguments.params, arguments.examples_first, shared)
        else:
            data = arguments.params, arguments.examples_first, shared
            scale = jnp.ones((), jax.eval_shape(lambda *data: rows(*data).norms(), *data).dtype)
            held = BlockedRows(*data, scale, rows, block_size, parts)
        return LogDerivatives(held, parts, arguments.params_tree)

    return derivatives


def _real_parts(value: Any) -> Array:
    """log ψ as one real number, or as the vector of its real and imaginary part."""
    leaves = [jnp.asarray(a) for a in jax.tree.leaves(value)]
    if len(leaves) == 1 and leaves[0].shape == () and jnp.issubdtype(leaves[0].dtype, jnp.complexfloating):
        return jnp.stack([leaves[0].real, leaves[0].imag])
    sizes = sum(a.size for a in leaves)
    if sizes not in (1, 2) or not all(jnp.issubdtype(a.dtype, jnp.floating) for a in leaves):
        got = ", ".join(f"{a.dtype}{list(a.shape)}" for a in leaves) or "nothing"
        raise TypeError(
            f"{caller()}: expected log ψ of one sample, a real or complex number, or two real numbers (log|ψ| and the "
            f"phase), got {got}. For a model of a batch write lambda params, x: model(params, x[None])[0]."
        )
    dtype = jnp.result_type(*leaves)
    numbers = jnp.concatenate([a.ravel().astype(dtype) for a in leaves])
    return numbers[0] if sizes == 1 else numbers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "examples", "shared", "scale"),
    meta_fields=("block", "size", "outputs"),
)
@dataclass(frozen=True)
class BlockedRows:
    """The rows of a matrix whose factors are computed when they are needed, for a block of examples at a time.

    The methods do what the methods of `PerExampleGrads` with the same names do.

    Attributes:
        params, examples, shared: the arguments of `block`, the examples with their axis in front.
        scale: a number that multiplies every row.
        block: (params, examples, shared) → the rows of these examples.
        size: the number of examples in a block.
        outputs: R, the number of rows of an example.
    """

    params: Any
    examples: Any
    shared: Any
    scale: Array
    block: Callable[..., Matrix]
    size: int
    outputs: int

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        count: int = self.examples[0].shape[0] * self.outputs
        return count

    def _rows(self, examples: Any) -> Matrix:
        return widened_rows(self.block(self.params, examples, self.shared)) * self.scale

    def _mapped(self, function: Callable[[Matrix], Array]) -> Float[Array, " n"]:
        """A number for every row."""
        numbers = lambda examples: function(self._rows(examples)).reshape(-1, self.outputs)  # noqa: E731
        return map_examples(numbers, self.size, self.examples).ravel()

    def summed(self, function: Callable[..., Any], *numbers: Array) -> Any:
        """The sum over blocks of function(rows, *numbers), for numbers with the axis of examples in front."""
        each = lambda examples, *numbers: function(self._rows(examples), *numbers)  # noqa: E731
        return sum_examples(each, self.size, self.examples, *numbers)

    def norms(self) -> Float[Array, " n"]:
        """The norm of every row."""
        return self._mapped(lambda rows: rows.norms())

    def dot(self, v: PyTree) -> Float[Array, " n"]:
        """G v."""
        return self._mapped(lambda rows: rows.dot(v))

    def gram(self) -> Float[Array, "n n"]:
        """G Gᵀ."""
        R = self.outputs

        def down(examples: Any) -> Array:
            first = self._rows(examples)

            def across(examples: Any) -> Array:  # [c, R, b·R]
                products = first.gram(self._rows(examples)).T
                return products.reshape(-1, R, products.shape[1])

            products = map_examples(across, self.size, self.examples, spread=False)
            return jnp.moveaxis(products.reshape(self.batch_size, -1, R), 0, 2)  # [b, R, n]

        return map_examples(down, self.size, self.examples).reshape(self.batch_size, self.batch_size)

    def weighted_sum(self, c: Float[Array, " n"], dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """Gᵀ c."""

        def of_block(rows: Matrix, c: Array) -> PyTree:
            return rows.weighted_sum(c.ravel(), self.scale.dtype)

        total = self.summed(of_block, c.reshape(-1, self.outputs))
        return jax.tree.map(lambda a, p: a.astype(dtype or p.dtype), total, self.params)

    def sum(self) -> PyTree:
        """The sum of the rows."""
        return self.weighted_sum(jnp.ones(self.batch_size, self.scale.dtype))

    def __mul__(self, c: Any) -> "BlockedRows":
        """Every row times one number."""
        return dataclasses.replace(self, scale=self.scale * jnp.asarray(c, self.scale.dtype))
