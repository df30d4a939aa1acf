"""TensorRT, or TensorRT for RTX: opens the plans of a bundle that were built for it and for this GPU, or none."""

from __future__ import annotations

from runtime.backends.cuda.pycuda import PyCudaDevice
from runtime.backends.tensorrt.answering import EngineBackend
from runtime.backends.tensorrt.loader import Loader
from runtime.backends.tensorrt.pixels import open_resize
from runtime.bundle.engines import Plans
from runtime.bundle.reader import Bundle
from runtime.errors import OptionError


class TensorRTBackend(EngineBackend):
    """The plans of a bundle on the first GPU.

    Args:
        bundle: what to run.
        threads: must be None; the GPU has no use for it.
        plans: file and record of each graph's plan, instead of those that the manifest has for this GPU. So a plan can
            be tried before it is registered.

    Raises:
        OptionError: ``threads`` was given.
        BackendError: something that it needs is not here, or a plan that was built by another TensorRT, for another
            GPU, with another plugin or of another graph; with the command that builds it again.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, plans: Plans | None = None) -> None:
        if threads is not None:
            raise OptionError(f"threads are of the CPU, and backend tensorrt computes on the GPU: leave out {threads}")
        device = PyCudaDevice()
        loader = Loader(bundle, device, plans)
        super().__init__(device, loader.decoder(), loader.vision, open_resize, loader.description, loader.length_limit)
