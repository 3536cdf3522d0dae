"""The name that an error begins with: that of the public function which was called."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_NOBODY = "jaxgrad"
_CALL: ContextVar[str] = ContextVar("call", default=_NOBODY)


@contextmanager
def naming(call: str, unless_inside: bool = False) -> Iterator[None]:
    """As a decorator of a public function, or around what it does: errors inside begin with this name.

    Args:
        unless_inside: whether another public function that is running gives its name in place of this one.
    """
    token = _CALL.set(called() if unless_inside and called() != _NOBODY else call)
    try:
        yield
    finally:
        _CALL.reset(token)


def called() -> str:
    """The name of the innermost public function that is running."""
    return _CALL.get()
