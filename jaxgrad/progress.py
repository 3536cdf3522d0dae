"""A progress bar over a loop."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], total: int | None, done: int = 0, progress: bool = True) -> Iterator[T]:
    """Yield the items; if `progress`, a bar (needs rich) counts them up to `total`, starting from `done`."""
    if not progress:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    with Progress("batches", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("batches", total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)
