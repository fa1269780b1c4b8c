"""Work in the background."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class _Failure:
    problem: BaseException


_END = object()


def ahead(items: Iterator[Item], size: int) -> Iterator[Item]:
    """Goes through an iterator in a thread of its own, at most `size` items ahead of whoever takes them.

    What the iterator raises is raised here, after what came before it. When this generator is closed, the iterator is
    closed too, and the thread has ended.
    """
    found: queue.Queue[Any] = queue.Queue(size)
    closed = threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                found.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put(item):
                        return
            put(_END)
        except BaseException as problem:
            put(_Failure(problem))

    thread = threading.Thread(target=work, daemon=True, name=f"bertjax-{getattr(items, '__name__', 'stage')}")
    thread.start()
    try:
        while (item := found.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.problem
            yield item
    finally:
        closed.set()
        thread.join()
