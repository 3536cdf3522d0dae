"""A progress bar over a loop."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def counted(items: Iterable[T], total: int | None, done: int = 0, progress: bool = True) -> Iterable[T]:
    """The items; with `progress`, a bar (needs rich) counts them from `done` up to `total`."""
    if not progress:
        return items
    from rich.progress import track

    return track(items, "batches", total=total, completed=done)
