"""Sums of clipped gradients, for private and robust training: no example moves the sum by more than a stated bound."""

import copy
import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxgrad.clipping.by_layer import checked_layers, is_by_layer, sums_by_layer
from jaxgrad.clipping.costs import Costs, compiled_cost
from jaxgrad.clipping.weightings import WEIGHTINGS, Weighting, automatic, limited, one_for_each
from jaxgrad.errors import naming
from jaxgrad.per_example.algebra import complexes
from jaxgrad.per_example.algebra.norms import nan_unless, root_sum_of_squares
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.masks_and_bounds import checked_bound, checked_groups, checked_mask
from jaxgrad.per_example.measure import measured_magnitudes
from jaxgrad.per_example.microbatches import in_microbatches
from jaxgrad.per_example.on_mesh import call_on_mesh
from jaxgrad.per_example.second_pass import check_linear, weighted_gradients
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import working_dtype
from jaxgrad.sharding import kept, laid_out_as

# How far the rounding of one example may move the sum, relative to the bound: ε is (1 + √B) times this number. The keys
# are the dtypes of the sum.
EPSILON = {jnp.dtype(jnp.float32): 2.0**-12, jnp.dtype(jnp.float64): 2.0**-31}


# The relative difference that is allowed, with two passes, between the two computations of one gradient.
RECOMPUTED = {
    jnp.dtype(jnp.float64): 2.0**-29,
    jnp.dtype(jnp.float32): 2.0**-10,
    jnp.dtype(jnp.float16): 2.0**-7,
    jnp.dtype(jnp.bfloat16): 2.0**-4,
}


@named_tuple
class ClipInfo(NamedTuple):
    """What `clipped_grad` returns besides the sum: losses, gradient norms and counts. They are not private.

    Attributes:
        values: [B], the loss of every example; 0 for masked examples.
        norms: [B], the norm of every gradient before clipping, over all groups together; 0 for masked examples, and NaN
            or infinite if the gradient is.
        clipped_fraction: fraction of the unmasked examples whose norm exceeds a bound or is not finite.
        nonfinite: number of unmasked examples whose gradient is NaN or infinite.
        aux: with has_aux, the auxiliary output of the loss for every example; 0 for masked examples.

    Example:
        >>> _, info = clipped_grad(lambda w, x: w @ x, 1.0)(jnp.ones(3), jnp.diag(jnp.array([0.5, 2.0, jnp.inf])))
        >>> info.norms.tolist(), f"{info.clipped_fraction:.2f}", int(info.nonfinite)
        ([0.5, 2.0, inf], '0.67', 1)
    """

    values: Array
    norms: Array
    clipped_fraction: Array
    nonfinite: Array
    aux: Any = None


