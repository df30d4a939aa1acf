"""Makes the recorded set of a bundle: a prompt with a picture, and a few tokens after it, one by one."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from export.recorded import format as form
from export.recorded import run as recording_run
from export.recorded.format import Call, Recording, Values, empty_caches, rounded, wide
from export.writer import rewrite_manifest
from runtime.backends import graph as names
from runtime.bundle.engines import WEIGHTS
from runtime.bundle.manifest import CHAT_TEMPLATE, DECODER_GRAPH, RECORDING, TOKENIZER, VISION_GRAPH, FileRecord
from runtime.bundle.reader import Bundle
from runtime.console.files import replaced
from runtime.conversation import Conversation
from runtime.errors import BundleError
from runtime.images.pixels import HostPixels, Pixels
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

QUESTION = "What is in the picture, and what is left of it?"
ANSWER = "A circle, in front of stripes."
"""What is read after the prompt, whether or not a model would say it. Tokens known beforehand need one reading of the
weights; those that a model chose would depend on the last bit where two are near each other."""

STEPS = 8
"""Tokens of the answer that are read one by one."""


def record(bundle: Bundle, progress: Callable[[int], object]) -> dict[str, bytes]:
    """Records a bundle; returns the files of its recorded set, by name.

    Calls ``progress`` with the bytes of weights that were just read.

    Raises:
        BundleError: its tokenizer or template cannot be read, or it is made for a CPU.
        BackendError: ONNX Runtime cannot run a graph.
    """
    if bundle.manifest.by_expert:
        raise BundleError(f"{bundle.folder} is made for ONNX Runtime on a CPU: no engine is built from it")
    recording, runner = _record(bundle, progress), f"onnxruntime {ort.__version__}, float32"
    return form.to_files(recording, form.made_of(bundle.manifest), runner)


def weights_size(bundle: Bundle) -> int:
    """Returns the bytes of weights that recording reads."""
    return sum(bundle.manifest.files[WEIGHTS[graph]].size for graph in form.GRAPHS)


def _record(bundle: Bundle, progress: Callable[[int], object]) -> Recording:
    manifest = bundle.manifest
    image, model, precision = manifest.image, manifest.model, manifest.precision

    def encode(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        (result,) = recording_run.run(bundle.path(VISION_GRAPH), [{names.PIXEL_VALUES: values}], progress)
        embeds: npt.NDArray[np.float32] = result[names.VISUAL_EMBEDS]
        return embeds

    pixels = HostPixels(rounded(image(picture(image.image_size), image.min_tiles), precision), encode)
    seen = pixels.embeds()
    ids, visual_mask = _tokens(bundle, pixels)
    embeds = wide(bundle.embeddings()[ids], precision)
    embeds[visual_mask] = rounded(seen, precision).reshape(-1, model.hidden_size)[: visual_mask.sum()]
    length = len(ids)
    prompt = max(length - STEPS, 1)
    calls: list[Values] = [
        {
            names.INPUTS_EMBEDS: embeds[None, start:stop],
            names.VISUAL_MASK: visual_mask[None, start:stop],
            names.POSITION_IDS: np.arange(start, stop)[None],
            names.WRITE_INDICES: np.array([start]),
        }
        for start, stop in ((0, prompt), *((start, start + 1) for start in range(prompt, length)))
    ]
    first = calls[0] | empty_caches(model, length)
    results = recording_run.run(bundle.path(DECODER_GRAPH), [first, *calls[1:]], progress)
    read = [Call(values, {names.LOGITS: result[names.LOGITS]}) for values, result in zip(calls, results, strict=True)]
    encoded = Call({names.PIXEL_VALUES: pixels.values}, {names.VISUAL_EMBEDS: seen})
    return {VISION_GRAPH: [encoded], DECODER_GRAPH: read}


def picture(size: int) -> npt.NDArray[np.uint8]:
    """Draws stripes, a gradient and a circle, so that tiles, places and colours all count; [size, size, 3]."""
    y, x = np.mgrid[:size, :size] * 448 // size
    red = np.where((x // 16) % 2, 224, 32)
    inside = (x - 260) ** 2 + (y - 180) ** 2 < 90**2
    return np.stack([red, y * 255 // 448, np.where(inside, 255, x * 255 // 448)], axis=-1).astype(np.uint8)


def _tokens(bundle: Bundle, pixels: Pixels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Returns ids and visual mask of the prompt and ``STEPS`` tokens after it, cut at the bundle's ``max_length``."""
    tokenizer = Tokenizer.from_file(bundle.path(TOKENIZER))
    template = ChatTemplate.from_file(bundle.path(CHAT_TEMPLATE))
    conversation = Conversation(template, tokenizer, bundle.manifest.image.tokens_per_tile)
    prompt = conversation.prompt([conversation.turn(QUESTION, [pixels])])
    answer = tokenizer.encode(ANSWER, add_bos=False)
    answer = (answer * math.ceil(STEPS / len(answer)))[:STEPS]
    most = bundle.manifest.model.max_length
    ids = np.concatenate([prompt.ids, np.array(answer)])[:most]
    return ids, np.concatenate([prompt.visual_mask, np.zeros(STEPS, np.bool_)])[:most]


def put(bundle: Bundle, files: dict[str, bytes]) -> None:
    """Puts a recorded set into a bundle that is in place. Wherever this is interrupted, the bundle still opens.

    Raises:
        BundleError: the bundle cannot be written.
    """
    others = {name: item for name, item in bundle.manifest.files.items() if Path(name).parts[0] != RECORDING}
    records = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    try:
        with replaced(bundle.path(RECORDING)) as folder:
            folder.mkdir()
            for name, data in files.items():
                (folder / Path(name).name).write_bytes(data)
            # While files are replaced, the manifest names none of them.
            rewrite_manifest(bundle.folder, lambda manifest: replace(manifest, files=others))
            shutil.rmtree(bundle.path(RECORDING), ignore_errors=True)
        files_now = dict(sorted((others | records).items()))
        rewrite_manifest(bundle.folder, lambda manifest: replace(manifest, files=files_now))
    except OSError as error:
        raise BundleError(f"{bundle.folder} cannot be written: {error.strerror}") from None
