"""Which examples matter: scores, similarities and influence from per-example gradients.

The names:

    Of a batch of gradients
        self_influence, influence     of each example on its own loss, and of training examples on test losses
        cosine_similarity             of every pair of gradients
        noise_scale                   how much of a gradient is noise, and the batch size at which that is half
        random_projection             a few numbers an example that keep inner products
    Of a loss or a model
        grand, tracin                 norms and inner products over several checkpoints
        ntk                           the empirical neural tangent kernel, in blocks for large batches

For more examples than fit into memory see `blocks`. B counts training examples, C test examples.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.gauss_newton import GaussNewton, rows_and_residuals
from jaxgrad.curvature.solve import EXACT, checked_damping, damped_solve, scaled_system
from jaxgrad.per_example.arguments import checked_batch
from jaxgrad.per_example.chunks import CHUNK_BYTES, chunk_size, map_examples
from jaxgrad.per_example.factors import Precision, added
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.per_example.scales import power_of_two
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.per_example.transform import per_example_grad

__all__ = [
    "NoiseScale",
    "cosine_similarity",
    "grand",
    "influence",
    "noise_scale",
    "ntk",
    "random_projection",
    "self_influence",
    "tracin",
]

# --- Of a batch of gradients -----------------------------------------------------------------------------------------


def self_influence(
    g: PerExampleGrads | GaussNewton, damping: Any = None, *, precision: Precision = None
) -> Float[Array, " B"]:
    """How much each example's own gradient helps its own loss: high where an example is unlike all others.

    Formula: ‖g_b‖², TracIn's at one checkpoint; with a damping μ, g_bᵀ(GᵀG/B + μI)⁻¹g_b, through the Gram matrix: B
    times the leverage of the example, between 0 and B for gradients. Examples with wrong labels tend to be high in
    both. Accuracy: as `natural_gradient`.

    Args:
        g: gradients of B examples; or `gauss_newton`'s result, for the Gauss-Newton matrix instead of GᵀG/B.
        damping: μ ≥ 0; None for ‖g_b‖², of gradients alone.
        precision: as in `jax.lax.dot_general`; with a damping None is full precision, as this is a solve.

    Returns:
        [B].

    Raises:
        ValueError: a damping that is not a number ≥ 0; none for a Gauss-Newton matrix.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[1.0, 0], [1.0, 0], [0, 3.0]]))
        >>> self_influence(g).tolist(), self_influence(g, 0.0).round(3).tolist()
        ([1.0, 1.0, 9.0], [1.5, 1.5, 3.0])

    Source: Pruthi et al. 2020 (TracIn); Koh and Liang 2017.
    """
    rows, residuals = rows_and_residuals("self_influence", g)
    if damping is None and not isinstance(g, GaussNewton):
        return g.squared_norms(precision=precision)
    checked_damping("self_influence", damping)
    B, R = residuals.shape
    if not B:
        return residuals.sum(1)
    exact = EXACT if precision is None else precision
    scaled, ridge, _ = scaled_system(rows, damping)
    right = scaled.gram(scaled.scale(residuals.ravel()), precision=exact)
    inner = damped_solve(scaled.gram(precision=exact), right, ridge)  # by row, then by column times r
    own = jnp.diagonal(inner.reshape(B, R, B, R), axis1=0, axis2=2)  # [R, R, B]
    return B / R * jnp.einsum("klb,bk->b", own, residuals, precision=exact)


def influence(
    train: PerExampleGrads | GaussNewton, test: PerExampleGrads, damping: Any, *, precision: Precision = EXACT
) -> Float[Array, "C B"]:
    """How much each test loss rises, to first order, when a training example is left out: > 0 helpful, < 0 harmful.

    Formula: test_cᵀ (GᵀG/n + μI)⁻¹ g_b / B, where GᵀG/n is the training gradients' empirical Fisher matrix, or the
    Gauss-Newton matrix. Exact, in a form that does not cancel: (test Gᵀ)(GGᵀ + μn I)⁻¹. Accuracy: each number to the
    order of n·eps·κ·‖test_c‖/√(‖g_b‖² + μn), κ as in `natural_gradient`: inner products are rounded, and beside a far
    larger test gradient that of a small one counts for more.

    Args:
        train: gradients of B training examples, or `gauss_newton`'s result for them.
        test: gradients of C test examples with respect to the same parameters.
        damping: μ ≥ 0.
        precision: as in `jax.lax.dot_general`; full unless told otherwise, as this is a solve.

    Returns:
        [C, B].

    Raises:
        ValueError: a damping that is not a number ≥ 0; gradients of other parameters.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> gradients = lambda x, y: jg.per_example_grad(loss)(jnp.ones(2), jnp.array(x), jnp.array(y))
        >>> train, test = gradients([[1.0, 0], [1.0, 0], [0, 1.0]], [2.0, 0.0, 3.0]), gradients([[1.0, 0]], [3.0])
        >>> influence(train, test, 0.0).round(3).tolist()                # like the test, against it, apart from it
        [[1.0, -1.0, 0.0]]

    Source: Koh and Liang 2017.
    """
    checked_damping("influence", damping)
    rows, residuals = rows_and_residuals("influence", train)
    checked_gradients("influence", test)
    if not rows.batch_size:
        return test.gram(rows)
    scaled, ridge, unit = scaled_system(rows, damping)
    across = test.gram(scaled, precision=precision)
    weights = damped_solve(scaled.gram(precision=precision), across.T, ridge).T / unit
    return jnp.einsum("cbr,br->cb", weights.reshape(-1, *residuals.shape), residuals, precision=EXACT)


def cosine_similarity(
    g: PerExampleGrads, other: PerExampleGrads | None = None, *, precision: Precision = None
) -> Float[Array, "B C"]:
    """The cosine of the angle between every pair of gradients, with `other`'s or with each other.

    Args:
        g: gradients of B examples.
        other: gradients of C examples with respect to the same parameters; None for g.
        precision: as in `jax.lax.dot_general`.

    Returns:
        [B, C], in [-1, 1]; 0 for a gradient of zero.

    Raises:
        ValueError: gradients of other parameters.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[2.0, 0], [0, 0], [3.0, 3.0]]))
        >>> cosine_similarity(g).round(3)[0].tolist()
        [1.0, 0.0, 0.707]
    """
    checked_gradients("cosine_similarity", g)
    first, inverse = _near_one(g)
    second, inverse_ = (None, inverse) if other is None else _near_one(other)
    return jnp.clip(first.gram(second, precision=precision) * inverse[:, None] * inverse_[None, :], -1, 1)


def _near_one(g: PerExampleGrads) -> tuple[PerExampleGrads, Array]:
    """(the gradients, each divided by a power of two near its norm; the inverse norms of these, 0 of 0)."""
    norms = g.norms()
    unit = power_of_two(norms)
    left = norms / unit
    return g.scale(1 / unit), jnp.where(left == 0, left, 1 / jnp.where(left == 0, jnp.ones_like(left), left))


@named_tuple
class NoiseScale(NamedTuple):
    """Of a batch of gradients; average noise and signal over several batches before dividing them.

    Attributes:
        noise: tr Σ, the variance of one example's gradient, all parameters together.
        signal: ‖mean gradient‖² of all data; an estimate without bias, which may be negative.
        scale: noise / signal in examples, the batch size at which noise and signal are alike; inf where signal ≤ 0.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[3.0, 1], [3.0, -1]]))
        >>> noise_scale(g).scale.round(3).item()
        0.25
    """

    noise: Array
    signal: Array
    scale: Array


def noise_scale(g: PerExampleGrads, *, precision: Precision = None) -> NoiseScale:
    """The simple noise scale tr Σ / ‖ḡ‖²: about how many examples a batch should have before more stop paying.

    Formula: tr Σ = (Σ‖g_b‖² - B‖ḡ‖²)/(B - 1), ‖ḡ‖² - tr Σ/B, both without bias. Accuracy: tr Σ to a few eps times the
    mean ‖g_b‖², absolute; where it is smaller than that (all gradients equal) it is 0 and not below.

    Args:
        g: gradients of B ≥ 2 examples, drawn at random from many more; NaN for fewer. If they are all there are, the
            signal is too low by noise/B.
        precision: as in `jax.lax.dot_general`.

    Returns:
        `NoiseScale`, of scalars.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[3.0, 1], [3.0, -1]]))
        >>> [number.round(3).item() for number in noise_scale(g)]
        [2.0, 8.0, 0.25]

    Source: McCandlish et al. 2018, appendix A.1.
    """
    checked_gradients("noise_scale", g)
    B, norms = g.batch_size, g.norms(precision=precision)
    if isinstance(B, int) and B < 2:
        return NoiseScale(*[jnp.full((), jnp.nan, norms.dtype)] * 3)
    unit = power_of_two(norms.max())
    total = g.scale(jnp.full_like(norms, 1) / unit).sum(precision=precision, rounded=False)
    mean = added([(leaf.astype(norms.dtype) ** 2).sum() for leaf in jax.tree.leaves(total)]) / B / B
    spread = (((norms / unit) ** 2).sum() - B * mean) / (B - 1)
    noise = jnp.maximum(spread, jnp.zeros_like(spread))
    signal = mean - noise / B
    hidden = signal <= 0  # the scale is infinite, and nothing infinite is made where it is not
    scale = jnp.where(hidden, jnp.ones_like(noise), noise) / jnp.where(hidden, jnp.zeros_like(signal), signal)
    return NoiseScale(noise * unit * unit, signal * unit * unit, scale)


def random_projection(g: PerExampleGrads, key: Array, size: int, *, precision: Precision = None) -> Float[Array, "B S"]:
    """[B, size]: G P/√size with random signs P [parameters, size]: inner products of rows are those of G, in the mean.

    The same key and size give the same P, however the gradients are held: rows of different batches can be compared.
    The relative standard error of ‖g_b‖² is at most √(2/size). P is drawn a few columns at a time and never there as a
    whole; G is not written out. Cost: that of size/B Gram matrices, roughly: size products with a direction.

    Args:
        g: gradients of B examples.
        key: of `jax.random`.
        size: how many numbers for each example.
        precision: as in `jax.lax.dot_general`.

    Returns:
        [B, size].

    Raises:
        ValueError: a size below 1.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(64), jnp.eye(64)[:4])
        >>> features = random_projection(g, jax.random.key(0), 1000)
        >>> features.shape, (features @ features.T).round().astype(int)[0].tolist()
        ((4, 1000), [1, 0, 0, 0])

    Source: Achlioptas 2003; Park et al. 2023 (TRAK).
    """
    checked_gradients("random_projection", g)
    if operator.index(size) < 1:
        raise ValueError(f"random_projection: expected a size of at least 1, got {size}.")
    if not g.batch_size:
        return jnp.zeros((0, size), jax.eval_shape(g.norms).dtype)
    return _projected(g, key, operator.index(size), precision)


@functools.partial(jax.jit, static_argnums=(2, 3))  # or a loop that is not in a jit would be compiled at every call
def _projected(g: PerExampleGrads, key: Array, size: int, precision: Precision) -> Array:
    treedef: Any
    leaves, treedef = jax.tree.flatten(jax.eval_shape(g.sum))

    def column(k: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, k), len(leaves))
        signs = [jax.random.rademacher(key, p.shape, p.dtype) for key, p in zip(keys, leaves, strict=True)]
        return g.dot(treedef.unflatten(signs), precision=precision)

    bytes_each = sum(p.size * p.dtype.itemsize for p in leaves) + g.nbytes
    columns = lax.map(column, jnp.arange(size), batch_size=chunk_size(bytes_each, CHUNK_BYTES, size))
    return columns.T / size**0.5


# --- Of a loss or a model, over several checkpoints and in blocks ----------------------------------------------------


def grand(loss: Callable[..., Any], *, in_axes: Any = 0) -> Callable[..., Float[Array, " B"]]:
    """GraNd: the norm of each example's gradient, averaged over several parameters (initialisations, checkpoints).

    Args:
        loss: of one example, as in `per_example_grad`.
        in_axes: as in `per_example_grad`.

    Returns:
        A function of (checkpoints, *batch), an iterable of parameters and the batch, that returns [B].

    Raises:
        TypeError: one tree of parameters in place of several.
        ValueError: no checkpoints.

    Example:
        >>> grand(lambda w, x: jnp.sin(w @ x))([jnp.zeros(2), jnp.ones(2)], jnp.eye(2)).round(3).tolist()
        [0.77, 0.77]

    Source: Paul et al. 2021.
    """
    norms = jax.jit(lambda params, batch: per_example_grad(loss, in_axes=in_axes)(params, *batch).norms())

    def over(checkpoints: Iterable[PyTree], *batch: Any) -> Array:
        total, count = _summed("grand", (norms(params, batch) for params in _several("grand", checkpoints)))
        return total / count

    return over


def _several(call: str, checkpoints: Any) -> Iterable[PyTree]:
    """The checkpoints; TypeError for what can be told to be one of them, whose leaves or rows would pass for many."""
    one = isinstance(checkpoints, Mapping) or hasattr(checkpoints, "shape") or hasattr(checkpoints, "_fields")
    if one or not isinstance(checkpoints, Iterable):
        raise TypeError(
            f"{call}: expected several parameters, a list or another iterable, as checkpoints, got "
            f"{type(checkpoints).__name__}. For a single one pass [params]."
        )
    return checkpoints


def _summed(call: str, terms: Iterable[Array]) -> tuple[Array, int]:
    """(the sum, of how many); one is there at a time."""
    total: Array | None = None
    count = 0
    for term in terms:
        total, count = term if total is None else total + term, count + 1
    if total is None:
        raise ValueError(f"{call}: expected at least one checkpoint, got none.")
    return total, count


def tracin(loss: Callable[..., Any], *, in_axes: Any = 0) -> Callable[..., Float[Array, "C B"]]:
    """TracIn: how much training on each example lowered each test loss, to first order, summed over checkpoints.

    Formula: Σ_k η_k test_c(w_k) · g_b(w_k), for plain gradient descent with learning rates η_k.

    Args:
        loss: of one example, as in `per_example_grad`.
        in_axes: as in `per_example_grad`.

    Returns:
        A function of (checkpoints, rates, train, test): parameters w_k, as many learning rates η_k, and two batches,
        tuples of the loss's other arguments; it returns [C, B], > 0 helpful.

    Raises:
        TypeError: one tree of parameters in place of several; a batch that is no tuple.
        ValueError: no checkpoints, or not as many rates.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> train, test = (jnp.eye(2), jnp.ones(2)), (jnp.eye(2)[:1], jnp.ones(1))
        >>> tracin(loss)([jnp.zeros(2), jnp.full(2, 0.5)], [0.1, 0.1], train, test).round(3).tolist()
        [[0.5, 0.0]]

    Source: Pruthi et al. 2020.
    """
    gradients = per_example_grad(loss, in_axes=in_axes)
    products = jax.jit(lambda params, train, test: gradients(params, *test).gram(gradients(params, *train)))

    missing = object()

    def over(checkpoints: Iterable[PyTree], rates: Iterable[Any], train: Any, test: Any) -> Array:
        train, test = checked_batch("tracin", "train", train), checked_batch("tracin", "test", test)
        several = _several("tracin", checkpoints)

        def terms() -> Iterator[Array]:
            for params, rate in zip_longest(several, rates, fillvalue=missing):
                if params is missing or rate is missing:
                    raise ValueError("tracin: expected as many rates as checkpoints, got fewer of one of them.")
                term = products(params, train, test)
                yield jnp.asarray(rate, term.dtype) * term

        return _summed("tracin", terms())[0]

    return over


def ntk(
    fun: Callable[..., Any], *, block_size: int | None = None, precision: Precision = None
) -> Callable[..., Float[Array, "B C *outputs"]]:
    """The empirical neural tangent kernel: inner products of the gradients of a model's outputs.

    Args:
        fun: fun(params, x) → the outputs of one example: a real scalar, or an array of O numbers.
        block_size: how many examples of each side to hold gradients of at once, to bound the memory; the second side's
            are then computed once for every block of the first. None: all.
        precision: as in `jax.lax.dot_general`.

    Returns:
        A function of (params, x, x2=None), trees of arrays with an example axis, that returns [B, C] for a scalar fun,
        otherwise [B, C, O, O′], where O′ is how many outputs there are on x2: J_b J_cᵀ (a matrix by
        `transpose(0, 2, 1, 3).reshape(B * O, C * O′)`). x2 None: x itself. Jit it.

    Raises:
        TypeError, ValueError: as `per_example_grad`; a block size below 1; a number on one side and an array on the
            other.

    Example:
        >>> kernel = jax.jit(ntk(lambda w, x: jnp.tanh(w @ x)))
        >>> kernel(jnp.zeros(3), jnp.eye(3)[:2]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> kernel(jnp.zeros((4, 3)), jnp.eye(3), jnp.eye(3)[:2]).shape
        (3, 2, 4, 4)

    Source: Jacot et al. 2018; in factors as Novak et al. 2022, "structured derivatives".
    """
    if block_size is not None and operator.index(block_size) < 1:
        raise ValueError(f"ntk: expected a block size of at least 1 or None, got {block_size}.")

    def gradients(params: PyTree, x: Any) -> tuple[PerExampleGrads, tuple[int, ...]]:
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), x)
        outputs = jax.eval_shape(fun, params, example)
        if not isinstance(outputs, jax.ShapeDtypeStruct):
            raise TypeError(f"ntk: expected a function that returns one array, got {type(outputs).__name__}.")
        shape = outputs.shape
        if shape == ():
            return per_example_grad(fun)(params, x), ()
        O = math.prod(shape)  # noqa: E741
        B = jax.tree.leaves(x)[0].shape[0]
        one = per_example_grad(lambda params, x, k: fun(params, x).ravel()[k])
        return one(params, jax.tree.map(lambda a: jnp.repeat(a, O, 0), x), jnp.tile(jnp.arange(O), B)), (O,)

    def block(params: PyTree, x: Any, x2: Any) -> Array:
        g, outputs = gradients(params, x)
        g2, outputs2 = (None, outputs) if x2 is None else gradients(params, x2)
        if len(outputs) != len(outputs2):
            raise ValueError(
                f"ntk: expected numbers on both sides or arrays on both, got outputs {outputs} on x and {outputs2} on "
                f"x2. Return an array from fun for both."
            )
        K = g.gram(g2, precision=precision)
        if not outputs:
            return K
        (O,), (O2,) = outputs, outputs2  # noqa: E741
        return K.reshape(K.shape[0] // O, O, K.shape[1] // O2, O2).transpose(0, 2, 1, 3)

    def kernel(params: PyTree, x: Any, x2: Any = None) -> Array:
        if block_size is None:
            return block(params, x, x2)
        x2 = x if x2 is None else x2

        def row(x: Any) -> Array:
            return jnp.swapaxes(map_examples(lambda c: jnp.swapaxes(block(params, x, c), 0, 1), block_size, x2), 0, 1)

        return map_examples(row, block_size, x)

    return kernel
