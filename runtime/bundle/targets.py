"""The TensorRTs that build and run plans: what ``export.engine`` and the runtime know of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

from runtime.errors import BackendError
from runtime.packages import install_command


@dataclass(frozen=True)
class Target:
    """One of the TensorRTs.

    Attributes:
        name: as ``--target``, manifests and the names of plans have it.
        title: the product's name.
        module: the Python module.
        remedy: how to install the module.
        tag: the first bytes of its plans.
        needs: which releases have all operators of its graphs.
        capabilities: compute capabilities that it builds for on any machine, of those that the plugin has kernels for;
            empty if only for the GPU at hand.
        timing_cache: whether what a build measured helps the next one.
        parser: lists the operators of the oldest release's ONNX parser, a file of ``export/engines/parsers``; graphs
            are rewritten for it. None where graphs stay as they are.
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

    @property
    def installed(self) -> bool:
        """Whether the module is there; it is not imported."""
        return find_spec(self.module) is not None

    def require(self) -> None:
        """Checks that the module is there.

        Raises:
            BackendError: it is not, with how to install it.
        """
        if not self.installed:
            raise BackendError(f"{self.module} is not installed; {self.remedy}")


PORTABLE_TARGET = "trt10.3"

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
_TRT_10_3 = replace(_TRT, name=PORTABLE_TARGET, needs="10.3 and later have all of it", parser="trt10.3.json")
_TRT_RTX = Target(
    name="trt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    remedy=f"this installs it: {install_command('tensorrt-rtx-cu13')}",
    tag=b"vtrt",
    needs="1.7.1 has all that bundles use",
    capabilities=(80, 86, 89, 120, 121),
    link=("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"),
)
TARGETS = {target.name: target for target in (_TRT, _TRT_10_3, _TRT_RTX)}
"""By name. Where several could run a bundle, the first does."""
