"""``python -m export.engine``: TensorRT plans of a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime.bundle.targets import TARGETS, Target
from runtime.console.console import Console
from runtime.console.files import require_output
from runtime.console.run import make_parser, need, run
from runtime.errors import BackendError, OptionError

_DESCRIPTION = """\
Builds TensorRT engines from a bf16 or fp16 bundle: one plan of the decoder, with a profile for prefill and one
for decode, and one of the vision graph. Both go into the bundle's engines/, and its manifest says what they were
built from and for.

examples:
  python -m export.engine --bundle bundle/ --target trt                 # on the device: for the GPU at hand
  python -m export.engine --bundle bundle/ --target trt10.3             # the same on JetPack 6
  python -m export.engine --bundle bundle/ --target trt-rtx --sm 89     # TensorRT for RTX, on any machine
  python -m export.engine --bundle bundle/ --target trt --sm 87 --print-trtexec > build.sh    # for another device
  python -m export.engine --bundle bundle/ --check                      # on the device: engines built elsewhere

On the GPU that it is for, a new engine first repeats the bundle's recorded prompt. One that disagrees with ONNX
Runtime is not registered. An interrupted or failed build leaves nothing behind."""

_TARGET_HELP = (
    "trt: TensorRT 10.15 or later. trt10.3: TensorRT 10.3 or later, as JetPack 6 has it; newer operators of the graphs "
    "are replaced by older ones. trt-rtx: TensorRT for RTX"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, by default this process's, and builds, prints, registers or checks."""
    parser = make_parser("export.engine", _DESCRIPTION)
    _add_options(parser)
    arguments = parser.parse_args(argv)

    need("onnx", "onnx_ir")
    from export.engines import options as checked
    from export.engines.build import build, register
    from export.engines.plan import plans
    from export.engines.trtexec import script, write_graphs
    from runtime.backends.cuda.driver import find_device
    from runtime.bundle.reader import Bundle

    console = Console()
    if arguments.check:
        _check(arguments, console)
        return
    prints = arguments.print_trtexec or arguments.write_onnx is not None
    builds = not prints and not arguments.register
    target = _target(arguments, prints, builds)
    bundle = Bundle(arguments.bundle)
    checked.check_bundle(bundle.manifest)
    max_length = checked.check_lengths(bundle.manifest, arguments.max_length, arguments.max_batch)
    if builds:
        target.require()
    device = find_device()
    capability = checked.choose_capability(target, arguments.sm, device.capability if device else None, builds)
    options = checked.Options(
        target,
        capability,
        max_length,
        arguments.max_batch,
        _plugin(arguments, capability, needed=not prints),
        (arguments.timing_cache or checked.default_timing_cache(capability)) if target.timing_cache else None,
        arguments.overwrite,
    )
    if builds:
        build(bundle, options, device, console)
    elif arguments.register:
        register(bundle, options, arguments.register, device, console)
    else:
        planned = plans(bundle, options)
        if arguments.write_onnx is not None:
            write_graphs(bundle, planned, arguments.write_onnx, arguments.overwrite)
            console.say(f"{arguments.write_onnx}: the graphs of both plans, with links to their weights")
        if arguments.print_trtexec:
            console.write(script(bundle, options, planned, arguments.write_onnx) + "\n")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bundle", required=True, metavar="BUNDLE", help="the bundle to build for")
    add("--target", choices=tuple(TARGETS), help=_TARGET_HELP)
    add("--sm", type=int, metavar="NN", help="compute capability to build for, 89 for 8.9 (default: the GPU at hand)")
    add("--max-length", type=int, metavar="N", help="tokens that the caches hold; the bundle's own limit by default")
    add("--max-batch", type=int, default=1, metavar="N", help="conversations computed at once (default 1)")
    add("--plugin", type=Path, metavar="PATH", help="the plugin library (default: the one that monoedge plugin built)")
    add("--timing-cache", type=Path, metavar="FILE", help="where TensorRT keeps its measurements for the next build")
    add("--overwrite", action="store_true", help="replace plans and files that exist")
    add = parser.add_argument_group("instead of building").add_argument
    add("--print-trtexec", action="store_true", help="print shell commands that build with trtexec, for another device")
    add("--write-onnx", type=Path, metavar="FOLDER", help="write the graphs that trtexec takes")
    add("--register", type=Path, nargs="+", metavar="PLAN", help="enter plans that trtexec built in the manifest")
    add("--check", action="store_true", help="compare the registered engines with what ONNX Runtime answered")


def _target(arguments: argparse.Namespace, prints: bool, builds: bool) -> Target:
    if arguments.target is None:
        raise OptionError(f"name the TensorRT to build for with --target: {', '.join(TARGETS)}")
    target = TARGETS[arguments.target]
    if prints and arguments.register:
        raise OptionError("--register takes plans that are built already: leave out --print-trtexec and --write-onnx")
    if prints and target.capabilities:
        raise OptionError(
            f"trtexec is TensorRT's; {target.title} builds on any machine: leave out --print-trtexec and --write-onnx"
        )
    if arguments.timing_cache is not None and not (builds and target.timing_cache):
        raise OptionError("--timing-cache is for builds with --target trt; TensorRT for RTX measures nothing")
    if arguments.timing_cache is not None:
        require_output(arguments.timing_cache, "--timing-cache")
    return target


def _plugin(arguments: argparse.Namespace, capability: int, needed: bool) -> Path | None:
    """Finds the plugin library with code for a GPU; None where it is neither named, nor needed, nor there."""
    from runtime.backends.plugin_library import plugin_library, require_code

    named: Path | None = arguments.plugin
    if named is not None:
        if not named.is_file():
            raise BackendError(f"--plugin {named}: no such file")
        require_code(named.absolute(), capability)
        return named.absolute()
    try:
        library = plugin_library()
        require_code(library, capability)
        return library
    except BackendError:
        if needed:
            raise
        return None


def _check(arguments: argparse.Namespace, console: Console) -> None:
    from export.engines.verify import check
    from runtime.backends.cuda.driver import find_device
    from runtime.bundle.reader import Bundle

    if arguments.register or arguments.print_trtexec or arguments.write_onnx is not None:
        raise OptionError("--check is for registered engines: leave out --register, --print-trtexec and --write-onnx")
    bundle, device = Bundle(arguments.bundle), find_device()
    if device is None:
        raise BackendError("there is no GPU here: run this on the device that the engines are for")
    check(bundle, arguments.target, _plugin(arguments, device.capability, needed=True), device, console)


if __name__ == "__main__":
    run(main)
