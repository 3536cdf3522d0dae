"""What jaxgrad takes from `jax.extend`, and every reading of a primitive's parameters: the only file of that kind.

tests/test_jax.py pins each layout that is read here. When JAX changes one, that file fails.
"""

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Literal: Any = jex.Literal
Jaxpr = Any  # a jex.Jaxpr
Equation = Any  # a jex.JaxprEqn, whose variables' avals have a shape and a dtype
Primitive = jex.Primitive

jit_p = primitives.jit_p
remat_p = primitives.remat_p
add_any_p = primitives.add_jaxvals_p
scan_p, cond_p = lax.scan_p, lax.cond_p
IDENTITIES = (
    *(lax.copy_p, lax.reduce_precision_p, lax.optimization_barrier_p),
    *(primitives.sharding_constraint_p, primitives.device_put_p),
)  # what a value may pass without being changed, each operand by itself
unstack_p: Any = getattr(lax, "unstack_p", None)  # these two since JAX 0.10.1
stack_p: Any = getattr(lax, "stack_p", None)

_JAX = os.path.dirname(os.path.abspath(jax.__file__))
_HERE = os.path.dirname(os.path.abspath(__file__))


class Program(NamedTuple):
    """A jaxpr with the values of its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Any]


def program_of(closed: Any) -> Program:
    """Of a ClosedJaxpr, of an open one without constants, and of the one kind there is since JAX 0.11."""
    return Program(getattr(closed, "jaxpr", closed), tuple(getattr(closed, "consts", ())))


def uses_custom_vjp(jaxpr: Jaxpr) -> bool:
    """Whether a backward pass written by hand is somewhere in a program that has not been differentiated."""

    def programs(p: Any) -> list[Any]:
        if isinstance(p, tuple | list):
            return [q for part in p for q in programs(part)]
        return [program_of(p).jaxpr] if _is_program(p) else []

    return any(
        eqn.primitive.name.startswith("custom_vjp") or any(map(uses_custom_vjp, programs(list(eqn.params.values()))))
        for eqn in jaxpr.eqns
    )


_WITHOUT_PUBLIC_NAMES = ("shard_map", "psum_invariant", "pvary")


def kind(eqn: Equation) -> Primitive | str:
    """The equation's primitive, or what it is called where JAX has no public name for it. `reshard` counts as a
    sharding constraint if it stays on one mesh, with the same kinds of axes."""
    if eqn.primitive.name in _WITHOUT_PUBLIC_NAMES:
        return eqn.primitive.name
    if eqn.primitive.name != "reshard":
        return eqn.primitive
    before, after = (v.aval.sharding.mesh for v in (eqn.invars[0], eqn.outvars[0]))
    return primitives.sharding_constraint_p if before == after else eqn.primitive


def body(eqn: Equation) -> Program:
    """The program of a jit, remat, scan or shard_map equation."""
    return program_of(eqn.params["jaxpr"])


def branches(eqn: Equation) -> list[Program]:
    """The programs of a cond equation; its first operand is the index of the branch."""
    return [program_of(branch) for branch in eqn.params["branches"]]


class ScanParts(NamedTuple):
    """How many of a scan's operands and results are what: operands consts + carry + xs, results carry + ys."""

    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: Any


def scan_parts(eqn: Equation) -> ScanParts:
    """Read from ranks and not from the params, whose names changed in JAX 0.11: a step sees one axis less."""
    jaxpr = body(eqn).jaxpr
    xs = sum(_rank(v) > _rank(w) for v, w in zip(eqn.invars, jaxpr.invars, strict=True))
    ys = sum(_rank(v) > _rank(w) for v, w in zip(eqn.outvars, jaxpr.outvars, strict=True))
    carry = len(eqn.outvars) - ys
    p = eqn.params
    return ScanParts(len(eqn.invars) - xs - carry, carry, p["length"], p["reverse"], p["unroll"])


class ShardMapParts(NamedTuple):
    """How a shard_map divides its operands and results."""

    mesh: Any
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    axis_names: frozenset[str]


def shard_map_parts(eqn: Equation) -> ShardMapParts | None:
    """None where JAX does not keep account of the mesh axes along which an array differs."""
    p = eqn.params
    if not p["check_vma"]:
        return None
    names = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]  # the latter up to JAX 0.10.1
    return ShardMapParts(p["mesh"], tuple(p["in_specs"]), tuple(p["out_specs"]), frozenset(names))


def padding(eqn: Equation) -> list[tuple[int, int, int]]:
    """Of a pad, for each axis: zeros before, after, and between entries."""
    return [(int(lo), int(hi), int(step)) for lo, hi, step in eqn.params["padding_config"]]


