"""Record equations as linear maps shared by all examples, where no rule can apply them to a product's operands.

This also covers a shared array times a few numbers per example, such as a penalty's gradient or a term that normalizing
a weight adds. Nothing here looks at values: a primitive's record says in which operands it is linear.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax, precision
from jaxgrad.per_example.algebra.maps import Call, Input, Map, Node, Result, call_of
from jaxgrad.per_example.interpreter import linear
from jaxgrad.per_example.interpreter.reasons import FORMED
from jaxgrad.per_example.interpreter.rules import record_of
from jaxgrad.per_example.interpreter.values import (
    Broadcast,
    Plain,
    Unevaluated,
    Value,
    added,
    array_of,
    is_shared,
    is_zero,
    mapped,
    times_shared,
    zero,
)


def behind(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """Apply the equation to the unevaluated products among its operands, by rule or as a map shared by all examples.

    The equation is linear in them, so the products and the maps in a sum are treated separately.
    """
    record = record_of(eqn)
    if record.identity:
        return list(values)
    if not any(isinstance(value, Unevaluated) and value.maps for value in values):
        results = None if record.keeps is None else record.keeps(eqn, values)
        return through(eqn, values) if results is None else results
    if eqn.primitive in (lax.add_p, _jax.add_any_p):
        return [added(*values)]
    # A shared array that is added to the products goes with the maps, so that it is counted once.
    slots = () if record.bilinear else record.linear_in(eqn)
    products = [
        dataclasses.replace(v, maps=(), as_written=None)
        if isinstance(v, Unevaluated)
        else zero(eqn.invars[k].aval.shape, eqn.invars[k].aval.dtype)
        if k in slots and is_shared(v)
        else v
        for k, v in enumerate(values)
    ]
    maps = [dataclasses.replace(v, terms=(), as_written=None) if isinstance(v, Unevaluated) else v for v in values]
    results = through(eqn, maps)
    if results is None or all(is_zero(value) for value in products if isinstance(value, Unevaluated)):
        return results
    others = behind(eqn, products)
    return None if others is None else [added(a, b) for a, b in zip(others, results, strict=True)]


def through(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """The equation's results as maps of the products among its operands; None if the map is not shared by examples."""
    record = record_of(eqn)
    taken: Sequence[int] = [k for k in record.linear_in(eqn) if not is_zero(values[k])]
    if record.bilinear:
        taken = [k for k in taken if isinstance(values[k], Unevaluated)][:1]
    inexact = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in [*eqn.outvars, *(eqn.invars[k] for k in taken)])
    if not taken or not inexact or _jax.gather_fills(eqn):
        return None
    sides: list[Any] = []
    for k, value in enumerate(values):
        if k not in taken:
            if not (is_shared(value) or is_zero(value)):
                return None
            sides.append(jnp.asarray(array_of(value)))
        elif isinstance(value, Unevaluated):
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
    """A product of a few numbers per example with a larger array shared by all examples, as a map of these numbers."""
    if eqn.primitive not in (lax.mul_p, lax.dot_general_p, lax.div_p, lax.select_n_p, lax.scatter_add_p):
        return None
    taken = record_of(eqn).linear_in(eqn)
    few = [k in taken and _is_few(v, eqn.outvars[0].aval.size) for k, v in enumerate(values)]
    if not any(few):
        return None
    return through(eqn, [_spread(v) if small else v for v, small in zip(values, few, strict=True)])


def _is_few(value: Value, size: int) -> bool:
    return isinstance(value, Broadcast) and not is_shared(value) and 2 * jnp.size(value.source) <= size


def _spread(value: Broadcast) -> Unevaluated:
    source, dims, shape = jnp.asarray(value.source), value.dims, value.shape
    call = Call(lambda xs: [lax.broadcast_in_dim(xs[0], shape, dims)], ("broadcast", dims, shape), (input_of(source),))
    return Unevaluated((), shape, source.dtype, (Result(call, 0),))


