"""Convert labels to signs: the loss needs y = ±1, but data has 0/1, booleans or names."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def signs(
    labels: Any, dtype: jax.typing.DTypeLike = jnp.float32, *, classes: Sequence[Any] | None = None
) -> Float[Array, "*shape"]:
    """Convert labels of two classes to -1 and +1.

    Labels -1 and +1 are unchanged; 0 and False become -1, and 1 and True become +1. Of any other two classes, strings
    included, the class that sorts first becomes -1. If a batch may contain only one class, name both with `classes`.

    Args:
        labels: an array or sequence of any shape, on the host (not traced, because its values determine the encoding).
        dtype: the floating dtype of the result.
        classes: (negative, positive), the two classes; None finds them in `labels`.

    Returns:
        An array of -1 and +1 with the shape of `labels`.

    Raises:
        ValueError: there are not exactly two classes, the labels are of mixed kinds (numbers and strings, say), or a
            label is NaN, NaT or not among `classes`. The message names the values found.
        TypeError: `labels` is traced (JAX's own message), or `dtype` is not floating.

    Example:
        >>> signs(["benign", "malignant", "benign"])
        Array([-1.,  1., -1.], dtype=float32)
        >>> signs([1, 1], classes=(0, 1))
        Array([1., 1.], dtype=float32)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"signs: expected a floating dtype, got {jnp.dtype(dtype)}. Pass jnp.float32, say.")
    values = _values(labels)
    missing = values != values
    if missing.any():
        kind = "NaT" if values.dtype.kind in "mM" else "NaN"
        raise ValueError(f"signs: expected two classes, got {int(missing.sum())} {kind}. Drop those rows.")
    distinct = np.unique(values)
    positive = _larger_class(distinct) if classes is None else _positive_class(distinct, classes)
    return jnp.asarray(np.where(values == positive, 1, -1), dtype)


def _values(labels: Any) -> np.ndarray:
    try:
        # Lists become objects first, because np.asarray(["a", 1]) would turn the 1 into a string.
        values = np.asarray(labels) if hasattr(labels, "__array__") else np.array(labels, dtype=object)
        if values.dtype.kind in "OT":
            values = _without_objects(values)
    except ValueError as error:
        if str(error).startswith("signs:"):
            raise
        raise ValueError("signs: expected rows of labels of one length. Pad or flatten them.") from error
    if values.dtype.kind == "V" and jnp.issubdtype(values.dtype, jnp.number):  # bfloat16
        values = values.astype(np.float32)
    if values.dtype.kind not in "biufcmMSU":
        raise ValueError(
            f"signs: expected numbers, booleans or strings, got {_listed(values.ravel())} of dtype {values.dtype}. "
            "Convert them."
        )
    return values


def _without_objects(values: np.ndarray) -> np.ndarray:
    """Convert an array of Python objects to one of numbers, booleans or strings."""
    flat = values.ravel().tolist()
    examples: dict[type, Any] = {}
    for value in flat:
        examples.setdefault(type(value), value)
    if len({_kind(value) for value in examples.values()}) > 1:
        got = ", ".join(f"{value!r} ({kind.__name__})" for kind, value in examples.items())
        raise ValueError(f"signs: expected labels of one kind, got {got}. Make them all strings or all numbers.")
    return np.asarray(flat).reshape(values.shape)


def _kind(value: Any) -> str:
    dtype = np.asarray(value).dtype
    return "number" if jnp.issubdtype(dtype, jnp.number) else dtype.kind


def _larger_class(distinct: np.ndarray) -> Any:
    if distinct.dtype == bool:
        return True
    if len(distinct) != 2:
        raise ValueError(
            f"signs: expected two classes, got {len(distinct)}: {_listed(distinct)}. "
            "Choose two, or name both with classes=(negative, positive)."
        )
    return distinct[1]


def _positive_class(distinct: np.ndarray, classes: Sequence[Any]) -> Any:
    try:
        two = len(classes) == 2 and bool(classes[0] != classes[1])
    except (TypeError, ValueError, KeyError):  # a number, a set, arrays
        two = False
    if not two:
        raise ValueError(f"signs: expected classes=(negative, positive), two different values, got {classes!r}.")
    others = [value for value in distinct.tolist() if value not in list(classes)]
    if others:
        raise ValueError(f"signs: expected labels among {list(classes)}, got also {_listed(np.asarray(others))}.")
    return classes[1]


def _listed(values: np.ndarray) -> str:
    """The first five values, for a message."""
    listed = ", ".join(repr(v) for v in values[:5].tolist())
    return (listed or "none") + (", …" if len(values) > 5 else "")
