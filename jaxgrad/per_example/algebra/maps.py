"""Linear maps shared by all examples, recorded while a jaxpr is interpreted and applied when their result is needed.

If a weight is normalized, masked or otherwise computed from the parameters before it is used, its gradient is a product
passed through such a map. `Node`s record the map: a graph of calls, from values that differ between examples (`Input`)
and arrays shared by all examples. `Map` is the same graph without its arrays, to be stored with factors.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.scales import power_of_two

# Elementwise primitives, and the keys of elementwise calls.
ENTRYWISE = frozenset(
    {lax.mul_p, lax.div_p, lax.neg_p, lax.add_p, _jax.add_any_p, lax.sub_p, lax.select_n_p, lax.copy_p}
    | {lax.convert_element_type_p, "sum"}
)

Function = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Input:
    """An input of a map: an unevaluated product, or an array of one example."""

    value: Any


@dataclass(frozen=True, eq=False)
class Call:
    """A function that is linear in those of its operands that are nodes.

    Attributes:
        function: list of arrays → list of arrays, for any floating dtype.
        key: equal for two calls whose functions are the same.
        operands: nodes, and arrays shared by all examples.
    """

    function: Function
    key: Any
    operands: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Result:
    """One result of a call."""

    call: Call
    index: int


Node = Input | Result


def call_of(eqn: _jax.Equation, operands: Sequence[Any]) -> Call:
    """Convert the equation to a call."""
    key = (eqn.primitive, tuple(sorted(eqn.params.items())))
    return Call(lambda arrays: _jax.bind_wide(eqn, arrays), _hashable(key, eqn), tuple(operands))


def _hashable(key: Any, otherwise: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        return id(otherwise), otherwise
    return key


def inputs_of(nodes: Sequence[Node]) -> list[Input]:
    """The inputs that the nodes depend on, each once."""
    found: dict[int, Input] = {}
    seen: set[int] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, Input):
            found.setdefault(id(node.value), node)
        elif isinstance(node, Result) and id(node.call) not in seen:
            seen.add(id(node.call))
            stack += [x for x in node.call.operands if isinstance(x, Node)]
    return list(found.values())


@dataclass(frozen=True)
class Step:
    """A call of a `Map`: its operands are ("input", i), ("shared", i) or ("step", i, index of the result)."""

    function: Function = field(compare=False)
    key: Any
    operands: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Map:
    """A linear map of several arrays to one; it depends on arrays shared by all examples.

    Attributes:
        steps: the calls, in an order in which they can run.
        results: the operands, in the form of `Step`, that are added up.
    """

    steps: tuple[Step, ...]
    results: tuple[tuple[Any, ...], ...]

    @staticmethod
    def of(nodes: Sequence[Node]) -> tuple["Map", list[Input], list[Any]]:
        """(the map, its inputs, the shared arrays) for the sum of these nodes."""
        steps: list[Step] = []
        inputs: dict[int, tuple[int, Input]] = {}
        shared: dict[int, tuple[int, Any]] = {}
        done: dict[int, int] = {}

        def named(x: Any) -> tuple[Any, ...]:
            if isinstance(x, Input):
                return ("input", inputs.setdefault(id(x.value), (len(inputs), x))[0])
            if not isinstance(x, Result):
                return ("shared", shared.setdefault(id(x), (len(shared), x))[0])
            if id(x.call) not in done:
                operands = tuple(named(operand) for operand in x.call.operands)
                done[id(x.call)] = len(steps)
                steps.append(Step(x.call.function, x.call.key, operands))
            return ("step", done[id(x.call)], x.index)

        results = tuple(named(node) for node in nodes)
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for _, x in shared.values()]
        return Map(tuple(steps), results), [x for _, x in inputs.values()], arrays

    def nodes(self, inputs: Sequence[Input], shared: Sequence[Any]) -> list[Node]:
        """Record the same map for other inputs: the inverse of `of`."""
        done: list[Call] = []

        def read(operand: tuple[Any, ...]) -> Any:
            kind, index, *rest = operand
            if kind == "step":
                return Result(done[index], rest[0])
            return inputs[index] if kind == "input" else shared[index]

        for step in self.steps:
            done.append(Call(step.function, step.key, tuple(read(operand) for operand in step.operands)))
        return [read(result) for result in self.results]

    def nodes_of_each(self, inputs: Sequence[Input], fixed: Sequence[Any], differing: Sequence[Any]) -> list[Node]:
        """Record this map for every step of a loop, with its inputs and its result stacked.

        Args:
            fixed: the shared arrays that are the same in every step, with None for the others.
            differing: these others, stacked.
        """
        stacked = [a is None for a in fixed]
        rest = iter(differing)
        shared = [next(rest) if a is None else a for a in fixed]
        is_entrywise = self.entrywise() == ()

        def function(arrays: Sequence[Any]) -> Sequence[Any]:
            xs, shared = list(arrays[: len(inputs)]), arrays[len(inputs) :]

            def one(step: Any) -> Array:
                step_arrays = iter(step[1])
                return self(
                    step[0], [next(step_arrays) if each else a for a, each in zip(shared, stacked, strict=True)]
                )

            steps = (xs, [a for a, each in zip(shared, stacked, strict=True) if each])
            # lax.map keeps a branch a branch; under vmap an elementwise map is one kernel.
            return [jax.vmap(one)(steps) if is_entrywise else lax.map(one, steps)]

        return [Result(Call(function, ("each", self, tuple(stacked)), (*inputs, *shared)), 0)]

    def __call__(self, inputs: Sequence[Array], shared: Sequence[Array]) -> Array:
        """Apply the map to these inputs."""
        done: list[Sequence[Array]] = []

        def read(operand: tuple[Any, ...]) -> Array:
            kind, index, *rest = operand
            return {"input": inputs, "shared": shared}[kind][index] if kind != "step" else done[index][rest[0]]

        for step in self.steps:
            done.append(step.function([read(operand) for operand in step.operands]))
        total, *others = (read(result) for result in self.results)
        for other in others:
            dtype = max(total.dtype, other.dtype, key=lambda d: d.itemsize)
            total = total.astype(dtype) + other.astype(dtype)
        return total

    def parts(self) -> list["Map"]:
        """The maps whose sum this map is."""
        return [Map(self.steps, (result,)) for result in self.results]

    def entrywise(self) -> tuple[int, ...] | None:
        """The axes of the result along which the single input varies, in the input's order; () for all of them.

        None unless each entry of the result is one entry of the input times a number.
        """
        dims: set[tuple[int, ...]] = set()
        for step in self.steps:
            kind = step.key[0] if isinstance(step.key, tuple) else step.key
            if kind == "broadcast" and step.operands[0] == ("input", 0):
                dims.add(step.key[1])
            elif kind not in ENTRYWISE and not (kind == "each" and step.key[1].entrywise() == ()):
                return None
            elif any(operand[0] == "input" for operand in step.operands):
                dims.add(())
        return dims.pop() if len(dims) == 1 else None

    def transposed(self, inputs: Sequence[jax.ShapeDtypeStruct], shared: Sequence[Array], cotangent: Array) -> Any:
        """Apply the map's transpose to a cotangent; returns one array for each input."""
        return jax.linear_transpose(lambda *xs: self(xs, shared), *inputs)(cotangent)

    def norm(self, inputs: Sequence[jax.ShapeDtypeStruct], shared: Sequence[Array], steps: int = 6) -> Array:
        """Estimate the map's operator norm from below, by the power method."""
        start = jax.random.normal(jax.random.key(0), (sum(x.size for x in inputs),), inputs[0].dtype)
        ends = [sum(x.size for x in inputs[:k]) for k in range(1, len(inputs))]
        vs = [part.reshape(x.shape) for part, x in zip(jnp.split(start, ends), inputs, strict=True)]
        for step in range(steps):
            size = _length(vs)
            image = self([v / jnp.where(size > 0, size, jnp.ones_like(size)) for v in vs], shared)
            unit = power_of_two(jnp.abs(image).max(initial=0))
            if step + 1 < steps:
                vs = list(self.transposed(inputs, shared, image / unit))
        return _length([image])


def _length(arrays: Sequence[Array]) -> Array:
    """The norm of all arrays together, scaled by a power of two so that neither huge nor tiny entries are lost."""
    unit = power_of_two(functools.reduce(jnp.maximum, [jnp.abs(a).max(initial=0) for a in arrays]))
    return unit * jnp.sqrt(sum(((a / unit) ** 2).sum() for a in arrays))
