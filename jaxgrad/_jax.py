"""The only file that uses `jax.extend` or reads a param whose layout differs between versions of JAX.

tests/test_jax.py pins each layout that is read here, so a change in JAX fails there.
"""

import functools
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
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
)  # primitives that return each operand unchanged
try:
    shard_alike: Any = importlib.import_module("jax.experimental.shard_alike").shard_alike
except ImportError:  # removed in JAX 0.12
    shard_alike = None
unstack_p: Any = getattr(lax, "unstack_p", None)  # JAX has these two since 0.10.1
stack_p: Any = getattr(lax, "stack_p", None)

_JAX = os.path.dirname(os.path.abspath(jax.__file__))
_HERE = os.path.dirname(os.path.abspath(__file__))


class Program(NamedTuple):
    """A jaxpr with the values of its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Any]


def program_of(closed: Any) -> Program:
    """The `Program` of a ClosedJaxpr, of an open jaxpr without constants, or of JAX 0.11's single jaxpr type."""
    return Program(getattr(closed, "jaxpr", closed), tuple(getattr(closed, "consts", ())))


def uses_custom_vjp(jaxpr: Jaxpr) -> bool:
    """Whether a program that has not been differentiated contains a `custom_vjp`."""
    return any(
        eqn.primitive.name.startswith("custom_vjp") or any(map(uses_custom_vjp, programs_in(eqn))) for eqn in jaxpr.eqns
    )


def programs_in(eqn: Equation) -> list[Jaxpr]:
    """The jaxprs among an equation's parameters."""

    def collect(p: Any) -> list[Any]:
        if isinstance(p, tuple | list):
            return [q for part in p for q in collect(part)]
        return [program_of(p).jaxpr] if _is_program(p) else []

    return collect(list(eqn.params.values()))


class While(NamedTuple):
    """A while_loop's two jaxprs; its operands are cond's constants, body's constants, then the carry."""

    cond: Jaxpr
    body: Jaxpr
    cond_consts: int
    body_consts: int


def while_parts(eqn: Equation) -> While:
    """The parts of a while_loop's equation."""
    p = eqn.params
    cond, body = (program_of(p[name]).jaxpr for name in ("cond_jaxpr", "body_jaxpr"))
    return While(cond, body, p["cond_nconsts"], p["body_nconsts"])


_WITHOUT_PUBLIC_NAMES = ("shard_map", "psum_invariant", "pvary")


def kind(eqn: Equation) -> Primitive | str:
    """The equation's primitive, or the primitive's name if JAX does not export it.

    A `reshard` that keeps the mesh and its axis types counts as a sharding constraint.
    """
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


def kernel_name(eqn: Equation) -> str | None:
    """The name in an equation's params, or else that of the function traced for it; None if there is neither.

    A Pallas kernel has the former if it is called with `name=`; else its name is that of the kernel's function.
    """
    name, inner = eqn.params.get("name"), eqn.params.get("jaxpr")
    if isinstance(name, str):
        return name
    function = getattr(getattr(getattr(inner, "jaxpr", inner), "debug_info", None), "func_name", None)
    return function if isinstance(function, str) else None


def is_batched_kernel(eqn: Equation) -> bool:
    """Whether the equation is a Pallas kernel that `jax.vmap` has batched, whose operands have an axis more."""
    return bool(getattr(eqn.params.get("grid_mapping"), "vmapped_dims", ()))


class RaggedParts(NamedTuple):
    """How a ragged product contracts its operands.

    Attributes:
        rows: the axis of the left operand that is divided into groups.
        lhs_contracted, rhs_contracted: the axes that are contracted.
        precision, dtype: as in `jax.lax.dot_general`.
    """

    rows: int
    lhs_contracted: tuple[int, ...]
    rhs_contracted: tuple[int, ...]
    precision: Any
    dtype: Any


def ragged_parts(params: Mapping[str, Any]) -> RaggedParts | None:
    """The parts of a `ragged_dot_general`; None if it has batch axes or an offset."""
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs, rhs), batch = numbers.dot_dimension_numbers
    if any(map(len, batch)) or params["group_offset"] is not None or len(numbers.lhs_ragged_dimensions) != 1:
        return None
    (rows,) = numbers.lhs_ragged_dimensions
    return RaggedParts(int(rows), tuple(lhs), tuple(rhs), params["precision"], params["preferred_element_type"])


def traced_for(function: Any, eqn: Equation) -> Program:
    """Trace a function on the avals of the equation's operands, in the context of the equation."""
    with context(eqn):
        return program_of(jax.make_jaxpr(function)(*map(_array_like, eqn.invars)))


