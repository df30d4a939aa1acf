"""Backends run the graphs of a bundle. Each is imported only when it is chosen.

A backend knows tensors, not conversations. ``Backend`` and ``Context`` are all that the rest of the runtime sees of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from runtime.errors import OptionError

if TYPE_CHECKING:  # The GPU and the plugin library are looked for where numpy is missing too.
    import numpy as np
    import numpy.typing as npt

    from runtime.bundle.reader import Bundle
    from runtime.images.frames import DeviceImage
    from runtime.images.pixels import Pixels
    from runtime.images.preprocess import ImageProcessor

Array: TypeAlias = "npt.NDArray[Any]"


class Context(Protocol):
    """The caches of one sequence. Not shared between threads."""

    capacity: int
    """Tokens that the caches have room for now."""

    def reserve(self, capacity: int) -> None:
        """Grows the caches to at least ``capacity`` tokens; what they hold stays.

        Raises:
            BackendError: there is not enough memory.
        """

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array | None:
        """Runs tokens ``start`` … ``start + n`` of the sequence and keeps their keys and values.

        Args:
            inputs_embeds: [n, hidden] in the bundle's number format, n from 1 to the backend's ``chunk``;
                ``start + n`` is within ``capacity``.
            visual_mask: [n], true for visual tokens.
            start: how many tokens of the caches are valid before.

        Returns:
            float32 logits of the last token, [vocab], in an array of its own. May be None where that token is visual,
            since no token is chosen after it.
        """


class Backend(Protocol):
    """The graphs of one bundle, ready to run; may be used from several threads at once."""

    description: str
    """What computes, for people: library, version and device."""
    chunk: int
    """Tokens that ``Context.forward`` takes at most; longer prompts come in chunks."""
    max_length: int
    """Tokens that a context can ever hold."""
    length_limit: str
    """What sets ``max_length`` and how to raise it, for people: ``the bundle was exported with --max-length 8192``."""

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        """Takes [tiles, 3, size, size] to [tiles · tokens_per_tile, hidden] in the bundle's number format."""

    def new_context(self) -> Context:
        """Returns empty caches for a new sequence."""


@runtime_checkable
class FrameBackend(Protocol):
    """A backend that takes pictures out of a GPU's memory."""

    def frame_pixels(self, image: DeviceImage, processor: ImageProcessor, max_tiles: int | None) -> Pixels:
        """Returns the picture's tiles. Its memory may be written again after.

        Raises:
            ImageError: the object is not a picture in the GPU's memory.
            OptionError: ``max_tiles`` out of range.
        """


_BACKENDS = {  # module, class
    "onnxruntime": ("runtime.backends.onnxruntime.backend", "OnnxRuntimeBackend"),
    "tensorrt": ("runtime.backends.tensorrt.backend", "TensorRTBackend"),
    "onnxruntime-cuda": ("runtime.backends.onnxruntime.cuda", "CudaProviderBackend"),
}

NAMES, DEFAULT = tuple(_BACKENDS), "onnxruntime"


def open_backend(name: str | None, bundle: Bundle, threads: int | None) -> Backend:
    """Opens a bundle with a backend.

    Args:
        name: one of the backends, or None for the default.
        bundle: what to run.
        threads: CPU threads to compute with; None lets the backend choose.

    Raises:
        OptionError: no backend of that name, or ``threads`` for one on a GPU.
        BackendError: it is not installed, or cannot run this bundle.
    """
    if (name or DEFAULT) not in NAMES:
        raise OptionError(f"backend {name!r} is not known, expected one of: {', '.join(NAMES)}")
    backend: Backend = backend_class(name or DEFAULT)(bundle, threads)
    return backend


def backend_class(name: str) -> Any:  # noqa: ANN401 - classes of several constructors
    """Imports the class of a backend, one of ``NAMES``; raises a ``BackendError`` where it is not installed."""
    module, class_name = _BACKENDS[name]
    return getattr(importlib.import_module(module), class_name)
