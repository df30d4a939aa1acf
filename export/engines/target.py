"""What plans are built with: TensorRT, and TensorRT for RTX."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

from runtime.errors import BackendError, OptionError
from runtime.packages import install_command


@dataclass(frozen=True)
class Target:
    """One builder of plans.

    Attributes:
        name: as ``--target`` and the names of plans have it.
        title: as people call it.
        module: the Python module.
        remedy: what to do where the module is not installed.
        tag: the first bytes of its plans.
        capabilities: compute capabilities that can be built for on any machine; empty where the GPU must be there.
        timing_cache: whether a build keeps what it measured for the next one.
        needs: which releases have the operators of its graphs.
        parser: what the ONNX parser of the first of them knows, a file of ``export/engines/parsers``; graphs are made
            portable for it. None where graphs stay as they are.
        link: the name that its ONNX parser opens its own library by, and the file that its wheel has for it.
    """

    name: str
    title: str
    module: str
    remedy: str
    tag: bytes
    needs: str
    capabilities: tuple[int, ...] = ()
    timing_cache: bool = False
    parser: str | None = None
    link: tuple[str, str] | None = None


_TRT = Target(
    name="trt",
    title="TensorRT",
    module="tensorrt",
    remedy="on Jetson it comes with JetPack (sudo apt install nvidia-jetpack; a virtual environment sees it with "
    "--system-site-packages), elsewhere: pip install tensorrt",
    tag=b"ftrt",
    needs="10.15 and later have all that bundles use; from 10.3 on there is --target trt10.3",
    timing_cache=True,
)
PORTABLE_TARGET = "trt10.3"
"""Which ``export.onnx`` knows too."""
_TRT_10_3 = replace(_TRT, name=PORTABLE_TARGET, needs="10.3 and later have all of it", parser="trt10.3.json")
_TRT_RTX = Target(
    name="trt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    remedy=f"this installs it: {install_command('tensorrt-rtx-cu13')}",
    tag=b"vtrt",
    needs="1.7.1 has all that bundles use",
    capabilities=(75, 80, 86, 89, 120, 121),
    link=("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"),
)
TARGETS = {target.name: target for target in (_TRT, _TRT_10_3, _TRT_RTX)}


def require_module(target: Target) -> None:
    """Checks that the target's module is installed, without importing it.

    Raises:
        BackendError: it is not, with what to do.
    """
    if importlib.util.find_spec(target.module) is None:
        raise BackendError(f"{target.module} is not installed; {target.remedy}")


def choose_capability(target: Target, named: int | None, present: int | None, build: bool = True) -> int:
    """The compute capability to build for, as 89 for 8.9.

    Args:
        target: what builds.
        named: by ``--sm``, if it was.
        present: that of the GPU in this machine, if there is one.
        build: False where nothing is built here: only names are made.

    Raises:
        OptionError: none is known, or one that cannot be built for.
        BackendError: the GPU that it takes is not here.
    """
    chosen = present if named is None else named
    known = ", ".join(map(str, target.capabilities))
    if target.capabilities:
        if chosen is None:
            raise OptionError(f"there is no GPU here: name the one to build for with --sm, one of {known}")
        if chosen not in target.capabilities:
            raise OptionError(f"{target.title} does not build for SM {chosen}, it knows --sm {known}")
        return chosen
    if build and present is None:
        raise BackendError(
            "TensorRT measures its kernels on the GPU that it builds for, and there is none here: run this on the "
            "device, print the commands for it with --print-trtexec, or build for an RTX GPU: --target trt-rtx --sm NN"
        )
    if build and chosen != present:
        raise OptionError(f"TensorRT builds for the GPU at hand, SM {present}: leave out --sm {chosen}")
    if chosen is None:
        raise OptionError(
            "there is no GPU here: name the one of the device with --sm, as 87 for Orin, 89 for Ada or 110 for Thor"
        )
    if chosen < 10:
        raise OptionError(f"--sm is a compute capability without its dot, as 87 for Orin's 8.7, got {chosen}")
    return chosen
