"""Other libraries on factored gradients: a script written for jax-privacy or optax changes an import.

    faiss           `index`: a FAISS index of stored projections
    jax_privacy     `clipped_grad`, with jax-privacy's signature and types; its plans, trainer and Keras API run on it
    optax           `differentially_private_aggregate`, which takes factored gradients

Each module needs the library that it is named after, and is imported when it is first used.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType

__all__ = ["faiss", "jax_privacy", "optax"]


def __getattr__(name: str) -> _ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _importlib.import_module(f"{__name__}.{name}")
