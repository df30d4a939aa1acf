"""What builder and runtime ask of TensorRT's Python module alike: a logger, and our plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# TensorRT's module is known when it is chosen, so that everything of it is Any here.
# ruff: noqa: ANN401

NAMESPACE = "monoedge"
"""The namespace of our plugins."""


def make_logger(trt: Any, told: Callable[[str], object]) -> Any:
    """Makes a logger.

    Args:
        trt: TensorRT's module.
        told: called with each error, in TensorRT's words.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                told(message)

    return Logger()


def load_plugins(trt: Any, library: str | Path, operators: Iterable[tuple[str, str]]) -> str | None:
    """Registers our plugins, once a process.

    Args:
        trt: TensorRT's module.
        library: the plugin library.
        operators: name and version of each plugin that is needed.

    Returns:
        None, or what is wrong.
    """
    registry, wanted = trt.get_plugin_registry(), list(operators)

    def missing() -> list[str]:
        return [
            f"plugin {name} of version {version}"
            for name, version in wanted
            if registry.get_creator(name, version, NAMESPACE) is None
        ]

    if not missing():
        return None
    try:
        loaded = registry.load_library(str(library)) is not None
    except RuntimeError as error:
        return f"cannot load the plugin library {library}: {error}"
    if not loaded:
        return f"cannot load the plugin library {library}"
    if left := missing():
        return f"{library} has no {', '.join(left)}: build the library of the monoedge installed here"
    return None
