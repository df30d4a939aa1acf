"""The backend ``tensorrt``: the plans of a bundle on TensorRT or TensorRT for RTX."""

from __future__ import annotations

from runtime.backends.cuda.device import require_no_threads
from runtime.backends.cuda.pycuda import PyCudaDevice
from runtime.backends.tensorrt.answering import EngineBackend
from runtime.backends.tensorrt.loader import Loader
from runtime.backends.tensorrt.pixels import open_resize
from runtime.bundle.engines import Plans
from runtime.bundle.reader import Bundle


class TensorRTBackend(EngineBackend):
    """The plans of a bundle on the first GPU.

    Args:
        bundle: what to run.
        threads: must be None.
        plans: the plans to run, instead of those that the manifest has for this GPU: so a plan can be tried before it
            is registered.

    Raises:
        OptionError: ``threads`` was given.
        BackendError: a package or the plugin library is missing, or a plan was built by another TensorRT, for another
            GPU, with another plugin or from another graph; with the command that builds it again.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, plans: Plans | None = None) -> None:
        require_no_threads("tensorrt", threads)
        device = PyCudaDevice()
        loader = Loader(bundle, device, plans)
        super().__init__(device, loader.decoder(), loader.vision, open_resize, loader.description, loader.length_limit)
