"""Projections of the gradient of every term of a loss, such as the loss at each position of a sequence."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxgrad.attribution.projection import measured_numbers
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.frameworks import add_advice
from jaxgrad.per_example.transform import Transformed


def per_position_projection(
    fun: Callable[..., Any],
    sides: PyTree,
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = 0,
    block_size: int = 1,
    spmd_axis_name: Any = None,
) -> Callable[..., Any]:
    """A few numbers for each position of each sequence: the projected gradient of the loss at that position alone.

    Formula: for an example b whose terms `fun` returns, ℓ_b1 … ℓ_bT, the row (b, t) is the projection of ∇ℓ_bt: what a
    step on the prediction of token t alone would change. A term reaches every weight that it depends on, at all
    positions: in a causal model those up to t. If an example's loss is the sum of its terms, its projection is the sum
    of its rows. A different split has the same sum: that of one backward pass by the position at which a weight is
    used, δ_t a_tᵀ. Its part t contains the later terms that depend on position t, and differs from ∇ℓ_bt.

    Cost: T backward passes over the batch, `block_size` of them at once, each with the memory of
    `per_example_projection`, and a forward pass for each block. To pay for fewer positions, let `fun` return only the
    terms that are asked for.

    Args:
        fun: fun(params, *example) → the terms [T] of one example's loss, of a real floating dtype.
        sides: as in `project`. Under `jax.jit` they are constants of the compiled program, unless they are an argument
            of the jitted function and `per_position_projection` is called inside that function.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.
        block_size: number of positions whose backward passes run at once.

    Returns:
        A function of fun's arguments, the batched ones with an example axis, that returns (terms [B, T], numbers
        [B, T, S]). The numbers are in the order of `project`, in float32 or wider. Jit it.

    Raises:
        TypeError: fun does not return a vector of one or more real floating numbers; otherwise as in
            `per_example_grad`.
        ValueError: the block size is below 1; or the tree of `sides` is not the parameters', or a `Sides` does not fit
            its parameter.

    Example:
        >>> def losses(params, ids):                         # of a bigram model, for each token but the first
        ...     logits = jnp.tanh(params["in"][ids[:-1]]) @ params["out"]
        ...     return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], 1)[:, 0]
        >>> params = {"in": jnp.ones((50, 16)), "out": jnp.ones((16, 50))}
        >>> sides = jg.attribution.random_sides(params, jax.random.key(0), 4)
        >>> terms, numbers = jax.jit(per_position_projection(losses, sides))(params, jnp.ones((5, 12), int))
        >>> terms.shape, numbers.shape
        ((5, 11), (5, 11, 32))

    Source: Chang et al. 2024 (TrackStar) and Choe et al. 2024 (LoGra) project and store the gradients of sequences;
    Grosse et al. 2023 attribute to tokens, by the other split.
    """
    if operator.index(block_size) < 1:
        raise ValueError(f"per_position_projection: expected a block size of at least 1, got {block_size}.")

    def term(*args: Any, **kwargs: Any) -> Array:
        *args_, t = args
        return fun(*args_, **kwargs)[t]

    whole = Transformed("per_position_projection", fun, argnums, in_axes)
    one_term = Transformed("per_position_projection", term, argnums, in_axes, spmd_axis_name=spmd_axis_name)

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    @naming("per_position_projection")
    def measured(*args: Any, **kwargs: Any) -> Any:
        arguments = whole.arguments(args, kwargs)

        def at(t: Array) -> tuple[Array, Array]:
            values, _, numbers = measured_numbers(one_term, _with_position(arguments, t), sides)
            return values, numbers

        T = _number_of_terms(fun, arguments)
        at_once = min(block_size, T) if arguments.batch_size else 1  # lax.map has no blocks of arrays of size zero
        terms, numbers = lax.map(at, jnp.arange(T, dtype=jnp.int32), batch_size=at_once if at_once > 1 else None)
        return jnp.swapaxes(terms, 0, 1), jnp.swapaxes(numbers, 0, 1)

    return measured


def _with_position(arguments: Arguments, t: Array) -> Arguments:
    """Append a position to the arguments; it is the same for all examples."""

    def rebuild(params: Any, examples: Any, shared: Any) -> Any:
        args, kwargs = arguments.rebuild(params, examples, shared[:-1])
        return (*args, shared[-1]), kwargs

    return dataclasses.replace(arguments, shared=[*arguments.shared, t], rebuild=rebuild)


def _number_of_terms(fun: Callable[..., Any], arguments: Arguments) -> int:
    """T; raise TypeError unless fun returns a vector of a real floating dtype, not an empty one, for one example."""

    def terms(params: Any, example: Any) -> Any:
        args, kwargs = arguments.loss_arguments(params, example)
        try:
            return fun(*args, **kwargs)
        except Exception as error:
            add_advice(error, args)
            raise

    found = jax.eval_shape(terms, arguments.params, arguments.example)
    shape: Any
    dtype: Any
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    if shape is None or len(shape) != 1 or shape == (0,) or not jnp.issubdtype(dtype, jnp.floating):
        got = type(found).__name__ if shape is None else f"{dtype} of shape {list(shape)}"
        raise TypeError(
            f"{caller()}: expected a function that returns the terms [T] of one example's loss, T ≥ 1 real numbers, "
            f"got {got}. Return the loss at every position, before it is summed or averaged."
        )
    return int(shape[0])