def clipped_grad(
    fun: Callable[..., Any],
    max_norm: PyTree,
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    has_aux: bool = False,
    spmd_axis_name: Any = None,
    microbatch_size: int | None = None,
    weighting: Weighting | str = "clip",
    passes: int = 1,
) -> "ClippedGrad":
    """Transform a loss into the sum of its clipped per-example gradients, for about the cost of one plain gradient.

    A plain gradient is that of the mean loss of the batch.

    Guarantee: let `gradient` be the function that `clipped_grad` returns, and B the largest batch size in use. Adding
    or removing any one example, whatever it contains, moves the sum by at most `gradient.sensitivity(B)`, which is
    max_norm·(1 + ε), in the Euclidean norm over all parameters. Replacing one example moves the sum by at most twice
    that. If there are several bounds, max_norm stands for their root sum of squares. An example that is masked, or
    whose gradient is NaN or infinite, adds exactly zero; with bounds by layer (an array as a bound, see `max_norm`),
    such a gradient adds zero only to the layers and groups in which it is NaN or infinite. Masked examples do not
    affect the result. Neither shapes nor the sequence of operations depend on the data.

    ε covers rounding. With one pass, ε is (1 + √B)·2⁻¹² if the parameters are in float32, bfloat16 or float16, because
    the sum is then in float32 and is not rounded to the parameters' dtype. It is (1 + √B)·2⁻³¹ if they are in float64.
    For two passes, see below.

    In this derivation of ε, the first of two numbers is for float32 and the second for float64. A gradient is a sum of
    products that may cancel. Let S be the magnitude of the products (`PerExampleGrads.magnitudes`; 0 for a single
    product, in which nothing can cancel). The sum of the products has a rounding error of a few u·S, where u is 2⁻²⁴ or
    2⁻⁵³. The gradient's norm is therefore taken to be √(‖g‖² + κS²), where κ is 2⁻²⁰ or 2⁻⁴⁰, so the magnitude of an
    example's scaled products, before they cancel, is at most max_norm/√κ. The rounding error of their sum is at most a
    few (u/√κ)·max_norm, where u/√κ is 2⁻¹⁴ or 2⁻³³. In the model of Higham and Mary (2019), rounding errors have mean
    zero, and the errors of B examples add up to √B times the error of one example. This model is assumed, not proved.

    Two refinements: if a gradient is passed through a linear map that all examples share and that is not elementwise
    (`Mapped`), the magnitude of its products is multiplied by the norm of the map before it enters S. That norm is
    estimated, with a margin for safety; the estimate is not a proved bound. If products are computed from rounded
    operands, ρ√(‖g‖² + S²) is added to the norm, which bounds the effect of this rounding. ρ is 3·2⁻⁸ for factors in
    bfloat16. For factors in float32, ρ is 2⁻⁹ on GPUs and 2⁻⁶ on TPUs, unless
    `jax.default_matmul_precision("highest")` is set, and 0 on CPUs (`PerExampleGrads.rounding`).

    Not guaranteed: the bound does not cover parameters or shared arguments that were computed from the batch, as in
    batch normalization. Privacy also needs noise, batches drawn at random, an accountant (see jax-privacy and
    dp-accounting), random numbers that nobody can predict, and a defense against attacks on floating-point noise
    (Mironov 2012). This function provides none of them. The running time may depend on the data if the time that the
    hardware takes for an operation depends on the operands. The contents of `ClipInfo` are not private.

    Args:
        fun: the loss: a pure function of one example that returns a real scalar, or (scalar, aux) with has_aux.
        max_norm: a positive number that bounds the norm over all parameters; or a tree prefix of the parameters that
            holds a number for every leaf or group of leaves. Each group is then clipped separately. inf clips nothing.
            For parameters that are stacks of L layers along axis 0, such as those that a `lax.scan` runs over, an array
            [L] in place of a number bounds the norm of every layer, over the parameters of its group. Each layer is
            then clipped and summed inside the backward loop and its factors are dropped there, so that one pass holds
            the factors of one layer beside what a plain gradient holds.
        argnums, in_axes, has_aux, spmd_axis_name: as in `per_example_grad`.
        microbatch_size: number of examples to process at once, in a loop, to bound the memory; None for all. The result
            is the same, up to rounding.
        weighting: "clip", min(1, max_norm/‖g‖), which leaves gradients up to the bound unchanged (Abadi et al. 2016);
            "normalize", max_norm/‖g‖, which rescales every nonzero gradient to the bound; `clipping.automatic(gamma)`;
            or your own function (norms [B], bound) → the numbers [B] by which the gradients are multiplied. Whatever
            it returns, no gradient becomes longer than its bound.
        passes: 1 holds the factors of all gradients until it computes the sum from them; prefer it if the factors fit
            in memory (the method `costs` of the returned function compares the two). 2 computes the norms first and
            drops the factors, then computes the ordinary gradient of Σ_b c_b · loss_b. Two passes need the memory of a
            plain gradient, even for a `lax.scan` over layers with `jax.checkpoint`, and about twice its time (1.8 to
            2.2 times in `docs/cost.md`). Each bound takes its own backward pass, and side effects of `fun`, such as
            those of `jax.debug.print`, happen in both passes.

    Two passes: the second pass computes the gradients again, with the rounding of a plain gradient. ε therefore also
    covers how far the two computations of one gradient may differ, relative to its norm: 2⁻¹⁰ in float32, 2⁻²⁹ in
    float64 and 2⁻⁴ in bfloat16. These numbers are assumed, not proved. In bfloat16, and where the operands of float32
    products are rounded (see ρ), √κ is 2⁻⁴ instead of 2⁻¹⁰. In bfloat16, ε also covers rounding the sum to the
    parameters' dtype, by the term 2·B·u, where u is now 2⁻⁸. Keep the parameters of a private model in float32. If the
    hardware rounds the operands of products, pass `sensitivity` the dtype that it rounds them to: bfloat16 for
    bfloat16, and float16 for TensorFloat-32, for which the first number is 2⁻⁷. A loss with cotangents in float16 or
    float8 raises an error, because a small c times a cotangent underflows there, and no ε covers that.

    Returns:
        A function that takes fun's arguments, with an example axis on the batched ones, and optionally `mask`, booleans
        [B] that are False for padding. It returns (sum, `ClipInfo`). The sum is a tree with the parameters' shapes, in
        float32 or wider; with two passes it has the parameters' dtypes, like an ordinary gradient. To mask padding for
        a loss that has a keyword argument `mask` of its own, or that takes `**kwargs`, pass a wrapper that has neither.

    Raises:
        ValueError: passes=2 is used for a loss with a `custom_vjp` whose backward pass is not linear in the cotangent,
            or with cotangents in float16 or float8.
        ValueError: there is an array of bounds with passes=2, or for parameters without as many layers.
        TypeError, ValueError: the errors of `per_example_grad`; or the bounds are not positive numbers or not a tree
            prefix of the parameters, the mask is not [B] booleans, a mask is passed although the loss has its own
            keyword argument `mask`, the microbatch size is below 1, passes is not 1 or 2, or the weighting returns
            neither one number nor one number for each example.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> gradient = clipped_grad(loss, 1.0)
        >>> total, info = gradient(jnp.zeros(3), jnp.ones((4, 3)), jnp.arange(4.0), mask=jnp.arange(4) < 3)
        >>> jnp.linalg.norm(total).round(4).item(), info.norms.round().tolist()
        (2.0, [0.0, 3.0, 7.0, 0.0])
        >>> f"{gradient.sensitivity(4):.4f}"
        '1.0007'
        >>> deep = lambda layers, x: jax.lax.scan(lambda h, W: (jnp.tanh(W @ h), None), x, layers)[0].sum()
        >>> total, _ = clipped_grad(deep, jnp.array([0.1, 0.2]))(0.1 * jnp.ones((2, 3, 3)), jnp.ones((1, 3)))
        >>> jnp.sqrt((total**2).sum((1, 2))).round(4).tolist()                               # one for each layer
        [0.1, 0.2]
    """
    return ClippedGrad(fun, max_norm, argnums, in_axes, has_aux, spmd_axis_name, microbatch_size, weighting, passes)


