"""Compare a hand-written gradient with `jax.grad`, example by example and leaf by leaf."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.leaf_agreement import RTOL, LeafAgreement, judged, measured, without_numbers

__all__ = ["RTOL", "AgreementReport", "LeafAgreement", "assert_agree", "check_gradient"]

Gradient = Callable[..., PyTree]


@dataclass(frozen=True)
class AgreementReport:
    """The result of `check_gradient`: `str()` gives a table, `agrees` the verdict, `leaves` the rows.

    Attributes:
        leaves: one row per leaf, in the order of the parameter tree.
        examples: number of examples that were compared.
        reference: what the candidate was compared with.

    Example:
        >>> report = check_gradient(lambda w, x: x, lambda w, x: w @ x, jnp.ones(3), jnp.eye(3))
        >>> print(str(report).splitlines()[-1])
        agrees with jax.grad on 3 examples
    """

    leaves: tuple[LeafAgreement, ...]
    examples: int
    reference: str

    @property
    def agrees(self) -> bool:
        """True if every leaf agrees."""
        return not any(leaf.problem for leaf in self.leaves)

    def assert_agrees(self) -> None:
        """Raise AssertionError, with this table and chex's message, unless every leaf agrees."""
        shapes = {leaf.path: (leaf.shape, leaf.dtype) for leaf in self.leaves}
        expected = {leaf.path: (leaf.expected_shape, leaf.expected_dtype) for leaf in self.leaves}
        excess = {leaf.path: np.float64(leaf.excess) for leaf in self.leaves}
        try:
            chex.assert_equal(shapes, expected)
            chex.assert_tree_all_finite(excess)
            chex.assert_trees_all_close(excess, jax.tree.map(np.zeros_like, excess), rtol=0, atol=1)
        except AssertionError as error:
            raise AssertionError(
                f"the gradients disagree.\n{self}\n"
                f"chex, on shapes, dtypes and ‖Δ‖ in units of the tolerance (at most 1):\n{error}"
            ) from None

    def __str__(self) -> str:
        rows = [
            ("leaf", "shape", "dtype", "max |Δ|", "max ‖Δ‖/‖ref‖", "rtol", "‖Δ‖/allowed", "worst example", "verdict")
        ]
        for leaf in self.leaves:
            rows.append(
                (
                    leaf.path,
                    str(leaf.shape),
                    leaf.dtype,
                    f"{leaf.max_abs:.2e}",
                    f"{leaf.max_rel:.2e}",
                    f"{leaf.rtol:.0e}",
                    f"{leaf.excess:.2g}",
                    str(leaf.worst_example),
                    leaf.problem or "agrees",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        verdict = "agrees" if self.agrees else "DISAGREES"
        return "\n".join([*lines, f"{verdict} with {self.reference} on {self.examples} examples"])


def check_gradient(
    candidate: Gradient,
    loss: Callable[..., Any],
    params: PyTree,
    *batch: PyTree,
    oracle: str | None = None,
    rtol: float | None = None,
    batched: bool | None = None,
    batch_size: int | None = None,
) -> AgreementReport:
    """Compare a gradient you derived by hand with `jax.grad`, for every example of a batch.

    Formula: let c be the candidate's gradient and r the reference vmap(jax.grad(loss)). Leaf l agrees on example i if
    ‖c_il - r_il‖ ≤ rtol·‖r_il‖ + floor, where floor = 32·eps·max_i ‖r_il‖ + √size·tiny. Below the floor's first term
    `jax.grad` itself has no correct digits (eps is that of the reference's dtype, float32 or float64). The second term
    allows for underflow (tiny is the smallest normal number of the leaf's dtype; for float16, the smallest subnormal).
    Norms are over the entries of a leaf. Both gradients are materialized: B × parameters numbers at once, or
    batch_size × parameters.

    Args:
        candidate: candidate(params, *example) → tree of gradients, or candidate(params, *batch) → the same with a
            leading example axis (a tree of arrays, or an object whose `materialize()` returns one); in JAX or NumPy.
        loss: loss(params, *example) → scalar, a pure JAX function of ONE example.
        params: tree of floating-point arrays.
        *batch: arrays or trees of arrays; axis 0 is the example axis.
        oracle: "float64" computes the reference in float64 from the same numbers; None computes it in the dtypes of
            the arguments, with float16 and bfloat16 widened to float32. (A loss that draws random numbers must name
            their dtype, because JAX draws different numbers in float64.)
        rtol: relative tolerance for every leaf; None takes it from the leaf's dtype: float64 1e-9, float32 1e-4,
            float16 1e-2, bfloat16 5e-2 (`agreement.RTOL`).
        batched: True if `candidate` takes a batch, False if it takes one example; None tries one example first, and
            uses the form whose result has the shapes of a gradient.
        batch_size: number of examples to compute at once; None for all.

    Returns:
        AgreementReport: one row per leaf, with its path. A leaf disagrees if it is missing or unexpected, if its shape
        or dtype is not that of its parameter, if it differs by more than the tolerance, or if either gradient is NaN or
        infinite.

    Raises:
        ValueError: batch arguments without a common leading axis; a candidate that cannot be called in either form.
        ValueError: an unknown oracle, a negative or infinite rtol, a batch_size below 1.
        TypeError: parameters that are not floating-point.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> by_hand = lambda w, x, y: 2 * (w @ x - y) * x
        >>> w, X, Y = jnp.ones(3), jnp.arange(12.0).reshape(4, 3), jnp.ones(4)
        >>> check_gradient(by_hand, loss, w, X, Y).agrees
        True
        >>> wrong_sign = lambda w, x, y: -by_hand(w, x, y)
        >>> check_gradient(wrong_sign, loss, w, X, Y).leaves[0].max_rel
        2.0
    """
    if oracle not in (None, "float64"):
        raise ValueError(f'check_gradient: expected oracle to be None or "float64", got {oracle!r}.')
    if rtol is not None and not 0 <= rtol < float("inf"):
        raise ValueError(f"check_gradient: expected 0 ≤ rtol < ∞, got {rtol}. None takes it from the dtype.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"check_gradient: expected batch_size ≥ 1, got {batch_size}. None computes all at once.")
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    examples = _batch_size(batch)
    paths = _paths(params)
    for path, leaf in paths.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"check_gradient: expected floating parameters, got {leaf.dtype} at params{path}. "
                "Close over values that are not differentiated, or pass them with the batch."
            )
    by_hand = _on_a_batch(candidate, params, batch, batched)
    by_jax = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, *[0] * len(batch))))

    parts, other_tree = [], ""
    step = batch_size or max(examples, 1)
    for start in range(0, max(examples, 1), step):
        part = jax.tree.map(lambda leaf, start=start: leaf[start : start + step], batch)
        gradients, reference = by_hand(params, *part), _reference(by_jax, params, part, oracle)
        parts.append(measured(paths, _paths(gradients), reference))
        found: Any = jax.tree.structure(gradients)
        if found != jax.tree.structure(params):
            other_tree = f"is a {type(gradients).__name__}, expected the parameters' {type(params).__name__}"
    rows = [judged([part[path] for part in parts], rtol) for path in parts[0]]
    if other_tree and not any(row.problem for row in rows):  # equal paths in different containers
        rows.append(without_numbers("the tree", (), "", None, f"{other_tree} and the same containers in it"))
    name = "jax.grad" + (f" in {oracle}" if oracle else "")
    return AgreementReport(tuple(rows), examples, name)


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


