"""A few numbers per example with about the inner products of the gradients: two-sided and dense projections."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra import chunks, complexes
from jaxgrad.per_example.algebra.chunks import chunk_size
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.projected import projected
from jaxgrad.per_example.algebra.projection_sides import Sides, is_sides
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.per_example.projecting import PROJECTOR, Placed
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import joined
from jaxgrad.sharding import with_automatic_axes


@naming("project")
def project(g: PerExampleGrads, sides: PyTree) -> Float[Array, "B S"]:
    """Project every gradient from two sides, parameter by parameter: a few numbers, at the price of thin products.

    Formula: P g Qᵀ for each weight, as `Sides` says. For a gradient Σ_t δ_t a_tᵀ that is Σ_t (P δ_t)(Q a_t)ᵀ, which
    takes T·k(F + K) + T·k² operations for k rows in each matrix, where `random_projection` takes T·F·K for every
    number. The matrices meet the parameter's gradient, however it is held and however often the weight is used. No
    gradient is materialized but those that have no products or a map behind them, a few examples at a time.

    With random signs, ‖P g Qᵀ‖² has a relative standard error of about 2/√k for a gradient of rank one, and less for
    higher ranks. That of `random_projection` onto as many numbers, k², is √2/k: it needs fewer numbers, and far more
    operations.

    Args:
        g: gradients of B examples.
        sides: the parameters' tree with a `Sides`, the matrices that project one parameter's gradient, at every leaf;
            `random_sides` returns such a tree.

    Returns:
        [B, S], in float32 or wider: the numbers of one parameter after those of another, in the order of
        `jax.tree.leaves`; of each, `Sides.result(shape)` in the order of its axes. A complex parameter has the real
        parts of its numbers first, then their imaginary parts.

    Raises:
        TypeError: `g` is not PerExampleGrads.
        ValueError: the tree of `sides` is not the parameters', or a `Sides` does not fit its parameter.

    Example:
        >>> loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()
        >>> params = {"W": jnp.ones((30, 20)), "b": jnp.ones(30)}
        >>> g = jg.per_example_grad(loss)(params, jnp.ones((5, 20)))
        >>> jg.attribution.project(g, jg.attribution.random_sides(params, jax.random.key(0), 4)).shape
        (5, 20)

    Source: Choe et al. 2024 (LoGra).
    """
    checked_gradients(g)
    treedef: Any
    nodes, treedef = jax.tree.flatten(g, is_leaf=lambda node: isinstance(node, Leaf) or complexes.is_complex(node))
    shapes = [(node.real if complexes.is_complex(node) else node).layout.shape for node in nodes]
    checked = checked_sides(sides, treedef.children()[0], shapes)

    @with_automatic_axes(by_example=True)
    def numbers(nodes: list[Any], sides: list[Sides]) -> Array:
        return flattened(
            [complexes.joined(_projections(node, s), complex_parts) for node, s in zip(nodes, sides, strict=True)]
        )

    with chunks.at_most(g.chunk_bytes):
        return numbers(nodes, checked)


def per_example_projection(
    fun: Callable[..., Any],
    sides: PyTree,
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = 0,
    has_aux: bool = False,
    spmd_axis_name: Any = None,
) -> Callable[..., Any]:
    """Transform a loss into the projections of its per-example gradients, in about a plain gradient's memory.

    The numbers are those of `project(per_example_grad(fun)(...), sides)`, which holds the factors of all parameters at
    once, including those of every layer of a `lax.scan`. This function projects a layer's gradient inside the loop that
    computes it and drops the factors there, so that the loop stacks only k × k numbers for each layer, if the two
    matrices that project a weight's gradient have k rows each. A weight that every step of a loop uses (a recurrent
    weight, a shared layer) is projected step by step too. Factors are held until the loop has ended only for a gradient
    that is computed inside a `cond` or a `shard_map`, or that after the loop goes through anything but reshapes,
    transposes and casts.

    Args:
        fun, argnums, in_axes, has_aux, spmd_axis_name: as in `per_example_grad`.
        sides: as in `project`. Under `jax.jit` they are constants of the compiled program, unless they are an argument
            of the jitted function and `per_example_projection` is called inside that function.

    Returns:
        A function of fun's arguments, the batched ones with an example axis, that returns (values [B], numbers [B, S])
        or, with has_aux, ((values, aux), numbers). The numbers are in the order of `project`. Call the returned
        function under `jax.jit`, which removes computations whose results are not used, such as those of the gradients
        themselves.

    Raises:
        TypeError, ValueError: as in `per_example_grad`; or the tree of `sides` is not the parameters', or a `Sides`
            does not fit its parameter (ValueError).

    Example:
        >>> def loss(layers, x):                                                   # 12 layers, one after the other
        ...     step = jax.checkpoint(lambda h, W: (jnp.tanh(h @ W), None))
        ...     return jax.lax.scan(step, x, layers)[0].sum()
        >>> layers, x = 0.1 * jnp.ones((12, 8, 8)), jnp.ones((4, 16, 8))
        >>> sides = jg.attribution.random_sides(layers, jax.random.key(0), 2, stacked=1)
        >>> values, numbers = per_example_projection(loss, sides)(layers, x)
        >>> values.shape, numbers.shape
        ((4,), (4, 48))
    """
    transformed = Transformed("per_example_projection", fun, argnums, in_axes, has_aux, spmd_axis_name=spmd_axis_name)

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    @naming("per_example_projection")
    def measured(*args: Any, **kwargs: Any) -> Any:
        arguments = transformed.arguments(args, kwargs)
        values, aux, numbers = measured_numbers(transformed, arguments, sides)
        return ((values, aux), numbers) if has_aux else (values, numbers)

    return measured


def measured_numbers(transformed: Transformed, arguments: Arguments, sides: PyTree) -> tuple[Any, Any, Array]:
    """(values, aux, the projections [B, S] of all gradients), measured inside the loops that compute the gradients."""
    params = jax.tree.unflatten(arguments.params_tree, arguments.params)
    nodes: Any
    nodes, treedef = jax.tree.flatten(params, is_leaf=complexes.is_complex)
    shapes = [jnp.shape(node.real if complexes.is_complex(node) else node) for node in nodes]
    checked = checked_sides(sides, treedef, shapes)

    def targets(_: Any, sides: Sequence[Sides]) -> list[Placed]:
        each = zip(nodes, sides, shapes, strict=True)
        return [Placed.of_parameter(s, len(shape)) for node, s, shape in each for _ in jax.tree.leaves(node)]

    values, aux, measures = transformed.measured(arguments, PROJECTOR, targets, common=checked)
    by_leaf = jax.tree.unflatten(arguments.params_tree, measures)
    return values, aux, flattened(jax.tree.leaves(complexes.joined(by_leaf, complex_parts)))


def checked_sides(sides: PyTree, params_tree: Any, shapes: Sequence[tuple[int, ...]]) -> list[Sides]:
    """Return the leaves of the sides; raise ValueError unless they fit parameters of this tree and these shapes."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(sides, is_leaf=is_sides)
    wrong = [jax.tree_util.keystr(path) for path, leaf in leaves if not is_sides(leaf)]
    if wrong or treedef != params_tree:
        got = f"another object at sides{wrong[0]}" if wrong else f"{treedef}"
        raise ValueError(f"{caller()}: expected a tree like the parameters', {params_tree}, with Sides, got {got}.")
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        leaf.check(shape, f"sides{jax.tree_util.keystr(path)}")
    return [leaf for _, leaf in leaves]


