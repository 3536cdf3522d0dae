"""Functions over examples on an explicit mesh that shards the examples and the parameters over the same axis (FSDP).

JAX maps no function over such examples. `call_on_mesh` therefore leaves the shardings over that axis to the compiler.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgrad import _jax
from jaxgrad.per_example.algebra.mapped import with_shared, without_shared
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.sharding import automatic_over, in_both, spread_over

R = TypeVar("R")


def call_on_mesh(function: Callable[..., R], arguments: Arguments, results: Any, *others: Any) -> R:
    """Call function(arguments, *others); over the mesh axes that shard examples and parameters, the compiler shards.

    Args:
        function: a function that maps over the examples, or calls one that does.
        arguments: the call.
        results: how the function's results are sharded, as a tree prefix of them: 0 along their leading axis, as the
            examples are; None not over these mesh axes; an array as this array is. Arrays that all examples share
            (`Same`) are not sharded over these mesh axes.
        others: trees of other arguments. Arrays on the mesh must be passed here: the function cannot close over them.
    """
    axes, examples = in_both(arguments.batch, arguments.axes, [*arguments.params, *arguments.shared])
    if examples is None or not axes:
        return function(arguments, *others)

    def call(params: Any, batch: Any, shared: Any, others: Any) -> Any:
        traced = [_jax.example_for_tracing(a, axis) for a, axis in zip(batch, arguments.axes, strict=True)]
        example = [*traced, *arguments.example[len(traced) :]]
        inner = dataclasses.replace(arguments, params=params, batch=batch, shared=shared, example=example)
        return without_shared(function(inner, *others))

    inputs = arguments.params, arguments.batch, arguments.shared, others
    shardings = _shardings(results, examples, _types(axes, call, examples, inputs))
    return with_shared(*automatic_over(axes, call, shardings, *inputs))  # type: ignore[no-any-return]


def _types(axes: tuple[str, ...], call: Callable[..., Any], examples: NamedSharding, inputs: Any) -> Any:
    """The results' types, which say how they are sharded over explicit axes; None if all axes are the compiler's."""
    mesh, found = examples.mesh, []
    if all(
        kind != AxisType.Explicit or name in axes for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    ):
        return None

    def traced(*inputs: Any) -> tuple[()]:
        found.append(jax.tree.map(jax.typeof, call(*inputs)))
        return ()

    jax.eval_shape(lambda *inputs: automatic_over(axes, traced, examples, *inputs), *inputs)
    return found[0]


def _shardings(results: Any, examples: NamedSharding, types: Any) -> Any:
    """The shardings of (the results without `Same`, arrays that all examples share)."""
    prefix: list[Any]
    structure: Any
    prefix, structure = jax.tree.flatten((results, None), is_leaf=lambda node: node is None)

    def sharding(result: Any, entries: Sequence[Any]) -> NamedSharding:
        if result is not None and not isinstance(result, int):
            return examples.update(spec=PartitionSpec(*spread_over(result)))
        first = examples.spec if result == 0 else entries[:1]
        return examples.update(spec=PartitionSpec(*first, *entries[1:]))

    if types is None:
        return structure.unflatten([sharding(result, ()) for result in prefix])

    def of_part(result: Any, part: Any) -> Any:
        return jax.tree.map(lambda a: sharding(result, [*a.sharding.spec, *[None] * a.ndim][: a.ndim]), part)

    return structure.unflatten(map(of_part, prefix, structure.flatten_up_to(types)))
