"""Advice for models of Flax and Equinox, added to the error if a call cannot be split or its loss cannot be traced."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxgrad.errors import caller

SPLIT = {
    "nnx": "Split the module, graph, params, rest = nnx.split(model, nnx.Param, ...), differentiate with respect to "
    "params, and call nnx.merge(graph, params, rest, copy=True) inside the loss.",
    "equinox": "Split the model, params, static = eqx.partition(model, eqx.is_inexact_array), differentiate with "
    "respect to params, and call eqx.combine(params, static) inside the loss.",
}
STATE = (
    "The loss changes a module's state (its counts of random numbers, its batch statistics). Let it change a copy: "
    "call nnx.merge(graph, params, rest, copy=True) inside the loss. For dropout, pass one key per example and "
    "nnx.reseed the copy with it. docs/frameworks.md shows both."
)
ONE_EXAMPLE = (
    "It must not vmap over the batch or take its mean; a model that needs an axis of examples gets one of size 1: "
    "model(x[None])[0]."
)
AXIS = (
    "The loss sees one example, so there is no axis of examples to take statistics over: with batch statistics no "
    "example has a gradient of its own. Use the running statistics (inference mode), or a normalization within the "
    "example (layer, group or instance normalization). docs/frameworks.md shows how."
)


def advice(tree: Any) -> str:
    """How to split a model in the tree into its parameters and the rest; empty if the tree holds no model."""
    models = [_model(node) for node in jax.tree.leaves(tree, is_leaf=lambda node: bool(_model(node)))]
    return next((SPLIT[model] for model in models if model), "")


def add_advice(error: Exception, args: Sequence[Any]) -> None:
    """Add to an error that the loss raised what the loss was given, and advice if the cause is known."""
    given = ", ".join(f"argument {k} {_shapes(arg)}" for k, arg in enumerate(args))
    error.add_note(f"{caller()}: the loss was called with ONE example: {given}. {ONE_EXAMPLE}")
    if type(error).__name__ == "TraceContextError":
        error.add_note(f"{caller()}: {STATE}")
    elif isinstance(error, NameError) and "unbound axis name" in str(error):
        error.add_note(f"{caller()}: {AXIS}")


def _shapes(arg: Any) -> str:
    """The dtypes and shapes of the arrays in an argument; the first three, if there are more."""
    leaves = [jax.typeof(leaf).str_short() for leaf in jax.tree.leaves(arg) if hasattr(leaf, "dtype")]
    if len(leaves) > 3:
        return f"with {len(leaves)} arrays"
    return " ".join(leaves) or type(arg).__name__


def _model(node: Any) -> str:
    """The library whose Module class the node's class inherits from: "nnx", "equinox" or ""."""
    for base in type(node).__mro__:
        if base.__name__ == "Module" and base.__module__.startswith("flax.nnx"):
            return "nnx"
        if base.__name__ == "Module" and base.__module__.startswith("equinox"):
            return "equinox"
    return ""
