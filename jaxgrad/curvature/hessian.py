"""Products with the Hessian of a mean loss."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxgrad.errors import naming
from jaxgrad.per_example.arguments import Arguments, arguments_of
from jaxgrad.per_example.on_mesh import call_on_mesh


def hessian_vector_product(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0, spmd_axis_name: Any = None
) -> Callable[..., PyTree]:
    """The Hessian of the mean loss times a direction, by forward mode over reverse mode.

    Cost: about two plain gradients.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function of (params, v, *batch) that returns a tree with the parameters' shapes and dtypes; v is a direction
        with the parameters' structure, shapes and dtypes.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> product = hessian_vector_product(lambda w, x: (w @ x) ** 2 / 2)
        >>> product(jnp.ones(2), jnp.array([1.0, 2.0]), jnp.eye(2)).tolist()
        [0.5, 1.0]

    Source: Pearlmutter 1994.
    """

    @naming("hessian_vector_product")
    def product(params: PyTree, v: PyTree, *batch: Any) -> PyTree:
        args = (params, *batch)
        arguments = arguments_of(args, {}, argnums, in_axes)
        numbers = argnums if isinstance(argnums, Sequence) else [argnums]
        chosen = args[argnums] if isinstance(argnums, int) else tuple(args[k] for k in numbers)

        def along(arguments: Arguments, chosen: PyTree, v: PyTree) -> PyTree:
            def mean_loss(chosen: PyTree) -> Array:
                def one(example: Sequence[Any]) -> Array:
                    inputs = list(arguments.loss_arguments(arguments.params, example)[0])
                    for k, value in zip(numbers, [chosen] if isinstance(argnums, int) else chosen, strict=True):
                        inputs[k] = value
                    return loss(*inputs)

                over_examples = jax.vmap(
                    one, (arguments.axes,), axis_size=arguments.batch_size, spmd_axis_name=spmd_axis_name
                )
                return over_examples(arguments.batch).mean()

            return jax.jvp(jax.grad(mean_loss), (chosen,), (v,))[1]

        return call_on_mesh(along, arguments, chosen, chosen, v)

    return product
