"""Functions of a batch's factors, applied to one example; under a vmap over examples, to the whole batch at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxgrad.per_example.algebra.mapped import map_examples_of, with_shared, without_shared


def for_one_example(function: Callable[[Any, Any], Any], summed: bool = False) -> Callable[..., Any]:
    """Return (factors of one example, others) → function of them as a batch of one, without its axis.

    Under `jax.vmap` over examples, the function is called once, for the whole batch: it can then bound its memory.

    Args:
        function: (a tree of factors of a batch, a tree of arrays that examples share) → a tree of arrays [B, …].
        summed: whether it returns (a tree of sums over the examples, a tree of arrays [B, …]).
    """

    def without_axis(result: Any) -> Any:
        sums, each = result if summed else ((), result)
        each = jax.tree.map(lambda a: a[0], each)
        return (sums, each) if summed else each

    def has_axis(result: Any) -> Any:
        flags = jax.tree.map(lambda _: True, result)
        return (jax.tree.map(lambda _: False, result[0]), flags[1]) if summed else flags

    def of_one(parts: Any, shared: list[Array], others: Any) -> Any:
        batch = map_examples_of(lambda a: a[None], with_shared(parts, shared))
        return without_axis(function(batch, others))

    called = custom_vmap(of_one)

    @called.def_vmap
    def over_examples(size: int, batched: Any, parts: Any, shared: list[Array], others: Any) -> tuple[Any, Any]:
        parts_batched, *rest = batched
        if any(jax.tree.leaves(rest)):  # a vmap over something other than examples
            axes = jax.tree.map(lambda batched: 0 if batched else None, batched)
            result = jax.vmap(of_one, tuple(axes))(parts, shared, others)
            return result, jax.tree.map(lambda _: True, result)

        def with_axis(a: Array, batched: bool) -> Array:
            return a if batched else jnp.broadcast_to(a[None], (size, *a.shape))

        result = function(with_shared(jax.tree.map(with_axis, parts, parts_batched), shared), others)
        return result, has_axis(result)

    def one(factors: Any, others: Any = ()) -> Any:
        return called(*without_shared(factors), others)

    return one