def scatter_axes(eqn: Equation) -> tuple[int, ...]:
    """The axes of the operand that the indices of a scatter-add are along."""
    return tuple(int(k) for k in eqn.params["dimension_numbers"].scatter_dims_to_operand_dims)


def scatter_window(eqn: Equation) -> list[int | None] | None:
    """For each axis of the operand the axis of the updates, None for one that is put in; None if there is a batch."""
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims or numbers.scatter_indices_batching_dims:
        return None
    window = iter([int(k) for k in numbers.update_window_dims])
    inserted = set(numbers.inserted_window_dims)
    return [None if k in inserted else next(window) for k in range(_rank(eqn.outvars[0]))]


def scatter_clips(eqn: Equation) -> bool:
    """Whether an index out of range is brought into it; otherwise it adds nothing, promised to be in range or not."""
    return eqn.params["mode"] == lax.GatherScatterMode.CLIP


def gather_fills(eqn: Equation) -> bool:
    """Whether an index out of range gives a number that is not zero: then it is not linear."""
    return eqn.primitive is lax.gather_p and bool(eqn.params["fill_value"])


def _rank(v: Any) -> int:
    return len(v.aval.shape)


def context(eqn: Equation) -> AbstractContextManager[None]:
    """What an equation is evaluated in, as JAX does: the kinds of the mesh's axes, where to compute, how keys split."""
    return eqn.ctx.manager


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """The equation's results. One that holds programs of its own is bound whole, as a program of one equation.

    Operands lie on an explicit mesh as the program says, also those that were evaluated in another way. Inside
    shard_map they differ along the same mesh axes, as JAX's own functions see to before they bind.
    """
    values = placed(values, eqn.invars)
    if any(map(varying, values)):
        if _only_varies(eqn):
            return [made_varying(x, _varying(v.aval)) for x, v in zip(values, eqn.outvars, strict=True)]
        values = _alike(eqn, values)
    if not any(_is_program(p) for p in eqn.params.values()):
        results = eqn.primitive.bind(*values, **eqn.params)
        return list(results) if eqn.primitive.multiple_results else [results]
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    known = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    return jex.jaxpr_as_fun(_alone(eqn, tuple(variables)))(*(known[v] for v in variables))


