"""The Gauss-Newton matrix mean_b J_bᵀH_bJ_b of a model and a convex loss of its outputs: its rows, and its products.

J [O, parameters] is the model's Jacobian on one example, and O the number of its outputs. H [O, O] is the Hessian of
the loss with respect to the outputs, and S [O, R] is a root of it: H = SSᵀ.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.rows import JacobianRows, Matrix
from jaxgrad.curvature.solve import MARGIN
from jaxgrad.errors import naming
from jaxgrad.per_example.arguments import Arguments, arguments_of
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.per_example.jacobian import PerExampleJacobian, evaluated_by_output, with_output_index
from jaxgrad.per_example.on_mesh import call_on_mesh
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import working_dtype

# --- Losses of a model's outputs -------------------------------------------------------------------------------------


class OutputLoss(NamedTuple):
    """A convex loss of one example's outputs, with functions for the products and for a root of its Hessian.

    Attributes:
        value: (outputs, target) → scalar.
        product: (outputs, target, u) → H u, with the outputs' shape.
        root: (outputs, target) → (S [O, R], r [R]), where H = SSᵀ and Sr is the gradient, both for the raveled outputs.

    Example:
        >>> S, r = softmax.root(jnp.zeros(2), 0)
        >>> (S @ S.T).round(3).tolist(), (S @ r).round(3).tolist()
        ([[0.25, -0.25], [-0.25, 0.25]], [-0.5, 0.5])
    """

    value: Callable[[Array, Any], Array]
    product: Callable[[Array, Any, Array], Array]
    root: Callable[[Array, Any], tuple[Array, Array]]


def _difference(outputs: Array, target: Any) -> Array:
    if jnp.shape(target) != outputs.shape:
        raise ValueError(f"squared: expected a target of the outputs' shape {outputs.shape}, got {jnp.shape(target)}.")
    return outputs - jnp.asarray(target, outputs.dtype)


def _squared_product(outputs: Array, target: Any, u: Array) -> Array:
    _difference(outputs, target)
    return u


def _squared_root(outputs: Array, target: Any) -> tuple[Array, Array]:
    difference = _difference(outputs, target).ravel()
    return jnp.eye(difference.size, dtype=difference.dtype), difference


squared = OutputLoss(
    lambda outputs, target: (_difference(outputs, target) ** 2).sum() / 2, _squared_product, _squared_root
)
"""½ ‖outputs - target‖², with H = I."""


def _checked_logits(logits: Array, label: Any) -> None:
    if logits.ndim != 1 or jnp.ndim(label) or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
        raise ValueError(
            f"softmax: expected logits [O] and one integer as label, got shape {logits.shape} and "
            f"{jnp.result_type(label)} of shape {jnp.shape(label)}."
        )


def _at_label(logits: Array, label: Any, value: Array) -> Array:
    """[O]: the value at the label and 0 elsewhere; all NaN if the label is out of range."""
    index = jnp.arange(logits.size)
    label = jnp.asarray(label, index.dtype)
    in_range = (label >= 0) & (label < logits.size)
    one_hot = jnp.where(index == label, value, jnp.zeros_like(value))
    return jnp.where(in_range, one_hot, jnp.full_like(one_hot, jnp.nan))


def _softmax_value(logits: Array, label: Any) -> Array:
    _checked_logits(logits, label)
    return -_at_label(logits, label, jax.nn.log_softmax(logits)).sum()


def _softmax_product(logits: Array, label: Any, u: Array) -> Array:
    _checked_logits(logits, label)
    p = jax.nn.softmax(logits)
    return p * (u - (p * u).sum())


def _least_root(dtype: Any) -> float:
    """The least root of a curvature: the rows' inner products, its squares, must not underflow where r is large."""
    return float(2.0**-50) if dtype == jnp.float32 else 2.0**-400


def _softmax_root(logits: Array, label: Any) -> tuple[Array, Array]:
    """S = diag(√p) - p √pᵀ, and r = -e/√p at the label. 1 - p is the sum of the other p, so nothing cancels."""
    _checked_logits(logits, label)
    logp = jax.nn.log_softmax(logits)
    p, root, diagonal = jnp.exp(logp), jnp.exp(logp / 2), jnp.eye(logits.size, dtype=bool)
    missing = jnp.where(jnp.isfinite(logp), jnp.maximum(_least_root(p.dtype) - root, 0), jnp.zeros_like(root))
    root = root + _at_label(logits, label, missing)
    # This selects instead of multiplying by 0 and 1, because jaxlib 0.10.2 may drop a factor shared by all examples.
    sum_of_others = jnp.where(diagonal, jnp.zeros_like(p)[None, :], p[None, :]).sum(1)
    S = jnp.where(diagonal, (root * sum_of_others)[:, None], -p[:, None] * root[None, :])
    return S, _at_label(logits, label, -1 / root)


