"""Activations: the function, its slope and its curvature, each accurate to the last digits.

`jax.grad` computes the slope of the logistic as σ - σ², and that difference is 0 long before the slope is: from z = 17
on in float32, from z = 6 on in bfloat16. The forms here never subtract nearly equal numbers. With e = exp(-|z|), for
example, the logistic is 1/(1 + e) or e/(1 + e), its slope is e/(1 + e)² and its curvature ∓e(1 - e)/(1 + e)³, all from
one exponential.

Accuracy. The table gives error bounds in ulp (units in the last place of the dtype) in float32 and float64 for
|z| ≤ 80, on CPU; `tests/test_activations.py` asserts them against 60-digit arithmetic.

| activation | value | slope | curvature | within 0.5 of a zero of the function: absolute, in eps |
|---|---|---|---|---|
| logistic | 4 | 6 | 8 | curvature (z = 0): 1 |
| tanh | 8 | 8 | 10 | value (z = 0): 2, curvature (z = 0): 4 |
| softplus | 4 | 4 | 6 | |
| relu, leaky_relu, identity | 1 | 1 | 1 | |
| elu | 6 | 4 | 4 | value (z = 0): 2 |
| gelu | 10 | 12 | 16 | slope (z = -0.75), curvature (z = ±1.41): 2 each |
| gelu_tanh | 10 | 12 | 20 | slope (z = -0.75), curvature (z = ±1.42): 4 each |
| silu | 6 | 10 | 20 | slope (z = -1.28), curvature (z = ±2.40): 2 each |
| sine | 2 | 2 | 2 | all three: 1, for any z |

float16 and bfloat16 are computed in float32 and rounded once. The bound is then 1 ulp, except for the value of the
logistic: it is a JAX primitive in the argument's own dtype, and its bound is 3 ulp. A true value or an argument below
the smallest normal number of the dtype may be treated as 0.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad.exercise.compensated import two_product, two_sum
from jaxgrad.exercise.gaussian import halves
from jaxgrad.precision import working_dtype

Elementwise = Callable[[Any], Array]
Jet = Callable[[Any], tuple[Array, Array, Array]]


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its first two derivatives, each a function of an array.

    Args:
        value: σ, applied elementwise.
        slope: σ′.
        curvature: σ″.
        name: the name that messages show.
        joint: optional function that returns all three at once, so that they share their exponentials.

    Calling the activation calls `value`. Two activations are equal when their functions are the same objects, so an
    activation can be a static argument of `jax.jit`.

    Example:
        >>> logistic.slope(jnp.float32(20.0))              # σ - σ² gives 0 here
        Array(2.0611537e-09, dtype=float32)
    """

    value: Elementwise
    slope: Elementwise
    curvature: Elementwise
    name: str = "custom"
    joint: Jet | None = None

    def __call__(self, z: jax.typing.ArrayLike) -> Array:
        """σ(z)."""
        return self.value(z)

    def __repr__(self) -> str:
        return f"Activation({self.name})"

    def jet(self, z: jax.typing.ArrayLike) -> tuple[Array, Array, Array]:
        """Return (σ(z), σ′(z), σ″(z)). `jit` leaves out those that are not used."""
        if self.joint is not None:
            return self.joint(z)
        return self.value(z), self.slope(z), self.curvature(z)

    @staticmethod
    def from_function(function: Elementwise) -> "Activation":
        """Make an activation from any elementwise JAX function; forward-mode autodiff gives its derivatives.

        The derivatives are as accurate as JAX's rules for `function`. The same function gives equal activations, so
        that `jax.jit` does not compile again; the function must be hashable.

        Example:
            >>> cube = Activation.from_function(lambda z: z**3)
            >>> float(cube.slope(2.0)), float(cube.curvature(2.0))
            (12.0, 12.0)

        Raises:
            TypeError: `function` is not callable or not hashable.
        """
        if not callable(function):
            raise TypeError(
                f"Activation.from_function: expected an elementwise JAX function, got {function!r}. "
                "Pass a callable such as jnp.tanh or jax.nn.mish."
            )
        try:
            return _from_function(function)
        except TypeError as error:
            raise TypeError(
                f"Activation.from_function: expected a hashable function, got {function!r}. "
                "Wrap it in a lambda or a def: activations are static arguments of jax.jit."
            ) from error


