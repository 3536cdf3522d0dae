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

    {-1, +1} are unchanged, 0 and False become -1, 1 and True become +1; of any other two classes (strings too) the one
    that sorts first becomes -1. If a batch may contain only one class, name both with `classes`.

    Args:
        labels: an array or sequence of any shape, on the host (not traced, because its values determine the encoding).
        dtype: the floating dtype of the result.
        classes: (negative, positive), the two classes; None finds them in `labels`.

    Returns:
        An array of the shape of `labels`.

    Raises:
        ValueError: not exactly two classes, labels of mixed kinds (numbers and strings, say), a NaN or NaT, or a label
            that is not among `classes`; the message names the values found.
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
    absent = values != values
    if absent.any():
        what = "NaT" if values.dtype.kind in "mM" else "NaN"
        raise ValueError(f"signs: expected two classes, got {int(absent.sum())} {what}. Drop those rows.")
    found = np.unique(values)
    positive = _larger_of_two(found) if classes is None else _second_given(found, classes)
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
            f"signs: expected numbers, booleans or strings, got {_shown(values.ravel())} of dtype {values.dtype}. "
            "Convert them."
        )
    return values


def _without_objects(values: np.ndarray) -> np.ndarray:
    flat = values.ravel().tolist()
    examples: dict[type, Any] = {}
    for value in flat:
        examples.setdefault(type(value), value)
    if len({_kind(value) for value in examples.values()}) > 1:
        found = ", ".join(f"{value!r} ({kind.__name__})" for kind, value in examples.items())
        raise ValueError(f"signs: expected labels of one kind, got {found}. Make them all strings or all numbers.")
    return np.asarray(flat).reshape(values.shape)


def _kind(value: Any) -> str:
    dtype = np.asarray(value).dtype
    return "number" if jnp.issubdtype(dtype, jnp.number) else dtype.kind


def _larger_of_two(found: np.ndarray) -> Any:
    if found.dtype == bool:
        return True
    if len(found) != 2:
        raise ValueError(
            f"signs: expected two classes, got {len(found)}: {_shown(found)}. "
            "Choose two, or name both with classes=(negative, positive)."
        )
    return found[1]


def _second_given(found: np.ndarray, classes: Sequence[Any]) -> Any:
    try:
        two = len(classes) == 2 and bool(classes[0] != classes[1])
    except (TypeError, ValueError, KeyError):  # a number, a set, arrays
        two = False
    if not two:
        raise ValueError(f"signs: expected classes=(negative, positive), two different values, got {classes!r}.")
    strange = [value for value in found.tolist() if value not in list(classes)]
    if strange:
        raise ValueError(f"signs: expected labels among {list(classes)}, got also {_shown(np.asarray(strange))}.")
    return classes[1]


def _shown(found: np.ndarray) -> str:
    shown = ", ".join(repr(v) for v in found[:5].tolist())
    return (shown or "none") + (", …" if len(found) > 5 else "")
