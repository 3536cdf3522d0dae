"""Solves with GᵀG [parameters, parameters] in place of GGᵀ, where G has more rows than columns.

G is materialized for a few examples at a time. R is the number of rows of an example, and its gradient is
Σ_k r_bk G_bk with the residuals r [B, R].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.rows import JacobianRows, Matrix
from jaxgrad.curvature.solve import damped_solve
from jaxgrad.per_example.algebra import factors
from jaxgrad.per_example.algebra.chunks import chunk_size, map_examples, sum_examples
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.precision import added, working_dtype
from jaxgrad.sharding import gathered, sharded_as, with_automatic_axes


def is_tall(rows: Matrix) -> bool:
    """Whether there are more rows than parameters, so that GᵀG is smaller than GGᵀ."""
    shapes = jax.tree.leaves(jax.eval_shape(rows.sum))
    is_complex = any(jnp.issubdtype(p.dtype, jnp.complexfloating) for p in shapes)
    n = rows.batch_size
    return not is_complex and isinstance(n, int) and n > sum(p.size for p in shapes)


def vector_of(tree: PyTree, dtype: Any) -> Float[Array, " P"]:
    """A tree like the parameters as one vector, which is replicated on an explicit mesh."""
    return jnp.concatenate([jnp.ravel(a).astype(dtype) for a in jax.tree.leaves(gathered(tree))])


def tree_of(vector: Float[Array, " P"], shapes: PyTree) -> PyTree:
    """The inverse of `vector_of`, in the vector's dtype; on an explicit mesh, sharded as the shapes say."""
    leaves, treedef = jax.tree.flatten(shapes)
    ends = [sum(p.size for p in leaves[: k + 1]) for k in range(len(leaves))]
    parts = [sharded_as(p, vector[end - p.size : end].reshape(p.shape)) for end, p in zip(ends, leaves, strict=True)]
    return jax.tree.unflatten(treedef, parts)


@with_automatic_axes(by_example=False)
def matrix_of(g: PerExampleGrads) -> Float[Array, "B P"]:
    """G, materialized in float32 or wider."""
    leaves = [added([factors.written_out(f) for f in leaf.weighted()]) for leaf in g._leaves]
    dtype = working_dtype(*(a.dtype for a in leaves))
    return jnp.concatenate([a.reshape(len(a), -1).astype(dtype) for a in leaves], 1)


@jax.jit  # without jit, JAX would compile the loops again at every call
def second_moments(rows: Matrix) -> Float[Array, "P P"]:
    """GᵀG."""
    return _over_examples(sum_examples, lambda G, _: jnp.matmul(G.T, G), rows, jnp.ones(rows.batch_size))


@jax.jit
def centered_sums(
    rows: Matrix, weights: Float[Array, " B"], numbers: Float[Array, "B R"], means: Float[Array, "R P"]
) -> tuple[Float[Array, "P P"], Float[Array, " P"], Float[Array, "R P"]]:
    """Σ_b w_b times Σ_k D_bk D_bkᵀ, Σ_k r_bk D_bk and D_b, where D_bk = G_bk - m_k, with numbers r.

    The means are subtracted before anything is multiplied. The last sum is what is left of the rounded means.
    """

    def sums(G: Array, numbers: Array, means: Array) -> Any:
        w, r = numbers[:, :1], numbers[:, 1:]
        D = G.reshape(len(w), *means.shape) - means[None]
        flat = (jnp.sqrt(w)[:, :, None] * D).reshape(G.shape)
        return jnp.matmul(flat.T, flat), jnp.einsum("br,brp->p", w * r, D), jnp.einsum("b,brp->rp", w[:, 0], D)

    return _over_examples(sum_examples, sums, rows, jnp.concatenate([weights[:, None], numbers], 1), means)


@jax.jit
def gradients_times(rows: Matrix, residuals: Float[Array, "B R"], X: Float[Array, "P M"]) -> Float[Array, "B M"]:
    """The gradients of the examples times a matrix."""
    return _over_examples(map_examples, lambda G, r, X: jnp.matmul(_gradients(G, r), X), rows, residuals, X)


@jax.jit
def gradients_in_norm(rows: Matrix, residuals: Float[Array, "B R"], S: Float[Array, "P P"]) -> Float[Array, " B"]:
    """gᵀ S g of the gradient of every example."""

    def squares(G: Array, r: Array, S: Array) -> Array:
        g = _gradients(G, r)
        return (jnp.matmul(g, S) * g).sum(1)

    return _over_examples(map_examples, squares, rows, residuals, S)


def inverse_of(rows: Matrix, ridge: Array) -> Float[Array, "P P"]:
    """(GᵀG + ridge I)⁻¹."""
    A = second_moments(rows)
    return damped_solve(A, jnp.eye(len(A), dtype=A.dtype), ridge)


def _gradients(G: Array, residuals: Array) -> Array:
    """[B·R, P] → [B, P]."""
    B, R = residuals.shape
    return jnp.einsum("brp,br->bp", G.reshape(B, R, -1), residuals.astype(G.dtype))


@with_automatic_axes(by_example=False)
def _over_examples(loop: Any, function: Callable[..., Any], rows: Matrix, numbers: Array, *shared: Array) -> Any:
    """The loop over blocks of examples of function(their rows [b·R, P], their numbers, *shared)."""
    tree: Any
    one: Callable[[Any], Array]
    if isinstance(rows, JacobianRows):
        R, one = rows.jacobian.outputs, _rows_of_jacobian
        tree = rows.jacobian, rows.weights.reshape(-1, R)
    else:
        R, one, tree = 1, matrix_of, rows
    row = jax.eval_shape(one, tree)
    B = rows.batch_size // R
    size = chunk_size(2 * R * row.shape[1] * row.dtype.itemsize, B)
    return loop(lambda part, number: function(one(part), number, *shared), size, tree, numbers.reshape(B, -1))


def _rows_of_jacobian(weighted: tuple[Any, Array]) -> Array:
    """[B·R, P], from a Jacobian and weights [B, R]."""
    jacobian, weights = weighted
    G = jacobian._vmap_outputs(matrix_of)
    return (weights[:, :, None] * G).reshape(-1, G.shape[2])
