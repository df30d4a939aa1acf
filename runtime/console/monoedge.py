"""``monoedge``: one name for all command lines."""

from __future__ import annotations

import importlib
import sys

import runtime
from runtime.console.run import run
from runtime.errors import OptionError

COMMANDS = {
    "export": ("export.onnx", "makes a bundle from a checkpoint"),
    "calibrate": ("calibration.__main__", "makes a bundle whose experts are INT8, and reports what it costs"),
    "plugin": ("plugins_trt.build", "builds the TensorRT plugin library for a GPU"),
    "engine": ("export.engine", "builds TensorRT engines of a bundle"),
    "recording": ("export.recording", "records what ONNX Runtime answers, to compare engines with"),
    "chat": ("runtime.chat.__main__", "answers questions about images"),
    "doctor": ("runtime.doctor.__main__", "says what of this machine answering needs, and whether it is there"),
    "bench": ("runtime.bench.__main__", "measures speed and memory of a bundle"),
}
"""Each command's module, whose ``main`` reads ``sys.argv``, and what it does. Modules are imported when chosen."""

USAGE = "usage: monoedge COMMAND [options]    (monoedge COMMAND --help tells its options)"


def main() -> None:
    """Runs the command that the command line names."""
    run(_main)


def _main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:10}  {about}" for name, (_, about) in COMMANDS.items()]
        print("\n".join([USAGE, "", "commands:", *lines, "", "  --version   says which monoedge this is"]))  # noqa: T201
    elif command == "--version":
        print(f"monoedge {runtime.__version__}")  # noqa: T201
    elif command in COMMANDS:
        sys.argv = [f"monoedge {command}", *rest]
        importlib.import_module(COMMANDS[command][0]).main()
    else:
        raise OptionError(f"there is no command {command!r}, expected one of: {', '.join(COMMANDS)}")
