"""The name that an error message begins with: that of the public function that the user called."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_NO_CALL = "jaxgrad"
_CALL: ContextVar[str] = ContextVar("call", default=_NO_CALL)


@contextmanager
def naming(call: str, unless_inside: bool = False) -> Iterator[None]:
    """Let error messages begin with this name. It decorates a public function, or is a context manager.

    Args:
        call: the name of the public function.
        unless_inside: True keeps the name of the public function that is already running, if there is one.
    """
    token = _CALL.set(caller() if unless_inside and caller() != _NO_CALL else call)
    try:
        yield
    finally:
        _CALL.reset(token)


def caller() -> str:
    """The name of the innermost public function that is running."""
    return _CALL.get()
