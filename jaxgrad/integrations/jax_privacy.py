"""jax-privacy's `clipped_grad` on factored gradients: a script that uses that library changes one import."""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import jax_privacy
from jax_privacy import clipping as theirs
from jaxtyping import Array, PyTree

from jaxgrad.clipping.transform import EPSILON
from jaxgrad.clipping.weightings import limited
from jaxgrad.errors import naming
from jaxgrad.per_example.algebra import complexes
from jaxgrad.per_example.algebra.norms import root_sum_of_squares
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.masks_and_bounds import checked_mask
from jaxgrad.per_example.microbatches import in_microbatches
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import working_dtype
from jaxgrad.sharding import kept

__all__ = ["BoundedSensitivityCallable", "clipped_grad", "installed"]

AuxiliaryOutput = theirs.AuxiliaryOutput
"""jax-privacy's own class: a named tuple (values, grad_norms, aux), with None for results that were not requested."""

_REPLACE_SPECIAL = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


class BoundedSensitivityCallable(theirs.BoundedSensitivityCallable):  # type: ignore[misc]
    """jax-privacy's own class, whose sensitivity can include rounding.

    Example:
        >>> gradient = clipped_grad(lambda w, x: (x @ w).sum(), l2_clip_norm=3.0)
        >>> gradient.sensitivity(), gradient.sensitivity(dp_accounting.NeighboringRelation.REPLACE_ONE)
        (3.0, 6.0)
        >>> f"{gradient.sensitivity(batch_size=256):.4f}"
        '3.0125'
    """

    def sensitivity(
        self,
        neighboring_relation: dp_accounting.NeighboringRelation = _REPLACE_SPECIAL,
        *,
        batch_size: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Any:
        """Return how far one example can move the sum: `l2_norm_bound`, or twice that if one example is replaced.

        Args:
            neighboring_relation: as in jax-privacy: add or remove an example, replace it, or replace it by nothing.
            batch_size: the largest batch size in use, to include rounding as `jg.clipped_grad` does; None returns
                jax-privacy's bound, which is for exact arithmetic.
            dtype: dtype of the returned gradient, which determines the rounding.

        Returns:
            A Python float; an array if the bound is traced.

        Raises:
            ValueError: the neighboring relation is unknown, or the batch size is negative.
        """
        exact = super().sensitivity(neighboring_relation)
        if batch_size is None:
            return exact
        if batch_size < 0:
            raise ValueError(f"sensitivity: expected a batch size of at least 0, got {batch_size}.")
        narrow = float(jnp.finfo(dtype).eps) if jnp.dtype(dtype).itemsize < 4 else 0.0
        return exact * (1 + (1 + math.sqrt(batch_size)) * EPSILON[working_dtype(dtype)] + batch_size * narrow)


def _unchanged(gradient: PyTree) -> PyTree:
    return gradient


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: PyTree,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[PyTree], PyTree] = _unchanged,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: jax.typing.DTypeLike | None = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
    grid_scale: int | None = None,
) -> BoundedSensitivityCallable:
    """Transform a loss into the sum of its clipped per-example gradients, with the signature of jax-privacy's function.

    The results are jax-privacy's, up to rounding, for about the cost of one plain gradient, because gradients are held
    as factors. Four things differ. The microbatch size need not divide the batch. Sums are accumulated, and norms
    returned, in float32 or a wider dtype. An example whose gradient is NaN or infinite adds exactly zero as a whole, as
    in jax-privacy after 2.0; version 2.0 sets only the entries that are NaN or infinite to zero. And if the products in
    a gradient cancel to less than their rounding errors, the gradient is clipped a little more, so that rounding cannot
    break the bound (see `jg.clipped_grad`; `sensitivity(batch_size=…)` is the bound with rounding).

    Args:
        fun: the loss of a batch of one example or, if keep_batch_dim is False, of one example or group. It returns a
            real scalar, or (scalar, aux) with has_aux.
        argnums: as in `jax.grad`.
        has_aux: whether fun returns (scalar, aux).
        l2_clip_norm: a number ≥ 0 that bounds the norm over all parameters; or a tree prefix of the gradient that holds
            a number for every leaf or group of leaves. Each group is then clipped separately. 0 makes every gradient
            zero; inf changes none. Numbers may be traced; a traced negative number counts as 0.
        rescale_to_unit_norm: whether to divide each clipped gradient by its bound, so that no norm exceeds 1. With a
            bound of 0, every nonzero gradient gets norm 1; with inf, all become zero.
        normalize_by: what to divide the sum by, a number > 0.
        batch_argnums: the positional arguments that have an example axis, axis 0. Arrays in keyword arguments also have
            it.
        keep_batch_dim: whether fun is given each example with an axis of size 1 in front. If so, that axis is removed
            from the auxiliary results.
        return_values: whether to return the losses [B].
        return_grad_norms: whether to return the norms [B] of the gradients before clipping and before the transform. If
            l2_clip_norm is a tree, they are a tree of the same structure.
        pre_clipping_transform: a function of one example's gradient that returns what is clipped and added up: a tree,
            which may have a different structure. If the function is linear and the same for all examples, gradients
            stay factored; an elementwise product with an array costs one more matrix product. If it is not linear,
            gradients are materialized, a microbatch at a time.
        microbatch_size: number of examples to process at once, in a loop, to bound the memory; None for all.
            Microbatches at the end that hold padding only are skipped.
        nan_safe: whether a gradient that is NaN or infinite adds zero. If False, the entries of the sum are NaN where
            an entry of such a gradient is not finite.
        dtype: dtype of the returned gradient; None for the gradient's own.
        prng_argnum: the positional argument that is a random key, or a tree of them; it is split, one for each example.
        spmd_axis_name: as in `jax.vmap`.
        grid_scale: must be None. Rounding gradients to a grid of integers needs every entry of every gradient, so
            factors do not help: use jax-privacy's own function for this.

    Returns:
        A `BoundedSensitivityCallable`: a function that takes fun's arguments and `is_padding_example`, booleans [B]
        that are True for examples that are padding and add zero. It returns the sum, or (sum, `AuxiliaryOutput`) if
        has_aux, return_values or return_grad_norms is set. Values, norms and aux are also computed for padding, except
        in skipped microbatches, where they are 0.

    Raises:
        ValueError: a bound is negative or not a number, or the bounds are not a tree prefix of the gradient;
            normalize_by is ≤ 0; batch_argnums are empty, negative, or also in argnums; batch sizes differ; the
            microbatch size is below 1; is_padding_example is not [B] booleans; or grid_scale is not None.
        TypeError: the loss is not a real scalar, or a parameter is not floating.

    Example:
        >>> loss = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)         # of a batch
        >>> gradient = clipped_grad(loss, l2_clip_norm=4.5, return_values=True, return_grad_norms=True)
        >>> total, aux = gradient(3.0, jnp.array([0.0, 7.0, -2.0]))
        >>> total.item(), aux.values.tolist(), aux.grad_norms.tolist()
        (3.5, [4.5, 8.0, 12.5], [3.0, 4.0, 5.0])

    Source: the signature and its meaning are those of `jax_privacy.clipped_grad` (Apache-2.0).
    """
    with naming("clipped_grad"):
        batched = _checked_arguments(argnums, batch_argnums)
        _checked_options(l2_clip_norm, normalize_by, microbatch_size, grid_scale)
    options = _Options(l2_clip_norm, rescale_to_unit_norm, nan_safe, return_grad_norms, pre_clipping_transform)
    loss = _of_a_batch_of_one(fun, batched) if keep_batch_dim else fun
    returns_aux = has_aux or return_values or return_grad_norms

    @naming("clipped_grad")
    def summed(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        B = _batch_size(args, batched)
        mask = None if is_padding_example is None else ~checked_mask(is_padding_example, B)
        in_axes = [0 if k in (*batched, prng_argnum) else None for k in range(len(args))]
        args = tuple(_split(arg, B) if k == prng_argnum else arg for k, arg in enumerate(args))
        clipped = _Clipped(options, loss, argnums, in_axes, has_aux, spmd_axis_name)
        total, (values, aux, norms) = clipped(args, kwargs, mask, microbatch_size)
        dtypes = jax.tree.map(lambda a: a.dtype if dtype is None else dtype, clipped.shapes)
        total = jax.tree.map(lambda a, dtype: (a / normalize_by).astype(dtype), total, dtypes)
        if not returns_aux:
            return total
        aux = jax.tree.map(_without_axis_1, aux) if keep_batch_dim else aux
        values, norms = values if return_values else None, norms if return_grad_norms else None
        return total, AuxiliaryOutput(values, norms, aux if has_aux else None)

    return BoundedSensitivityCallable(summed, options.bound() / normalize_by, returns_aux)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Let jax-privacy's own plans, trainer and Keras API use this `clipped_grad`, while the context is open.

    When a step is traced, they look `clipped_grad` up in jax-privacy's modules. While the context is open, these
    modules hold this function. Steps that are compiled in the context keep it.

    Example:
        >>> with installed():
        ...     type(jax_privacy.clipped_grad(lambda w, x: (x @ w).sum(), l2_clip_norm=1.0)).__module__
        'jaxgrad.integrations.jax_privacy'
    """
    modules = (theirs, jax_privacy)
    before = [module.clipped_grad for module in modules]
    try:
        for module in modules:
            module.clipped_grad = clipped_grad
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.clipped_grad = function


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is done with one example's gradient."""

    bounds: PyTree
    rescaled: bool
    nan_safe: bool
    returns_norms: bool
    transform: Callable[[PyTree], PyTree]

    def bound(self) -> Any:
        """The norm of a clipped gradient, at most."""
        bounds = jax.tree.leaves(self.bounds)
        if self.rescaled:
            return math.sqrt(len(bounds))
        try:
            return math.sqrt(sum(float(bound) ** 2 for bound in bounds)) if len(bounds) > 1 else float(bounds[0])
        except jax.errors.ConcretizationTypeError:  # a bound is traced
            return root_sum_of_squares([jnp.maximum(jnp.asarray(bound, float), 0.0) for bound in bounds])

    def factors(self, norms: Array, bound: Any) -> tuple[Array, Array]:
        """(what gradients of these norms [B] are multiplied with, the longest that one may be then)."""
        bound = jnp.maximum(jnp.asarray(bound, norms.dtype), 0)
        longer = jnp.maximum(norms, bound)
        divisor = jnp.where(longer > 0, longer, jnp.ones_like(longer))
        if self.rescaled:
            return 1 / divisor, jnp.ones_like(bound)
        finite = jnp.where(jnp.isinf(bound), jnp.ones_like(bound), bound)
        return jnp.where(jnp.isinf(bound), jnp.ones_like(norms), finite / divisor), bound


class _Clipped:
    """The sum of one batch's clipped gradients. `shapes` is, after a call, the tree of its shapes and dtypes."""

    shapes: PyTree

    def __init__(self, options: _Options, fun: Any, argnums: Any, in_axes: Any, has_aux: bool, spmd_axis_name: Any):
        self._options = options
        self._norms_apart = options.returns_norms and options.transform is not _unchanged
        self._loss = Transformed("clipped_grad", fun, argnums, in_axes, has_aux, False, spmd_axis_name, self._after)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Array | None, size: int | None) -> Any:
        """Return (sum, (values, aux, norms) of every example)."""
        arguments = self._loss.arguments(args, kwargs)
        B, padded = arguments.batch_size, mask is not None
        keep = jnp.ones(B, bool) if mask is None else mask
        if size is None or size > B or (size == B and not padded):
            flat, (values, aux, norms) = self._part(arguments, keep)
        else:
            flat, (values, aux, norms) = in_microbatches(self._part, arguments, keep, size, skip_the_end=padded)
        structure = jax.tree.structure(complexes.parts(self.shapes))
        total = complexes.joined(jax.tree.unflatten(structure, flat), complexes.gradient)
        return total, (values, aux, jax.tree.unflatten(jax.tree.structure(self._options.bounds), norms))

    def _after(self, gradient: PyTree) -> PyTree:
        result = self._options.transform(gradient)
        self.shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), result)
        return (result, gradient) if self._norms_apart else result

    def _part(self, arguments: Arguments, mask: Array) -> tuple[list[Array], Any]:
        """Return (leaves of the sum, (values, aux, norms of every group))."""
        options = self._options
        values, aux, g, _ = self._loss.evaluated(arguments)
        g = jax.tree.map(_exactly_rounded, g, is_leaf=_is_dense)
        ones = jax.tree.map(lambda _: 1.0, options.bounds)
        _, groups = g.groups((ones, ones) if self._norms_apart else ones)
        bounds = jax.tree.leaves(options.bounds)
        clipped, originals = groups[: len(bounds)], groups[-len(bounds) :]
        lengths = [group.norms() for group in clipped]
        keep = mask
        if options.nan_safe:
            keep = functools.reduce(operator.and_, (jnp.isfinite(n) for n in lengths), keep)
        total: list[Array] = []
        for bound, group, norms in zip(bounds, clipped, lengths, strict=True):
            c, most = options.factors(kept(keep, norms), bound)
            c = limited(c, norms, group.magnitudes(), most, keep, group.rounding())
            total += jax.tree.leaves(group.where(keep).scale(c).sum(norms.dtype))
        wanted = [group.norms() for group in originals] if self._norms_apart else lengths
        return total, (values, aux, wanted)


