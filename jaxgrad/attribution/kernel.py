"""The empirical neural tangent kernel of a model."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.chunks import map_examples
from jaxgrad.per_example.arguments import Arguments, arguments_of
from jaxgrad.per_example.jacobian import per_example_jacobian
from jaxgrad.per_example.transform import per_example_grad


def ntk(
    fun: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
    block_size: int | None = None,
) -> Callable[..., Float[Array, "B C *outputs"]]:
    """The empirical neural tangent kernel: inner products of the gradients of a model's outputs.

    Args:
        fun: fun(params, x) → the outputs of one example: a real scalar, or an array of O numbers.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`, for the arguments (params, x) and (params, x2).
        block_size: number of examples of x, and of x2, whose gradients are held at once, to bound the memory. The
            gradients on x2 are then computed once for every block of x. None holds all gradients.

    Returns:
        A function of (params, x, x2=None). If fun returns a scalar, it returns the kernel [B, C]. Otherwise it returns
        J_b J_cᵀ [B, C, O, O′], where O′ is the number of outputs on x2; `transpose(0, 2, 1, 3).reshape(B * O, C * O′)`
        turns this array into a matrix. x and x2 are trees of arrays with an example axis; x2=None stands for x. Jit the
        function.

    Raises:
        TypeError: fun does not return one array; otherwise as in `per_example_grad`.
        ValueError: the block size is below 1; fun returns a scalar on one of x and x2 and an array on the other;
            otherwise as in `per_example_grad`.

    Example:
        >>> kernel = jax.jit(ntk(lambda w, x: jnp.tanh(w @ x)))
        >>> kernel(jnp.zeros(3), jnp.eye(3)[:2]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> kernel(jnp.zeros((4, 3)), jnp.eye(3), jnp.eye(3)[:2]).shape
        (3, 2, 4, 4)

    Source: Jacot et al. 2018; the factored form is that of Novak et al. 2022, "structured derivatives".
    """
    if block_size is not None and operator.index(block_size) < 1:
        raise ValueError(f"ntk: expected a block size of at least 1 or None, got {block_size}.")

    def gradients(arguments: Arguments, examples: Sequence[Array]) -> Any:
        def outputs_of(params: Sequence[Any], example: Sequence[Any]) -> Any:
            return fun(*arguments.loss_arguments(params, example)[0])

        outputs = jax.eval_shape(outputs_of, arguments.params, arguments.example)
        if not isinstance(outputs, jax.ShapeDtypeStruct):
            raise TypeError(f"ntk: expected a function that returns one array, got {type(outputs).__name__}.")
        transform = per_example_jacobian if outputs.shape else per_example_grad
        return transform(outputs_of, spmd_axis_name=spmd_axis_name)(arguments.params, examples)

    def block(arguments: Arguments, arguments2: Arguments | None, examples: Any, examples2: Any) -> Array:
        g = gradients(arguments, examples)
        other = None if arguments2 is None else gradients(arguments2, examples2)
        if other is not None and type(g) is not type(other):
            outputs, outputs2 = (getattr(h, "outputs", ()) for h in (g, other))
            raise ValueError(
                f"ntk: expected numbers on both sides or arrays on both, got outputs {outputs} on x and {outputs2} on "
                f"x2. Return an array from fun for both."
            )
        return g.gram(other)

    @naming("ntk")
    def kernel(params: PyTree, x: Any, x2: Any = None) -> Array:
        arguments = arguments_of((params, x), {}, argnums, in_axes)
        arguments2 = None if x2 is None else arguments_of((params, x2), {}, argnums, in_axes)
        if block_size is None:
            return block(arguments, arguments2, arguments.examples_first, arguments2 and arguments2.examples_first)
        arguments2 = arguments2 or arguments

        def row(examples: Sequence[Array]) -> Array:
            transposed = lambda examples2: jnp.swapaxes(block(arguments, arguments2, examples, examples2), 0, 1)  # noqa: E731
            return jnp.swapaxes(map_examples(transposed, block_size, arguments2.examples_first), 0, 1)

        return map_examples(row, block_size, arguments.examples_first)

    return kernel
