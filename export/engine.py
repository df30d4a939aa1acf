"""``python -m export.engine``: TensorRT plans of a bundle."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.bundle.targets import TARGETS
from runtime.console.console import Console
from runtime.console.run import make_parser, need, run

_DESCRIPTION = """\
Builds TensorRT plans of a bf16 or fp16 bundle: one for the decoder, with a profile for prefill and one for
decode, and one for the vision graph. They go into the bundle's engines/, and its manifest says what they were
built of.

examples:
  python -m export.engine --bundle bundle/ --target trt                 # on the device: for the GPU at hand
  python -m export.engine --bundle bundle/ --target trt10.3             # the same on JetPack 6
  python -m export.engine --bundle bundle/ --target trt-rtx --sm 89     # TensorRT for RTX, on any machine
  python -m export.engine --bundle bundle/ --target trt --sm 87 --print-trtexec
  python -m export.engine --bundle bundle/ --check                      # on the device: engines built elsewhere

On the GPU that it is for, a new engine first answers the bundle's recorded prompt; one that disagrees with ONNX
Runtime is not registered. Nothing is kept of a build that was interrupted or failed."""


_TARGET_HELP = (
    "TensorRT from 10.15 on; from 10.3 on, which JetPack 6 has, with the newer operators of the graphs taken apart; or "
    "TensorRT for RTX"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, by default this process's, and builds, prints or registers."""
    parser = make_parser("export.engine", _DESCRIPTION)
    _add_options(parser)
    arguments = parser.parse_args(argv)

    need("onnx", "onnx_ir")
    from export.engines import build as engine_build
    from export.engines import trtexec as engine_trtexec
    from export.engines.plan import Options, check_bundle, check_chip, check_lengths, plans
    from export.engines.target import choose_capability, require_module
    from runtime.backends.cuda.driver import find_device
    from runtime.bundle.reader import Bundle
    from runtime.errors import BackendError, OptionError

    if arguments.check:
        _check(arguments)
        return
    if arguments.target is None:
        raise OptionError(f"name what is to build with --target: {', '.join(TARGETS)}")
    target = TARGETS[arguments.target]
    prints = arguments.print_trtexec or arguments.write_onnx is not None
    builds = not prints and not arguments.register
    if prints and arguments.register:
        raise OptionError("--register takes plans that are there: leave out --print-trtexec and --write-onnx")
    if prints and target.capabilities:
        raise OptionError(f"trtexec is TensorRT's; {target.title} builds on any machine: leave out --print-trtexec")
    if arguments.timing_cache is not None and not (builds and target.timing_cache):
        raise OptionError("--timing-cache is for builds with --target trt; TensorRT for RTX measures nothing")
    bundle = Bundle(arguments.bundle)
    check_bundle(bundle.manifest)
    max_length = check_lengths(bundle.manifest, arguments.max_length, arguments.max_batch)
    if builds:
        require_module(target)
    device = find_device()
    capability = choose_capability(target, arguments.sm, device.capability if device else None, builds)
    check_chip(bundle.manifest, capability)
    options = Options(target, capability, max_length, arguments.max_batch)

    console = Console()
    if prints:
        try:
            plugin: Path | None = engine_build.find_plugin(arguments.plugin)
        except BackendError:
            if arguments.plugin is not None:
                raise
            plugin = None
        made = plans(bundle, options)
        if arguments.write_onnx is not None:
            engine_trtexec.write_graphs(bundle, made, arguments.write_onnx, arguments.overwrite)
            console.say(f"{arguments.write_onnx}: the graphs of both plans, with links to their weights")
        if arguments.print_trtexec:
            console.write(engine_trtexec.script(bundle, options, made, plugin, arguments.write_onnx) + "\n")
        return
    options = replace(
        options,
        plugin=engine_build.find_plugin(arguments.plugin),
        timing_cache=(arguments.timing_cache or _timing_cache(capability)) if target.timing_cache else None,
        overwrite=arguments.overwrite,
    )
    if arguments.register:
        engine_build.register(bundle, options, arguments.register, device, console)
        return
    engine_build.build(bundle, options, plans(bundle, options), device, console)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bundle", required=True, metavar="BUNDLE", help="the bundle to build for")
    add("--target", choices=tuple(TARGETS), help=_TARGET_HELP)
    add("--sm", type=int, metavar="NN", help="compute capability to build for, as 89 (default: the GPU at hand)")
    add("--max-length", type=int, metavar="N", help="tokens that caches hold (default, and most: the bundle's)")
    add("--max-batch", type=int, default=1, metavar="N", help="conversations computed at once (default 1)")
    add("--plugin", type=Path, metavar="PATH", help="the plugin library (default: the one that cmake built)")
    add("--timing-cache", type=Path, metavar="FILE", help="what TensorRT measured, kept for its next build")
    add("--overwrite", action="store_true", help="replace plans that are there already")
    add("--print-trtexec", action="store_true", help="build nothing, print the commands that do it with trtexec")
    add("--write-onnx", type=Path, metavar="FOLDER", help="build nothing, write the graphs that trtexec takes")
    add("--register", type=Path, nargs="+", metavar="PLAN", help="take plans that trtexec built into the bundle")
    add("--check", action="store_true", help="build nothing, compare the registered engines with what was recorded")


def _check(arguments: argparse.Namespace) -> None:
    from export.engines import build as engine_build
    from export.engines import verify as engine_verify
    from runtime.backends.cuda.driver import find_device
    from runtime.bundle.reader import Bundle
    from runtime.errors import BackendError, OptionError

    if arguments.register or arguments.print_trtexec or arguments.write_onnx is not None:
        raise OptionError("--check is for engines that are registered: leave out what builds, prints or registers")
    bundle, device = Bundle(arguments.bundle), find_device()
    if device is None:
        raise BackendError("there is no GPU here: run this on the device that the engines are for")
    engine_verify.check(bundle, arguments.target, engine_build.find_plugin(arguments.plugin), device, Console())


def _timing_cache(capability: int) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / f"monoedge/trt-sm{capability}.timing"


if __name__ == "__main__":
    run(main)
