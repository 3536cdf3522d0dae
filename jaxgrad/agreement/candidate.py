"""The gradient under test: find out whether it takes one example or a batch, and call it accordingly."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.per_example.arguments import Arguments

Gradient = Callable[..., PyTree]


def paths(tree: PyTree) -> dict[str, Any]:
    """The tree's leaves by their paths, as `jax.tree_util.keystr` writes them."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_batched(
    candidate: Gradient, arguments: Arguments, batched: bool | None, spmd_axis_name: Any
) -> Callable[..., PyTree]:
    """Return the candidate as a function of the leaves of (parameters, batch) that returns all examples' gradients.

    It is called with one example and with the batch. The form whose result has the shapes of a gradient is used; if
    neither has them, the first form that does not raise is used.

    Args:
        candidate, batched, spmd_axis_name: as in `check_gradient`; `batched` restricts it to one form.
        arguments: the call.

    Raises:
        ValueError: the candidate raises in both forms.
    """

    def gradient(params: Sequence[Any], leaves: Sequence[Any]) -> PyTree:
        args, _ = arguments.loss_arguments(params, leaves)
        result = candidate(*args)
        return result.materialize() if hasattr(result, "materialize") else result

    size, params = arguments.batch_size, arguments.params
    one = _example(arguments, arguments.batch, 0) if size else [jnp.zeros(e.shape, e.dtype) for e in arguments.example]
    expected = dict(zip(arguments.paths, (leaf.shape for leaf in params), strict=True))
    errors, forms = [], []
    for form in (False, True) if batched is None else (batched,):
        leaves = arguments.batch if form else one
        traceable = True
        try:
            try:
                shapes = jax.eval_shape(gradient, params, leaves)
            except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
                traceable = False  # the candidate uses NumPy: call it without tracing
                shapes = gradient(params, leaves)
            returned = {path: np.shape(leaf) for path, leaf in paths(shapes).items()}
        except Exception as error:  # a function may raise anything in the form that it does not take
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        prefix = (size,) if form else ()
        forms.append((returned == {path: prefix + shape for path, shape in expected.items()}, form, traceable))
    if not forms:
        raise ValueError(
            "check_gradient: expected a candidate(params, *example) or candidate(params, *batch), got one that raises. "
            + " With the batch: ".join([f"With one example: {errors[0]}.", *(f"{e}." for e in errors[1:])])
        )
    _, form, traceable = max(forms, key=lambda tried: tried[0])  # the first that fits; otherwise the first
    if form:
        return gradient
    if traceable:
        return jax.jit(jax.vmap(gradient, (None, arguments.axes), spmd_axis_name=spmd_axis_name))

    def loop(params: Sequence[Any], leaves: Sequence[Any]) -> PyTree:
        count = leaves[0].shape[arguments.axes[0]]
        gradients = [gradient(params, _example(arguments, leaves, i)) for i in range(count)]
        if not gradients:
            return jax.tree.map(lambda leaf: np.zeros((0, *np.shape(leaf)), leaf.dtype), gradient(params, one))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)

    return loop


def _example(arguments: Arguments, leaves: Sequence[Any], i: int) -> list[Any]:
    return [
        jax.lax.index_in_dim(leaf, i, axis, keepdims=False) for leaf, axis in zip(leaves, arguments.axes, strict=True)
    ]
