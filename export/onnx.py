"""``python -m export.onnx``: a Mono-InternVL checkpoint made into a bundle of ONNX graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.cpu_target import CPU_TARGET, CPU_WEIGHTS, FP32
from runtime.bundle.manifest import PRECISIONS
from runtime.bundle.targets import PORTABLE_TARGET
from runtime.console.console import Console
from runtime.console.run import make_parser, need, run
from runtime.errors import OptionError

_DESCRIPTION = """\
Makes a bundle from a Mono-InternVL checkpoint: a folder with the ONNX graphs, their weights, the tokenizer
and a manifest, from which "python -m runtime.chat" answers and TensorRT engines are built.

examples:
  python -m export.onnx --ckpt examples/shapes/checkpoint -o bundle/
  python -m export.onnx --ckpt OpenGVLab/Mono-InternVL-2B -o bundle-bf16/ --dtype bf16
  python -m export.onnx --ckpt examples/shapes/checkpoint -o bundle-cpu/ --target cpu --weights int8
  python -m export.onnx --ckpt examples/shapes/checkpoint -o bundle-py310/ --target trt10.3

The checkpoint is never loaded as a whole: tensors are streamed, and memory stays below 2 GB at any size.
Nothing is kept of an export that was interrupted or failed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, by default this process's, and exports."""
    parser = make_parser("export.onnx", _DESCRIPTION)
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="CKPT",
        help="a folder with config.json, *.safetensors and tokenizer.model, or a hub id, which is downloaded",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", type=Path, help="the bundle to make")
    parser.add_argument(
        "--dtype",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="number format of weights and activations: fp32 for CPUs (the default), bf16 for GPUs; fp16 overflows "
        "on the released weights",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens that a conversation may have, image and answers included (default 8192)",
    )
    parser.add_argument(
        "--target",
        choices=(CPU_TARGET, PORTABLE_TARGET),
        help="cpu: a decoder for ONNX Runtime on a CPU alone, with its own operators, faster there. trt10.3: graphs of "
        "older operators only, opset 20, which ONNX Runtime before 1.25 takes too (Python 3.10); engines for TensorRT "
        "10.3 need no such bundle: python -m export.engine makes these graphs of any",
    )
    parser.add_argument(
        "--weights",
        choices=CPU_WEIGHTS,
        help="with --target cpu, the decoder's matrices: fp32 (the default); int8, a quarter of the size and several "
        "times as fast; int4, the experts in 4 bits and the rest in 8, smaller still and less exact",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there already")
    arguments = parser.parse_args(argv)

    if arguments.weights is not None and arguments.target != CPU_TARGET:
        raise OptionError(f"--weights {arguments.weights} is for --target cpu: add that, or leave it out")
    if arguments.target == CPU_TARGET and arguments.dtype != "fp32":
        raise OptionError(f"a CPU computes in fp32 beside its weights: leave out --dtype {arguments.dtype}")
    need("torch", "onnx", "onnxscript", "safetensors", "huggingface_hub")

    from export.bundle import export_bundle
    from export.checkpoint.reader import Checkpoint, locate
    from export.passes.nodes import OPSET as PORTABLE_OPSET
    from export.writer import BundleWriter
    from plugins_trt.function import OPSET
    from runtime.bundle.reader import size_text

    BundleWriter(arguments.output, arguments.overwrite)  # refuses a target that exists before a long download
    folder = locate(arguments.ckpt)
    checkpoint = Checkpoint(folder)
    console = Console()
    console.say(
        f"{arguments.ckpt}: Mono-InternVL {checkpoint.config.version}, {checkpoint.config.num_hidden_layers} layers, "
        f"hidden {checkpoint.config.hidden_size}, {size_text(checkpoint.source_bytes)}"
    )
    manifest = export_bundle(
        checkpoint,
        name=folder.resolve().name if folder == Path(arguments.ckpt).expanduser() else arguments.ckpt,
        target=arguments.output,
        precision=arguments.dtype,
        max_length=arguments.max_length,
        overwrite=arguments.overwrite,
        opset=PORTABLE_OPSET if arguments.target == PORTABLE_TARGET else OPSET,
        cpu_weights=(arguments.weights or FP32) if arguments.target == CPU_TARGET else None,
        console=console,
    )
    total = sum(record.size for record in manifest.files.values())
    console.say(
        f"{arguments.output}: {size_text(total)}, conversations of up to {manifest.model.max_length} tokens; try\n"
        f'  python -m runtime.chat --bundle {arguments.output} --image PHOTO "What is in the picture?"'
    )


if __name__ == "__main__":
    run(main)
