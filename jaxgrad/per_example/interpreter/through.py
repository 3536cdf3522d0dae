"""What no rule can do to a product's operands, but what is linear and the same for all examples: a map behind it.

Also an array that all examples share times a few numbers of each: a penalty's gradient, what normalising a weight
adds. Nothing here looks at values: an equation is linear in the operands that `LINEAR` says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.maps import Call, Input, Node, Result, call_of
from jaxgrad.per_example.interpreter import linear
from jaxgrad.per_example.interpreter.values import (
    FORMED,
    Broadcast,
    Plain,
    Undone,
    Value,
    array_of,
    is_shared,
    is_zero,
    mapped,
    times_shared,
)
from jaxgrad.precision import added

_first: Callable[[int], range] = lambda n: range(1)  # noqa: E731

# Operands in which a primitive is linear, all of them together, if the others are fixed.
LINEAR: dict[_jax.Primitive, Callable[[int], Sequence[int]]] = {
    **dict.fromkeys(
        [
            lax.neg_p,
            lax.convert_element_type_p,
            lax.transpose_p,
            lax.reshape_p,
            lax.squeeze_p,
            lax.broadcast_in_dim_p,
            lax.reduce_sum_p,
            lax.rev_p,
            lax.slice_p,
            lax.split_p,
            lax.copy_p,
            lax.cumsum_p,
            lax.real_p,
            lax.imag_p,
            lax.conj_p,
            lax.fft_p,
            lax.reduce_window_sum_p,
            lax.reduce_precision_p,
            lax.gather_p,
            lax.dynamic_slice_p,
            lax.div_p,
            *([] if _jax.unstack_p is None else [_jax.unstack_p]),
        ],
        _first,
    ),
    **dict.fromkeys([lax.add_p, _jax.add_any_p, lax.sub_p, lax.concatenate_p, lax.complex_p], range),
    **({} if _jax.stack_p is None else {_jax.stack_p: range}),
    lax.select_n_p: lambda n: range(1, n),
    lax.pad_p: lambda n: range(2),
    lax.dynamic_update_slice_p: lambda n: range(2),
    lax.scatter_add_p: lambda n: (0, 2),
    lax.linalg.triangular_solve_p: lambda n: (1,),
}
BILINEAR = frozenset({lax.mul_p, lax.dot_general_p})  # in one operand, if the other is fixed


def operands(eqn: _jax.Equation) -> Sequence[int]:
    """The operands that may stand for a product here."""
    if eqn.primitive in BILINEAR:
        return range(2)
    if eqn.primitive is lax.linear_solve_p:  # the right sides come last
        return range(len(eqn.invars) - len(eqn.outvars), len(eqn.invars))
    return LINEAR.get(eqn.primitive, lambda n: range(0))(len(eqn.invars))


def through(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """The equation's results as maps of the products among its operands; None if it is none that examples share."""
    taken: Sequence[int] = [k for k in operands(eqn) if not is_zero(values[k])]
    if eqn.primitive in BILINEAR:
        taken = [k for k in taken if isinstance(values[k], Undone)][:1]
    inexact = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in [*eqn.outvars, *(eqn.invars[k] for k in taken)])
    if not taken or not inexact or _jax.gather_fills(eqn):
        return None
    sides: list[Any] = []
    for k, value in enumerate(values):
        if k not in taken:
            if not (is_shared(value) or is_zero(value)):
                return None
            sides.append(jnp.asarray(array_of(value)))
        elif isinstance(value, Undone):
            sides.append(node_of(value))
        elif is_shared(value):
            array = jnp.asarray(array_of(value))
            sides.append(node_of(times_shared(jnp.ones((), array.dtype), array)))
        else:
            return None
    number = _contracted(eqn, sides[0]) if eqn.primitive is lax.reduce_sum_p else None
    if number is not None:
        return [Plain(number.astype(eqn.outvars[0].aval.dtype), FORMED)]
    return results_of(eqn, sides)


