"""``python -m export.recording``: the recorded set of a bundle, made, and written for polygraphy and trtexec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from runtime.console.console import Console
from runtime.console.files import require_new
from runtime.console.run import make_parser, need, run

_DESCRIPTION = """\
Records what ONNX Runtime makes of a prompt with a picture, computed in float32 from the bundle's own weights, so
that engines can be compared with it. The inputs and outputs go into the bundle's recording/. "python -m
export.onnx" ends with this; the command is for bundles without it. With -o it also writes them for other programs.

examples:
  python -m export.recording --bundle bundle/
  python -m export.recording --bundle bundle/ -o recorded/                      # files, and commands that use them
  python -m export.recording --bundle bundle/ -o recorded/ --max-length 4096    # for an engine of 4096 tokens"""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, by default this process's, and records or writes files."""
    parser = make_parser("export.recording", _DESCRIPTION)
    add = parser.add_argument
    add("--bundle", required=True, metavar="BUNDLE", help="the bundle to record")
    add("--overwrite", action="store_true", help="record again what is there already")
    add("-o", "--output", type=Path, metavar="FOLDER", help="write files for polygraphy and trtexec; print commands")
    add("--max-length", type=int, metavar="N", help="tokens that the caches in those files hold (default: an engine's)")
    arguments = parser.parse_args(argv)

    need("onnx", "ml_dtypes")
    need("onnxruntime")
    from export.recorded import files, make
    from export.recorded import format as form
    from runtime.bundle.manifest import RECORDING
    from runtime.bundle.reader import Bundle
    from runtime.errors import OptionError

    if arguments.max_length is not None and arguments.output is None:
        raise OptionError("--max-length is for the files of -o: name a folder for them")
    bundle = Bundle(arguments.bundle)
    if arguments.output is not None:
        require_new(arguments.output)
        need("polygraphy")
        if bundle.manifest.precision == "bf16":
            need("torch")
    console, reason = Console(), form.why_missing(bundle)
    if reason or arguments.overwrite:
        with console.bar("weights", make.weights_size(bundle), "B") as advance:
            recorded = make.record(bundle, advance)
        make.put(bundle, recorded)
        console.say(f"{bundle.path(RECORDING)}: recorded" + (f", since {reason}" if reason else " again"))
        bundle = Bundle(arguments.bundle)
    elif arguments.output is None:
        console.say(f"{bundle.path(RECORDING)} is up to date; --overwrite records it again")
    if arguments.output is not None:
        recording = form.read(bundle)
        length = files.choose_length(bundle, recording, arguments.max_length)
        files.write(bundle, recording, length, arguments.output, _tensor)
        console.say(f"{arguments.output}: the first recorded call of each graph, with caches of {length} tokens")
        for line in files.commands(bundle, recording, length, arguments.output):
            console.write(line + "\n")


def _tensor(array: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - torch is imported where it is needed
    """Makes a torch tensor, which is how polygraphy knows bfloat16."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    run(main)