softmax = OutputLoss(_softmax_value, _softmax_product, _softmax_root)
"""-log softmax(logits [O])[label], with H = diag(p) - ppᵀ. A label out of range gives NaN. In a root, the label's p is
at least 2⁻¹⁰⁰ in float32 and 2⁻⁸⁰⁰ in float64, which changes H by as much, and the gradient Sr not at all."""


def _sign(margin: Array, y: Any) -> Array:
    """Return y, ±1 or boolean, as ±1 in the margin's dtype; NaN for any other value."""
    y = jnp.asarray(y)
    sign = jnp.where(y, 1.0, -1.0).astype(margin.dtype) if y.dtype == bool else y.astype(margin.dtype)
    return jnp.where(jnp.abs(sign) == 1, sign, jnp.full_like(sign, jnp.nan))


def _logistic_product(margin: Array, y: Any, u: Array) -> Array:
    return u * jnp.exp(_log_slope(_sign(margin, y) * margin))


def _logistic_root(margin: Array, y: Any) -> tuple[Array, Array]:
    sign = _sign(margin, y)
    exact, least = jnp.exp(_log_slope(sign * margin) / 2), _least_root(margin.dtype)
    # Above the least root, r is written so that it is accurate where both the gradient and the root are small.
    r = jnp.where(exact > least, jnp.exp(-sign * margin / 2), jax.nn.sigmoid(-sign * margin) / least)
    return jnp.maximum(exact, least).reshape(1, 1), (-sign * r).reshape(1)


def _log_slope(margin: Array) -> Array:
    """log π(1 - π) with π = logistic(margin), in a form that neither overflows nor loses digits."""
    return jax.nn.log_sigmoid(margin) + jax.nn.log_sigmoid(-margin)


logistic = OutputLoss(
    lambda margin, y: jax.nn.softplus(-_sign(margin, y) * margin).sum(), _logistic_product, _logistic_root
)
"""log(1 + exp(-y·margin)), the exercise's loss: H = π(1 - π), one output. y is ±1 or boolean; others give NaN. In a
root, H is at least 2⁻¹⁰⁰ in float32 and 2⁻⁸⁰⁰ in float64."""


def from_function(loss: Callable[[Array, Any], Array]) -> OutputLoss:
    """The `OutputLoss` of any convex loss: H u by differentiation, the root by eigenvectors, NaN where not convex."""

    def product(outputs: Array, target: Any, u: Array) -> Array:
        return jax.jvp(lambda f: jax.grad(loss)(f, target), (outputs,), (u,))[1]

    def root(outputs: Array, target: Any) -> tuple[Array, Array]:
        flat = lambda f: loss(f.reshape(outputs.shape), target)  # noqa: E731
        f = outputs.ravel()
        gradient, H = jax.grad(flat)(f), jax.hessian(flat)(f)
        values, vectors = jnp.linalg.eigh(H)
        largest, precision = jnp.abs(values).max(), len(H) * jnp.finfo(H.dtype).eps
        rounding = MARGIN * precision * jnp.maximum(largest, _curvature_near_zero(flat, f))
        zero = (values <= precision * largest) & (values >= -rounding)
        roots = jnp.where(zero, jnp.zeros_like(values), jnp.sqrt(jnp.where(zero, jnp.ones_like(values), values)))
        inverse = jnp.where(zero, jnp.zeros_like(values), 1 / jnp.where(zero, jnp.ones_like(values), roots))
        return vectors * roots[None, :], inverse * (vectors.T @ gradient)

    return OutputLoss(loss, product, root)


def _curvature_near_zero(loss: Callable[[Array], Array], f: Array) -> Array:
    """The largest entry of the Hessian at the outputs scaled to magnitudes below 1; it bounds the Hessian's rounding.

    Where a loss saturates, its Hessian is a difference of terms that are as large as its curvature elsewhere, with
    rounding errors to match: a saturated softmax has p - p² with p near 1.
    """
    f = jnp.where(jnp.isfinite(f), f, jnp.zeros_like(f))
    largest = jnp.abs(jax.hessian(loss)(f / (1 + jnp.abs(f).max()))).max()
    return jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))


