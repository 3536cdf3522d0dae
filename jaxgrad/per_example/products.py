"""The primitives that end a matrix's gradient: their result is a product, and stays one."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example import moves, undone
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


def _pad(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """What is put into zeros is held without them."""
    value, padding = values
    if not is_zero(padding):
        return None
    array, reason = jnp.asarray(array_of(value)), value.reason if isinstance(value, Plain) else FORMED
    return moves.pad(undone.carried_out(array, reason), _jax.padding(eqn))


def _convolution(eqn: _jax.Equation, values: Sequence[Value]) -> Term | Array | None:
    """The gradient of a kernel: the cotangents slide over the input, and each place of the kernel is a product.

    The places are few and the positions many. Where positions · (fan-out + fan-in · places) is less than the kernel,
    the windows of the input are unfolded and the product is kept; otherwise it is formed here, place by place, as
    matrix products: under vmap a convolution of two batched operands would become one with a group for each example.
    """
    p, out = eqn.params, eqn.outvars[0].aval
    lhs, rhs = (jnp.asarray(array_of(value)) for value in values)
    numbers, groups, batch_groups = p["dimension_numbers"], p["feature_group_count"], p["batch_group_count"]
    if not jnp.issubdtype(out.dtype, jnp.floating) or (groups > 1 and batch_groups > 1):
        return None
    (n, c, *spatial), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    lhs = lhs.transpose(c, *spatial, n)  # what is summed first: for images with channels last nothing moves
    rhs = rhs.transpose(i, *window, o)
    edges = [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    lhs, rhs = _grouped(lhs, groups, batch_groups), _grouped(rhs, 1, groups * batch_groups)
    sizes, places = rhs.shape[2:-1], tuple(out.shape[k] for k in numbers.out_spec[2:])
    G, C, N, F = *lhs.shape[:2], lhs.shape[-1], rhs.shape[-1]
    T, K = C * math.prod(sizes), N * math.prod(places)
    if 0 in (T, F, K) or not places:
        return None

    def windows(image: Array, places: tuple[int, ...]) -> Array:  # [G, T, places · N]: what the window meets there
        def at(place: Sequence[int]) -> Array:
            starts = [k * s for k, s in zip(place, p["window_strides"], strict=True)]
            limits = [a + (m - 1) * d + 1 for a, m, d in zip(starts, sizes, p["rhs_dilation"], strict=True)]
            part = lax.slice(image, (0, 0, *starts, 0), (G, C, *limits, N), (1, 1, *p["rhs_dilation"], 1))
            return part.reshape(G, T, N)

        return jnp.concatenate([at(place) for place in itertools.product(*map(range, places))], 2)

    order = sorted(range(len(places) + 2), key=numbers.out_spec.__getitem__)  # from [N, G · F, *places]
    flat = rhs.reshape(G, T, F)
    if 2 * T * (F + K) < F * K:
        # labels: 0 group, 1 position, 2 fan-out, then the places and the channels of the window
        at = tuple(range(3, 4 + len(places)))
        unfolded = windows(lhs, places).reshape(G, T, *places, N)
        dims = (at[-1:], (0, 2), *((k,) for k in at[:-1]))
        term = Term(flat, unfolded, (0, 1, 2), (0, 1, *at), dims, precision=p["precision"])
        return moves.transpose(term, order)

    def of_row(start: Array) -> Array:  # [G, places · N, F]
        image = lax.dynamic_slice_in_dim(lhs, start, (sizes[0] - 1) * p["rhs_dilation"][0] + 1, 2)
        met, work = windows(image, (1, *places[1:])), working_dtype(out.dtype)
        return lax.dot_general(met, flat, (((1,), (1,)), ((0,), (0,))), p["precision"], work).astype(out.dtype)

    # A row of places after another: what is unfolded is no more than a row's windows.
    formed = lax.map(of_row, p["window_strides"][0] * jnp.arange(places[0]))
    formed = formed.reshape(places[0], G, *places[1:], N, F)
    axes = range(formed.ndim)
    formed = formed.transpose(axes[-2], 1, axes[-1], 0, *axes[2:-2]).reshape(N, G * F, *places)
    return formed.transpose(order)


def _grouped(a: Array, first: int, last: int) -> Array:
    """The groups of the first axis, or of the last one, in front: [G, first / G, …, last / G]."""
    a = a.reshape(first, a.shape[0] // first, *a.shape[1:-1], last, a.shape[-1] // last)
    a = jnp.moveaxis(a, -2, 1)
    return a.reshape(first * last, *a.shape[2:])


PRODUCTS: dict[Any, Callable[[_jax.Equation, Sequence[Value]], Term | Array | None]] = {
    lax.dot_general_p: _dot_general,
    lax.mul_p: _outer,
    lax.scatter_add_p: _scatter_add,
    lax.dynamic_update_slice_p: _dynamic_update_slice,
    lax.conv_general_dilated_p: _convolution,
    lax.pad_p: _pad,
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