def _is_dense(node: Any) -> bool:
    return isinstance(node, Product) and node.right is None


def _exactly_rounded(node: Any) -> Any:
    """Materialized gradients in half precision as float32, rounded once: norms and sums then see the same numbers."""
    if not _is_dense(node) or node.left.dtype not in (jnp.bfloat16, jnp.float16):
        return node
    narrow = jnp.finfo(node.left.dtype)
    value = jax.lax.reduce_precision(node.left.astype(jnp.float32), narrow.nexp, narrow.nmant)
    return dataclasses.replace(node, left=value)


# --- Arguments


def _numbers(argnums: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, argnums)) if isinstance(argnums, Sequence) else (operator.index(argnums),)


def _checked_arguments(argnums: Any, batch_argnums: Any) -> tuple[int, ...]:
    """Return the numbers of the arguments with an example axis."""
    differentiated, batched = _numbers(argnums), _numbers(batch_argnums)
    if not batched:
        raise ValueError(
            "clipped_grad: Batch Argnums must not be empty: expected the number of an argument with examples as "
            "batch_argnums, got none."
        )
    if min(differentiated + batched) < 0:
        raise ValueError(
            f"clipped_grad: expected numbers ≥ 0, got {argnums=} and {batch_argnums=}. Count arguments from the first."
        )
    both = set(differentiated) & set(batched)
    if both:
        raise ValueError(
            f"clipped_grad: expected parameters without an example axis, got {argnums=} and {batch_argnums=}, which "
            f"overlap in {sorted(both)}. Take an argument out of one of them."
        )
    return batched


