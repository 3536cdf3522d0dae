"""A progress bar over a loop."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], total: int | None, done: int = 0, progress: bool = True) -> Iterator[T]:
    """The items, with a bar of how many of `total` there were, of which `done` before; needs rich if `progress`."""
    if not progress:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    with Progress("batches", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("batches", total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)
