"""The empirical neural tangent kernel of a model."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.per_example.algebra.chunks import map_examples
from jaxgrad.per_example.jacobian import per_example_jacobian
from jaxgrad.per_example.transform import per_example_grad


def ntk(fun: Callable[..., Any], *, block_size: int | None = None) -> Callable[..., Float[Array, "B C *outputs"]]:
    """The empirical neural tangent kernel: inner products of the gradients of a model's outputs.

    Args:
        fun: fun(params, x) → the outputs of one example: a real scalar, or an array of O numbers.
        block_size: number of examples of each side whose gradients are held at once, to bound the memory; the gradients
            of the second side are then computed once for every block of the first. None holds all.

    Returns:
        A function of (params, x, x2=None) that returns [B, C] for a scalar fun, otherwise J_b J_cᵀ [B, C, O, O′], where
        O′ is the number of outputs on x2 (`transpose(0, 2, 1, 3).reshape(B * O, C * O′)` makes it a matrix). x and x2
        are trees of arrays with an example axis; x2 = None stands for x. Jit the function.

    Raises:
        TypeError, ValueError: as in `per_example_grad`; a block size below 1; scalar outputs on one side and arrays on
            the other.

    Example:
        >>> kernel = jax.jit(ntk(lambda w, x: jnp.tanh(w @ x)))
        >>> kernel(jnp.zeros(3), jnp.eye(3)[:2]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> kernel(jnp.zeros((4, 3)), jnp.eye(3), jnp.eye(3)[:2]).shape
        (3, 2, 4, 4)

    Source: Jacot et al. 2018; the factored form is from Novak et al. 2022, "structured derivatives".
    """
    if block_size is not None and operator.index(block_size) < 1:
        raise ValueError(f"ntk: expected a block size of at least 1 or None, got {block_size}.")

    def gradients(params: PyTree, x: Any) -> Any:
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), x)
        outputs = jax.eval_shape(fun, params, example)
        if not isinstance(outputs, jax.ShapeDtypeStruct):
            raise TypeError(f"ntk: expected a function that returns one array, got {type(outputs).__name__}.")
        return (per_example_jacobian(fun) if outputs.shape else per_example_grad(fun))(params, x)

    def block(params: PyTree, x: Any, x2: Any) -> Array:
        g = gradients(params, x)
        other = None if x2 is None else gradients(params, x2)
        if other is not None and type(g) is not type(other):
            outputs, outputs2 = (getattr(h, "outputs", ()) for h in (g, other))
            raise ValueError(
                f"ntk: expected numbers on both sides or arrays on both, got outputs {outputs} on x and {outputs2} on "
                f"x2. Return an array from fun for both."
            )
        return g.gram(other)

    def kernel(params: PyTree, x: Any, x2: Any = None) -> Array:
        if block_size is None:
            return block(params, x, x2)
        x2 = x if x2 is None else x2

        def row(x: Any) -> Array:
            return jnp.swapaxes(map_examples(lambda c: jnp.swapaxes(block(params, x, c), 0, 1), block_size, x2), 0, 1)

        return map_examples(row, block_size, x)

    return kernel
