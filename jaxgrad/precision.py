"""The dtypes that the library computes in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def working_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype to compute in: float64 if any of these is double, otherwise float32; complex if any is."""
    kinds = [jnp.dtype(d) for d in dtypes]
    double = any(d in (jnp.float64, jnp.complex128) for d in kinds)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in kinds):
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def contracted(spec: str, a: Array, b: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Return `jnp.einsum(spec, a, b)` in `dtype`, float32 or wider.

    Products of two bfloat16 numbers are exact in float32, so arrays of bfloat16 are multiplied as they are.
    """
    if {a.dtype, b.dtype} == {jnp.dtype(jnp.bfloat16)} and dtype == jnp.float32:
        return widening(lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=dtype), a, b)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype))


def widening(product: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """Return product(a, b), one dot_general of arrays in half precision that is accumulated in float32.

    XLA's CPU casts the operands of most such products to float32, and cannot run the others: those of several axes that
    only one operand has, and those of some transposed operands. There they are all cast here.
    """

    def cast(a: Array, b: Array) -> Array:
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    found: Array = jax.lax.platform_dependent(a, b, cpu=cast, default=product)
    return found


def product_rounding() -> Array:
    """Return the relative error of rounding a float32 operand in a matrix product on the platform of the program.

    By default, GPUs round operands to TensorFloat-32 and TPUs to bfloat16; `jax.default_matmul_precision` changes this.
    """
    setting: Any = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  # its stub lacks it
    if setting in ("highest", "float32"):
        errors = {"default": 0.0}
    elif setting in ("high", "tensorfloat32", "bfloat16_3x"):
        errors = {"cpu": 0.0, "cuda": 2.0**-11, "rocm": 2.0**-11, "tpu": 2.0**-15, "default": 2.0**-8}
    elif setting in (None, "default", "fastest", "bfloat16"):
        errors = {"cpu": 0.0, "cuda": 2.0**-11, "rocm": 2.0**-11, "default": 2.0**-8}
    else:  # an algorithm of `jax.lax.DotAlgorithmPreset`
        errors = {"default": 2.0**-8}
    branches: Any = {name: lambda value=value: jnp.asarray(value, jnp.float32) for name, value in errors.items()}
    error: Array = jax.lax.platform_dependent(**branches) if len(branches) > 1 else branches["default"]()
    return error


def added(terms: Sequence[Array]) -> Array:
    """Return the sum of the arrays, in float64 if one of them is double, otherwise in float32."""
    dtype = working_dtype(*(term.dtype for term in terms))
    total = terms[0].astype(dtype)
    for term in terms[1:]:
        total = total + term.astype(dtype)
    return total


def index_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return an integer dtype for indices into an axis; it holds every index that has one of these dtypes."""
    return jnp.dtype(jnp.int64 if any(jnp.dtype(dtype).itemsize > 4 for dtype in dtypes) else jnp.int32)


def joined(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Concatenate arrays in their dtype if they share one, otherwise in a dtype that holds them all."""
    dtype, *other_dtypes = {a.dtype for a in arrays}
    if other_dtypes:
        dtype = (working_dtype if jnp.issubdtype(dtype, jnp.inexact) else index_dtype)(dtype, *other_dtypes)
    return jnp.concatenate([a.astype(dtype) for a in arrays], axis)