def _checked_options(bounds: Any, normalize_by: Any, microbatch_size: Any, grid_scale: Any) -> None:
    if grid_scale is not None:
        raise ValueError(
            f"clipped_grad: expected grid_scale=None, got {grid_scale!r}. Rounding to a grid needs every entry of "
            f"every example's gradient, which factors do not hold. Use jax_privacy.clipped_grad for it."
        )
    if not normalize_by > 0:
        raise ValueError(f"clipped_grad: expected normalize_by > 0, got {normalize_by}. Pass the expected batch size.")
    if microbatch_size is not None and operator.index(microbatch_size) < 1:
        raise ValueError(f"clipped_grad: expected a microbatch size of at least 1 or None, got {microbatch_size}.")
    leaves = jax.tree.leaves(bounds)
    if not leaves or not all(map(_is_bound, leaves)):
        raise ValueError(
            f"clipped_grad: expected numbers ≥ 0 as l2_clip_norm, got {bounds!r}. One number bounds the whole "
            f"gradient; a tree prefix of it bounds groups of parameters."
        )


def _is_bound(bound: Any) -> bool:
    try:
        real = any(jnp.issubdtype(jnp.result_type(bound), kind) for kind in (jnp.integer, jnp.floating))
        return real and jnp.ndim(bound) == 0 and bool(bound >= 0)
    except jax.errors.TracerBoolConversionError:  # a traced number, which acts as 0 if it turns out to be negative
        return True
    except TypeError:
        return False


def _batch_size(args: Sequence[Any], batched: Sequence[int]) -> int:
    if len(args) <= max(batched):
        raise ValueError(
            f"clipped_grad: expected an argument {max(batched)} with examples, as batch_argnums says, got {len(args)} "
            f"arguments."
        )
    shapes = [jnp.shape(leaf) for k in batched for leaf in jax.tree.leaves(args[k])]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"clipped_grad: Batch axis: expected arrays of the same size along axis 0 in the arguments "
            f"{list(batched)}, got shapes {shapes}."
        )
    (size,) = sizes
    assert size is not None
    return size


def _split(keys: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda key: jax.random.split(key, count), keys)


def _of_a_batch_of_one(fun: Callable[..., Any], batched: Sequence[int]) -> Callable[..., Any]:
    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    def of_one(*args: Any, **kwargs: Any) -> Any:
        with_axis = (
            jax.tree.map(lambda a: jnp.expand_dims(a, 0), arg) if k in batched else arg for k, arg in enumerate(args)
        )
        return fun(*with_axis, **kwargs)

    return of_one


def _without_axis_1(a: Array) -> Array:
    return jnp.squeeze(a, 1) if a.ndim > 1 and a.shape[1] == 1 else a
