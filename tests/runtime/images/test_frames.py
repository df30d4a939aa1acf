"""Pictures in a GPU's memory: told by both protocols, tiled with Pillow's bits, answered as others are."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.backends.tensorrt.pixels import ResizeParams, open_resize
from runtime.bundle.manifest import to_format
from runtime.images.frames import device_frame, is_device_frame
from runtime.images.preprocess import ImageProcessor
from runtime.images.resampling import Filter, across_first, bicubic

from ...plugins_trt.preprocess_library import resize_on_cpu
from ..backends.tensorrt.host_device import HostDevice
from ..backends.tensorrt.test_backend import device_of, open_on_host
from ..test_golden import GOLDEN

STREAM = 7
QUESTION = "What is written here?"
PICTURE = GOLDEN / "images/portrait.png"


class Cuda:
    """An array that says it lies in device memory, by ``__cuda_array_interface__``."""

    def __init__(self, array: np.ndarray, stream: int | None = None, strides: bool = True) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            "strides": array.strides if strides else None,
            "stream": stream,
        }


class DLPack:
    """The same, by DLPack."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (2, 0)) -> None:
        self.array, self.device = array, device
        self.streams: list[object] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: object = None) -> object:
        self.streams.append(stream)
        return self.array.__dlpack__()


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def never() -> None:
    raise AssertionError("nobody asked to wait")


# What is a frame ------------------------------------------------------------------------------------------------------


def test_what_is_a_frame() -> None:
    array = picture(4, 5)
    assert is_device_frame(Cuda(array))
    assert is_device_frame(DLPack(array))
    assert is_device_frame(DLPack(array, (13, 0)))  # managed memory
    assert not is_device_frame(DLPack(array, (1, 0)))
    for host in (array, Image.fromarray(array), "x.png", b"", None):
        assert not is_device_frame(host)


@pytest.mark.parametrize("kind", [Cuda, DLPack])
def test_address_size_and_strides(kind: Callable[[np.ndarray], Any]) -> None:
    whole = picture(20, 30, 4)
    for view in (whole, whole[..., :3], whole[3:17, 5:20], whole[..., ::-1][..., 1:]):
        frame = device_frame(kind(view), STREAM, never)
        assert frame.address == view.ctypes.data
        assert (frame.height, frame.width) == view.shape[:2]
        assert frame.strides == view.strides


def test_strides_may_be_left_out() -> None:
    assert device_frame(Cuda(picture(2, 5, 4), strides=False), STREAM, never).strides == (20, 4, 1)


def test_a_producer_is_waited_for() -> None:
    dlpack = DLPack(picture(2, 3))
    device_frame(dlpack, STREAM, never)
    assert dlpack.streams == [STREAM]
    waited = []
    device_frame(Cuda(picture(2, 3), stream=2), STREAM, lambda: waited.append("a stream"))
    # Numba's specification of the interface, version 3: None needs no wait; before it, there was no such field.
    device_frame(Cuda(picture(2, 3), stream=None), STREAM, never)
    older = Cuda(picture(2, 3))
    del older.__cuda_array_interface__["stream"]
    device_frame(older, STREAM, lambda: waited.append("all work"))
    assert waited == ["a stream", "all work"]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Cuda(picture(4, 5).astype(np.float32)), "expected values of uint8, got <f4 [4, 5, 3] in a GPU's memory"),
        (DLPack(picture(4, 5).astype(np.int8)), "expected values of uint8, got DLPack type (0, 8, 1) [4, 5, 3]"),
        (Cuda(picture(4, 5)[..., 0]), "expected [height, width, 3] or [height, width, 4], got |u1 [4, 5]"),
        (
            Cuda(picture(4, 5).transpose(2, 0, 1)),
            "expected [height, width, 3] or [height, width, 4], got |u1 [3, 4, 5]",
        ),
        (DLPack(picture(0, 5)), "expected [height, width, 3]"),
        (DLPack(picture(4, 5), (2, 1)), "expected a picture on GPU 0, got one on GPU 1"),
    ],
)
def test_what_is_none_is_refused(image: object, words: str) -> None:
    with pytest.raises(runtime.ImageError) as caught:
        device_frame(image, STREAM, never)
    assert words in str(caught.value)


