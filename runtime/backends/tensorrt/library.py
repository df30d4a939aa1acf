"""TensorRT's Python module with its log and our plugins, for whoever builds plans and whoever runs them.

TensorRT for RTX has a module of its own with the same names. An error becomes one line with what TensorRT logged.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from runtime.backends.plugin_library import BUILD_COMMAND
from runtime.bundle.targets import Target
from runtime.errors import BackendError

# TensorRT's module is known when it is chosen, so that everything of it is Any here.
# ruff: noqa: ANN401

NAMESPACE = "monoedge"
"""The namespace of our plugins."""

_REGISTERING = threading.Lock()
"""Held while a library is registered: TensorRT refuses plugins that are there already."""


class TensorRT:
    """One TensorRT of this process.

    Args:
        target: which.
        hear: called with every error that TensorRT logs, from whichever thread.

    Raises:
        BackendError: it cannot be imported.
    """

    def __init__(self, target: Target, hear: Callable[[str], object] | None = None) -> None:
        try:
            self.trt: Any = importlib.import_module(target.module)
        except ImportError as error:
            raise BackendError(f"{target.module} cannot be imported: {error}; {target.remedy}") from None
        self.title, self.version = target.title, str(self.trt.__version__)
        self.logger = _logger(self.trt)
        if hear is not None:
            self.logger.hear = hear

    def load_plugins(self, library: Path, operators: Mapping[str, int]) -> None:
        """Registers our plugins, once a process.

        Args:
            library: the plugin library.
            operators: name and version of the plugins that it should have.

        Raises:
            BackendError: the library cannot be loaded, or does not have these plugins in these versions.
        """
        with _REGISTERING, self.listening():
            here = self._plugins()
            missing = _missing(operators, here)
            if not missing:
                return
            if here:  # which TensorRT lets nobody register again
                raise self.error(
                    f"the plugin library of this process has no {', '.join(missing)}: build it again with: "
                    f"{BUILD_COMMAND}; then start again"
                )
            try:
                loaded = self.trt.get_plugin_registry().load_library(str(library))
            except RuntimeError as error:
                raise self.error(f"cannot load the plugin library {library}", str(error)) from None
            if loaded is None:
                raise self.error(f"cannot load the plugin library {library}")
            if missing := _missing(operators, self._plugins()):
                raise self.error(f"{library} has no {', '.join(missing)}: build it again with: {BUILD_COMMAND}")

    def _plugins(self) -> set[tuple[str, str]]:
        """Returns name and version of our plugins that are registered."""
        # Not by get_creator, which logs an error for what it does not find.
        return {
            (creator.name, creator.plugin_version)
            for creator in self.trt.get_plugin_registry().all_creators
            if getattr(creator, "plugin_namespace", None) == NAMESPACE
        }

    def listening(self) -> AbstractContextManager[None]:
        """Within, ``error`` in this thread knows what TensorRT logged since: to be put around calls that may fail."""
        listening: AbstractContextManager[None] = self.logger.listening()
        return listening

    def error(self, what: str, reason: str = "") -> BackendError:
        """Makes an error of one line: what failed, and ``reason`` or else the first error that TensorRT logged."""
        reason = reason or self.logger.first
        return BackendError(" ".join(f"{self.title} {self.version}: {what}{': ' if reason else ''}{reason}".split()))


def _missing(operators: Mapping[str, int], here: set[tuple[str, str]]) -> list[str]:
    return [
        f"plugin {name} of version {version}" for name, version in operators.items() if (name, str(version)) not in here
    ]


@cache
def _logger(trt: Any) -> Any:
    """Returns the logger of a TensorRT, one for the whole process.

    What belongs to no engine, as what plugins report, TensorRT writes to the first logger that it was given, until all
    that was made with any logger is gone. A logger for each model would be used after the end of the first model.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors of the calls that are going on. TensorRT logs from the caller's thread and from its own."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.hear: Callable[[str], object] = lambda message: None
            # A finalizer may log in the midst of this.
            self._lock = threading.RLock()
            self._calls: dict[int, list[str]] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.hear(message)
                with self._lock:
                    own = self._calls.get(threading.get_ident())
                    # What a thread of TensorRT's own says may be the reason of any call.
                    for errors in self._calls.values() if own is None else (own,):
                        errors.append(message)

        @contextmanager
        def listening(self) -> Iterator[None]:
            thread = threading.get_ident()
            with self._lock:
                outer, self._calls[thread] = self._calls.get(thread), []
            try:
                yield
            finally:
                with self._lock:
                    del self._calls[thread]
                    if outer is not None:
                        self._calls[thread] = outer

        @property
        def first(self) -> str:
            """The first error of this thread's call, which tells most."""
            with self._lock:
                return next(iter(self._calls.get(threading.get_ident(), ())), "")

    return Logger()