def _array_like(v: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(v.aval, "sharding", None)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def equations_in(jaxpr: Jaxpr) -> Iterator[Equation]:
    """The equations of a program and of all programs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in programs_in(eqn):
            yield from equations_in(inner)


class ScanParts(NamedTuple):
    """The layout of a scan: its operands are consts, carry and xs; its results are carry and ys."""

    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: Any


def scan_parts(eqn: Equation) -> ScanParts:
    """Read a scan's layout from ranks, because JAX 0.11 renamed the params: xs and ys lose an axis inside a step."""
    jaxpr = body(eqn).jaxpr
    xs = sum(_rank(v) > _rank(w) for v, w in zip(eqn.invars, jaxpr.invars, strict=True))
    ys = sum(_rank(v) > _rank(w) for v, w in zip(eqn.outvars, jaxpr.outvars, strict=True))
    carry = len(eqn.outvars) - ys
    p = eqn.params
    return ScanParts(len(eqn.invars) - xs - carry, carry, p["length"], p["reverse"], p["unroll"])


class ShardMapParts(NamedTuple):
    """How a shard_map shards its operands and results."""

    mesh: Any
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    axis_names: frozenset[str]


def shard_map_parts(eqn: Equation) -> ShardMapParts | None:
    """The parts of a shard_map; None for check_vma=False, where JAX does not track the axes that arrays vary along."""
    p = eqn.params
    if not p["check_vma"]:
        return None
    names = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]  # the latter up to JAX 0.10.1
    return ShardMapParts(p["mesh"], tuple(p["in_specs"]), tuple(p["out_specs"]), frozenset(names))


def padding(eqn: Equation) -> list[tuple[int, int, int]]:
    """The padding of a pad equation, for each axis: (before, after, between entries)."""
    return [(int(lo), int(hi), int(step)) for lo, hi, step in eqn.params["padding_config"]]


def scatter_axes(eqn: Equation) -> tuple[int, ...]:
    """The axes of a scatter-add's operand that its indices point into."""
    return tuple(int(k) for k in eqn.params["dimension_numbers"].scatter_dims_to_operand_dims)


def scatter_window(eqn: Equation) -> list[int | None] | None:
    """For each axis of a scatter's operand, the matching axis of the updates, or None if the axis is inserted.

    The result is None if the scatter has batch axes.
    """
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims or numbers.scatter_indices_batching_dims:
        return None
    window = iter([int(k) for k in numbers.update_window_dims])
    inserted = set(numbers.inserted_window_dims)
    return [None if k in inserted else next(window) for k in range(_rank(eqn.outvars[0]))]


def scatter_clips(eqn: Equation) -> bool:
    """Whether an index out of range is clipped; in all other modes, "promise_in_bounds" included, it adds nothing."""
    return eqn.params["mode"] == lax.GatherScatterMode.CLIP


def gather_fills(eqn: Equation) -> bool:
    """Whether a gather fills in a number other than zero for an index out of range, so that it is not linear."""
    return eqn.primitive is lax.gather_p and bool(eqn.params["fill_value"])


def _rank(v: Any) -> int:
    return len(v.aval.shape)


@functools.cache
def _exported_primitives() -> frozenset[Primitive]:
    return frozenset(p for m in (lax, lax.linalg, primitives) for p in vars(m).values() if isinstance(p, Primitive))


def is_foreign(eqn: Equation) -> bool:
    """Whether JAX does not export the primitive, because it is a user's own or a kernel."""
    return eqn.primitive not in _exported_primitives()


def context(eqn: Equation) -> AbstractContextManager[None]:
    """The context in which JAX evaluates an equation: the mesh's axis types, where to compute, how keys split."""
    return eqn.ctx.manager


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation; one whose params contain jaxprs is evaluated as a program of one equation.

    On an explicit mesh, each operand is first resharded as the program states, because the interpreter may have
    computed it with another sharding. Inside shard_map, all operands are made to vary along the same mesh axes, as
    JAX's own functions do before they bind.
    """
    values = placed(values, eqn.invars)
    if any(map(varying, values)):
        if _only_varies(eqn):
            return [made_varying(x, _varying(v.aval)) for x, v in zip(values, eqn.outvars, strict=True)]
        values = _made_alike(eqn, values)
    if not any(_is_program(p) for p in eqn.params.values()):
        results = eqn.primitive.bind(*values, **eqn.params)
        return list(results) if eqn.primitive.multiple_results else [results]
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    value_of = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    return jex.jaxpr_as_fun(_single_equation(eqn, variables))(*(value_of[v] for v in variables))


def placed(values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """The values, resharded on an explicit mesh as the program states for their variables."""

    def place(x: Any, v: Any) -> Any:
        sharding = getattr(v.aval, "sharding", None)
        if isinstance(v, Literal) or sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            return x
        return x if jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)

    return [place(x, v) for x, v in zip(values, variables, strict=True)]


def _only_varies(eqn: Equation) -> bool:
    """Whether the equation only marks its operand as varying along more mesh axes, which the value may already be."""
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1 or any(_is_program(p) for p in eqn.params.values()):
        return False
    return _varying(eqn.outvars[0].aval) > _varying(eqn.invars[0].aval)


def _made_alike(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Make each operand vary along the mesh axes that the program states for it, and along all that it never states."""
    stated = [frozenset() if isinstance(v, Literal) else _varying(v.aval) for v in eqn.invars]
    unstated = frozenset().union(*map(varying, values)) - frozenset().union(*stated)
    return [made_varying(x, axes | unstated) for x, axes in zip(values, stated, strict=True)]


