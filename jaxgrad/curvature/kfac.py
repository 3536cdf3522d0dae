"""Kronecker factors of weight matrices, from moments that are computed in place of the gradients' products."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from jaxgrad.curvature.joint import Bias, Found
from jaxgrad.curvature.joint import biases as found_biases
from jaxgrad.curvature.kronecker import KroneckerFactors, sums
from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.chunks import sum_examples
from jaxgrad.per_example.algebra.factors import Factor, accumulator, at_once, unfolded, wide
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter.measuring import Item, Measurer, measure_of, sums_over_positions
from jaxgrad.per_example.interpreter.values import Unevaluated, Value
from jaxgrad.per_example.lower import factors_of
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import added
from jaxgrad.sharding import with_automatic_axes

Shared = Literal["expand", "reduce"]
Biases = Literal["joint", "apart"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("left", "right", "positions"),
    meta_fields=("layout", "bias"),
)
@dataclasses.dataclass(frozen=True)
class _Moments:
    """Σ_bt left leftᵀ [G, F, F] and Σ_bt right rightᵀ [G, K, K] of products with these positions in this layout.

    All three numbers add up over the steps of a loop.
    """

    left: Any  # an Array, or what JAX puts in its place
    right: Any
    positions: Any
    layout: Layout
    bias: Bias | None


def kfac(
    loss: Callable[..., Any],
    *,
    shared: Shared = "expand",
    biases: Biases = "joint",
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
) -> Callable[..., PyTree]:
    """Transform a loss into the Kronecker factors of its weight matrices, whatever the length of sequences or images.

    `kfac_factors(g)` takes the Kronecker factors from gradients that are held as factors. `kfac` accumulates them in
    the backward pass, so that it also has them for weights whose gradients are not held as factors because these, over
    many positions, would be larger than the gradient, as in most convolutions and in dense layers on long sequences.
    Only the two second-moment matrices of each weight are held; in a `lax.scan` over layers, they are computed inside
    the loop.

    Formula: for the gradient Σ_t δ_t a_tᵀ of one example, with T positions in a sequence or image,
    "expand": E[Σ_t δ_t δ_tᵀ] ⊗ E[mean_t a_t a_tᵀ], for models that make a prediction at each position;
    "reduce": E[δ̂ δ̂ᵀ] ⊗ E[ā āᵀ] with δ̂ = Σ_t δ_t and ā = mean_t a_t, for positions that are averaged before the output.
    For `W @ x`, `left` is the moment of δ and `right` that of a; for `x @ W` it is the reverse. The mean over t is
    always taken in `right`, which does not change the Kronecker product. For `W @ x + b`, W and b are one block: its
    inputs are (a_t, 1), `left` is the moment of δ, and `right` that of (a, 1). Cost: two matrix products, one
    for `left` and one for `right`, replace the one that computes the weight's gradient.

    A parameter is the bias of a weight if its gradient is the sum, over all positions, of the cotangents in the
    weight's gradient: `kfac` sees in the program that both are computed from the same array. So a bias that is scaled
    or used elsewhere too stays apart, as does that of a convolution with groups. If a bias fits several weights, it
    goes to the one whose path has the longest beginning in common with its own.

    If the labels in the batch are those of the data, the factors approximate the empirical Fisher matrix; if they are
    drawn from the model, the Fisher matrix.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        shared: how to treat positions that share a weight: "expand" or "reduce", as in the formula.
        biases: "joint" for one block of a weight and its bias, "apart" for blocks of weights alone.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function of (params, *batch) that returns the parameters' tree with `KroneckerFactors` at every matrix, and
        None at embeddings, at matrices whose gradient is not a product, which `explain` names, and at biases: the
        factors of a weight say in `bias` which one is in their block. A matrix that every step of a loop uses has the
        steps as positions. If the factors of all steps together would hold as many numbers as the matrix or more,
        there is None at such a matrix if it is used outside of this loop too, and always with "reduce". With "reduce",
        there is also None at matrices whose gradient is a sum of several products. To average over batches of equal
        size, average the results with `jax.tree.map`.

    Raises:
        TypeError, ValueError: as in `per_example_grad`; or `shared` or `biases` is not one of its two values
            (ValueError).

    Example:
        >>> loss = lambda W, x: jnp.tanh(x @ W).sum()                    # x [T, K], with more positions than parameters
        >>> factors = kfac(loss)(jnp.ones((9, 4)), jnp.ones((2, 100, 9)))
        >>> factors.left.shape, factors.right.shape
        ((1, 9, 9), (1, 4, 4))

    Source: Martens and Grosse 2015; Grosse and Martens 2016; Eschenhagen et al. 2023.
    """
    for name, value, values in (("shared", shared, get_args(Shared)), ("biases", biases, get_args(Biases))):
        if value not in values:
            raise ValueError(f'kfac: expected {name}="{values[0]}" or "{values[1]}", got {value!r}.')
    transformed = Transformed("kfac", loss, argnums, in_axes, spmd_axis_name=spmd_axis_name)

    @naming("kfac")
    def factors(params: PyTree, *batch: Any) -> PyTree:
        arguments = transformed.arguments((params, *batch), {})
        paths = arguments.paths
        measurer = _measurer(shared, paths if biases == "joint" else None)
        _, _, moments = transformed.measured(arguments, measurer, lambda *_: range(len(paths)), None)
        B = max(arguments.batch_size, 1)
        return jax.tree.unflatten(arguments.params_tree, [_means(m, B, shared) for m in moments])

    return factors


def _means(moments: _Moments | None, B: int, shared: Shared) -> KroneckerFactors | None:
    if moments is None:
        return None
    T = moments.positions if shared == "expand" else moments.positions**2  # ā is a mean
    return KroneckerFactors(moments.left / B, moments.right / B / T, moments.layout, moments.bias)


def _measurer(shared: Shared, paths: Sequence[str] | None) -> Measurer:
    """A measurer whose targets are the indices of the parameters; `paths` are theirs, None for biases apart."""

    def one(value: Value, shape: tuple[int, ...], dtype: Any, _: Any) -> _Moments | None:
        return _measure(shared, value, shape, dtype, None, "")

    def together(items: Sequence[Item]) -> list[_Moments | None]:
        of_items = [paths[index] for *_, index in items] if paths is not None else []
        pairs = found_biases(items, of_items)
        taken = {pair.gradient for pair in pairs.values()}

        def measure(k: int) -> _Moments | None:
            if k in taken:
                return None
            pair, (value, shape, dtype, _) = pairs.get(k), items[k]
            return _measure(shared, value, shape, dtype, pair, of_items[pair.gradient] if pair else "")

        return [measure(k) for k in range(len(items))]

    return Measurer(
        one,
        _of_all_steps,
        adds_up=shared == "expand",  # "reduce" first sums the sides over the steps
        has_layout=True,
        together=None if paths is None else together,
        of_sides=True,
    )


def _measure(
    shared: Shared, value: Value, shape: tuple[int, ...], dtype: Any, pair: Found | None, path: str
) -> _Moments | None:
    """The moments of one example's gradient, None if it is not a sum of products in one layout."""
    known: Any = measure_of(value)
    if known is not None or not isinstance(value, Unevaluated) or sum(n != 1 for n in shape) < 2:
        return known
    if sums_over_positions(value):  # a bias of several axes
        return None
    parts = factors_of(value, shape, dtype)
    products = [f for f in parts if isinstance(f, Product) and f.kind in ("Outer", "Windows") and f.positions]
    if len(products) < len(parts) or not all(f.layout.same_place(products[0].layout) for f in products):
        return None
    if shared == "reduce" and len(products) > 1:
        return None  # its positions are in several products
    if pair is not None and not pair.left:
        products = [f.turned() for f in products]
    found = [_moments(f, shared, pair is not None) for f in products]
    left, right = (added(side) for side in zip(*found, strict=True))
    positions = jnp.asarray(sum(f.positions for f in products), left.dtype)
    return _Moments(left, right, positions, products[0].layout, Bias(path, pair.layout) if pair else None)


