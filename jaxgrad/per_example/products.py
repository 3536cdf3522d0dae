"""The primitives that end a matrix's gradient: their result is a product, and stays one."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example import undone
from jaxgrad.per_example.undone import Term
from jaxgrad.per_example.values import FORMED, Plain, Undone, Value, array_of, as_broadcast, is_zero
from jaxgrad.precision import working_dtype


def _dot_general(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    p = eqn.params
    (lhs_c, rhs_c), (lhs_b, rhs_b) = p["dimension_numbers"]
    contracted, batch = list(zip(lhs_c, rhs_c, strict=True)), list(zip(lhs_b, rhs_b, strict=True))
    left, right = (jnp.asarray(array_of(value)) for value in values)
    return undone.product(left, right, contracted, batch, p["precision"])


def _outer(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """mul of a column and a row, both broadcast: an elementwise outer product."""
    a, b = (as_broadcast(value) for value in values)
    shape = tuple(eqn.outvars[0].aval.shape)
    if a is None or b is None or not len(a.shape) == len(b.shape) == len(shape):
        return None
    if not set(a.varies) - set(b.varies) or not set(b.varies) - set(a.varies):
        return None
    if any(n != 1 and k not in a.varies and k not in b.varies for k, n in enumerate(shape)):
        return None
    both = [(a.varies.index(k), b.varies.index(k)) for k in a.varies if k in b.varies]
    term = undone.product(jnp.asarray(a.compact), jnp.asarray(b.compact), [], both)
    order = [k for k in a.varies if k in b.varies]
    order += [k for k in a.varies if k not in b.varies] + [k for k in b.varies if k not in a.varies]
    dims = dict(zip(order, term.dims, strict=True))
    return undone.replace(term, dims=tuple(dims.get(k, ()) for k in range(len(shape))))


def _scatter_add(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """Rows added to a table of zeros at one index each, along any one axis."""
    operand, indices, updates = values
    shape, window, axes = eqn.outvars[0].aval.shape, _jax.scatter_window(eqn), _jax.scatter_axes(eqn)
    if not is_zero(operand) or window is None:
        return None
    added = jnp.asarray(array_of(updates))
    sizes = [1 if k is None else added.shape[k] for k in window]
    axis = next((k for k, (n, m) in enumerate(zip(shape, sizes, strict=True)) if n != m), axes[0])
    clipped = _jax.scatter_clips(eqn)
    if axis not in axes or sizes[axis] != 1:
        return None
    if any(n != m for k, (n, m) in enumerate(zip(shape, sizes, strict=True)) if k != axis):
        return None
    index = jnp.asarray(array_of(indices))
    ids = index[..., axes.index(axis)]
    if clipped:
        ids = jnp.clip(ids, 0, shape[axis] - 1)
    elif len(axes) > 1:  # an axis that is there as a whole has room for index 0 alone
        others = jnp.stack([index[..., k] == 0 for k in range(len(axes)) if axes[k] != axis]).all(0)
        ids = jnp.where(others, ids, jnp.full_like(ids, shape[axis]))
    positions = [k for k in range(added.ndim) if k not in window]
    dims = [None if k == axis else window[k] for k in range(len(shape))]
    spare = window[axis]
    if spare is not None:  # an axis of size 1 for the row that is added
        added = added.reshape([n for k, n in enumerate(added.shape) if k != spare])
        shift = lambda k: k if k is None or k < spare else k - 1  # noqa: E731
        positions, dims = [shift(k) for k in positions], [shift(k) for k in dims]
    if any(k is None for j, k in enumerate(dims) if j != axis):  # an axis of size 1 that the updates do not have
        return None
    return undone.lookup(ids, added, positions, dims, shape[axis])


def _dynamic_update_slice(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """One row put into a table of zeros, along any one axis."""
    operand, update, *starts = values
    shape, part = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
    axes = [k for k, (n, m) in enumerate(zip(shape, part, strict=True)) if n != m]
    if not is_zero(operand) or len(axes) != 1 or part[axes[0]] != 1:
        return None
    axis = axes[0]
    ids = jnp.clip(jnp.asarray(array_of(starts[axis])), 0, shape[axis] - 1)[None]
    dims = [None if k == axis else k for k in range(len(shape))]
    return undone.lookup(ids, jnp.asarray(array_of(update)), [axis], dims, shape[axis])


def _convolution(eqn: _jax.Equation, values: Sequence[Value]) -> Term | Array | None:
    """The gradient of a kernel: the cotangents slide over the input, and each place of the kernel is a product.

    The places are few and the positions many. Where positions · (fan-out + fan-in · places) is less than the kernel,
    the windows of the input are unfolded and the product is kept; otherwise it is formed here, place by place, as
    matrix products: under vmap a convolution of two batched operands would become one with a group for each example.
    """
    p, out = eqn.params, eqn.outvars[0].aval
    lhs, rhs = (jnp.asarray(array_of(value)) for value in values)
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    numbers = p["dimension_numbers"]
    lhs = lhs.transpose(numbers.lhs_spec)  # [N, C, *spatial]
    rhs = rhs.transpose(numbers.rhs_spec)  # [O, I, *window]
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    edges = [
        (0, 0, 0),
        (0, 0, 0),
        *((lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"], strict=True)),
    ]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)
    if groups > 1 and batch_groups > 1:
        return None
    G = groups * batch_groups
    N, C = lhs.shape[0] // batch_groups, lhs.shape[1] // groups
    lhs = lhs.reshape(batch_groups, N, groups, C, *lhs.shape[2:])
    lhs = lhs.transpose(0, 2, 1, *range(3, lhs.ndim)).reshape(G, N, C, *lhs.shape[4:])  # [G, N, C, *spatial]
    rhs = rhs.reshape(G, rhs.shape[0] // G, *rhs.shape[1:])  # [G, O, C, *window]
    window = rhs.shape[3:]
    places = tuple(out.shape[k] for k in numbers.out_spec[2:])
    T, F, K = C * math.prod(window), rhs.shape[1], N * math.prod(places)

    def at(place: Sequence[int]) -> Array:  # [G, N, C, *window]: what the window meets there
        starts = [i * s for i, s in zip(place, p["window_strides"], strict=True)]
        limits = [a + (n - 1) * d + 1 for a, n, d in zip(starts, window, p["rhs_dilation"], strict=True)]
        return lax.slice(lhs, (0, 0, 0, *starts), (*lhs.shape[:3], *limits), (1, 1, 1, *p["rhs_dilation"]))

    ranges = _all_places(places)
    if not ranges or 0 in window:
        return None
    flat_rhs = rhs.reshape(G, F, T)
    windows = [at(place).reshape(G, N, T) for place in ranges]
    order = sorted(range(len(places) + 2), key=numbers.out_spec.__getitem__)  # from [N, G·F, *places]
    if T * (F + K) < F * K:
        unfolded = jnp.stack(windows, 2).reshape(G, N, *places, T)
        spatial = tuple(range(4, 4 + len(places)))
        dims = ((3,), (0, 1), *((k,) for k in spatial))
        term = Term(flat_rhs, unfolded, (0, 1, 2), (0, 3, *spatial, 2), dims, precision=p["precision"])
        return undone.transpose(term, order)
    work = working_dtype(out.dtype)
    parts = [lax.dot_general(flat_rhs, w, (((2,), (2,)), ((0,), (0,))), p["precision"], work) for w in windows]
    array = jnp.stack(parts, -1).astype(out.dtype).transpose(2, 0, 1, 3).reshape(N, G * F, *places)
    return array.transpose(order)


def _all_places(places: tuple[int, ...]) -> list[tuple[int, ...]]:
    total: list[tuple[int, ...]] = [()]
    for n in places:
        total = [(*place, i) for place in total for i in range(n)]
    return total


PRODUCTS: dict[Any, Callable[[_jax.Equation, Sequence[Value]], Term | Array | None]] = {
    lax.dot_general_p: _dot_general,
    lax.mul_p: _outer,
    lax.scatter_add_p: _scatter_add,
    lax.dynamic_update_slice_p: _dynamic_update_slice,
    lax.conv_general_dilated_p: _convolution,
}


def undone_product(eqn: _jax.Equation, values: Sequence[Value]) -> Undone | Plain | None:
    """The equation's result as a product, or formed if that is the smaller thing; None if it is neither."""
    make, out = PRODUCTS.get(eqn.primitive), eqn.outvars[0].aval
    if make is None or out.size == 0 or not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    term = make(eqn, values)
    if isinstance(term, Term):
        if term.held < out.size:
            return Undone((term,), tuple(out.shape), out.dtype)
        return Plain(_jax.bind(eqn, [array_of(value) for value in values])[0], FORMED)
    return None if term is None else Plain(term, FORMED)