def scaled(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """A product, entry by entry, of a few numbers of each example and a larger array that all share."""
    if eqn.primitive not in (*BILINEAR, lax.div_p, lax.select_n_p, lax.scatter_add_p):
        return None
    few = [k in operands(eqn) and _is_few(v, eqn.outvars[0].aval.size) for k, v in enumerate(values)]
    if not any(few):
        return None
    return through(eqn, [_spread(v) if small else v for v, small in zip(values, few, strict=True)])


def _is_few(value: Value, size: int) -> bool:
    return isinstance(value, Broadcast) and not is_shared(value) and 2 * jnp.size(value.source) <= size


def _spread(value: Broadcast) -> Undone:
    source, dims, shape = jnp.asarray(value.source), value.dims, value.shape
    call = Call(lambda xs: [lax.broadcast_in_dim(xs[0], shape, dims)], ("broadcast", dims, shape), (_input(source),))
    return Undone((), shape, source.dtype, (Result(call, 0),))


def results_of(eqn: _jax.Equation, sides: Sequence[Any]) -> list[Value]:
    """The equation's results as maps, of nodes and arrays that all examples share."""
    call = call_of(eqn, sides)
    avals = [v.aval for v in eqn.outvars]
    return [Undone((), tuple(a.shape), a.dtype, (Result(call, k),)) for k, a in enumerate(avals)]


def node_of(value: Undone) -> Node:
    """The value as one node; complex numbers as their real and imaginary parts."""
    nodes = list(value.maps)
    if value.terms:
        nodes.append(_input(value if not value.maps else Undone(value.terms, value.shape, value.dtype)))
    if len(nodes) == 1:
        return nodes[0]
    return Result(Call(lambda xs: [sum(xs[1:], xs[0])], "sum", tuple(nodes)), 0)


def _input(value: Any) -> Node:
    if not jnp.issubdtype(value.dtype, jnp.complexfloating):
        return Input(value)
    dtype = jnp.finfo(value.dtype).dtype
    parts: list[Any]
    if isinstance(value, Undone):
        parts = [mapped(value, value.shape, dtype, f) for f in (linear.real, linear.imag)]
        assert all(part is not None for part in parts)
    else:
        parts = [jnp.real(value), jnp.imag(value)]
    return Result(Call(lambda xs: [lax.complex(*xs)], "complex", tuple(map(Input, parts))), 0)


def _contracted(eqn: _jax.Equation, node: Node) -> Array | None:
    """Σ over some axes of what products times shared arrays are, entry by entry: nothing is written out."""
    aval = eqn.invars[0].aval
    found = _against(node, jnp.ones((), aval.dtype), tuple(aval.shape), [int(k) for k in eqn.params["axes"]])
    return None if found is None else found.reshape(eqn.outvars[0].aval.shape)


def _against(node: Node, scale: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array | None:
    """Σ over axes of the node, of this shape, times `scale`, entry by entry; None where that takes writing it out."""
    scale = scale if scale.ndim == 0 else jnp.broadcast_to(scale, shape)
    if isinstance(node, Input):
        if not isinstance(node.value, Undone) or tuple(node.value.shape) != shape:
            return None
        terms = node.value.terms
        if any(term.windows or term.row is not None or term.box is not None for term in terms):
            return None
        return added([linear.contracted_with(term, jnp.broadcast_to(scale, shape), axes) for term in terms])
    kind = node.call.key[0] if isinstance(node.call.key, tuple) else node.call.key
    nodes = [x for x in node.call.operands if isinstance(x, Node)]
    arrays = [x for x in node.call.operands if not isinstance(x, Node)]
    if kind in (lax.mul_p, lax.div_p) and len(nodes) == 1 and arrays[0].ndim in (0, len(shape)):
        return _against(nodes[0], scale / arrays[0] if kind is lax.div_p else scale * arrays[0], shape, axes)
    if kind is lax.neg_p:
        return _against(nodes[0], -scale, shape, axes)
    if kind in ("sum", lax.add_p, _jax.add_any_p) and not arrays:
        parts = [_against(x, scale, shape, axes) for x in nodes]
        known = [part for part in parts if part is not None]
        return added(known) if len(known) == len(parts) else None
    if kind == "broadcast" and isinstance(nodes[0], Input):
        source, dims = nodes[0].value, node.call.key[1]
        kept = [k for k in range(len(shape)) if k not in axes]
        wide = [k if n != 1 or shape[k] == 1 else len(shape) + k for k, n in zip(dims, source.shape, strict=True)]
        return jnp.einsum(source, wide, jnp.broadcast_to(scale, shape), list(range(len(shape))), kept)
    return None
