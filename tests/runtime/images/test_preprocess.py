"""Tiles against the official pixels, and the images that must be refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import BundleError, OptionError
from runtime.images.pixels import HostPixels
from runtime.images.preprocess import ImageProcessor, tile_grid
from runtime.records import read_record
from tests.runtime.images.pictures import noise

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
IMAGES = GOLDEN / "images"
CASES = sorted(path for path in GOLDEN.glob("tiny-*/*.json") if path.name != "tensors.json")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PROCESSOR = ImageProcessor(
    image_size=448,
    tokens_per_tile=256,
    min_tiles=1,
    max_tiles=12,
    use_thumbnail=True,
    dynamic_image_size=True,
    mean=MEAN,
    std=STD,
)


def name_of(values: np.ndarray) -> str:
    return HostPixels(values, lambda _: np.empty(0)).name


# ---- pixels ----------------------------------------------------------------------------------------------


def test_the_golden_cases_were_found():
    assert len(CASES) >= 14


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_pixels_have_the_official_bits(case):
    facts = json.loads(case.read_text())
    values = [PROCESSOR(IMAGES / name, max_tiles) for name, max_tiles in facts["images"]]
    assert [len(value) for value in values] == facts["num_patches_list"]
    assert [name_of(value) for value in values] == facts["pixel_values_sha256"]


@pytest.mark.parametrize("model", ["tiny-v1", "tiny-v15"])
def test_whole_official_tensor(model):
    safetensors = pytest.importorskip("safetensors.numpy")
    expected = safetensors.load_file(GOLDEN / model / "one_tile.safetensors")["pixel_values"]
    values = PROCESSOR(IMAGES / "sq448.png")
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("mean", "std"),
    [(MEAN, STD), ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))],
)
def test_every_byte_is_normalized_as_torchvision_does(mean, std):
    torch = pytest.importorskip("torch")
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.stack([levels, levels.T, levels[::-1]], axis=-1)
    values = replace(PROCESSOR, image_size=16, max_tiles=1, mean=mean, std=std)(image)

    channels = torch.from_numpy(image).permute(2, 0, 1).to(torch.float32).div(255)  # ToTensor, then Normalize
    expected = channels.sub(torch.tensor(mean)[:, None, None]).div(torch.tensor(std)[:, None, None])
    np.testing.assert_array_equal(values[0], expected.numpy())


def test_tiles_go_row_by_row_and_the_thumbnail_is_last():
    colours = np.array([[250, 0, 0], [0, 240, 0], [0, 0, 230], [9, 99, 199], [200, 100, 0], [7, 7, 7]], np.uint8)
    image = np.repeat(np.repeat(colours.reshape(2, 3, 3), 8, axis=0), 8, axis=1)  # 2 rows of 3 squares
    values = replace(PROCESSOR, image_size=8, max_tiles=6)(image)

    def normalized(pixels: np.ndarray) -> np.ndarray:
        return np.moveaxis((pixels / 255.0 - MEAN) / STD, -1, -3)

    assert values.shape == (7, 3, 8, 8)
    expected = np.broadcast_to(normalized(colours[:, None, None]), (6, 3, 8, 8))
    np.testing.assert_allclose(values[:6], expected, rtol=0, atol=2e-6)
    thumbnail = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(values[6], normalized(thumbnail), rtol=0, atol=2e-6)


def test_thumbnail_can_be_left_out():
    image = noise(24, 16)
    processor = replace(PROCESSOR, image_size=8, max_tiles=6)
    without = replace(processor, use_thumbnail=False)(image)
    np.testing.assert_array_equal(without, processor(image)[:-1])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_extreme_shapes_are_stretched_over_twelve_tiles(size):
    image = Image.fromarray(noise(*size))
    values = PROCESSOR(image)
    grid = (448, 12 * 448) if size[0] == 1 else (12 * 448, 448)
    first = np.asarray(image.resize(grid, Image.Resampling.BICUBIC))[:448, :448]
    assert len(values) == 13
    np.testing.assert_allclose(values[0], np.moveaxis((first / 255 - MEAN) / STD, -1, 0), rtol=0, atol=2e-6)


def test_names_tell_images_apart_and_ignores_memory_order():
    values = PROCESSOR(noise(30, 30))
    other = values.copy()
    other[0, 2, 447, 447] += np.float32(1e-3)
    assert name_of(values) == name_of(np.asfortranarray(values))
    assert name_of(values) != name_of(other)


# ---- grids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "tiles"),
    [(1600, 700, 12, 11), (1600, 700, 6, 3), (300, 420, 12, 13), (448, 448, 12, 1), (4000, 3000, 12, 13)],
)
def test_tile_counts(width, height, max_tiles, tiles):
    assert PROCESSOR.tiles(width, height, max_tiles) == tiles


@given(width=st.integers(1, 6000), height=st.integers(1, 6000), least=st.integers(1, 6), more=st.integers(0, 40))
@example(width=300, height=150, least=3, more=1)  # halfway between 2×2 and 3×1
@settings(max_examples=300, deadline=None)
def test_grid_is_the_one_that_transformers_chooses(width, height, least, more):
    peer = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    expected = peer.get_optimal_tiled_canvas((height, width), (448, 448), least, least + more)
    grid = tile_grid(width, height, image_size=448, max_tiles=least + more, min_tiles=least)
    assert grid == expected


@given(width=st.integers(1, 90), height=st.integers(1, 90), max_tiles=st.integers(1, 14), thumbnail=st.booleans())
@settings(max_examples=60, deadline=None)
def test_counted_tiles_are_the_computed_ones(width, height, max_tiles, thumbnail):
    processor = replace(PROCESSOR, image_size=4, use_thumbnail=thumbnail)
    values = processor(noise(width, height), max_tiles)
    assert values.shape == (processor.tiles(width, height, max_tiles), 3, 4, 4)
    assert len(values) <= max_tiles + thumbnail


# ---- the processor's facts -------------------------------------------------------------------------------


def read(data: object) -> ImageProcessor:
    return read_record(ImageProcessor, data, "image processor")


def test_facts_survive_json():
    assert read(json.loads(json.dumps(asdict(PROCESSOR)))) == PROCESSOR


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("image_size", True),
        ("image_size", 448.0),
        ("tokens_per_tile", "256"),
        ("min_tiles", 13),
        ("max_tiles", None),
        ("use_thumbnail", 1),
        ("dynamic_image_size", "yes"),
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("std", [0.2, 0.2, 0]),
        ("std", [0.2, 0.2, float("nan")]),
        ("std", [0.2, 0.2, True]),
    ],
)
def test_malformed_facts_are_refused(key, value):
    with pytest.raises(BundleError, match=f"image processor: {key} must be .*got .*export the bundle again"):
        read(asdict(PROCESSOR) | {key: value})


@pytest.mark.parametrize("data", [None, [], {}, asdict(PROCESSOR) | {"crop": 1}])
def test_facts_with_other_keys_are_refused(data):
    with pytest.raises(BundleError, match="expected the keys"):
        read(data)


@pytest.mark.parametrize("max_tiles", [0, -1, 1.0, True, "12"])
def test_max_tiles_out_of_range_is_refused(max_tiles):
    for compute in (lambda: PROCESSOR(noise(8, 8), max_tiles), lambda: PROCESSOR.tiles(8, 8, max_tiles)):
        with pytest.raises(OptionError, match=f"max_tiles .* at least 1, got {max_tiles!r}"):
            compute()


@pytest.mark.parametrize("max_tiles", [1001, 10**6, 10**5000], ids=["1001", "10^6", "10^5000"])
def test_more_tiles_than_anything_reads_are_refused(max_tiles):
    with pytest.raises(OptionError, match="max_tiles must be at most 1000"):
        PROCESSOR.tiles(5000, 1, max_tiles)
    assert PROCESSOR.tiles(5000, 1, 1000) == 1001


def test_max_tiles_below_the_checkpoints_minimum_is_refused():
    with pytest.raises(OptionError, match="at least 4, got 3"):
        replace(PROCESSOR, min_tiles=4)(noise(8, 8), max_tiles=3)


def test_a_checkpoint_without_dynamic_tiling_takes_one_tile():
    image = noise(1600, 700)
    processor = replace(PROCESSOR, dynamic_image_size=False, min_tiles=2)
    whole = np.asarray(Image.fromarray(image).resize((448, 448), Image.Resampling.BICUBIC))
    values = processor(image)
    assert len(values) == processor.tiles(1600, 700) == processor.tiles(1600, 700, max_tiles=1) == 1
    np.testing.assert_array_equal(values, PROCESSOR(whole))
    with pytest.raises(OptionError, match="as one tile"):
        processor(image, max_tiles=6)
