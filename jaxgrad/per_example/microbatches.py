"""A loop over microbatches that adds up their sums and joins the results of all examples."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.precision import working_dtype
from jaxgrad.sharding import divisible, sharded_as

Step = Callable[[Arguments, Array], tuple[list[Array], Any]]
"""A function (arguments, mask) → (arrays to add up over microbatches, a tree of arrays [B, …])."""


def in_microbatches(
    step: Step, arguments: Arguments, mask: Array, size: int, skip_the_end: bool = False
) -> tuple[list[Array], Any]:
    """Apply a step to one microbatch after another; return the sums, and the results of all examples.

    If there are n microbatches, each consists of every n-th example, so that it is sharded as the batch is.

    Args:
        step: the computation on one microbatch.
        arguments, mask: the arguments and the mask of the whole batch.
        size: the number of examples in a microbatch. It need not divide the batch.
        skip_the_end: whether to skip all microbatches after the last one that has an unmasked example; the results of
            the examples in skipped microbatches are 0.
    """
    B = arguments.batch_size
    count = -(-B // size)
    divides = count * size == B

    def divided(a: Any, axis: int = 0) -> Any:
        a = divisible(jnp.moveaxis(a, axis, 0), size if divides else 1)
        a = a if divides else a[jnp.minimum(jnp.arange(count * size), B - 1)]  # pads with the last example, masked
        return a.reshape(size, count, *a.shape[1:]).swapaxes(0, 1)

    leaves = [divided(a, axis) for a, axis in zip(arguments.batch, arguments.axes, strict=True)]
    valid = divided(mask) & (jnp.arange(count * size) < B).reshape(size, count).T
    axes = frozenset(name for a in arguments.batch for name in _jax.varying(a))

    program, (shapes, example_shapes) = jax.make_jaxpr(lambda: step(arguments, mask), return_shape=True)()
    types = program.out_avals[: len(shapes)]  # these have shardings

    def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
        return _jax.made_varying(jnp.zeros(shape, dtype), axes)

    def skip(*_: Any) -> tuple[list[Array], Any]:
        by_example = jax.tree.map(lambda s: zeros((size, *s.shape[1:]), s.dtype), example_shapes)
        return [sharded_as(t, zeros(t.shape, t.dtype)) for t in types], by_example

    def run(batch: list[Any], mask: Array) -> tuple[list[Array], Any]:
        return step(dataclasses.replace(arguments, batch=batch, axes=[0] * len(batch), batch_size=size), mask)

    def add(total: list[Array], micro: tuple[list[Any], Array, Array | None]) -> tuple[list[Array], Any]:
        batch, mask, skipped = micro
        if not skip_the_end:
            flat, by_example = run(batch, mask)
        else:
            flat, by_example = lax.cond(skipped, skip, run, batch, mask)
        return [a + b.astype(a.dtype) for a, b in zip(total, flat, strict=True)], by_example

    start = [sharded_as(t, zeros(t.shape, working_dtype(t.dtype))) for t in types]
    skipped = jnp.cumsum(valid.any(1)[::-1])[::-1] == 0 if skip_the_end else None
    total, by_example = lax.scan(add, start, (leaves, valid, skipped))
    total = [a.astype(s.dtype) for a, s in zip(total, types, strict=True)]
    return total, jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(count * size, *a.shape[2:])[:B], by_example)
