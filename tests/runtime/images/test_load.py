"""What is accepted as an image, and what is refused, each in one line."""

import base64
import io
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import ImageError
from runtime.images.load import OpenedImage, load_image
from tests.runtime.images.pictures import encoded, header_only, noise

IMAGES = Path(__file__).parents[2] / "data" / "golden" / "images"
PICTURE = IMAGES / "portrait.png"
DATA_URI = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"


def refusal(image: object, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(image, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# ---- accepted --------------------------------------------------------------------------------------------------------


def test_every_way_to_give_an_image_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, image = PICTURE.read_bytes(), Image.open(PICTURE)
    (tmp_path / "p.png").write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    read_to_its_end = io.BytesIO(data)
    read_to_its_end.read()
    given_images = [PICTURE, str(PICTURE), "~/p.png", Path("~/p.png"), data, bytearray(data), memoryview(data)]
    given_images += [io.BytesIO(data), read_to_its_end, DATA_URI, "DATA:;base64," + DATA_URI.partition(",")[2]]
    given_images += [DATA_URI.rstrip("=") + "%0A", image, np.asarray(image)]
    for given_image in given_images:
        assert load_image(given_image).tobytes() == image.tobytes()
    with PICTURE.open("rb") as file:
        assert load_image(file).tobytes() == image.tobytes()
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb") as filled:
        filled.write(data)
        filled.close()
        assert load_image(pipe).tobytes() == image.tobytes()


def test_what_is_given_may_be_written_again() -> None:
    data, array = bytearray(PICTURE.read_bytes()), noise(9, 5)
    opened, read = OpenedImage(data), OpenedImage(array).rgb
    data[:], array[:] = bytes(len(data)), 0
    assert opened.rgb.tobytes() == Image.open(PICTURE).tobytes()
    np.testing.assert_array_equal(np.asarray(read), noise(9, 5))


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(noise(9, 5))
    np.testing.assert_array_equal(np.asarray(load_image(tensor)), noise(9, 5))
    assert "tensor.permute(1, 2, 0)" in refusal(tensor.permute(2, 0, 1))
    for other in (tensor.to(torch.bfloat16), tensor.float().requires_grad_(), tensor.to("meta")):
        assert "torch.Tensor cannot be read" in refusal(other)


def test_reversed_channels_are_read_in_the_order_that_the_view_shows() -> None:
    pixels = noise(9, 5)
    np.testing.assert_array_equal(np.asarray(load_image(pixels[:, ::-1, ::-1])), pixels[:, ::-1, ::-1])


def test_gray_is_repeated() -> None:
    gray = noise(9, 5, 1)
    for array in (gray, gray[..., 0]):
        np.testing.assert_array_equal(np.asarray(load_image(array)), np.repeat(gray, 3, axis=-1))


def test_the_size_is_known_before_the_pixels_are() -> None:
    for data in (header_only(640, 480), encoded(Image.fromarray(noise(64, 48)))[:-2000], noise(7, 5)):
        opened = OpenedImage(data)
        assert opened.size in [(640, 480), (64, 48), (7, 5)]
    assert "cannot be decoded" in refusal(header_only(640, 480))


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("no/such/photo.jpg", ["'no/such/photo.jpg'", "does not exist"]),
        ("two\nlines.png", ["'two\\nlines.png'", "does not exist"]),
        (f"{PICTURE}/x.png", ["does not exist"]),
        ("", ["''", "is not a file"]),
        (IMAGES, ["images", "is not a file"]),
        ("/dev/zero", ["'/dev/zero'", "is not a file"]),
        ("a\0b.png", [r"'a\x00b.png'", "cannot be read (embedded null byte)"]),
        ("\ud800.png", [r"'\ud800.png'", "cannot be read"]),
        ("x" * 5000, ["cannot be read (File name too long)"]),
        ("~no-such-user/x.png", ["'~no-such-user/x.png'", "cannot be read", "home"]),
        ("https://example.org/x.png", ["does not exist", "bytes of what a URL names"]),
        (DATA_URI.partition(",")[2], ["cannot be read (File name too long)", "data:image/png;base64"]),
        (DATA_URI.replace(";base64", ""), ["cannot be read", "expected data:image/png;base64,"]),
        (DATA_URI[:50] + "!" + DATA_URI[50:], ["cannot be read", "base64"]),
        ("data:image/png;base64,AAAA", ["data URI", "not an image"]),
        (Path(__file__), ["test_load.py", "not an image", "PNG"]),
        (b"", ["0 bytes", "not an image"]),
        (b"GIF89a", ["6 bytes"]),
        (encoded(Image.fromarray(noise(64, 64)))[:-2000], ["cannot be decoded", "truncated", "complete"]),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-2000], ["cannot be decoded", "truncated"]),
        (encoded(Image.fromarray(noise(8, 8)), "EPS"), ["not an image of PNG"]),
        (encoded(Image.fromarray(noise(8, 8)), "PPM"), ["not an image of PNG"]),
        (io.StringIO("text"), ["_io.StringIO", "str", "'rb'"]),
        (noise(8, 6).transpose(2, 0, 1), ["uint8 [3, 6, 8]", "transpose(1, 2, 0)"]),
        (noise(8, 6, 1).transpose(2, 0, 1), ["uint8 [1, 6, 8]", "transpose(1, 2, 0)"]),
        (noise(8, 8)[None], ["uint8 [1, 8, 8, 3]", "one image"]),
        (noise(8, 8, 5), ["uint8 [8, 8, 5]"]),
        (noise(8, 8)[0, 0], ["uint8 [3]"]),
        (np.float32(0.5), ["float32 []"]),
        (noise(8, 8)[:0], ["no pixels", "[0, 8, 3]"]),
        (noise(8, 8)[:, :0, 0], ["no pixels", "[8, 0]"]),
        (np.ma.masked_array(noise(8, 8)), ["masked array", "filled"]),
        (np.zeros((8, 8), [(f"field{number}", "u1") for number in range(500)]), ["uint8"]),
        (Image.new("RGB", (0, 5)), ["no pixels", "0×5"]),
        (noise(8, 8).tolist(), ["builtins.list", "path"]),
        (None, ["NoneType"]),
        (7, ["builtins.int"]),
        (np.ndarray, ["object []"]),
        (io.BytesIO, ["builtins.type cannot be read"]),
        (Image, ["builtins.module"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_images_are_refused_in_one_line(image: object, says: list[str]) -> None:
    message = refusal(image)
    for words in says:
        assert words in message


def test_closed_and_released_things_are_refused() -> None:
    image, file, view = Image.open(PICTURE), io.BytesIO(PICTURE.read_bytes()), memoryview(PICTURE.read_bytes())
    image.close()
    file.close()
    view.release()
    assert "the PIL image cannot be decoded" in refusal(image)
    assert "_io.BytesIO cannot be read (I/O operation on closed file" in refusal(file)
    assert "memoryview cannot be read" in refusal(view)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is not a file" in refusal(tmp_path / "pipe.png")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    assert "cannot be read (Too many levels of symbolic links)" in refusal(tmp_path / "a")


@pytest.fixture
def private_folder() -> Iterator[Path]:
    """A folder with a picture, for somebody to whom no permissions are given that a test's user need not have."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "inner").mkdir()
        for file in (folder / "photo.png", folder / "inner/photo.png"):
            file.write_bytes(PICTURE.read_bytes())
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        (folder / "inner").chmod(stat.S_IRWXU)


def test_what_may_not_be_read_is_said_to_be_unreadable(private_folder: Path) -> None:
    assert load_image(private_folder / "photo.png").size == (300, 420)
    root = os.getuid() == 0
    for path, mode in ((private_folder / "photo.png", 0o000), (private_folder / "inner", 0o000)):
        if root:
            os.seteuid(0)
        path.chmod(mode)
        if root:
            os.seteuid(65534)
    for path in (private_folder / "photo.png", private_folder / "inner/photo.png"):
        assert "photo.png' cannot be read (Permission denied)" in refusal(path)


# ---- too large -------------------------------------------------------------------------------------------------------


def test_too_many_pixels_are_refused_before_anything_is_decoded() -> None:
    for image in (header_only(101, 100), noise(101, 100), Image.fromarray(noise(101, 100))):
        assert "101×100 pixels, more than the 10000 allowed (max_pixels)" in refusal(image, max_pixels=10_000)
    assert load_image(noise(100, 100), max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_default(size: tuple[int, int]) -> None:
    assert "too large to decode safely" in refusal(header_only(*size))


@pytest.mark.parametrize("limit", [100, 40])  # Pillow warns above its limit and refuses above twice the limit
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_lower_limit_of_pillow_holds(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(noise(11, 11)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "too large to decode safely" in refusal(data)


# ---- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_files_are_read_or_refused(file_format: str, data: st.DataObject) -> None:
    content = bytearray(encoded(Image.fromarray(noise(12, 9)), file_format))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of much that it then reads
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # or it would read 90 million pixels
        try:
            image = load_image(bytes(content))
        except ImageError as error:
            message = str(error)
        else:
            message = ""
            assert image.mode == "RGB"
            assert min(image.size) > 0
    assert "\n" not in message