def results_of(eqn: _jax.Equation, sides: Sequence[Any]) -> list[Value]:
    """The equation's results as maps; `sides` holds its operands as nodes or as arrays shared by all examples."""
    call = call_of(eqn, sides)
    avals = [v.aval for v in eqn.outvars]
    return [Unevaluated((), tuple(a.shape), a.dtype, (Result(call, k),)) for k, a in enumerate(avals)]


def node_of(value: Unevaluated) -> Node:
    """The value as one node; complex inputs are split into real and imaginary parts."""
    nodes = list(value.maps)
    if value.terms:
        nodes.append(input_of(value if not value.maps else Unevaluated(value.terms, value.shape, value.dtype)))
    if len(nodes) == 1:
        return nodes[0]
    return Result(Call(lambda xs: [sum(xs[1:], xs[0])], "sum", tuple(nodes)), 0)


def input_of(value: Any) -> Node:
    """The input of a map, as a node: a product, or an array of one example."""
    if not jnp.issubdtype(value.dtype, jnp.complexfloating):
        return Input(value)
    dtype = jnp.finfo(value.dtype).dtype
    parts: list[Any]
    if isinstance(value, Unevaluated):
        parts = [mapped(value, value.shape, dtype, f) for f in (linear.real, linear.imag)]
        assert all(part is not None for part in parts)
    else:
        parts = [jnp.real(value), jnp.imag(value)]
    return Result(Call(lambda xs: [lax.complex(*xs)], "complex", tuple(map(Input, parts))), 0)


def _contracted(eqn: _jax.Equation, node: Node) -> Array | None:
    """Σ over some axes of products times shared arrays, elementwise, without materializing the products."""
    aval = eqn.invars[0].aval
    found = _against(node, jnp.ones((), aval.dtype), tuple(aval.shape), [int(k) for k in eqn.params["axes"]])
    return None if found is None else found.reshape(eqn.outvars[0].aval.shape)


def _against(node: Node, scale: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array | None:
    """Σ over axes of (node ⊙ scale), for a node of this shape; None if that requires materializing the node."""
    scale = scale if scale.ndim == 0 else jnp.broadcast_to(scale, shape)
    if isinstance(node, Input):
        if not isinstance(node.value, Unevaluated) or tuple(node.value.shape) != shape:
            return None
        terms = node.value.terms
        if not terms or any(term.over or term.windows or term.row is not None for term in terms):
            return None
        return precision.added([linear.contracted_with(term, jnp.broadcast_to(scale, shape), axes) for term in terms])
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
        return precision.added(known) if len(known) == len(parts) else None
    if kind == "broadcast" and isinstance(nodes[0], Input):
        source, dims = nodes[0].value, node.call.key[1]
        kept = [k for k in range(len(shape)) if k not in axes]
        wide = [k if n != 1 or shape[k] == 1 else len(shape) + k for k, n in zip(dims, source.shape, strict=True)]
        return jnp.einsum(source, wide, jnp.broadcast_to(scale, shape), list(range(len(shape))), kept)
    return _against_transposed(node, jnp.broadcast_to(scale, shape)) if len(axes) == len(shape) else None


def _against_transposed(node: Node, scale: Array) -> Array | None:
    """⟨M(p), scale⟩ = ⟨p, Mᵀ(scale)⟩: the transpose is applied once, to an array shared by all examples."""
    if jnp.iscomplexobj(scale):  # JAX's transpose pairs complex numbers by their real part
        return None
    function, inputs, shared = Map.of([node])
    shapes = [jax.ShapeDtypeStruct(tuple(x.value.shape), x.value.dtype) for x in inputs]
    found = []
    for x, image in zip(inputs, function.transposed(shapes, shared, scale), strict=True):
        if isinstance(x.value, Unevaluated):
            found.append(_against(x, image, tuple(image.shape), range(image.ndim)))
        else:
            found.append((x.value * image).sum())
    known = [part for part in found if part is not None]
    return precision.added(known) if len(known) == len(found) else None
