"""Work done ahead of its use, in order, on threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(make: Callable[[Item], Made], items: Iterable[Item], depth: int) -> Iterator[Made]:
    """make(item) for each item, in order; `depth` of them are being made while one is used. No more than that is held.

    For work that waits (reading): threads share one interpreter. An error is raised when its item's turn comes.
    """
    with ThreadPoolExecutor(depth, thread_name_prefix="ahead") as pool:
        coming: deque[Future[Made]] = deque()
        try:
            for item in items:
                coming.append(pool.submit(make, item))
                if len(coming) > depth:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
