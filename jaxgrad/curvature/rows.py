"""The rows of a Jacobian as one matrix: B·O gradients, none of which copies what the outputs of an example share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.per_example.gradients import PerExampleGrads, widened
from jaxgrad.per_example.jacobian import PerExampleJacobian


class Rows(NamedTuple):
    """G [n, parameters] with n = B·O, the O rows of an example one after another: what products and solves need of it.

    Attributes:
        jacobian: the rows before they are multiplied by `weights`.
        weights: [n], a number for each row.
    """

    jacobian: PerExampleJacobian
    weights: Array

    @staticmethod
    def of(jacobian: PerExampleJacobian) -> "Rows":
        """The rows of a Jacobian."""
        dtype = jax.eval_shape(jacobian.norms).dtype
        return Rows(jacobian, jnp.ones(jacobian.batch_size * jacobian.outputs, dtype))

    @property
    def batch_size(self) -> int:
        """n."""
        return self.jacobian.batch_size * self.jacobian.outputs

    def _of_rows(self, found: Float[Array, "B O"]) -> Float[Array, " n"]:
        return self.weights * found.ravel()

    def norms(self) -> Float[Array, " n"]:
        """The norm of every row."""
        return jnp.abs(self._of_rows(self.jacobian.norms()))

    def dot(self, v: PyTree) -> Float[Array, " n"]:
        """G v."""
        return self._of_rows(self.jacobian.dot(v))

    def gram(self, other: "Rows | PerExampleGrads | None" = None) -> Float[Array, "n m"]:
        """G G′ᵀ, where G′ is `other` or, without it, G."""
        if isinstance(other, PerExampleGrads):
            found = self.jacobian.gram(other).swapaxes(1, 2)
            return self.weights[:, None] * found.reshape(self.batch_size, other.batch_size)
        second = self if other is None else other
        same = second.jacobian is self.jacobian
        found = self.jacobian.gram(None if same else second.jacobian).transpose(0, 2, 1, 3)
        return self.weights[:, None] * found.reshape(self.batch_size, second.batch_size) * second.weights[None]

    def weighted_sum(self, c: Float[Array, " n"], dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """Gᵀ c."""
        c = (self.weights * c).reshape(self.jacobian.batch_size, self.jacobian.outputs)
        return self.jacobian.weighted_sum(c, dtype)

    def sum(self, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """The sum of the rows."""
        return self.weighted_sum(jnp.ones_like(self.weights), dtype)

    def mean(self) -> PyTree:
        """The mean of the rows."""
        return jax.tree.map(lambda a: a / self.batch_size if self.batch_size else jnp.full_like(a, jnp.nan), self.sum())

    def scale(self, c: Float[Array, " n"]) -> "Rows":
        """Every row times a number of its own."""
        return Rows(self.jacobian, self.weights * c.astype(self.weights.dtype))

    def __mul__(self, c: Any) -> "Rows":
        """Every row times one number, multiplied in before anything is squared."""
        return Rows(self.jacobian * c, self.weights)


Matrix = Any
"""`PerExampleGrads` or `Rows`."""


def widened_rows(g: Matrix) -> Matrix:
    """The same rows with factors of float32 in place of bfloat16."""
    return widened(g) if isinstance(g, PerExampleGrads) else Rows(g.jacobian.widened(), g.weights)
