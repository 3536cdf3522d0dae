"""The exercise's gradients by `jax.grad`, with the same names and signatures as `closed_form`.

The closed form replaces these functions and is compared with them. Where σ saturates, `jax.grad` loses the digits of
the slope, because it computes σ - σ²; `closed_form` does not. Nothing is widened here: with bfloat16 parameters the
arithmetic is in bfloat16, unless the compiler keeps more digits.
"""

import jax
from jaxtyping import Array, Float

from jaxgrad.exercise.activations import Activation, logistic
from jaxgrad.exercise.checks import batch, batch_mean, one_example_jitted
from jaxgrad.exercise.model import loss
from jaxgrad.exercise.params import Params

__all__ = [
    "batched_grad",
    "batched_input_grad",
    "grad",
    "hessian_vector_product",
    "input_grad",
    "value_and_grad",
    "value_and_grad_one",
]


def _mean_loss(params: Params, X: Array, Y: Array, activation: Activation) -> Array:
    return jax.vmap(lambda x, y: loss(params, x, y, activation))(X, Y).mean()


@one_example_jitted
def grad(params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic) -> Params:
    """∂loss/∂params of one example; see `closed_form.grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> float(grad(params, jnp.zeros(2), 1.0).b[0])
        -0.09438...
    """
    return jax.grad(loss)(params, x, y, activation)


@one_example_jitted
def value_and_grad_one(
    params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic
) -> tuple[Float[Array, ""], Params]:
    """(loss, ∂loss/∂params) of one example; see `closed_form.value_and_grad_one`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> float(value_and_grad_one(params, jnp.zeros(2), 1.0)[0])
        0.47407...
    """
    return jax.value_and_grad(loss)(params, x, y, activation)


@one_example_jitted
def input_grad(
    params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic
) -> Float[Array, " D"]:
    """∂loss/∂x of one example; see `closed_form.input_grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> input_grad(params, jnp.zeros(2), 1.0).tolist()
        [-0.09438..., -0.09438...]
    """
    return jax.grad(loss, argnums=1)(params, x, y, activation)


@batch
def batched_grad(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> Params:
    """Every example's ∂loss/∂params: jit(vmap(jax.grad)); see `closed_form.batched_grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> batched_grad(params, jnp.zeros((5, 2)), jnp.ones(5)).W.shape
        (5, 1, 2)
    """
    return jax.vmap(lambda x, y: jax.grad(loss)(params, x, y, activation))(X, Y)


@batch
def batched_input_grad(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> Float[Array, "B D"]:
    """Every example's ∂loss/∂x; see `closed_form.batched_input_grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> batched_input_grad(params, jnp.zeros((5, 2)), jnp.ones(5)).shape
        (5, 2)
    """
    return jax.vmap(lambda x, y: jax.grad(loss, argnums=1)(params, x, y, activation))(X, Y)


@batch_mean
def value_and_grad(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> tuple[Float[Array, ""], Params]:
    """(mean loss, its gradient): jit(jax.value_and_grad(mean loss)); see `closed_form.value_and_grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> value, gradient = value_and_grad(params, jnp.zeros((5, 2)), jnp.ones(5))
        >>> float(value), gradient.W.shape
        (0.47407..., (1, 2))
    """
    return jax.value_and_grad(_mean_loss)(params, X, Y, activation)


@batch_mean
def hessian_vector_product(
    params: Params, V: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> Params:
    """The mean loss's Hessian times V: jax.jvp of jax.grad; see `closed_form.hessian_vector_product`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> float(hessian_vector_product(params, params, jnp.zeros((5, 2)), jnp.ones(5)).w[0])
        0.05875...
    """
    return jax.jvp(lambda p: jax.grad(_mean_loss)(p, X, Y, activation), (params,), (V,))[1]
