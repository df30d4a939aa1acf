"""Work in other threads, and what they collect."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any


def in_threads(*works: Callable[[], Any]) -> None:
    """Does each in a thread of its own, all at once, and collects garbage there; raises what one of them raised."""
    failures: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
            gc.collect()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
