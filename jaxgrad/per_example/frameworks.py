"""What to do with other libraries' models: said in the errors of calls that cannot be taken apart or traced."""

from typing import Any

import jax

from jaxgrad.errors import called

WHOLE = {
    "nnx": "Split the module, graph, params, rest = nnx.split(model, nnx.Param, ...), differentiate with respect to "
    "params, and call nnx.merge(graph, params, rest) inside the loss.",
    "equinox": "Split the model, params, static = eqx.partition(model, eqx.is_inexact_array), differentiate with "
    "respect to params, and call eqx.combine(params, static) inside the loss.",
}
STATE = (
    "The loss changes a module's state (its counts of random numbers, its batch statistics). Let it change a copy, "
    "nnx.merge(graph, params, rest, copy=True) inside the loss; for dropout pass a key for every example, and "
    "nnx.reseed the copy with it. docs/frameworks.md shows both."
)
AXIS = (
    "The loss sees one example, so there is no axis of examples to take statistics over: with batch statistics no "
    "example has a gradient of its own. Use the running statistics (inference mode), or a normalisation within the "
    "example (layer, group or instance normalisation). docs/frameworks.md shows how."
)


def advice(tree: Any) -> str:
    """How to take a model in the tree apart into its parameters and the rest; empty where there is none."""
    models = [_model(node) for node in jax.tree.leaves(tree, is_leaf=lambda node: bool(_model(node)))]
    return next((WHOLE[model] for model in models if model), "")


def explained(error: Exception) -> None:
    """Adds what to do to an error of the loss where it is known what that comes from."""
    if type(error).__name__ == "TraceContextError":
        error.add_note(f"{called()}: {STATE}")
    elif isinstance(error, NameError) and "unbound axis name" in str(error):
        error.add_note(f"{called()}: {AXIS}")


def _model(node: Any) -> str:
    """Whose model it is: a class of the library's own class of that name."""
    for base in type(node).__mro__:
        if base.__name__ == "Module" and base.__module__.startswith("flax.nnx"):
            return "nnx"
        if base.__name__ == "Module" and base.__module__.startswith("equinox"):
            return "equinox"
    return ""