def _batch_size(batch: Sequence[PyTree]) -> int:
    sizes = {
        f"batch[{k}]{jax.tree_util.keystr(path)}": leaf.shape[:1]
        for k, argument in enumerate(batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument)
    }
    if len(set(sizes.values())) != 1 or () in sizes.values():
        shown = ", ".join(f"{path}: {size[0] if size else 'a scalar'}" for path, size in sizes.items()) or "no array"
        raise ValueError(
            f"check_gradient: expected batch arguments with a common leading example axis, got {shown}. "
            "Close over values shared by all examples."
        )
    return next(iter(sizes.values()))[0]


def _paths(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _materialized(gradients: Any) -> PyTree:
    return gradients.materialize() if hasattr(gradients, "materialize") else gradients


def _on_a_batch(candidate: Gradient, params: PyTree, batch: tuple[PyTree, ...], batched: bool | None) -> Gradient:
    """Return the candidate as a function of (params, *batch) → a tree of arrays with a leading example axis.

    Both forms of calling it are tried. The one whose result has the shapes of a gradient is used; if neither has them,
    the first one that can be called.
    """

    def gradient(params: PyTree, *arguments: PyTree) -> PyTree:
        return _materialized(candidate(params, *arguments))

    size = _batch_size(batch)
    one = jax.tree.map(lambda leaf: leaf[0] if size else jnp.zeros(leaf.shape[1:], leaf.dtype), batch)
    wanted = {path: leaf.shape for path, leaf in _paths(params).items()}
    errors, ways = [], []
    for form in (False, True) if batched is None else (batched,):
        arguments = batch if form else one
        traceable = True
        try:
            try:
                shapes = jax.eval_shape(gradient, params, *arguments)
            except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
                traceable = False  # the candidate uses NumPy: call it without tracing
                shapes = gradient(params, *arguments)
            found = {path: np.shape(leaf) for path, leaf in _paths(shapes).items()}
        except Exception as error:  # whatever the user's function raises for the form it was not written for
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        prefix = (size,) if form else ()
        ways.append((found == {path: prefix + shape for path, shape in wanted.items()}, form, traceable))
    if not ways:
        raise ValueError(
            "check_gradient: expected a candidate(params, *example) or candidate(params, *batch), got one that raises. "
            + " With the batch: ".join([f"With one example: {errors[0]}.", *(f"{e}." for e in errors[1:])])
        )
    _, form, traceable = max(ways, key=lambda way: way[0])  # the first that fits; otherwise the first
    if form:
        return gradient
    if traceable:
        return jax.jit(jax.vmap(gradient, in_axes=(None, *[0] * len(batch))))

    def loop(params: PyTree, *part: PyTree) -> PyTree:
        count = _batch_size(part)
        each = [gradient(params, *jax.tree.map(lambda leaf, i=i: leaf[i], part)) for i in range(count)]
        if not each:
            return jax.tree.map(lambda leaf: np.zeros((0, *np.shape(leaf)), leaf.dtype), gradient(params, *one))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    return loop


def _reference(by_jax: Gradient, params: PyTree, batch: tuple[PyTree, ...], oracle: str | None) -> PyTree:
    with jax.enable_x64(True) if oracle else nullcontext():
        params, batch = jax.tree.map(_to_float64 if oracle else _to_float32_at_least, (params, batch))
        return {path: np.asarray(leaf) for path, leaf in _paths(by_jax(params, *batch)).items()}


def _to_float64(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _to_float32_at_least(leaf: jax.Array) -> jax.Array:
    half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if half else leaf
