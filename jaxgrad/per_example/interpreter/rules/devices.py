"""Primitives that act along mesh axes inside shard_map."""

import dataclasses

from jaxgrad import _jax
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter.rules.record import Record, on_first


def _summed(eqn: _jax.Equation, term: Product) -> Product:
    """Sum over devices: by psum if the product is materialized, or over an axis of positions outside shard_map."""
    return dataclasses.replace(term, over=(*term.over, *eqn.params["axes"]))


def _varying(eqn: _jax.Equation, term: Product) -> Product | None:
    """A sum over devices is the same on all of them but its parts are not, so nothing device-dependent may follow."""
    return None if set(term.over) & set(eqn.params["axes"]) else term


RECORDS = {
    "psum_invariant": Record(on_first(_summed, True)),
    "pvary": Record(on_first(_varying, True)),
}
