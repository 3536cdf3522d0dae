"""The name that an error message begins with: the public function that was called."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_NOBODY = "jaxgrad"
_CALL: ContextVar[str] = ContextVar("call", default=_NOBODY)


@contextmanager
def naming(call: str, unless_inside: bool = False) -> Iterator[None]:
    """Make errors inside begin with this name; use as a decorator of a public function, or as a context manager.

    Args:
        unless_inside: True keeps the name of another public function that is already running, if there is one.
    """
    token = _CALL.set(called() if unless_inside and called() != _NOBODY else call)
    try:
        yield
    finally:
        _CALL.reset(token)


def called() -> str:
    """The name of the innermost public function that is running."""
    return _CALL.get()
