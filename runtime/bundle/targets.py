"""The TensorRTs that build plans and run them: TensorRT, and TensorRT for RTX. Each fact about them stands here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.packages import install_command


@dataclass(frozen=True)
class Target:
    """One way to build plans, and what runs them.

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
"""By name. Where several could run a bundle, the first does."""
