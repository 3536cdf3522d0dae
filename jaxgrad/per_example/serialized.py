"""Serialization of the types that hold gradients, for `jax.export`: their static fields are written as JSON."""

import dataclasses
import json
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import export

from jaxgrad.per_example.algebra.complexes import Complex
from jaxgrad.per_example.algebra.factors import Dense, Outer, Rows, Windows
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same
from jaxgrad.per_example.algebra.windows import Unfolding, Window
from jaxgrad.per_example.gradients import PerExampleGrads

N = TypeVar("N")


def named_tuple(cls: type[N]) -> type[N]:
    """Decorate a NamedTuple, so that `jax.export` can serialize functions that take or return it."""
    export.register_namedtuple_serialization(cls, serialized_name=_name(cls))  # type: ignore[type-var]
    return cls


def _name(cls: type) -> str:
    return f"jaxgrad.{cls.__name__}"


def _written(fields: Any) -> bytes:
    return json.dumps(_plain(fields)).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Layout):
        return {"layout": [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]}
    if isinstance(value, Unfolding):
        return {"unfolding": [*value[:2], [list(window) for window in value.windows]]}
    if isinstance(value, jnp.dtype):
        return {"dtype": value.name}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _read(data: bytes | bytearray) -> Any:
    return _made(json.loads(bytes(data)))


def _made(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "dtype":
            return jnp.dtype(content)
        fields = _made(content)
        if kind == "layout":
            return Layout(*fields)
        left, image, windows = fields
        return Unfolding(left, image, tuple(Window(*window) for window in windows))
    return tuple(_made(part) for part in value) if isinstance(value, list) else value


def _refused(_: Any) -> bytes:
    raise ValueError(
        "jax.export: expected gradients without `Mapped` factors, got one, whose linear map is a program that cannot "
        "be serialized. Export a function that returns what you compute from the gradients: norms, sums, or "
        "g.materialize()."
    )


for _kind in (Outer, Rows, Windows, Dense, Common, Same, Leaf, Complex):
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
