"""The rows of a Jacobian as one matrix of B·O gradients, without copies of the arrays that outputs share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.per_example.gradients import PerExampleGrads, widened
from jaxgrad.per_example.jacobian import PerExampleJacobian


class JacobianRows(NamedTuple):
    """G [n, parameters] with n = B·O, the rows of the first example first, and the methods that solves call.

    The methods do what the methods of `PerExampleGrads` with the same names do.

    Attributes:
        jacobian: the rows before they are multiplied by `weights`.
        weights: [n], a number for each row.
    """

    jacobian: PerExampleJacobian
    weights: Array

    @staticmethod
    def of(jacobian: PerExampleJacobian) -> "JacobianRows":
        """The rows of a Jacobian, with weight 1."""
        dtype = jax.eval_shape(jacobian.norms).dtype
        return JacobianRows(jacobian, jnp.ones(jacobian.batch_size * jacobian.outputs, dtype))

    @property
    def batch_size(self) -> int:
        """n."""
        return self.jacobian.batch_size * self.jacobian.outputs

    def _weighted(self, values: Float[Array, "B O"]) -> Float[Array, " n"]:
        return self.weights * values.ravel()

    def norms(self) -> Float[Array, " n"]:
        """The norm of every row."""
        return jnp.abs(self._weighted(self.jacobian.norms()))

    def dot(self, v: PyTree) -> Float[Array, " n"]:
        """G v."""
        return self._weighted(self.jacobian.dot(v))

    def gram(self, other: "JacobianRows | PerExampleGrads | None" = None) -> Float[Array, "n m"]:
        """G G′ᵀ, where G′ is `other` or, without it, G."""
        if isinstance(other, PerExampleGrads):
            products = self.jacobian.gram(other).swapaxes(1, 2)
            return self.weights[:, None] * products.reshape(self.batch_size, other.batch_size)
        second = self if other is None else other
        products = self.jacobian.gram(None if second.jacobian is self.jacobian else second.jacobian)
        products = products.transpose(0, 2, 1, 3)
        return self.weights[:, None] * products.reshape(self.batch_size, second.batch_size) * second.weights[None]

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

    def scale(self, c: Float[Array, " n"]) -> "JacobianRows":
        """Every row times its own number."""
        return JacobianRows(self.jacobian, self.weights * c.astype(self.weights.dtype))

    def __mul__(self, c: Any) -> "JacobianRows":
        """Every row times one number, which scales the factors, so that no square overflows or underflows later."""
        return JacobianRows(self.jacobian * c, self.weights)


Matrix = Any
"""`PerExampleGrads` or `JacobianRows`."""


def widened_rows(g: Matrix) -> Matrix:
    """The same rows with bfloat16 factors cast to float32."""
    return widened(g) if isinstance(g, PerExampleGrads) else JacobianRows(g.jacobian.widened(), g.weights)
