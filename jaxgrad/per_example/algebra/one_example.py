"""Functions of a batch's factors, applied to one example; under a vmap over examples, to the whole batch at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxgrad.per_example.algebra.factors import Factor
from jaxgrad.per_example.algebra.mapped import map_examples_of, with_shared, without_shared

Factors = tuple[Factor, ...]


def for_one_example(function: Callable[[Factors, Any], Any]) -> Callable[..., Any]:
    """Return (factors of one example, others) → function of them as a batch of one, without its axis.

    Under `jax.vmap` over examples, the function is called once, for the whole batch: it can then bound its memory.

    Args:
        function: (factors of a batch, a tree of arrays that examples share) → a tree of arrays [B, …].
    """

    def of_one(parts: Factors, shared: list[Array], others: Any) -> Any:
        batch = map_examples_of(lambda a: a[None], with_shared(parts, shared))
        return jax.tree.map(lambda a: a[0], function(batch, others))

    called = custom_vmap(of_one)

    @called.def_vmap
    def over_examples(size: int, batched: Any, parts: Factors, shared: list[Array], others: Any) -> tuple[Any, Any]:
        parts_batched, *rest = batched
        if any(jax.tree.leaves(rest)):  # a vmap over something other than examples
            axes = jax.tree.map(lambda has_axis: 0 if has_axis else None, batched)
            result = jax.vmap(of_one, tuple(axes))(parts, shared, others)
            return result, jax.tree.map(lambda _: True, result)

        def with_axis(a: Array, has_axis: bool) -> Array:
            return a if has_axis else jnp.broadcast_to(a[None], (size, *a.shape))

        result = function(with_shared(jax.tree.map(with_axis, parts, parts_batched), shared), others)
        return result, jax.tree.map(lambda _: True, result)

    def one(factors: Factors, others: Any = ()) -> Any:
        return called(*without_shared(factors), others)

    return one
