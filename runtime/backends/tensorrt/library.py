"""TensorRT's Python module with its log and our plugins, for whoever builds plans and whoever runs them.

TensorRT for RTX has a module of its own with the same names. An error becomes one line with what TensorRT logged.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.backends.plugin_library import BUILD_COMMAND
from runtime.bundle.targets import Target
from runtime.errors import BackendError

# TensorRT's module is known when it is chosen, so that everything of it is Any here.
# ruff: noqa: ANN401

NAMESPACE = "monoedge"
"""The namespace of our plugins."""


class TensorRT:
    """One TensorRT of this process.

    Args:
        target: which.
        hear: called with every error that TensorRT logs.

    Raises:
        BackendError: it cannot be imported.
    """

    def __init__(self, target: Target, hear: Callable[[str], object] = lambda message: None) -> None:
        try:
            self.trt: Any = importlib.import_module(target.module)
        except ImportError as error:
            raise BackendError(f"{target.module} cannot be imported: {error}; {target.remedy}") from None
        self.title, self.version = target.title, str(self.trt.__version__)
        self.logger = _logger(self.trt, hear)

    def load_plugins(self, library: Path, operators: Mapping[str, int]) -> None:
        """Registers our plugins, once a process.

        Args:
            library: the plugin library.
            operators: name and version of the plugins that it should have.

        Raises:
            BackendError: the library cannot be loaded, or does not have these plugins in these versions.
        """
        if not self._missing_plugins(operators):
            return
        try:
            loaded = self.trt.get_plugin_registry().load_library(str(library))
        except RuntimeError as error:
            raise self.error(f"cannot load the plugin library {library}", str(error)) from None
        if loaded is None:
            raise self.error(f"cannot load the plugin library {library}")
        if missing := self._missing_plugins(operators):
            raise self.error(f"{library} has no {', '.join(missing)}: build it again with: {BUILD_COMMAND}")

    def _missing_plugins(self, operators: Mapping[str, int]) -> list[str]:
        registry = self.trt.get_plugin_registry()
        return [
            f"plugin {name} of version {version}"
            for name, version in operators.items()
            if registry.get_creator(name, str(version), NAMESPACE) is None
        ]

    def error(self, what: str, reason: str = "") -> BackendError:
        """Makes an error of one line: what failed, and ``reason`` or else the first error that TensorRT logged."""
        logged = self.logger.take()
        reason = reason or logged
        return BackendError(" ".join(f"{self.title} {self.version}: {what}{': ' if reason else ''}{reason}".split()))


def _logger(trt: Any, hear: Callable[[str], object]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the first error, which tells most, until it is taken."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                hear(message)
                self.first = self.first or message

        def take(self) -> str:
            first, self.first = self.first, ""
            return first

    return Logger()
