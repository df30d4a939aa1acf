"""A loaded bundle: everything that the sessions of one app share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from runtime.backends import Backend, FrameBackend, open_backend
from runtime.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError, ImageError, NotCopied, PromptError
from runtime.images.frames import DeviceImage, frame_size, is_device_frame
from runtime.images.load import OpenedImage
from runtime.images.pixels import HostPixels, Pixels
from runtime.images.source import ImageInput
from runtime.options import require_whole
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

L = TypeVar("L", bound="LoadedBundle")

BUNDLE_VARIABLE = "MONOEDGE_BUNDLE"
"""The environment variable that names the default bundle."""

_MOST_THREADS = 256

Image: TypeAlias = ImageInput | DeviceImage
Images: TypeAlias = Image | Sequence[Image] | None
"""What a question may be about: one image, several in a list or tuple, or none."""

Picture: TypeAlias = OpenedImage | DeviceImage
"""An image whose size is known, of which nothing is computed yet."""


class LoadedBundle(NotCopied):
    """A bundle with the backend that runs it. May be used from several threads.

    Args:
        bundle: an opened bundle.
        backend: what computes.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.max_length = backend.max_length
        self.image_processor = bundle.manifest.image
        self.tokenizer = Tokenizer.from_file(bundle.path(TOKENIZER))
        self.template = ChatTemplate.from_file(bundle.path(CHAT_TEMPLATE))
        if self.tokenizer.vocab_size != bundle.manifest.model.vocab_size:
            sizes = f"{self.tokenizer.vocab_size} tokens, the model {bundle.manifest.model.vocab_size}"
            raise BundleError(f"{bundle.folder}: the tokenizer has {sizes}: export the bundle again")
        self.stop_ids = frozenset(map(self.tokenizer.id_of, self.template.stop_tokens))
        self._embeddings = bundle.embeddings()

    @classmethod
    def load(
        cls: type[L],
        bundle: str | Path | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
        verify: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> L:
        """Loads a bundle once for many sessions.

        Args:
            bundle: its folder; by default the environment variable ``MONOEDGE_BUNDLE`` names it.
            backend: what computes, one of ``runtime.backends.NAMES``; ``"onnxruntime"``, on the CPU, is the default.
            threads: CPU threads to compute with, where the CPU computes; None lets the backend choose.
            verify: compare the SHA-256 of every file with the manifest, which reads all of it.
            progress: with ``verify``, called with the number of bytes just read.

        Raises:
            BundleError: no bundle, or one that is incomplete, altered or of another version.
            BackendError: the backend is not installed, or cannot run this bundle.
            OptionError: a bad option.
        """
        folder = bundle if bundle is not None else os.environ.get(BUNDLE_VARIABLE)
        if not folder:
            raise BundleError(f'no bundle given: pass bundle="FOLDER" (--bundle FOLDER), or set {BUNDLE_VARIABLE}')
        # Thousands of threads would take the machine minutes to start, deaf to every signal.
        require_whole("threads", threads, 1, max(_MOST_THREADS, os.cpu_count() or 1))
        opened = Bundle(folder, verify, progress)
        return cls(opened, open_backend(backend, opened, threads))

    def read(self, images: Images, *, as_stored: bool = False, max_pixels: int | None = None) -> list[Picture]:
        """Opens one image, several or none; ``as_stored`` and ``max_pixels`` as ``load_image`` takes them.

        Raises:
            ImageError: not an image; a collection whose order means nothing; or a picture in the memory of a GPU that
                the backend does not compute on.
        """
        if isinstance(images, (set, frozenset, dict)):
            raise ImageError(f"expected an image or a list of images, got a {type(images).__name__}")
        several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        pictures: list[Picture] = []
        for image in several:
            on_device = is_device_frame(image)
            if on_device and not isinstance(self.backend, FrameBackend):
                raise ImageError(
                    "the picture lies in a GPU's memory, which only backend tensorrt takes: copy it to the host first, "
                    "as frame.cpu().numpy() does in torch and frame.get() in CuPy"
                )
            pictures.append(image if on_device else OpenedImage(image, as_stored=as_stored, max_pixels=max_pixels))
        return pictures

    def cut(self, pictures: Sequence[Picture], max_tiles: int | None = None) -> list[Pixels]:
        """Cuts images into tiles; those of a picture in a GPU's memory are made there.

        Raises:
            ImageError: an image cannot be decoded.
            OptionError: ``max_tiles`` out of range.
            PromptError: there are more tiles than the cache has room for; no pixel was computed then.
        """
        sizes = [image.size if isinstance(image, OpenedImage) else frame_size(image) for image in pictures]
        tiles = sum(self.image_processor.fewest_tiles(*size, max_tiles) for size in sizes)
        if (tokens := tiles * self.image_processor.tokens_per_tile) > self.max_length:
            raise PromptError(
                f"the images alone have at least {tokens} tokens, but {self.backend.length_limit}: use fewer images or "
                "fewer tiles (max_tiles)"
            )
        return [self._cut(picture, max_tiles) for picture in pictures]

    def _cut(self, picture: Picture, max_tiles: int | None) -> Pixels:
        if isinstance(picture, OpenedImage):
            return HostPixels(self.image_processor.cut(picture.rgb, max_tiles), self.backend.encode_image)
        assert isinstance(self.backend, FrameBackend)  # noqa: S101 - as read found
        return self.backend.frame_pixels(picture, self.image_processor, max_tiles)

    def pixels(self, image: Image, max_tiles: int | None = None, *, as_stored: bool = False) -> Pixels:
        """Reads an image and cuts it into tiles; raises as ``read`` and ``cut`` do."""
        (pixels,) = self.cut(self.read([image], as_stored=as_stored), max_tiles)
        return pixels

    def embed(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Reads the embeddings of token ids, [n] → [n, hidden], from the file."""
        return self._embeddings[ids]
