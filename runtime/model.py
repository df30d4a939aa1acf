"""A loaded bundle: everything that the sessions of one app share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Backend, FrameBackend, Pixels, open_backend
from runtime.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError, ImageError, OptionError
from runtime.images.frames import DeviceImage, is_device_frame
from runtime.images.preprocess import ImageInput
from runtime.session import Images, Session
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

BUNDLE_VARIABLE = "MONOEDGE_BUNDLE"
"""The environment variable that names the default bundle."""


class Model:
    """A bundle with the backend that runs it. Sessions of one model may run in several threads.

    Args:
        bundle: an opened bundle.
        backend: what computes.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.max_length = backend.max_length
        self.image_processor = bundle.manifest.image
        self.tokenizer = Tokenizer.from_file(bundle.path(TOKENIZER))
        self.template = _read_template(bundle.path(CHAT_TEMPLATE))
        if self.tokenizer.vocab_size != bundle.manifest.model.vocab_size:
            raise BundleError(
                f"{bundle.folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                f"{bundle.manifest.model.vocab_size}: export the bundle again"
            )
        self.stop_ids = frozenset(map(self.tokenizer.id_of, self.template.stop_tokens))
        self._embeddings = bundle.embeddings()

    def session(self, image: Images = None, prompt: str | None = None, **options: Any) -> Session:  # noqa: ANN401
        """A new conversation with this model; takes what ``Session`` takes."""
        return Session(image, prompt, model=self, **options)

    def pixels(self, image: ImageInput | DeviceImage, max_tiles: int | None = None) -> Pixels:
        """An image's tiles; those of a picture in a GPU's memory are made there.

        Raises:
            ImageError: not an image, or in the memory of a GPU that the backend does not compute on.
            OptionError: ``max_tiles`` out of range.
        """
        if not is_device_frame(image):
            return self.image_processor(image, max_tiles)  # type: ignore[arg-type] # refuses what is none
        if not isinstance(self.backend, FrameBackend):
            raise ImageError(
                "the picture lies in a GPU's memory, which backend tensorrt takes: copy it to the host first, as "
                "frame.cpu().numpy() does in torch and frame.get() in CuPy"
            )
        return self.backend.frame_pixels(image, self.image_processor, max_tiles)  # type: ignore[arg-type] # just asked

    def embed(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Token ids [n] → embeddings [n, hidden], read from the file."""
        return self._embeddings[ids]


def load(
    bundle: str | Path | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
    verify: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Model:
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
        raise BundleError(f'no bundle given: pass bundle="FOLDER" (--bundle FOLDER), or set {BUNDLE_VARIABLE}=FOLDER')
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise OptionError(f"threads must be a whole number of at least 1, or None, got {threads!r}")
    opened = Bundle(folder, verify, progress)
    return Model(opened, open_backend(backend, opened, threads))


def _read_template(file: Path) -> ChatTemplate:
    try:
        return ChatTemplate.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {error}; export the bundle again") from None