def flattened(each: Sequence[Array]) -> Float[Array, "B S"]:
    """The numbers of all parameters, [B, …] each, beside each other."""
    return joined([a.reshape(a.shape[0], math.prod(a.shape[1:])) for a in each], 1)


def _projections(node: Any, sides: Sides) -> Any:
    """[B, …] of one parameter, as a pair if it is complex."""

    def one(leaf: Leaf) -> Array:
        numbers = projected(leaf.factors, sides)
        return leaf.weight.reshape(-1, *[1] * (numbers.ndim - 1)).astype(numbers.dtype) * numbers

    return jax.tree.map(one, node, is_leaf=lambda node: isinstance(node, Leaf))


def complex_parts(real: Array, imag: Array) -> Array:
    """The parts [B, 2, …] of a complex parameter's numbers, whose gradient is ∂/∂Re - i ∂/∂Im."""
    return jnp.stack([real, -imag], 1)


@naming("random_projection")
def random_projection(g: PerExampleGrads, key: Array, size: int) -> Float[Array, "B S"]:
    """G P/√size [B, size] with random signs P [parameters, size]: the expected inner products of rows are those of G.

    The same key and size give the same P, however the gradients are held, so that rows of different batches can be
    compared. If ‖g_b‖² is estimated from a row, its relative standard error is at most √(2/size). P is drawn a few
    columns at a time and never held as a whole; G is not materialized. Cost: `size` products G v, which cost about as
    much as size/B Gram matrices.

    Args:
        g: gradients of B examples.
        key: a key of `jax.random`.
        size: how many numbers to return for each example.

    Returns:
        [B, size], in float32 or wider.

    Raises:
        ValueError: the size is below 1.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(64), jnp.eye(64)[:4])
        >>> features = random_projection(g, jax.random.key(0), 1000)
        >>> features.shape, (features @ features.T).round().astype(int)[0].tolist()
        ((4, 1000), [1, 0, 0, 0])

    Source: Achlioptas 2003; Park et al. 2023 (TRAK).
    """
    checked_gradients(g)
    if operator.index(size) < 1:
        raise ValueError(f"random_projection: expected a size of at least 1, got {size}.")
    if not g.batch_size:
        return jnp.zeros((0, size), jax.eval_shape(g.norms).dtype)
    return _projected(g, key, operator.index(size))


@functools.partial(jax.jit, static_argnums=2)  # a loop outside jit would be compiled at every call
def _projected(g: PerExampleGrads, key: Array, size: int) -> Array:
    treedef: Any
    leaves, treedef = jax.tree.flatten(jax.eval_shape(g.sum))

    def column(k: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, k), len(leaves))
        signs = [_signs(key, p) for key, p in zip(keys, leaves, strict=True)]
        return g.dot(treedef.unflatten(signs))

    bytes_each = sum(p.size * p.dtype.itemsize for p in leaves) + g.nbytes
    columns = lax.map(column, jnp.arange(size), batch_size=chunk_size(bytes_each, size))
    return columns.T / size**0.5


def _signs(key: Array, p: Any) -> Array:
    if not jnp.issubdtype(p.dtype, jnp.complexfloating):
        return jax.random.rademacher(key, p.shape, p.dtype)
    real, imag = jax.random.rademacher(key, (2, *p.shape), jnp.finfo(p.dtype).dtype)
    return lax.complex(real, imag)
