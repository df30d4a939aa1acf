"""Progress bars over things and over bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.console.run import bar_options


def bar(name: str, total: int, **options: Any) -> Any:  # noqa: ANN401 - tqdm has no types
    """tqdm's bar on stderr, with further options of tqdm."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, **bar_options(), **options)


def progress(name: str, total: int) -> Callable[[int], object]:
    """A bar as a function to be called with how many more are done; it closes with the last."""
    shown = bar(name, total)

    def more(count: int) -> None:
        shown.update(count)
        if shown.n >= total:
            shown.close()

    return more
