"""The functions that are compared on a model in JAX: a plain gradient, and several ways to sum clipped gradients.

Each is a function of (params, *batch) that returns (mean loss, gradient). A clipped gradient is a sum over the batch.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from benchmarks.models import Model

NOT_INSTALLED = "not installed"
MICROBATCHES = (None, 64, 16, 4, 1)
Function = Callable[..., Any]


def in_axes(model: Model) -> Any:
    return (None, *[0] * len(model.batch))


def max_norm(model: Model, examples: int | None = None) -> float:
    """A bound near the median norm, so that some examples are clipped and some are not."""
    norms = jax.jit(lambda p, *b: jg.per_example_grad(model.loss)(p, *b).norms())
    return float(np.median(norms(*model.first(examples or model.batch_size))))


def plain(model: Model, axis: str | None = None) -> Function:
    """The mean loss and its gradient. The tables give the cost of the other functions as multiples of this one's.

    With the name of a mesh axis, the examples are sharded over it.
    """
    losses = jax.vmap(model.loss, in_axes(model), spmd_axis_name=axis)
    return lambda params, *batch: jax.value_and_grad(lambda p: losses(p, *batch).mean())(params)


def factored(model: Model, bound: float) -> Function:
    """The mean loss and the clipped sum, from factors."""

    def compute(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), g.clip(bound).sum()

    return compute


def norms(model: Model) -> Function:
    """The mean loss and the norms, without a sum."""

    def compute(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), g.norms()

    return compute


def weighted_sum(model: Model) -> Function:
    """The mean loss and a sum with weights that are known in advance, without norms."""
    c = jnp.linspace(0.5, 1.5, model.batch_size)

    def compute(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), g.weighted_sum(c)

    return compute


def clipped(model: Model, bound: Any, passes: int = 1, axis: str | None = None) -> Function:
    """`jaxgrad.clipped_grad`, with a mask.

    Args:
        model: the model.
        bound: one number, or a tree prefix of bounds.
        passes: one or two.
        axis: the name of the mesh axis that the examples are sharded over.
    """
    gradient = jg.clipped_grad(model.loss, bound, passes=passes, spmd_axis_name=axis)

    def compute(params: Any, *batch: Any) -> Any:
        total, info = gradient(params, *batch, mask=jnp.ones(len(jax.tree.leaves(batch)[0]), bool))
        return info.values.mean(), total

    return compute


def clipped_by_layer(model: Model, bound: float) -> Function:
    """`jaxgrad.clipped_grad` with a bound for each layer of `params["layers"]` and for each other parameter."""
    length = len(jax.tree.leaves(model.params["layers"])[0])
    return clipped(model, {name: jnp.full(length, bound) if name == "layers" else bound for name in model.params})


def materialized(model: Model, bound: float) -> Function:
    """The mean loss and the clipped sum, from the gradients that `vmap(jax.grad)` materializes."""

    def compute(params: Any, *batch: Any) -> Any:
        values, G = jax.vmap(jax.value_and_grad(model.loss), in_axes(model))(params, *batch)
        squares = sum(
            jnp.sum(jnp.abs(leaf.reshape(len(leaf), -1)) ** 2, 1, dtype=jnp.float32) for leaf in jax.tree.leaves(G)
        )
        c = bound / jnp.maximum(bound, jnp.sqrt(squares))
        return values.mean(), jax.tree.map(lambda leaf: jnp.tensordot(c.astype(leaf.dtype), leaf, 1), G)

    return compute


def optax(model: Model, bound: float) -> Function | str:
    """`vmap(jax.grad)`, clipped by `optax.per_example_global_norm_clip`."""
    if importlib.util.find_spec("optax") is None:
        return NOT_INSTALLED
    from optax import per_example_global_norm_clip

    def compute(params: Any, *batch: Any) -> Any:
        values, G = jax.vmap(jax.value_and_grad(model.loss), in_axes(model))(params, *batch)
        leaves, tree = jax.tree.flatten(G)
        return values.mean(), jax.tree.unflatten(tree, per_example_global_norm_clip(leaves, bound)[0])

    return compute


def jax_privacy(model: Model, bound: float, microbatches: tuple[int | None, ...] = MICROBATCHES) -> dict[str, Any]:
    """jax-privacy's clipped_grad at several microbatch sizes (None for the whole batch), by column."""
    name = "jax-privacy"
    if importlib.util.find_spec("jax_privacy") is None:
        return {name: NOT_INSTALLED}
    import jax_privacy as library

    warnings.filterwarnings("ignore", message="optax.global_norm is deprecated")

    def at_size(microbatch: int | None) -> Function:
        def compute(params: Any, *batch: Any) -> Any:
            size = None if microbatch is None or microbatch >= len(jax.tree.leaves(batch)[0]) else microbatch
            gradient = library.clipped_grad(
                model.loss,
                l2_clip_norm=bound,
                batch_argnums=tuple(range(1, 1 + len(model.batch))),
                keep_batch_dim=False,
                return_values=True,
                microbatch_size=size,
            )
            total, aux = gradient(params, *batch)
            return aux.values.mean(), total

        return compute

    B = model.batch_size
    return {f"{name} {m}": at_size(m) for m in microbatches if m is None or (m < B and B % m == 0)}


def materialized_bytes(model: Model, columns: dict[str, Any]) -> dict[str, int]:
    """Bytes of gradients that are materialized at once, for the columns that materialize a batch or a microbatch."""
    example_bytes = model.gradient_bytes // model.batch_size
    sizes = dict.fromkeys(("vmap(grad)", "optax"), model.gradient_bytes)
    for column in columns:
        if column.startswith("jax-privacy "):
            microbatch = column.split()[1]
            sizes[column] = example_bytes * (model.batch_size if microbatch == "None" else int(microbatch))
    return sizes
