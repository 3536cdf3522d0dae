"""Complex parameters, each as two real ones.

By JAX's convention the gradient with respect to p is ∂/∂Re p - i ∂/∂Im p; it is held as its two real gradients. A
complex tree that stands for a real vector (a gradient, a direction) has the first as its real part and the second, with
its sign changed, as its imaginary part. Inner products are those of the real vectors, Re Σ conj(g) v.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=("real", "imag"), meta_fields=())
@dataclass(frozen=True)
class Complex:
    """A pair that replaces a complex parameter: the values for its real part and its imaginary part.

    Attributes:
        real: the value for the real part.
        imag: the value for the imaginary part.

    Example:
        >>> loss = lambda W, x: jnp.abs(W @ x).sum()
        >>> g = jg.per_example_grad(loss)(jnp.ones((30, 20), jnp.complex64), jnp.ones((4, 20)))
        >>> g.sum().dtype.name, [f.kind for f in g.factors.real]
        ('complex64', ['Outer'])
    """

    real: Any
    imag: Any


def is_complex(node: Any) -> bool:
    """Test for `Complex`, for JAX's `is_leaf`."""
    return isinstance(node, Complex)


def parts(tree: PyTree, sign: int = 1) -> PyTree:
    """Replace every complex array in the tree by a pair of real ones, with the imaginary part times `sign`."""

    def one(a: Any) -> Any:
        try:
            dtype = jnp.result_type(a)
        except TypeError:
            return a
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            return a
        if isinstance(a, jax.ShapeDtypeStruct):
            real = jax.ShapeDtypeStruct(a.shape, jnp.finfo(dtype).dtype, sharding=a.sharding)
            return Complex(real, real)
        a = jnp.asarray(a)
        return Complex(a.real, a.imag if sign == 1 else -a.imag)

    return jax.tree.map(one, tree)


def joined(tree: PyTree, function: Callable[[Any, Any], Any]) -> PyTree:
    """Replace every pair in the tree by function(real, imag)."""
    return jax.tree.map(lambda a: function(a.real, a.imag) if is_complex(a) else a, tree, is_leaf=is_complex)


def number(real: Array, imag: Array) -> Array:
    """real + i imag."""
    return lax.complex(real, imag)


def gradient(real: Array, imag: Array) -> Array:
    """real - i imag: the complex gradient from the gradients with respect to the two parts."""
    return lax.complex(real, -imag)