def _takes_a_mask(fun: Callable[..., Any]) -> bool:
    """Whether the loss has, or may have, a keyword argument `mask` of its own, which need not mark padding."""
    try:
        parameters = inspect.signature(fun).parameters
    except (TypeError, ValueError):  # a function without a signature takes its arguments by position
        return False
    named = "mask" in parameters and parameters["mask"].kind is not inspect.Parameter.POSITIONAL_ONLY
    return named or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class ClippedGrad:
    """The function that `clipped_grad` returns: call it with the loss's arguments and, for padding, a mask.

    Example:
        >>> gradient = clipped_grad(lambda params, x: params["a"] * x + params["b"], {"a": 3.0, "b": 4.0})
        >>> gradient.max_norm, gradient.sensitivity(100) > 5.0
        (5.0, True)
    """

    @naming("clipped_grad")
    def __init__(
        self,
        fun: Callable[..., Any],
        max_norm: PyTree,
        argnums: int | Sequence[int],
        in_axes: Any,
        has_aux: bool,
        spmd_axis_name: Any,
        microbatch_size: int | None,
        weighting: Weighting | str,
        passes: int = 1,
    ):
        for bound in jax.tree.leaves(max_norm):
            checked_bound(bound, by_layer=True)
        try:
            valid = microbatch_size is None or operator.index(microbatch_size) >= 1
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(
                f"clipped_grad: expected a microbatch size of at least 1 or None, got {microbatch_size!r}."
            )
        uncalled: Any = automatic
        function = WEIGHTINGS.get(weighting) if isinstance(weighting, str) else weighting
        if function is None or function is uncalled or not callable(function):
            raise TypeError(
                f'clipped_grad: expected "clip", "normalize" or a function (norms, bound) → factors as weighting, such '
                f"as clipping.automatic(0.01), got {weighting!r}."
            )
        if passes not in (1, 2):
            raise ValueError(f"clipped_grad: expected 1 or 2 passes, got {passes!r}.")
        if passes == 2 and is_by_layer(max_norm):
            raise ValueError(
                "clipped_grad: expected one number for each group of parameters with passes=2, which takes a backward "
                "pass for each bound, got an array of bounds. Take passes=1: bounds by layer need no second pass."
            )
        self._passes = passes
        self._own_mask = _takes_a_mask(fun)
        self._transformed = Transformed("clipped_grad", fun, argnums, in_axes, has_aux, spmd_axis_name=spmd_axis_name)
        self._max_norm, self._microbatch_size, self._weighting = max_norm, microbatch_size, function
        functools.update_wrapper(self, fun, assigned=("__name__", "__qualname__", "__module__"), updated=())

    @property
    def max_norm(self) -> float | Array:
        """The root sum of squares of the bounds: how far one example could move the sum if nothing were rounded.

        It is a Python float, or an array if a bound is traced.
        """
        return self._bound(jnp.result_type(float))

    def _bound(self, dtype: jax.typing.DTypeLike) -> float | Array:
        bounds = jax.tree.leaves(self._max_norm)
        try:
            return math.sqrt(sum(float(n) ** 2 for bound in bounds for n in np.ravel(bound)))
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):  # a bound is traced
            return root_sum_of_squares([n for bound in bounds for n in jnp.ravel(jnp.asarray(bound, dtype))])

    def sensitivity(self, batch_size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> float | Array:
        """Return the bound on how far one example can move the sum: max_norm·(1 + ε), where ε covers rounding.

        Args:
            batch_size: B, the largest batch size in use.
            dtype: dtype of the sum; with two passes, the narrowest dtype in which the loss computes or to which the
                hardware rounds the operands of products.

        Returns:
            A Python float; an array if a bound is traced.

        Raises:
            ValueError: the batch size is negative.
        """
        if operator.index(batch_size) < 0:
            raise ValueError(f"ClippedGrad.sensitivity: expected a batch size of at least 0, got {batch_size}.")
        wide = working_dtype(dtype)
        ratio = 1 + (1 + math.sqrt(batch_size)) * EPSILON[wide]
        if self._passes == 2:
            sum_error = float(jnp.finfo(dtype).eps) if jnp.dtype(dtype).itemsize < 4 else 0.0
            ratio += RECOMPUTED[jnp.finfo(dtype).dtype] + batch_size * sum_error
        bound = self._bound(wide)
        return bound * (ratio if isinstance(bound, float) else jnp.asarray(ratio, wide))

    def costs(self, *args: Any, **kwargs: Any) -> Costs:
        """Return memory and operations of one pass, of two passes and of a plain gradient, to choose `passes`.

        The programs are compiled for the arguments' shapes, dtypes and shardings, and not run.

        Args:
            args, kwargs: the arguments of a call: arrays or `jax.ShapeDtypeStruct`s.

        Returns:
            `Costs` with the rows "plain gradient", "one pass" and, without bounds by layer, "two passes".

        Raises:
            TypeError, ValueError: as the call itself, with one pass or with two.

        Example:
            >>> gradient = clipped_grad(lambda W, x: jnp.tanh(W @ x).sum(), 1.0)
            >>> costs = gradient.costs(jnp.ones((30, 20)), jax.ShapeDtypeStruct((4, 20), jnp.float32))
            >>> costs["plain gradient"].operations < costs["one pass"].operations < costs["two passes"].operations
            True
        """

        def plain(*args: Any, mask: Any = None, **kwargs: Any) -> list[Array]:
            arguments = self._transformed.arguments(args, kwargs)
            ones = jnp.ones(arguments.batch_size)
            return weighted_gradients(self._transformed, arguments, [ones], ones > 0)[0]

        ways: dict[str, Any] = {"plain gradient": plain}
        for name, passes in (("one pass", 1), ("two passes", 2))[: 1 if is_by_layer(self._max_norm) else 2]:
            ways[name] = copy.copy(self)
            ways[name]._passes = passes
        return Costs({name: compiled_cost(way, args, kwargs) for name, way in ways.items()})

    @naming("clipped_grad")
    def __call__(self, *args: Any, mask: Any = None, **kwargs: Any) -> tuple[PyTree, ClipInfo]:
        """Return (sum, ClipInfo)."""
        if mask is not None and self._own_mask:
            raise ValueError(
                "clipped_grad: expected mask=, which marks padding, with a loss that has no keyword argument of this "
                "name, got a loss that takes one. Wrap the loss, so that its own mask has another name: "
                "clipped_grad(lambda params, x, own: loss(params, x, mask=own), ...)(params, x, own, mask=padding)."
            )
        arguments = self._transformed.arguments(args, kwargs)
        B = arguments.batch_size
        mask = jnp.ones(B, bool) if mask is None else checked_mask(mask, B)
        flat, by_example = call_on_mesh(self._sum_of_all, arguments, (list(arguments.params), 0), mask, self._max_norm)
        values, aux, norms, exceeds = jax.tree.map(lambda a: kept(mask, a), by_example)
        count = jnp.maximum(mask.sum(), 1).astype(norms.dtype)
        nonfinite = mask & ~jnp.isfinite(norms)
        fraction = (exceeds | nonfinite).sum().astype(norms.dtype) / count
        total = complexes.joined(jax.tree.unflatten(arguments.params_tree, flat), complexes.gradient)
        return total, ClipInfo(values, norms, fraction, nonfinite.sum(), aux)

    def _sum_of_all(self, arguments: Arguments, mask: Array, max_norm: PyTree) -> tuple[list[Array], Any]:
        """As `_clipped_sum`, in microbatches, with these bounds."""
        bounded, B, size = copy.copy(self), arguments.batch_size, self._microbatch_size
        bounded._max_norm = max_norm
        if size is None or size >= B:
            return bounded._clipped_sum(arguments, mask)
        return in_microbatches(bounded._clipped_sum, arguments, mask, size)

    def _clipped_sum(self, arguments: Arguments, mask: Array) -> tuple[list[Array], Any]:
        """Return (leaves of the sum, (values, aux, norms, True if a norm exceeds its bound) of every example)."""
        if self._passes == 2:
            return self._sum_in_two_passes(arguments, mask)
        if is_by_layer(self._max_norm):
            return self._sum_by_layer(arguments, mask)
        values, aux, g, _ = self._transformed.evaluated(arguments)
        bounds, groups = g.groups(self._max_norm)
        norms = [group.norms() for group in groups]
        keep = mask & functools.reduce(operator.and_, (jnp.isfinite(n) for n in norms))
        total: list[Array] = []
        exceeds = jnp.zeros_like(mask)
        for bound, group, n in zip(bounds, groups, norms, strict=True):
            limit = jnp.asarray(bound, n.dtype)
            c = self._factors(n, group.magnitudes(), limit, keep, group.rounding())
            total += jax.tree.leaves(group.where(keep).scale(c).sum(n.dtype))
            exceeds |= n > limit
        return self._laid_out(total, arguments), (values, aux, root_sum_of_squares(norms), exceeds)

    def _sum_by_layer(self, arguments: Arguments, mask: Array) -> tuple[list[Array], Any]:
        """As `_clipped_sum`: every layer of a stack is clipped and summed where its gradients are complete."""
        bounds, groups = checked_groups(self._max_norm, arguments.params_tree, by_layer=True)
        checked_layers(bounds, groups, arguments)
        limits = list(map(jnp.asarray, bounds))
        members = list(zip(limits, groups, strict=True))
        values, aux, total, norms = sums_by_layer(self._transformed, arguments, members, mask, self._factors)
        each = [column for n in norms for column in (n.T if n.ndim > 1 else [n])]
        limits = [limit for b in limits for limit in (b if b.ndim else [b])]
        exceeds = [n > limit.astype(n.dtype) for n, limit in zip(each, limits, strict=True)]
        return self._laid_out(total, arguments), (
            values,
            aux,
            root_sum_of_squares(each),
            functools.reduce(operator.or_, exceeds),
        )

    @staticmethod
    def _laid_out(total: Sequence[Array], arguments: Arguments) -> list[Array]:
        pairs = zip(total, arguments.params, strict=True)
        return [laid_out_as(a.astype(working_dtype(p.dtype)), p) for a, p in pairs]

    def _sum_in_two_passes(self, arguments: Arguments, mask: Array) -> tuple[list[Array], Any]:
        """As `_clipped_sum`: take the norms first, then the gradient of the weighted sum of losses."""
        check_linear(self._transformed, arguments)
        values, aux, measures = measured_magnitudes(self._transformed, arguments)
        bounds, groups = checked_groups(self._max_norm, arguments.params_tree)
        parts = [[measures[i] for i in group] for group in groups]
        norms = [root_sum_of_squares([m.norm for m in part]) for part in parts]
        keep = mask & functools.reduce(operator.and_, (jnp.isfinite(n) for n in norms))
        limits = [jnp.asarray(bound, n.dtype) for bound, n in zip(bounds, norms, strict=True)]
        weights = [
            self._factors(n, root_sum_of_squares([m.magnitude for m in part]), limit, keep, jnp.zeros(()))
            for n, part, limit in zip(norms, parts, limits, strict=True)
        ]
        sums = weighted_gradients(self._transformed, arguments, weights, keep)
        total = {i: leaves[i] for group, leaves in zip(groups, sums, strict=True) for i in group}
        exceeds = functools.reduce(operator.or_, (n > limit for n, limit in zip(norms, limits, strict=True)))
        ordered = [laid_out_as(total[i], p) for i, p in enumerate(arguments.params)]
        return ordered, (values, aux, root_sum_of_squares(norms), exceeds)

    def _factors(self, norms: Array, magnitudes: Array | None, limit: Array, keep: Array, rounding: Array) -> Array:
        """c [B], the factors that make no gradient longer than its bound; 0 for examples that are not kept."""
        norms = kept(keep, norms)
        c = one_for_each(self._weighting(norms, limit), norms)
        return nan_unless(limit > 0, limited(c, norms, magnitudes, limit, keep, rounding))
