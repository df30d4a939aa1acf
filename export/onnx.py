"""``python -m export.onnx``: a Mono-InternVL checkpoint made into a bundle of ONNX graphs."""

from __future__ import annotations

import sys

if not __package__:  # Run by its path, or imported as onnx by a script that was: this file hides that package.
    print("error: run it as a module: python -m export.onnx, and likewise python -m export.engine", file=sys.stderr)  # noqa: T201
    sys.exit(2)

from collections.abc import Sequence
from pathlib import Path

from export.options import CPU_WEIGHTS, DEFAULT_MAX_LENGTH, TARGETS, ExportOptions
from runtime.bundle.manifest import PRECISIONS
from runtime.console.console import Console
from runtime.console.run import make_parser, need, run

_DESCRIPTION = """\
Makes a bundle from a Mono-InternVL checkpoint: a folder with the ONNX graphs, their weights, the tokenizer
and a manifest, from which "python -m runtime.chat" answers and TensorRT engines are built.

examples:
  python -m export.onnx --ckpt examples/shapes/checkpoint -o bundle/
  python -m export.onnx --ckpt OpenGVLab/Mono-InternVL-2B -o bundle-bf16/ --dtype bf16
  python -m export.onnx --ckpt examples/shapes/checkpoint -o bundle-cpu/ --target cpu --weights int8
  python -m export.onnx --ckpt examples/shapes/checkpoint -o bundle-py310/ --target trt10.3

The checkpoint is never loaded as a whole: tensors are streamed, and memory stays below 2 GB at any size.
An export that fails or is interrupted leaves nothing."""

_TARGET_HELP = """\
what the graphs are for, if not for any runtime. cpu: ONNX Runtime on a CPU, with operators of its own, which are faster
there. trt10.3: older runtimes, such as ONNX Runtime 1.17 to 1.24 (Python 3.10), by operators of opset 20; engines for
TensorRT 10.3 can be built from any bundle: python -m export.engine"""

_WEIGHTS_HELP = """\
with --target cpu, number format of the decoder's matrices: fp32 (the default); int8, a quarter of the size and several
times as fast; int4, 4 bits for the experts and 8 for the rest, smaller and less exact"""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, by default this process's, and exports."""
    parser = make_parser("export.onnx", _DESCRIPTION)
    add = parser.add_argument
    what = "a folder with config.json, *.safetensors and tokenizer.model, or a hub id, which is downloaded"
    add("--ckpt", required=True, metavar="CKPT", help=what)
    add("-o", "--output", required=True, metavar="OUT", type=Path, help="the bundle to make")
    what = "number format: fp32 for CPUs (the default), bf16 for GPUs; fp16 overflows with the released weights"
    add("--dtype", choices=tuple(PRECISIONS), default="fp32", help=what)
    what = f"tokens that a conversation may have, images and answers included (default {DEFAULT_MAX_LENGTH})"
    add("--max-length", type=int, metavar="N", help=what)
    add("--target", choices=TARGETS, help=_TARGET_HELP)
    add("--weights", choices=tuple(CPU_WEIGHTS), help=_WEIGHTS_HELP)
    add("--overwrite", action="store_true", help="replace a bundle that is there already")
    arguments = parser.parse_args(argv)

    options = ExportOptions(
        arguments.dtype, arguments.max_length, arguments.target, arguments.weights, arguments.overwrite
    )
    need("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")

    from export.bundle import export_bundle, least_length
    from export.checkpoint.reader import Checkpoint, locate
    from export.writer import BundleWriter
    from runtime.bundle.engines import next_command
    from runtime.bundle.reader import size_text
    from runtime.records import user_path

    BundleWriter(arguments.output, arguments.overwrite)  # refuses a target that exists before a long download
    folder = locate(arguments.ckpt)
    checkpoint = Checkpoint(folder)
    console = Console()
    console.say(
        f"{arguments.ckpt}: Mono-InternVL {checkpoint.config.version}, {checkpoint.config.num_hidden_layers} layers, "
        f"hidden {checkpoint.config.hidden_size}, {size_text(checkpoint.source_bytes)}"
    )
    least, length = least_length(checkpoint), options.length(checkpoint.config.max_position_embeddings)
    if not (pictures := length >= least):
        console.say(f"--max-length {length} is for text alone: a question about a picture needs {least} at least")
    name = folder.resolve().name if folder == user_path(arguments.ckpt) else arguments.ckpt
    manifest = export_bundle(checkpoint, name, arguments.output, options, console)
    total = sum(record.size for record in manifest.files.values())
    console.say(
        f"{arguments.output}: {size_text(total)}, conversations of up to {manifest.model.max_length} tokens; try\n"
        f"  {next_command(manifest, arguments.output, pictures)}"
    )


if __name__ == "__main__":
    run(main)
