"""Pixels as people see them, against Pillow's own tools and values computed by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime.errors import ImageError
from runtime.images.load import load_image
from tests.runtime.images.pictures import encoded, noise

TURNED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
"""What each EXIF orientation asks for: 6, as phones write it for portraits, turns clockwise."""


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[…, 3] and […] of 0 … 255."""
    colours, alpha = colours.astype(np.int64), alpha.astype(np.int64)[..., None]
    return np.rint((colours * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)


def seen(image: object, **options: bool) -> np.ndarray:
    return np.asarray(load_image(image, **options))


def official(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def oriented(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one chunk more, behind its pixels."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:-12] + chunk + png[-12:]


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_their_exif_asks(file_format: str, orientation: int) -> None:
    data = encoded(Image.fromarray(noise(20, 10)), file_format, exif=oriented(orientation))
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(seen(data), turned)
    np.testing.assert_array_equal(seen(Image.open(io.BytesIO(data))), turned)
    np.testing.assert_array_equal(seen(data, as_stored=True), official(data))
    if file_format == "PNG":
        np.testing.assert_array_equal(turned, TURNED[orientation](noise(20, 10)))


def test_an_orientation_may_stand_behind_the_pixels_or_in_xmp() -> None:
    pixels = noise(20, 10)
    late = with_chunk(encoded(Image.fromarray(pixels)), b"eXIf", oriented(6).tobytes()[6:])
    xmp = with_chunk(encoded(Image.fromarray(pixels)), b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')
    for data in (late, xmp):
        np.testing.assert_array_equal(seen(data), np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int) -> None:
    data = encoded(Image.fromarray(noise(20, 10)), exif=oriented(orientation))
    np.testing.assert_array_equal(seen(data), noise(20, 10))


@pytest.mark.parametrize("exif", [b"Exif\0\0gibberish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_hides_no_picture(exif: bytes) -> None:
    data = encoded(Image.fromarray(noise(20, 10)), "JPEG", exif=exif)
    np.testing.assert_array_equal(seen(data), official(data))


def test_what_was_read_is_not_turned_or_blended_again() -> None:
    data = encoded(Image.fromarray(noise(20, 10, 4)), exif=oriented(6))
    for as_stored in (False, True):
        once = load_image(data, as_stored=as_stored)
        np.testing.assert_array_equal(seen(once), np.asarray(once))


def test_the_given_image_is_left_as_it_was() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(noise(20, 10)), exif=oriented(6))))
    before = image.tobytes()
    load_image(image).putpixel((0, 0), (1, 2, 3))
    assert (image.tobytes(), image.size, image.getexif()[0x0112]) == (before, (20, 10), 6)


# ---- transparency ----------------------------------------------------------------------------------------------------


def test_transparent_pixels_are_laid_over_white() -> None:
    pixels = noise(30, 20, 4)
    expected = over_white(pixels[..., :3], pixels[..., 3])
    image = Image.fromarray(pixels)
    for given in (pixels, image, encoded(image), encoded(image, "TIFF")):
        np.testing.assert_array_equal(seen(given), expected)
        np.testing.assert_array_equal(seen(given, as_stored=True), pixels[..., :3])


def test_gray_with_alpha() -> None:
    pixels = noise(30, 20, 2)
    expected = over_white(np.repeat(pixels[..., :1], 3, axis=-1), pixels[..., 1])
    image = Image.fromarray(pixels)
    assert image.mode == "LA"
    for given in (pixels, image, encoded(image)):
        np.testing.assert_array_equal(seen(given), expected)
        np.testing.assert_array_equal(seen(given, as_stored=True), np.repeat(pixels[..., :1], 3, axis=-1))


@pytest.mark.parametrize("transparency", [3, bytes([255, 0, 128, 77, 255, 200, 1, 254])])
@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palettes_with_transparent_colours(transparency: int | bytes, file_format: str) -> None:
    if file_format == "GIF" and isinstance(transparency, bytes):
        transparency = 5
    image = Image.fromarray(noise(16, 16)).quantize(8)
    alphas = np.full(256, 255, np.uint8)
    if isinstance(transparency, bytes):
        alphas[: len(transparency)] = list(transparency)
    else:
        alphas[transparency] = 0
    expected = over_white(np.asarray(image.convert("RGB")), alphas[np.asarray(image)])
    data = encoded(image, file_format, transparency=transparency)
    np.testing.assert_array_equal(seen(data), expected)
    np.testing.assert_array_equal(seen(data, as_stored=True), official(data))


def test_a_palette_and_an_alpha_channel() -> None:
    image = Image.fromarray(noise(16, 16)).quantize(8).convert("PA")
    alpha = noise(16, 16, 1)[..., 0]
    image.putalpha(Image.fromarray(alpha))
    assert image.mode == "PA"
    np.testing.assert_array_equal(seen(image), over_white(np.asarray(image.convert("RGB")), alpha))


@pytest.mark.parametrize(
    ("mode", "transparency"), [("1", 255), ("L", 77), ("RGB", (7, 8, 9)), ("I;16", 3000)], ids=lambda value: str(value)
)
def test_one_colour_of_a_png_may_be_transparent(mode: str, transparency: int | tuple[int, ...]) -> None:
    values = {
        "1": np.arange(64).reshape(8, 8) % 3 == 0,
        "L": noise(8, 8, 1)[..., 0],
        "RGB": noise(8, 8),
        "I;16": np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000,
    }[mode]
    hidden = values == (transparency if mode != "1" else True)
    if mode != "1":
        values[0, 0] = transparency
        hidden = (values == np.array(transparency)).reshape(8, 8, -1).all(-1)
    data = encoded(Image.fromarray(values), transparency=transparency)
    opaque = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode == mode
    assert hidden.any()
    np.testing.assert_array_equal(seen(data)[hidden], 255)
    np.testing.assert_array_equal(seen(data)[~hidden], seen(opaque)[~hidden])


# ---- more than 8 bits ------------------------------------------------------------------------------------------------

LEVELS = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    expected = np.repeat(np.rint(LEVELS / 257).astype(np.uint8)[..., None], 3, axis=-1)
    assert len(np.unique(expected)) == 256
    big_endian = Image.frombytes("I;16B", (30, 20), LEVELS.astype(">u2").tobytes())
    image = Image.fromarray(LEVELS)
    for given in (LEVELS, LEVELS[..., None], image, big_endian, encoded(image), encoded(image, "TIFF")):
        np.testing.assert_array_equal(seen(given), expected)
    np.testing.assert_array_equal(seen(encoded(image), as_stored=True), official(encoded(image)))
    colours = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=-1)
    np.testing.assert_array_equal(seen(colours), np.rint(colours / 257).astype(np.uint8))


def tiff(pixels: bytes, bits: int, photometric: int) -> bytes:
    """A gray picture of 4 × 2 pixels."""
    tags = [(256, 3, 4), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 200), (277, 3, 1)]
    tags += [(278, 3, 2), (279, 4, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + pixels


def test_a_tiff_says_where_its_white_lies() -> None:
    levels = np.array([[0, 1, 255, 256], [2048, 4000, 4094, 4095]])
    pairs = levels.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    twelve = seen(tiff(packed.astype(np.uint8).tobytes(), 12, 1))[..., 0]
    np.testing.assert_array_equal(twelve, np.rint(levels / 4095 * 255))
    sixteen = (levels * 16).astype("<u2")
    for photometric, expected in ((1, np.rint(sixteen / 257)), (0, 255 - np.rint(sixteen / 257))):
        np.testing.assert_array_equal(seen(tiff(sixteen.tobytes(), 16, photometric))[..., 0], expected)


def test_floats_are_scaled() -> None:
    values = np.random.default_rng(3).random((20, 30, 3), dtype=np.float32)
    values[0, 0], values[0, 1] = 0, 1
    expected = np.rint(values * np.float32(255)).astype(np.uint8)
    gray = Image.fromarray(values[..., 0].copy())
    assert gray.mode == "F"
    np.testing.assert_array_equal(seen(values), expected)
    np.testing.assert_array_equal(seen(values.astype(np.float64)), expected)
    for given in (gray, encoded(gray, "TIFF")):
        np.testing.assert_array_equal(seen(given), np.repeat(expected[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(seen(gray, as_stored=True), np.asarray(gray.convert("RGB")))


def test_black_and_white() -> None:
    values = np.arange(64).reshape(8, 8) % 3 == 0
    expected = np.repeat(np.where(values, 255, 0)[..., None], 3, axis=-1)
    for given in (values, Image.fromarray(values), encoded(Image.fromarray(values))):
        np.testing.assert_array_equal(seen(given), expected)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (noise(8, 8).astype(np.float32), ["float32 [8, 8, 3]", "from 0 to 1"]),
        (np.full((8, 8), np.nan), ["float64", "nan"]),
        (np.full((8, 8), -1e-3), ["-0.001"]),
        (noise(8, 8).astype(np.int64), ["int64 [8, 8, 3]", ".astype(numpy.uint8)"]),
        (noise(8, 8).astype(np.int8), ["int8"]),
        (noise(8, 8).astype(np.complex64), ["complex64"]),
        (noise(8, 8).astype(object), ["object"]),
        (Image.fromarray(noise(8, 8)[..., 0].astype(np.int32)), ["int32 [8, 8]", "scale"]),
        (encoded(Image.fromarray(noise(8, 8)[..., 0].astype(np.int32)), "TIFF"), ["int32"]),
        (encoded(Image.fromarray(noise(8, 8)[..., 0].astype(np.float32)), "TIFF"), ["float32 [8, 8]", "252"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_values_whose_scale_nobody_knows_are_refused(image: object, says: list[str]) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(image)
    assert all(words in str(caught.value) for words in says), caught.value


# ---- other modes and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_the_official_code_does(mode: str) -> None:
    image = Image.fromarray(noise(30, 10)).convert(mode)
    np.testing.assert_array_equal(seen(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_stored_pixels_are_those_of_the_official_code(mode: str) -> None:
    image = Image.fromarray(noise(30, 10))
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    if mode in ("LA", "PA", "RGBA"):
        image.putalpha(Image.fromarray(noise(30, 10, 1)[..., 0]))
    np.testing.assert_array_equal(seen(image, as_stored=True), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_picture_of_several_is_read(file_format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(seen(data).astype(int) - np.asarray(frames[0])).max() <= 2