def placed(values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """The values, each lying on an explicit mesh as the program says of its variable."""

    def one(x: Any, v: Any) -> Any:
        lies = getattr(v.aval, "sharding", None)
        if isinstance(v, Literal) or lies is None or AxisType.Explicit not in lies.mesh.axis_types:
            return x
        return x if jax.typeof(x).sharding == lies else jax.sharding.reshard(x, lies)

    return [one(x, v) for x, v in zip(values, variables, strict=True)]


def _only_varies(eqn: Equation) -> bool:
    """Whether all that it does is to say that its operand may differ along more mesh axes, which it may do already."""
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1 or any(_is_program(p) for p in eqn.params.values()):
        return False
    return _varying(eqn.outvars[0].aval) > _varying(eqn.invars[0].aval)


def _alike(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Each operand differs along the axes that the program says, and along those that it does not know of."""
    said = [frozenset() if isinstance(v, Literal) else _varying(v.aval) for v in eqn.invars]
    more = frozenset().union(*map(varying, values)) - frozenset().union(*said)
    return [made_varying(x, axes | more) for x, axes in zip(values, said, strict=True)]


def _is_program(p: Any) -> bool:
    if isinstance(p, tuple | list):
        return any(_is_program(q) for q in p)
    return isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)


@functools.lru_cache(256)
def _template(operands: int, results: int) -> Any:
    """A program with so many operands and results: its debug information is what one of our own needs."""
    return jax.make_jaxpr(lambda *operands: (0.0,) * results)(*[0.0] * operands)


def _alone(eqn: Equation, variables: tuple[Any, ...]) -> Any:
    jaxpr = program_of(_template(len(variables), len(eqn.outvars))).jaxpr
    results, invars = list(eqn.outvars), list(variables)
    return jex.ClosedJaxpr(
        jaxpr.replace(constvars=[], invars=invars, outvars=results, eqns=[eqn], effects=eqn.effects), ()
    )


def one_example(a: Any, axis: int) -> Any:
    """What an example of a batch looks like, on an explicit mesh with where its own axes lie; inside shard_map one of
    them, which differs along the same mesh axes."""
    if varying(a) and a.shape[axis]:
        return lax.index_in_dim(a, 0, axis, keepdims=False)
    aval = a if isinstance(a, jax.ShapeDtypeStruct) else jax.typeof(a)
    shape, lies = aval.shape[:axis] + aval.shape[axis + 1 :], aval.sharding
    if isinstance(lies, NamedSharding) and AxisType.Explicit in lies.mesh.axis_types:
        spec = [*lies.spec, *[None] * len(aval.shape)][: len(aval.shape)]
        lies = NamedSharding(lies.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type, sharding=lies)
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def varying(a: Any) -> frozenset[str]:
    """The mesh axes along which an array differs inside shard_map."""
    if isinstance(a, jax.ShapeDtypeStruct):
        return frozenset()
    return _varying(jax.typeof(a))


def _varying(aval: Any) -> frozenset[str]:
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))


def made_varying(a: Any, axes: frozenset[str]) -> Any:
    """An array that may differ along these mesh axes, so that its gradients are not summed over them."""
    missing = axes - varying(a)
    return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a


def depending(program: Any, operands: Sequence[int] | None = None) -> list[bool]:
    """Which results of a program may depend on these operands, None for any: no fewer than those that do."""
    jaxpr = program_of(program).jaxpr
    return list(_depending(jaxpr, tuple(range(len(jaxpr.invars)) if operands is None else operands)))


@functools.lru_cache(512)
def _depending(jaxpr: Jaxpr, operands: tuple[int, ...]) -> tuple[bool, ...]:
    found = {jaxpr.invars[k] for k in operands}
    for eqn in jaxpr.eqns:
        mine = [k for k, v in enumerate(eqn.invars) if not isinstance(v, Literal) and v in found]
        found.update(v for v, depends in zip(eqn.outvars, results_depending(eqn, mine), strict=True) if depends)
    return tuple(not isinstance(v, Literal) and v in found for v in jaxpr.outvars)


def results_depending(eqn: Equation, operands: Sequence[int]) -> list[bool]:
    """Which results of an equation may depend on these operands: as `depending`, and as JAX's own vmap finds it."""
    if not operands:
        return [False] * len(eqn.outvars)
    if eqn.primitive is lax.optimization_barrier_p:  # it keeps each operand by itself
        return [k in operands for k in range(len(eqn.outvars))]
    if eqn.primitive in (jit_p, remat_p):
        return depending(eqn.params["jaxpr"], operands)
    if eqn.primitive is cond_p and 0 not in operands:
        inner = [depending(branch, [k - 1 for k in operands]) for branch in eqn.params["branches"]]
        return [any(results) for results in zip(*inner, strict=True)]
    if eqn.primitive is scan_p:
        parts, found, before = scan_parts(eqn), set(operands), None
        while found != before:  # what is carried is an operand of the next step
            before = set(found)
            results = depending(eqn.params["jaxpr"], sorted(found))
            found |= {parts.consts + k for k in range(parts.carry) if results[k]}
        carried = [parts.consts + k in found for k in range(parts.carry)]
        return carried + results[parts.carry :]
    return [True] * len(eqn.outvars)


def function_of(program: Any) -> Any:
    """The function of arrays that a ClosedJaxpr is; it returns a list."""
    return jex.jaxpr_as_fun(program)


def source_line(eqn: Equation) -> str:
    """file:line of the innermost frame that is neither JAX's nor ours; empty if JAX kept none."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        inside = os.path.abspath(frame.file_name)
        if not inside.startswith((_JAX + os.sep, _HERE + os.sep)) and not frame.file_name.startswith("<"):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def bind_wide(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """As `bind`, for values that may be wider than the equation's own: nothing is rounded to something narrower."""
    (first, *_), to = values, eqn.outvars[0].aval.dtype
    if eqn.primitive is lax.convert_element_type_p and jnp.issubdtype(to, jnp.floating):
        first = first.real  # as JAX converts complex numbers
        return [first if _bits(first) > _bits(eqn.outvars[0].aval) else first.astype(to)]
    inexact = [k for k, x in enumerate(values) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if all(values[k].dtype == eqn.invars[k].aval.dtype for k in inexact):
        return bind(eqn, values)
    widest = max((values[k] for k in inexact), key=_bits)
    real = jnp.finfo(widest.dtype).dtype
    if any(_is_program(p) for p in eqn.params.values()):
        narrow = bind(eqn, [x.astype(v.aval.dtype) for x, v in zip(values, eqn.invars, strict=True)])
        return [x.astype(real) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in narrow]
    values = [_as_wide(x, real) if k in inexact else x for k, x in enumerate(values)]
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = None
    results = eqn.primitive.bind(*values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _bits(x: Any) -> int:
    """Of the real numbers in an array."""
    return int(jnp.finfo(x.dtype).bits)


def _as_wide(x: Any, real: Any) -> Any:
    return x.astype(np.result_type(real, np.complex64) if jnp.iscomplexobj(x) else real)