def _moments(f: Product, shared: Shared, extended: bool) -> tuple[Array, Array]:
    """The two moments of one example; under a vmap over examples, their sums over the batch, without an axis for it."""

    @custom_vmap
    def of_example(f: Factor) -> tuple[Array, Array]:
        return _batch_moments(jax.tree.map(lambda a: a[None], f), shared, extended)

    @of_example.def_vmap
    def _(size: int, batched: Any, f: Factor) -> tuple[Any, Any]:
        def with_axis(a: Array, has_axis: bool) -> Array:
            return a if has_axis else jnp.broadcast_to(a[None], (size, *a.shape))

        return _batch_moments(jax.tree.map(with_axis, f, batched[0]), shared, extended), (False, False)

    return of_example(f)


@with_automatic_axes(by_example=False)
def _batch_moments(f: Product, shared: Shared, extended: bool) -> tuple[Array, Array]:
    wide_f: Any = wide(f, accumulator(f))
    if not f.windows:
        return sums(wide_f, shared == "reduce", extended)
    return sum_examples(lambda w: sums(unfolded(w), shared == "reduce", extended), at_once(f), wide_f)


def _of_all_steps(moments: _Moments | None, _: Any) -> _Moments | None:
    """The moments of a stacked parameter: the steps are a group."""
    if moments is None:
        return None
    steps, bias = moments.left.shape[0], moments.bias
    left, right = (a.reshape(-1, *a.shape[2:]) for a in (moments.left, moments.right))
    stacked_bias = None if bias is None else Bias(bias.path, _stacked(bias.layout, steps))
    return _Moments(left, right, moments.positions[0], _stacked(moments.layout, steps), stacked_bias)


def _stacked(layout: Layout, steps: int) -> Layout:
    """The layout in a parameter with a first axis of steps, which are a group."""
    label = len(layout.sizes)
    axis, group = (Axis(steps, 0, ((label, 1),)), (label,)) if steps != 1 else (Axis(1), ())
    G, F, K = layout.order
    return Layout((axis, *layout.place), (*layout.sizes, steps), ((*group, *G), F, K), layout.dtype)