def test_other_backends_say_which_takes_them(tiny_v1_bundle: Path) -> None:
    model = runtime.load(tiny_v1_bundle)
    with pytest.raises(runtime.ImageError, match=r"which only backend tensorrt takes: copy it to the host first"):
        model.session(Cuda(picture(30, 30)), QUESTION)


# Pillow's bits --------------------------------------------------------------------------------------------------------

SIZES = [
    *[((500, 375), (448, 448)), ((1080, 1920), (896, 1792)), ((448, 448), (448, 448)), ((1, 1), (7, 9))],
    *[((300, 20), (15, 400)), ((255, 191), (108, 204)), ((720, 1280), (64, 64)), ((33, 1000), (35, 3))],
]


def filtered(array: np.ndarray, filter_: Filter) -> np.ndarray:
    """One direction, the first axis, in numpy."""
    sums = np.full((len(filter_.first), *array.shape[1:]), 1 << 21, np.int64)
    for tap in range(filter_.weights.shape[1]):
        places = np.minimum(filter_.first + tap, len(array) - 1)
        sums += filter_.weights[:, tap, None, None].astype(np.int64) * array[places]
    return np.clip(sums >> 22, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_weights_are_those_of_pillow(source: tuple[int, int], target: tuple[int, int]) -> None:
    for array in (picture(*source), picture(*source) // 128 * 255):
        first = across_first(source[::-1], target[::-1])
        value = array
        for axis in (1, 0) if first else (0, 1):
            value = filtered(value.swapaxes(0, axis), bicubic(source[axis], target[axis])).swapaxes(0, axis)
        expected = Image.fromarray(array).resize(target[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(value, np.asarray(expected))


class Enqueued:
    """The kernel, compiled for the CPU, that waits in the device's queue like all work."""

    def __init__(self, device: Any, folder: Path) -> None:
        self._device, self._resize = device, resize_on_cpu(folder)
        self.status = 0

    def __call__(self, params: Any, stream: ctypes.c_void_p) -> int:
        assert stream.value == self._device.stream
        copy = ResizeParams.from_buffer_copy(params._obj)
        self._device.enqueue(lambda: self._check(self._resize(ctypes.byref(copy), stream)))
        return self.status

    def _check(self, status: int) -> None:
        assert status == 0


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preprocess")


@pytest.fixture
def model(tiny_v1_bundle: Path, compiled: Path) -> runtime.Model:
    device = HostDevice()
    return open_on_host(tiny_v1_bundle, device=device, open_resize=lambda: Enqueued(device, compiled))


def tiles_on_device(model: runtime.Model, image: object, max_tiles: int | None = None) -> np.ndarray:
    pixels = model.pixels(image, max_tiles)
    size = 3 * 448 * 448 * 4
    return device_of(model).at(pixels.address, len(pixels) * size).view(np.float32).reshape(-1, 3, 448, 448).copy()


@pytest.mark.parametrize(("height", "width"), [(448, 448), (300, 500), (700, 211), (97, 1000)], ids=str)
def test_tiles_have_the_bits_of_the_host(model: runtime.Model, height: int, width: int) -> None:
    array = picture(height, width)
    expected = model.image_processor(array, 6)
    np.testing.assert_array_equal(tiles_on_device(model, Cuda(array), 6), expected)
    # A part of a larger picture, with a channel that is dropped.
    wide = picture(height + 7, width + 9, 4)
    view = wide[3 : 3 + height, 5 : 5 + width]
    np.testing.assert_array_equal(tiles_on_device(model, DLPack(view), 6), model.image_processor(view[..., :3], 6))


def test_half_precision_is_rounded_once(compiled: Path) -> None:
    """The levels are in the plan's format before the kernel sees them."""
    from runtime.backends.tensorrt.pixels import Tiler
    from runtime.backends.tensorrt.plan import Buffer, Profile, VisionLayout

    device = HostDevice()
    tile, tokens = Buffer(np.dtype("<u2"), (3, 32, 32)), Buffer(np.dtype("<u2"), (4, 8))
    processor = ImageProcessor(32, 4, 1, 6, True, True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    array = picture(40, 90)
    with device:
        layout = VisionLayout((Profile(0, 1, 7),), tile, tokens)
        pixels = Tiler(device, layout, Enqueued(device, compiled), lambda pixels: np.empty(0))(
            Cuda(array), processor, 6
        )
        got = device.at(pixels.address, len(pixels) * tile.nbytes).view(np.uint16).reshape(-1, 3, 32, 32)
    expected = np.empty(got.shape, np.uint16)
    to_format(processor(array, 6), expected)
    np.testing.assert_array_equal(got, expected)


# Answers --------------------------------------------------------------------------------------------------------------


def test_answers_as_the_same_picture_from_the_host(model: runtime.Model) -> None:
    array = np.asarray(Image.open(PICTURE).convert("RGB"))
    expected = model.session(array, QUESTION, max_tiles=2, max_new_tokens=12).text
    frame = DLPack(array.copy())
    session = model.session(frame, QUESTION, max_tiles=2, max_new_tokens=12)
    # The camera goes on.
    frame.array[:] = 0
    assert session.text == expected
    # It stays in the conversation.
    visual = session.stats.visual_tokens
    session.ask("And now?", max_new_tokens=2)
    assert session.text is not None
    assert session.stats.visual_tokens == visual
    assert session.stats.reused_tokens > visual


def test_a_frame_given_before_the_question(model: runtime.Model) -> None:
    array = np.asarray(Image.open(PICTURE).convert("RGB"))
    session = model.session(Cuda(array))
    assert session.ask(QUESTION, max_tiles=1, max_new_tokens=4).text is not None
    assert session.stats.visual_tokens == 256


def test_every_frame_is_a_picture_of_its_own(model: runtime.Model) -> None:
    array = picture(100, 100)
    first, again = model.pixels(Cuda(array)), model.pixels(Cuda(array))
    assert first.name != again.name


def test_frames_that_do_not_fit_are_refused_before_they_are_cut(model: runtime.Model) -> None:
    before = len(device_of(model).live)
    for frame in (Cuda(picture(300, 500)), DLPack(picture(300, 500))):
        with pytest.raises(runtime.PromptError, match="images alone have at least"):
            model.session([frame] * 33, QUESTION)
    assert len(device_of(model).live) == before


def test_memory_of_frames_is_given_back(model: runtime.Model) -> None:
    def ask(frame: object) -> None:
        assert model.session(frame, QUESTION, max_tiles=1, max_new_tokens=2).text is not None

    ask(Cuda(picture(100, 100)))
    before = len(device_of(model).live)
    for _ in range(3):
        ask(Cuda(picture(100, 100)))
    # Of another size, whose tables take the place of the others.
    ask(Cuda(picture(120, 90)))
    assert len(device_of(model).live) == before


def test_memory_is_given_back_with_the_model(tiny_v1_bundle: Path, compiled: Path) -> None:
    device = HostDevice()
    model = open_on_host(tiny_v1_bundle, device=device, open_resize=lambda: Enqueued(device, compiled))
    model.pixels(Cuda(picture(100, 100)))
    assert device.live
    del model
    gc.collect()
    assert device.live == set()


def test_a_failing_kernel_is_one_line(model: runtime.Model, compiled: Path) -> None:
    resize = Enqueued(device_of(model), compiled)
    resize.status = 1
    model.backend._open_resize = lambda: resize
    with pytest.raises(runtime.BackendError, match="resizing a picture of 100×60 failed: CUDA error 1"):
        model.session(Cuda(picture(60, 100)), QUESTION)


def test_an_older_library_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old.so"
    old.write_bytes(b"no library")
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(old))
    with pytest.raises(
        runtime.BackendError, match=r"old.so cannot resize pictures .*: build it again with: monoedge plugin"
    ):
        open_resize()


def test_the_plugin_library_has_the_entry(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
    assert callable(open_resize())