def _floating(z: Any) -> Array:
    z = jnp.asarray(z)
    return z if jnp.issubdtype(z.dtype, jnp.floating) else z.astype(jnp.result_type(float))


@functools.lru_cache(maxsize=256)
def _from_function(function: Elementwise) -> Activation:
    def value(z: jax.typing.ArrayLike) -> Array:
        return function(_floating(z))

    def derivative(f: Elementwise) -> Elementwise:
        def df(z: jax.typing.ArrayLike) -> Array:
            z = _floating(z)
            return jax.jvp(f, (z,), (jnp.ones_like(z),))[1]

        return df

    slope = derivative(value)
    name = getattr(function, "__name__", type(function).__name__)
    return Activation(value, slope, derivative(slope), name)


def _rounded_once(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Compute in float32 or wider, and round the result to the dtype of the argument."""

    def wrapper(z: jax.typing.ArrayLike) -> Any:
        narrow = _floating(z)
        wide = narrow.astype(working_dtype(narrow.dtype))
        return jax.tree.map(lambda v: v.astype(narrow.dtype), function(wide))

    return wrapper


def _from_joint(name: str, joint: Jet, value: Elementwise | None = None) -> Activation:
    """Make an activation from one function that returns all three parts; `value`, if given, is a JAX primitive."""
    part = [_rounded_once(functools.partial(_part, joint, i)) for i in range(3)]
    return Activation(_primitive(value) if value else part[0], part[1], part[2], name, _rounded_once(joint))


def _part(joint: Jet, i: int, z: Array) -> Array:
    return joint(z)[i]


def _from_parts(name: str, value: Elementwise, slope: Elementwise, curvature: Elementwise) -> Activation:
    return Activation(_rounded_once(value), _rounded_once(slope), _rounded_once(curvature), name)


def _primitive(function: Elementwise) -> Elementwise:
    """Call a JAX primitive in the argument's dtype: it rounds only once, and has JAX's derivative."""

    def value(z: jax.typing.ArrayLike) -> Array:
        return function(_floating(z))

    return value


def _magnitude(z: Array) -> Array:
    # The derivative of jnp.abs at 0 is 0. This form has a derivative of ±1 there, so that jax.grad of a slope is right.
    return jnp.where(z >= 0, z, -z)


def _by_sign(z: Array, right: Array, left: Array) -> Array:
    return jnp.where(z >= 0, right, left)


def _logistic(z: Array) -> tuple[Array, Array, Array]:
    # Each part ends with a division, because XLA stores the result of one; it would recompute a product for every use.
    e = jnp.exp(-_magnitude(z))
    one = 1 + e
    slope = e / (one * one)
    return _by_sign(z, jnp.ones_like(e), e) / one, slope, _by_sign(z, -slope, slope) * ((1 - e) / one)


def _tanh(z: Array) -> tuple[Array, Array, Array]:
    # With h = exp(-|z|), 1 - tanh² = (2h/(1 + h²))²; exp(-2|z|) itself would underflow before the slope does.
    h = jnp.exp(-_magnitude(z))
    root = 2 * h / (1 + h * h)
    value, slope = jnp.tanh(z), root * root
    return value, slope, root * (root * (-2 * value))


def _softplus(z: Array) -> tuple[Array, Array, Array]:
    value, slope, _ = _logistic(z)
    return jax.nn.softplus(z), value, slope


def _silu(z: Array) -> tuple[Array, Array, Array]:
    a = _magnitude(z)
    e = jnp.exp(-a)
    r = 1 / (1 + e)
    value = _by_sign(z, z * r, z * (e * r))
    slope = _by_sign(z, r * (1 + a * (e * r)), e * (r * (1 - a * r)))
    return value, slope, e * (r * r * (2 - a * ((1 - e) * r)))


def _gelu(z: Array) -> tuple[Array, Array, Array]:
    # Φ(-t) = c·r², φ(t) = d·r² with r = exp(-t²/4): see gaussian.halves.
    r, c, d = halves(z)
    a = _magnitude(z)
    value = _by_sign(z, z * (1 - r * (r * c)), r * (r * (z * c)))
    slope = _by_sign(z, 1 + r * (r * (a * d - c)), r * (r * (c - a * d)))
    t = jnp.minimum(a, jnp.asarray(80, a.dtype))  # beyond 80, r is 0 and t² could overflow
    return value, slope, r * (r * (d * (2 - t * t)))


# 2√(2/π) and 0.044715 times that, each as the sum of two float64.
_C = (1.5957691216057308, -9.96930880911092e-17)
_K = (0.07135481627260025, -6.175149918155315e-19)


def _gelu_tanh(z: Array) -> tuple[Array, Array, Array]:
    # (1 + tanh(v/2))/2 is the logistic of v = c·z + k·z³; v is held as a sum of two floats, because exp(-v)
    # multiplies the rounding error of v by v.
    a = jnp.minimum(_magnitude(z), jnp.asarray(80, z.dtype))
    (c0, c1), (k0, k1) = _two_floats(_C, a), _two_floats(_K, a)
    square, square_lost = two_product(a, a)
    cubic, cubic_lost = two_product(k0, square)
    factor, factor_lost = two_sum(c0, cubic)
    factor_lost = factor_lost + cubic_lost + c1 + k0 * square_lost + k1 * square
    v, v_lost = two_product(a, factor)
    v_lost = v_lost + a * factor_lost
    h = jnp.exp(-v / 2) * (1 - v_lost / 2)  # e = h², but h·(h·…) underflows only where the result does
    r = 1 / (1 + h * h)
    dv, ddv = factor + 2 * cubic, 6 * k0 * a
    value = _by_sign(z, z * r, h * (h * (z * r)))
    slope = _by_sign(z, r * (1 + h * (h * (a * dv * r))), h * (h * (r * (1 - a * dv * r))))
    bend = 2 * dv + a * ddv - a * dv * dv * ((1 - h * h) * r)
    return value, slope, h * (h * (r * r * bend))


def _two_floats(constant: tuple[float, float], template: Array) -> tuple[Array, Array]:
    """The constant as an unevaluated sum of two arrays of the template's shape and dtype."""
    high = float(np.asarray(constant[0], template.dtype))
    return jnp.full_like(template, high), jnp.full_like(template, constant[0] - high + constant[1])


def _step(z: Array) -> Array:
    return jnp.where(z > 0, jnp.ones_like(z), jnp.zeros_like(z))


def _bounded_exp(z: Array) -> Array:
    """exp(z) for z ≤ 0 and 1 for z > 0, so that a branch that is not taken does not overflow."""
    return jnp.exp(jnp.where(z > 0, jnp.zeros_like(z), z))


_LEAK = 0.01

logistic = _from_joint("logistic", _logistic, jax.nn.sigmoid)
"""1/(1 + exp(-z)), the σ of the exercise."""
tanh = _from_joint("tanh", _tanh, jnp.tanh)
"""tanh(z)."""
softplus = _from_joint("softplus", _softplus)
"""log(1 + exp(z))."""
silu = _from_joint("silu", _silu)
"""z·logistic(z), also called swish."""
gelu = _from_joint("gelu", _gelu)
"""z·Φ(z), where Φ is the normal distribution function; `jax.nn.gelu(z, approximate=False)`."""
gelu_tanh = _from_joint("gelu_tanh", _gelu_tanh)
"""z·(1 + tanh(√(2/π)(z + 0.044715 z³)))/2; `jax.nn.gelu(z, approximate=True)`."""
relu = _from_parts("relu", jax.nn.relu, _step, jnp.zeros_like)
"""max(z, 0); its slope at 0 is 0, as in jax.nn.relu."""
leaky_relu = _from_parts(
    "leaky_relu",
    lambda z: jnp.where(z >= 0, z, _LEAK * z),
    lambda z: jnp.where(z >= 0, jnp.ones_like(z), jnp.full_like(z, _LEAK)),
    jnp.zeros_like,
)
"""z where z ≥ 0, otherwise 0.01·z; its slope at 0 is 1, as in jax.nn.leaky_relu."""
elu = _from_parts(
    "elu",
    jax.nn.elu,
    _bounded_exp,
    lambda z: jnp.where(z > 0, jnp.zeros_like(z), _bounded_exp(z)),
)
"""z where z > 0, otherwise exp(z) - 1."""
sine = _from_parts("sine", jnp.sin, jnp.cos, lambda z: -jnp.sin(z))
"""sin(z)."""
identity = _from_parts("identity", lambda z: z, jnp.ones_like, jnp.zeros_like)
"""z, for a network without a nonlinearity."""

ACTIVATIONS = {
    a.name: a for a in (logistic, tanh, softplus, relu, leaky_relu, elu, gelu, gelu_tanh, silu, sine, identity)
}
"""Every activation of this module by its name."""