# --- The matrix ------------------------------------------------------------------------------------------------------


class GaussNewton(NamedTuple):
    """The Gauss-Newton matrix as GᵀG/n, and the mean gradient as Gᵀr/n, where G has n = B·R rows.

    Attributes:
        jacobian: the R rows of every example, √R·S_bᵀJ_b, with S_b and J_b as in `gauss_newton`.
        residuals: r [B, R], as in `gauss_newton`.

    Example:
        >>> found = gauss_newton(lambda w, x: w @ x, squared)(jnp.zeros((2, 3)), jnp.ones((4, 3)), jnp.ones((4, 2)))
        >>> found.rows.batch_size, found.residuals.shape
        (8, (4, 2))
    """

    jacobian: PerExampleJacobian
    residuals: Float[Array, "B R"]

    @property
    def rows(self) -> PerExampleGrads:
        """G as n gradients, those of the first example first; arrays that rows share are copied for each."""
        return self.jacobian.rows()


def rows_and_residuals(g: PerExampleGrads | GaussNewton) -> tuple[Matrix, Float[Array, "B R"]]:
    """(G, r [B, R] in float32 or wider), where the mean gradient is Gᵀr/n; for PerExampleGrads r = 1 and R = 1."""
    rows: Matrix
    if isinstance(g, GaussNewton):
        residuals = g.residuals
        rows = JacobianRows.of(g.jacobian) if g.jacobian.outputs > 1 else g.rows
    else:
        checked_gradients(g)
        rows, residuals = g, jnp.ones((g.batch_size, 1), jnp.float32)
    return rows, residuals.astype(jax.eval_shape(rows.norms).dtype)


def gauss_newton(
    model: Callable[..., Any],
    loss: OutputLoss | Callable[[Array, Any], Array],
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
) -> Callable[..., GaussNewton]:
    """Transform a model and a loss into the rows G of the Gauss-Newton matrix GᵀG/n.

    `natural_gradient`, `influence` and others take the result in place of gradients.

    Formula: let J_b [O, parameters] be the model's Jacobian on example b, H_b the Hessian of the loss with respect to
    the O outputs, and S_b [O, R] a root of it, H_b = S_bS_bᵀ. G has n = B·R rows; row (b, k) is √R · S_b[:, k]ᵀJ_b, the
    gradient of one number, held as factors. So GᵀG/n = mean_b J_bᵀH_bJ_b. The gradient of the loss with respect to the
    outputs is S_br_b/√R, where r [B, R] are the residuals, so Gᵀr/n is the gradient of the mean loss. Cost: one forward
    pass and R backward passes; R is 1 for a scalar model, and usually O otherwise. Activations are held once for all
    rows of an example. For many outputs use `gauss_newton_vector_product`.

    Gᵀr/n is the mean gradient only if the gradient of the loss with respect to the outputs lies in the range of H_b, as
    it does for `squared`, `softmax` and `logistic`; a component outside that range is left out of r.

    Args:
        model: model(params, *inputs) → outputs of one example, an array of any shape.
        loss: `squared`, `softmax`, `logistic` or your own `OutputLoss`; or a convex function (outputs, target) →
            scalar, whose H is decomposed into eigenvectors. The result is NaN where the function is not convex. A
            negative eigenvalue counts as 0 if it is within the rounding error of H; this error is taken to be relative
            to H or to the curvature at outputs near 0, whichever is larger.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`, for the arguments (params, *inputs, target).

    Returns:
        A function of (params, *inputs, target) that returns `GaussNewton`; inputs and target are trees of arrays, with
        an example axis where `in_axes` says so.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> model = lambda w, x: w @ x                                        # w [2, 3]
        >>> found = gauss_newton(model, squared)(jnp.zeros((2, 3)), jnp.ones((4, 3)), jnp.ones((4, 2)))
        >>> jg.curvature.natural_gradient(found, 0.0).round(3)[0].tolist()                      # the step to w @ x = 1
        [-0.333, -0.333, -0.333]

    Source: Schraudolph 2002; Martens 2020.
    """
    root = (loss if isinstance(loss, OutputLoss) else from_function(loss)).root

    @naming("gauss_newton")
    def rows(params: PyTree, *batch: Any) -> GaussNewton:
        arguments = arguments_of((params, *batch), {}, argnums, in_axes)

        def outputs_and_root(
            params: Sequence[Any], example: Sequence[Any], shared: Sequence[Any]
        ) -> tuple[Array, Array, Array]:
            *args, target = arguments.rebuild(params, example, shared)[0]
            outputs = model(*args)
            outputs = outputs.astype(working_dtype(outputs.dtype))
            S, r = root(jax.lax.stop_gradient(outputs), target)
            scale = jnp.asarray(S.shape[1] ** 0.5, S.dtype)
            return outputs.ravel(), S * scale, r * scale

        def row_value(*args: Any) -> tuple[Array, Array]:
            outputs, S, r = outputs_and_root(*args[:-1])
            return (outputs * jnp.take(S, args[-1], 1)).sum(), r

        root_of_one = functools.partial(outputs_and_root, shared=arguments.shared)
        R = jax.eval_shape(root_of_one, arguments.params, arguments.example)[1].shape[1]
        by_leaves = dataclasses.replace(arguments, rebuild=lambda *leaves: (leaves, {}))
        transformed = Transformed("gauss_newton", row_value, 0, 0, has_aux=True, spmd_axis_name=spmd_axis_name)
        residuals, jacobian = evaluated_by_output(transformed, with_output_index(by_leaves), R)
        return GaussNewton(jacobian, residuals)

    return rows


