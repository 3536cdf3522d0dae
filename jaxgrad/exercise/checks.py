"""Checks of a call's arguments, made before anything is traced so that errors describe the caller's arrays.

Each decorator takes a pure function on arrays and returns the public function, with the same name, docstring and
signature. The public function converts its arguments to arrays, checks them, and checks that the activation is an
`Activation`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from jaxgrad.exercise.activations import Activation
from jaxgrad.exercise.params import Params

P = ParamSpec("P")
R = TypeVar("R")


def one_example(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate function(params, x[, y]) of one example, without a batch axis. The function is not jitted."""
    return _checked(function, _check_one, jitted=False)


def one_example_jitted(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate as `one_example` does, and jit with the activation static."""
    return _checked(function, _check_one, jitted=True)


def batch(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate function(params, X, Y) of a batch, with the example axis first; jit with the activation static."""
    return _checked(function, _check_batch, jitted=True)


def batch_mean(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate function(params, [V,] X, Y), a mean over a nonempty batch; jit it with the activation static."""
    return _checked(function, _check_mean, jitted=True)


def _checked(function: Callable[P, R], check: Callable[..., dict[str, Any]], *, jitted: bool) -> Callable[P, R]:
    name = f"{function.__module__.replace('jaxgrad.exercise', 'network')}.{function.__name__}"
    signature = inspect.signature(function)

    def arguments(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}: {error}; its arguments are {', '.join(signature.parameters)}.") from None
        bound.apply_defaults()
        activation = bound.arguments.pop("activation")
        if not isinstance(activation, Activation):
            raise TypeError(
                f"{name}: expected activation to be an Activation, got {activation!r}. "
                "Use one of jaxgrad.network's, or Activation.from_function(f)."
            )
        return check(name, **bound.arguments) | {"activation": activation}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(**arguments(*args, **kwargs))  # type: ignore[call-arg,arg-type]

    if not jitted:
        return checked
    # The check runs while a call is traced, before the function itself, so it costs nothing if the shapes are compiled
    # already. If it fails, it is repeated on the arguments as they were given, so that the error describes those.
    compiled = jax.jit(checked, static_argnames=("activation",))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return compiled(*args, **kwargs)
        except (TypeError, ValueError) as error:
            failed = error
        arguments(*args, **kwargs)
        raise failed

    return call


@functools.cache
def _is_floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1  # the 8-bit formats do not promote


def _array(name: str, what: str, value: Any) -> jax.Array:
    if isinstance(value, jax.Array) and _is_floating(value.dtype):
        return value
    hint = " Make y with jaxgrad.exercise.signs(labels)." if what in ("y", "Y") else " Convert it to a floating dtype."
    try:
        array = jnp.asarray(value)
        if what == "y" and array.weak_type and jnp.issubdtype(array.dtype, jnp.integer):
            array = array * 1.0  # a literal 1 or -1, still weakly typed; an integer array is refused below
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected {what} to be an array, got {type(value).__name__}.{hint}") from error
    if not _is_floating(array.dtype):
        raise TypeError(f"{name}: expected {what} of a floating dtype, got {array.dtype}.{hint}")
    return array


def _check_params(name: str, params: Any, what: str = "params") -> Params:
    try:
        leaves = params.W, params.b, params.w
    except AttributeError:
        raise TypeError(
            f"{name}: expected {what} to be Params(W, b, w), got {type(params).__name__}. "
            "Make them with jaxgrad.exercise.init_params or jaxgrad.exercise.Params."
        ) from None
    arrays = Params(*(_array(name, f"{what}.{field}", v) for field, v in zip(Params._fields, leaves, strict=True)))
    W, b, w = arrays.W.shape, arrays.b.shape, arrays.w.shape
    if len(W) != 2:
        raise ValueError(f"{name}: expected {what}.W of shape [H, D], got {W}. Rows are hidden units.")
    for field, shape in (("b", b), ("w", w)):
        if shape != (W[0],):
            raise ValueError(
                f"{name}: expected {what}.{field} of shape {(W[0],)} to match {what}.W of shape {W}, got {shape}. "
                "Each hidden unit has one bias and one output weight."
            )
    return arrays


_ABSENT: Any = object()


def _check_one(name: str, params: Any, x: Any, y: Any = _ABSENT) -> dict[str, Any]:
    params, x = _check_params(name, params), _array(name, "x", x)
    if x.shape != params.W.shape[1:]:
        raise ValueError(
            f"{name}: expected x of shape {params.W.shape[1:]} to match params.W of shape {params.W.shape}, "
            f"got {x.shape}. Pass one example; for a batch use jax.vmap or the batched functions."
        )
    if y is _ABSENT:
        return {"params": params, "x": x}
    y = _array(name, "y", y)
    if y.shape != ():
        raise ValueError(f"{name}: expected y of shape (), got {y.shape}. Pass the sign of one example.")
    return {"params": params, "x": x, "y": y}


def _check_batch(name: str, params: Any, X: Any, Y: Any) -> dict[str, Any]:
    params, X, Y = _check_params(name, params), _array(name, "X", X), _array(name, "Y", Y)
    if X.ndim != 2 or X.shape[1:] != params.W.shape[1:]:
        raise ValueError(
            f"{name}: expected X of shape [B, {params.W.shape[1]}] to match params.W of shape {params.W.shape}, "
            f"got {X.shape}. One row is one example."
        )
    if Y.shape != X.shape[:1]:
        raise ValueError(
            f"{name}: expected Y of shape {X.shape[:1]} to match X of shape {X.shape}, got {Y.shape}. "
            "Pass one sign for each row of X."
        )
    return {"params": params, "X": X, "Y": Y}


def _check_mean(name: str, params: Any, X: Any, Y: Any, V: Any = _ABSENT) -> dict[str, Any]:
    checked = _check_batch(name, params, X, Y)
    params, X = checked["params"], checked["X"]
    if X.shape[0] == 0:
        raise ValueError(
            f"{name}: expected at least one example, got X of shape {X.shape}. An empty mean is undefined."
        )
    if V is _ABSENT:
        return checked
    V = _check_params(name, V, "V")
    if V.W.shape != params.W.shape:
        raise ValueError(
            f"{name}: expected V.W of shape {params.W.shape} to match params.W, got {V.W.shape}. "
            "A direction has the shapes of the parameters."
        )
    return checked | {"V": V}
