"""check_gradient: compare a gradient with `jax.grad`, and with central differences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.agreement.candidate import Gradient, as_batched, paths
from jaxgrad.agreement.differences import slopes
from jaxgrad.agreement.leaf import Slopes, against_slope, compared, judged, without_numbers
from jaxgrad.agreement.report import AgreementReport
from jaxgrad.errors import naming
from jaxgrad.per_example.arguments import Arguments, arguments_of
from jaxgrad.sharding import gathered


@naming("check_gradient")
def check_gradient(
    candidate: Gradient,
    loss: Callable[..., Any],
    params: PyTree,
    *batch: PyTree,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
    numerical: bool = False,
    reference_dtype: jax.typing.DTypeLike | None = None,
    rtol: float | None = None,
    batched: bool | None = None,
    batch_size: int | None = None,
) -> AgreementReport:
    """Compare a gradient that you derived by hand with `jax.grad`, for every example of a batch.

    Formula: let c be the candidate's gradient and r the reference vmap(jax.grad(loss)). Leaf l agrees on example i if
    ‖c_il - r_il‖ ≤ rtol·‖r_il‖ + floor, where floor = 32·eps·max_i ‖r_il‖ + √size·tiny and norms are over the entries
    of a leaf. The first term of the floor is the precision of the reference: eps is that of the reference's dtype,
    float32 or float64. The second term allows for underflow: tiny is the smallest normal number of the leaf's dtype,
    except for float16, where it is the smallest subnormal number. Cost: c and r are both materialized, with one
    number for each example and parameter entry; `batch_size` limits the number of examples at a time.

    `jax.grad` uses every `custom_vjp` and `custom_jvp` in the loss, including wrong ones. With `numerical`, the
    gradient must therefore also agree with central differences D of the loss in float64, along two random directions v
    in each leaf: |⟨c_il, v⟩ - D| ≤ 4·(rtol·‖r_il‖ + floor) + the error of D. The error of D is estimated from two step
    sizes and from the slopes on both sides of the point, so that a kink at the point is not reported. Central
    differences ignore `stop_gradient` and straight-through estimators. If a loss uses these, its gradient is reported
    as disagreeing even if it is what the author intends.

    Args:
        candidate: the gradient under test, in JAX or NumPy: candidate(params, *example) → the gradient of one example;
            or candidate(params, *batch) → the gradients of all examples, with a leading example axis. A gradient is a
            tree of arrays, or an object whose `materialize()` returns such a tree.
        loss: loss(params, *example) → scalar, a pure JAX function of ONE example.
        params: tree of floating-point arrays.
        *batch: arrays or trees of arrays, with an example axis where `in_axes` says so. Arrays on an explicit mesh are
            replicated first.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`, for the arguments (params, *batch) of both the
            candidate and the loss.
        numerical: whether to compare with central differences as well, which takes 8 evaluations of the loss for each
            leaf.
        reference_dtype: jnp.float64 computes the reference in float64 from the same numbers; None computes it in the
            dtypes of the arguments, with float16 and bfloat16 widened to float32. (If the loss draws random numbers, it
            must name their dtype, because JAX draws different numbers in float64.)
        rtol: relative tolerance for every leaf; None takes it from the leaf's dtype: float64 1e-9, float32 1e-4,
            float16 1e-2, bfloat16 5e-2 (`agreement.RTOL`).
        batched: True if `candidate` takes a batch, False if it takes one example; None tries both, one example first,
            and uses the form whose result has the shapes of a gradient.
        batch_size: number of examples to compute at once; None for all.

    Returns:
        An `AgreementReport` with one row per leaf. A leaf disagrees if it is missing or unexpected, if its shape
        or dtype is not that of its parameter, if it differs by more than the tolerance, or if either gradient is NaN or
        infinite.

    Raises:
        ValueError: batch arguments have different numbers of examples; the candidate raises an error both with one
            example and with a batch; reference_dtype is neither None nor float64; rtol is negative or infinite; or
            batch_size is below 1.
        TypeError: a parameter is not floating-point.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> by_hand = lambda w, x, y: 2 * (w @ x - y) * x
        >>> w, X, Y = jnp.ones(3), jnp.arange(12.0).reshape(4, 3), jnp.ones(4)
        >>> check_gradient(by_hand, loss, w, X, Y).agrees
        True
        >>> wrong_sign = lambda w, x, y: -by_hand(w, x, y)
        >>> check_gradient(wrong_sign, loss, w, X, Y).leaves[0].max_rel
        2.0
        >>> check_gradient(jax.grad(loss), loss, w, X, 1.0, in_axes=(None, 0, None), numerical=True).agrees
        True
    """
    _check_options(reference_dtype, rtol, batch_size)
    args = gathered(jax.tree.map(jnp.asarray, (params, *batch)))
    arguments = arguments_of(args, {}, argnums, in_axes)
    chosen = args[argnums] if isinstance(argnums, int) else tuple(args[k] for k in argnums)
    for path, leaf in paths(chosen).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"check_gradient: expected real floating parameters, got {leaf.dtype} at params{path}.")
    by_hand = as_batched(candidate, arguments, batched, spmd_axis_name)
    over_examples = (None, arguments.axes, None)

    def gradient(params: Any, examples: Any, shared: Any) -> Any:
        return jax.grad(loss, argnums)(*arguments.rebuild(params, examples, shared)[0])

    def values(params: Any, examples: Any, shared: Any) -> Any:
        return loss(*arguments.rebuild(params, examples, shared)[0])

    by_jax, by_value = (jax.jit(jax.vmap(f, over_examples, spmd_axis_name=spmd_axis_name)) for f in (gradient, values))
    parts, differences, tree_problem = [], [], ""
    for part in _parts(arguments, batch_size):
        gradients = by_hand(arguments.params, part)
        double = reference_dtype is not None
        reference = _computed(by_jax, arguments, part, double)
        leaves = paths(gradients)
        parts.append(compared(paths(chosen), leaves, paths(reference)))
        if numerical:
            differences.append(_against_differences(by_value, arguments, part, parts[-1], leaves))
        structure: Any = jax.tree.structure(gradients)
        if structure != jax.tree.structure(chosen):
            tree_problem = f"is a {type(gradients).__name__}, expected the parameters' {type(chosen).__name__}"
    rows = [
        judged([part[path] for part in parts], rtol, [by_path[path] for by_path in differences if path in by_path])
        for path in parts[0]
    ]
    if tree_problem and not any(row.problem for row in rows):  # equal paths in different containers
        rows.append(without_numbers("the tree", (), "", None, f"{tree_problem} and the same containers in it"))
    name = "jax.grad" + (" in float64" if reference_dtype is not None else "")
    name += " and central differences" if numerical else ""
    return AgreementReport(tuple(rows), arguments.batch_size, name)


def assert_agree(candidate: Gradient, loss: Callable[..., Any], params: PyTree, *batch: PyTree, **options: Any) -> None:
    """`check_gradient` as an assertion, for a test.

    Args: as in `check_gradient`.

    Raises:
        AssertionError: the gradients disagree; the message holds the report's table and chex's message.

    Example:
        >>> loss = lambda w, x: (w @ x) ** 2
        >>> assert_agree(lambda w, x: 2 * (w @ x) * x, loss, jnp.ones(3), jnp.eye(3))
    """
    check_gradient(candidate, loss, params, *batch, **options).assert_agrees()


def _check_options(reference_dtype: Any, rtol: float | None, batch_size: int | None) -> None:
    if reference_dtype is not None and jnp.dtype(reference_dtype) != np.float64:
        raise ValueError(f"check_gradient: expected None or float64 as reference_dtype, got {reference_dtype!r}.")
    if rtol is not None and not 0 <= rtol < float("inf"):
        raise ValueError(f"check_gradient: expected 0 ≤ rtol < ∞, got {rtol}. None takes it from the dtype.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"check_gradient: expected batch_size ≥ 1, got {batch_size}. None computes all at once.")


def _parts(arguments: Arguments, batch_size: int | None) -> Iterator[list[Any]]:
    """The leaves of the batch, `batch_size` examples at a time; one empty part if there are no examples."""
    count = max(arguments.batch_size, 1)
    step = batch_size or count
    for start in range(0, count, step):
        end = min(start + step, arguments.batch_size)
        yield [
            jax.lax.slice_in_dim(leaf, start, end, axis=axis)
            for leaf, axis in zip(arguments.batch, arguments.axes, strict=True)
        ]


def _computed(
    function: Callable[..., Any], arguments: Arguments, part: list[Any], double: bool, params: list[Any] | None = None
) -> Any:
    """Call the function on these examples, in float64, or else in float32 or wider, and return NumPy arrays.

    Args:
        params: the leaves of the parameters; None takes the leaves from `arguments`.
    """
    with jax.enable_x64(True) if double else nullcontext():
        trees = arguments.params if params is None else params, part, arguments.shared
        return jax.tree.map(np.asarray, function(*jax.tree.map(_to_float64 if double else _to_float32_at_least, trees)))


def _against_differences(
    by_value: Callable[..., Any], arguments: Arguments, part: list[Any], rows: dict[str, Any], leaves: dict[str, Any]
) -> dict[str, list[Slopes]]:
    """How far the candidate's leaves are from central differences, for every leaf with the right shape."""

    def values(params: list[np.ndarray]) -> Any:
        return _computed(by_value, arguments, part, True, params=params)

    result: dict[str, list[Slopes]] = {}
    for slope in slopes(values, arguments.params):
        path = arguments.paths[slope.leaf]
        slope_error = against_slope(rows[path], leaves.get(path), slope)
        if slope_error is not None:
            result.setdefault(path, []).append(slope_error)
    return result


def _to_float64(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _to_float32_at_least(leaf: jax.Array) -> jax.Array:
    half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if half else leaf