def _is_program(p: Any) -> bool:
    if isinstance(p, tuple | list):
        return any(_is_program(q) for q in p)
    return isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)


@functools.lru_cache(256)
def _template(operands: int, results: int) -> Any:
    """A program with this many operands and results, whose debug information the programs built here share."""
    return jax.make_jaxpr(lambda *operands: (0.0,) * results)(*[0.0] * operands)


def _single_equation(eqn: Equation, variables: Sequence[Any]) -> Any:
    """A ClosedJaxpr that evaluates this equation as a function of these variables."""
    jaxpr = program_of(_template(len(variables), len(eqn.outvars))).jaxpr
    results, invars = list(eqn.outvars), list(variables)
    return jex.ClosedJaxpr(
        jaxpr.replace(constvars=[], invars=invars, outvars=results, eqns=[eqn], effects=eqn.effects), ()
    )


def example_for_tracing(a: Any, axis: int) -> Any:
    """One example of a batch, to trace with: its shape and dtype and, on an explicit mesh, its sharding.

    Inside shard_map it is the first example itself, because that varies along the same mesh axes as the batch.
    """
    if varying(a) and a.shape[axis]:
        return lax.index_in_dim(a, 0, axis, keepdims=False)
    aval = a if isinstance(a, jax.ShapeDtypeStruct) else jax.typeof(a)
    shape, sharding = aval.shape[:axis] + aval.shape[axis + 1 :], aval.sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        spec = [*sharding.spec, *[None] * len(aval.shape)][: len(aval.shape)]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding)
    return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)


def is_offloaded(a: Any) -> bool:
    """Whether an array or variable is not in the device's memory, as what a checkpoint policy has moved to the host."""
    aval = getattr(a, "aval", None) or jax.typeof(a)
    return getattr(aval, "memory_space", jax.memory.Space.Device) != jax.memory.Space.Device


def varying(a: Any) -> frozenset[str]:
    """The mesh axes along which an array varies inside shard_map."""
    if isinstance(a, jax.ShapeDtypeStruct):
        return frozenset()
    return _varying(jax.typeof(a))


def _varying(aval: Any) -> frozenset[str]:
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))


def sharded_alike(a: Any, like: Any) -> Any:
    """The array, which the compiler shards as another of its shape; for axes of a mesh that are automatic."""
    if shard_alike is not None:
        alike, _ = shard_alike(a, -like.astype(a.dtype))
        return alike
    never = lax.optimization_barrier(jnp.zeros((), bool))  # an elementwise operation, through which shardings propagate
    return jnp.where(never, like.astype(a.dtype), a)


def made_varying(a: Any, axes: frozenset[str]) -> Any:
    """The array, marked as varying along these mesh axes, so that its gradients are not summed over them."""
    missing = axes - varying(a)
    return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a


def function_of(program: Any) -> Any:
    """A ClosedJaxpr as a function of arrays that returns a list."""
    return jex.jaxpr_as_fun(program)


def source_line(eqn: Equation) -> str:
    """file:line of the innermost frame outside JAX and jaxgrad; empty if JAX kept none."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        path = os.path.abspath(frame.file_name)
        if not path.startswith((_JAX + os.sep, _HERE + os.sep)) and not frame.file_name.startswith("<"):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def bind_wide(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Like `bind`, for values whose dtypes may be wider than the equation's; it computes in the widest of them.

    An equation that contains jaxprs is evaluated in its own dtypes, and its results are widened.
    """
    dtype = eqn.outvars[0].aval.dtype
    if eqn.primitive is lax.convert_element_type_p and jnp.issubdtype(dtype, jnp.floating):
        number = values[0].real  # JAX converts complex numbers this way
        return [number if _bits(number) > _bits(eqn.outvars[0].aval) else number.astype(dtype)]
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
    """The width in bits of the real numbers in an array."""
    return int(jnp.finfo(x.dtype).bits)


def _as_wide(x: Any, real: Any) -> Any:
    """The array, real or complex, with real numbers of this dtype."""
    return x.astype(np.result_type(real, np.complex64) if jnp.iscomplexobj(x) else real)
