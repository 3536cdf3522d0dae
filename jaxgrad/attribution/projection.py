"""A few numbers per example that preserve the inner products of gradients."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.chunks import chunk_size
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients


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
