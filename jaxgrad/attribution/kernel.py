"""The empirical neural tangent kernel of a model."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.chunks import map_examples
from jaxgrad.per_example.arguments import Arguments, arguments_of
from jaxgrad.per_example.jacobian import PerExampleJacobian, per_example_jacobian
from jaxgrad.per_example.transform import per_example_grad
from jaxgrad.sharding import divisible, replicated

Outputs = Literal["full", "diagonal", "trace"]


def ntk(
    fun: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
    outputs: Outputs = "full",
    block_size: int | None = None,
) -> Callable[..., Float[Array, "B C *outputs"]]:
    """The empirical neural tangent kernel: inner products of the gradients of a model's outputs.

    Args:
        fun: fun(params, x) → the outputs of one example: a real scalar, or an array or tree of O numbers.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`, for the arguments (params, x) and (params, x2).
        outputs: "full" for the kernel of all pairs of outputs; "diagonal" for each output with itself; "trace" for the
            sum of these. The last two take O inner products instead of O² for each pair of examples.
        block_size: number of examples of x, and of x2, whose gradients are held at once, to bound the memory. The
            gradients are then computed once for every pair of blocks; of x with itself, each pair is computed once.
            None holds all gradients.

    Returns:
        A function of (params, x, x2=None). If fun returns a scalar, it returns the kernel [B, C]. Otherwise it returns
        J_b J_cᵀ [B, C, O, O′], where O′ is the number of outputs on x2; `transpose(0, 2, 1, 3).reshape(B * O, C * O′)`
        turns this array into a matrix. The diagonal is [B, C, O], and the trace [B, C]. The outputs of a tree are
        numbered as `jax.flatten_util.ravel_pytree` does. x and x2 are trees of arrays with an example axis; x2=None
        stands for x. Jit the function.

    Raises:
        TypeError: fun does not return real floating arrays; otherwise as in `per_example_grad`.
        ValueError: the block size is below 1; `outputs` is another word; with "diagonal" or "trace", fun has different
            numbers of outputs on x and x2; fun returns a scalar on one of x and x2 and an array on the other;
            otherwise as in `per_example_grad`.

    Example:
        >>> kernel = jax.jit(ntk(lambda w, x: jnp.tanh(w @ x)))
        >>> kernel(jnp.zeros(3), jnp.eye(3)[:2]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> kernel(jnp.zeros((4, 3)), jnp.eye(3), jnp.eye(3)[:2]).shape
        (3, 2, 4, 4)
        >>> trace = jax.jit(ntk(lambda w, x: jnp.tanh(w @ x), outputs="trace"))
        >>> trace(jnp.zeros((4, 3)), jnp.eye(3)[:2]).tolist()
        [[4.0, 0.0], [0.0, 4.0]]

    Source: Jacot et al. 2018; the factored form is that of Novak et al. 2022, "structured derivatives".
    """
    if block_size is not None and operator.index(block_size) < 1:
        raise ValueError(f"ntk: expected a block size of at least 1 or None, got {block_size}.")
    if outputs not in get_args(Outputs):
        raise ValueError(f'ntk: expected outputs="full", "diagonal" or "trace", got {outputs!r}.')

    def gradients(arguments: Arguments, examples: Sequence[Array]) -> Any:
        def outputs_of(params: Sequence[Any], example: Sequence[Any]) -> Any:
            return fun(*arguments.loss_arguments(params, example)[0])

        shapes = jax.eval_shape(outputs_of, arguments.params, arguments.example)
        is_scalar = isinstance(shapes, jax.ShapeDtypeStruct) and not shapes.shape
        transform = per_example_grad if is_scalar else per_example_jacobian
        return transform(outputs_of, spmd_axis_name=spmd_axis_name)(arguments.params, examples)

    def block(arguments: Arguments, arguments2: Arguments | None, examples: Any, examples2: Any) -> Array:
        g = gradients(arguments, examples)
        other = None if arguments2 is None else gradients(arguments2, examples2)
        if other is not None and type(g) is not type(other):
            count, count2 = (getattr(h, "outputs", ()) for h in (g, other))
            raise ValueError(
                f"ntk: expected numbers on both sides or arrays on both, got outputs {count} on x and {count2} on x2. "
                f"Return an array from fun for both."
            )
        if outputs == "full" or not isinstance(g, PerExampleJacobian):
            return g.gram(other)
        diagonal = g.diagonal_gram(other)
        return diagonal if outputs == "diagonal" else diagonal.sum(2)

    @naming("ntk")
    def kernel(params: PyTree, x: Any, x2: Any = None) -> Array:
        arguments = arguments_of((params, x), {}, argnums, in_axes)
        arguments2 = None if x2 is None else arguments_of((params, x2), {}, argnums, in_axes)
        if block_size is None:
            return block(arguments, arguments2, arguments.examples_first, arguments2 and arguments2.examples_first)
        explicit = any(replicated(a) is not None for a in arguments.examples_first)
        x_parts, x2_parts = (
            [divisible(a, math.gcd(block_size, a.shape[0])) for a in side.examples_first]
            for side in (arguments, arguments2 or arguments)
        )
        if arguments2 is None and block_size < arguments.batch_size and not explicit:
            return _symmetric(lambda a, b: block(arguments, arguments, a, b), block_size, x_parts)

        arguments2 = arguments2 or arguments

        def row(examples: Sequence[Array]) -> Array:
            transposed = lambda examples2: jnp.swapaxes(block(arguments, arguments2, examples, examples2), 0, 1)  # noqa: E731
            return jnp.swapaxes(map_examples(transposed, block_size, x2_parts), 0, 1)

        return map_examples(row, block_size, x_parts)

    return kernel


def _symmetric(
    block: Callable[[Sequence[Array], Sequence[Array]], Array], size: int, examples: Sequence[Array]
) -> Array:
    """The kernel of examples with themselves, from its blocks on and above the diagonal.

    A block has every n-th example, so that it is sharded as the examples are.
    """
    B = examples[0].shape[0]
    count = -(-B // size)

    def divided(a: Array) -> Array:
        a = a if count * size == B else a[jnp.minimum(jnp.arange(count * size), B - 1)]  # fills up the last blocks
        return a.reshape(size, count, *a.shape[1:])

    def of_pair(pair: tuple[Array, Array]) -> Array:
        return block(*([jax.lax.dynamic_index_in_dim(a, k, 1, keepdims=False) for a in parts] for k in pair))

    parts = list(map(divided, examples))
    first, second = (jnp.asarray(k) for k in np.triu_indices(count))
    blocks = jax.lax.map(of_pair, (first, second))  # [pairs, size, size, …]
    turned = blocks.swapaxes(1, 2)
    turned = turned.swapaxes(3, 4) if turned.ndim == 5 else turned  # J_c J_bᵀ is the transpose of J_b J_cᵀ
    whole = jnp.zeros((count, count, *blocks.shape[1:]), blocks.dtype)
    whole = whole.at[second, first].set(turned).at[first, second].set(blocks)
    whole = whole.transpose(2, 0, 3, 1, *range(4, whole.ndim))
    return whole.reshape(count * size, count * size, *blocks.shape[3:])[:B, :B]
