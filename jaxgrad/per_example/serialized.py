"""Serialization of the types that hold gradients, for `jax.export`: their static fields are written as JSON."""

import dataclasses
import json
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import export

from jaxgrad.per_example.algebra.complexes import Complex
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same
from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product, Unfolded
from jaxgrad.per_example.algebra.projection_sides import Sides
from jaxgrad.per_example.algebra.windows import Window
from jaxgrad.per_example.gradients import PerExampleGrads

N = TypeVar("N")
_TYPES: tuple[Any, ...] = (Axis, Layout, Unfolded, Window)
_NAMED = {kind.__name__: kind for kind in _TYPES}


def named_tuple(cls: type[N]) -> type[N]:
    """Decorate a NamedTuple, so that `jax.export` can serialize functions that take or return it."""
    export.register_namedtuple_serialization(cls, serialized_name=_name(cls))  # type: ignore[type-var]
    return cls


def _name(cls: type) -> str:
    return f"jaxgrad.{cls.__name__}"


def _written(fields: Any) -> bytes:
    return json.dumps(_plain(fields)).encode()


def _plain(value: Any) -> Any:
    """Data that JSON can hold; a dtype and the types of `_TYPES` become {name: fields}."""
    if isinstance(value, jnp.dtype):
        return {"dtype": value.name}
    if type(value) in _TYPES:
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)] if type(value) is Layout else value
        return {type(value).__name__: [_plain(part) for part in fields]}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _read(data: bytes | bytearray) -> Any:
    return _made(json.loads(bytes(data)))


def _made(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return jnp.dtype(content) if kind == "dtype" else _NAMED[kind](*_made(content))
    return tuple(_made(part) for part in value) if isinstance(value, list) else value


def _refused(_: Any) -> bytes:
    raise ValueError(
        "jax.export: expected gradients without `Mapped` factors, got one, whose linear map is a program that cannot "
        "be serialized. Export a function that returns what you compute from the gradients: norms, sums, or "
        "g.materialize()."
    )


for _kind in (Product, Common, Same, Leaf, Complex, Sides):
    export.register_pytree_node_serialization(
        _kind, serialized_name=_name(_kind), serialize_auxdata=_written, deserialize_auxdata=_read
    )
export.register_pytree_node_serialization(
    Mapped, serialized_name=_name(Mapped), serialize_auxdata=_refused, deserialize_auxdata=_read
)
export.register_pytree_node_serialization(
    PerExampleGrads,
    serialized_name=_name(PerExampleGrads),
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
)