def gauss_newton_vector_product(
    model: Callable[..., Any],
    loss: OutputLoss | Callable[[Array, Any], Array],
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
) -> Callable[..., PyTree]:
    """The Gauss-Newton matrix times a direction v, mean_b J_bᵀH_bJ_b v, with J_b and H_b as in `gauss_newton`.

    Cost: about two plain gradients, for any number of outputs; nothing is decomposed.

    Args:
        model: model(params, *inputs) → outputs of one example, an array of any shape.
        loss: an `OutputLoss`, or a function (outputs, target) → scalar.
        argnums, in_axes, spmd_axis_name: as in `gauss_newton`.

    Returns:
        A function of (params, v, *inputs, target) that returns a tree with the parameters' shapes and dtypes; v is a
        direction with the parameters' structure, shapes and dtypes, and the other arguments are as in `gauss_newton`.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> product = gauss_newton_vector_product(lambda w, x: w @ x, squared)
        >>> product(jnp.zeros((1, 2)), jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.zeros((2, 1))).tolist()
        [[0.5, 1.0]]
    """
    hessian_product = (loss if isinstance(loss, OutputLoss) else from_function(loss)).product

    @naming("gauss_newton_vector_product")
    def product(params: PyTree, v: PyTree, *batch: Any) -> PyTree:
        args = (params, *batch)
        arguments = arguments_of(args, {}, argnums, in_axes)
        is_sequence = not isinstance(argnums, int)
        numbers = argnums if isinstance(argnums, Sequence) else [argnums]
        chosen = tuple(args[k] for k in numbers) if is_sequence else args[numbers[0]]

        def along(arguments: Arguments, chosen: PyTree, v: PyTree) -> PyTree:
            def outputs_of_one(chosen: PyTree, example: Sequence[Any]) -> tuple[Array, Any]:
                *inputs, target = arguments.loss_arguments(arguments.params, example)[0]
                for k, value in zip(numbers, chosen if is_sequence else [chosen], strict=True):
                    inputs[k] = value
                return model(*inputs), target

            over_examples = jax.vmap(
                outputs_of_one,
                (None, arguments.axes),
                axis_size=arguments.batch_size,
                spmd_axis_name=spmd_axis_name,
            )
            outputs, forwards, target = jax.linearize(
                lambda chosen: over_examples(chosen, arguments.batch), chosen, has_aux=True
            )
            wide = working_dtype(outputs.dtype)
            cotangent = jax.vmap(hessian_product, spmd_axis_name=spmd_axis_name)(
                outputs.astype(wide), target, forwards(v).astype(wide)
            )
            cotangent = cotangent / max(arguments.batch_size, 1)
            return jax.linear_transpose(forwards, chosen)(cotangent.astype(outputs.dtype))[0]

        return call_on_mesh(along, arguments, chosen, chosen, v)

    return product
