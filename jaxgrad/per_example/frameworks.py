"""Advice for models of Flax and Equinox, added to the error if a call cannot be split or its loss cannot be traced."""

from typing import Any

import jax

from jaxgrad.errors import caller

SPLIT = {
    "nnx": "Split the module, graph, params, rest = nnx.split(model, nnx.Param, ...), differentiate with respect to "
    "params, and call nnx.merge(graph, params, rest) inside the loss.",
    "equinox": "Split the model, params, static = eqx.partition(model, eqx.is_inexact_array), differentiate with "
    "respect to params, and call eqx.combine(params, static) inside the loss.",
}
STATE = (
    "The loss changes a module's state (its counts of random numbers, its batch statistics). Let it change a copy: "
    "call nnx.merge(graph, params, rest, copy=True) inside the loss. For dropout, pass one key per example and "
    "nnx.reseed the copy with it. docs/frameworks.md shows both."
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


def add_advice(error: Exception) -> None:
    """Add advice to an error that the loss raised, if its cause is known."""
    if type(error).__name__ == "TraceContextError":
        error.add_note(f"{caller()}: {STATE}")
    elif isinstance(error, NameError) and "unbound axis name" in str(error):
        error.add_note(f"{caller()}: {AXIS}")


def _model(node: Any) -> str:
    """The library whose Module class the node's class inherits from: "nnx", "equinox" or ""."""
    for base in type(node).__mro__:
        if base.__name__ == "Module" and base.__module__.startswith("flax.nnx"):
            return "nnx"
        if base.__name__ == "Module" and base.__module__.startswith("equinox"):
            return "equinox"
    return ""
