"""The quantizer: what ONNX's QuantizeLinear says, and numbers that survive packing bit for bit."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from export.quantized.quantize import LARGEST, absmax_scale, block_scales, block_size, pack, quantize

WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-8, 8, width=32))


@pytest.fixture(scope="module")
def quantize_linear() -> ort.InferenceSession:
    model = onnx.parser.parse_model("""
        <ir_version: 11, opset_import: ["" : 24]>
        rows (float[o, i] x, float[o] scale, int8[o] zero) => (int8[o, i] y)
        { y = QuantizeLinear <axis = 0> (x, scale, zero) }
    """)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@given(weight=WEIGHTS, clipping=st.floats(0.1, 1.0))
def test_is_quantize_linear_but_for_the_lowest(
    quantize_linear: ort.InferenceSession, weight: np.ndarray, clipping: float
) -> None:
    scale = absmax_scale(weight) * np.float32(clipping)
    feeds = {"x": weight, "scale": scale, "zero": np.zeros(len(weight), np.int8)}
    (expected,) = quantize_linear.run(None, feeds)
    got = quantize(weight, scale)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, np.maximum(expected, -LARGEST))


def test_ties_go_to_even_and_the_ends_saturate() -> None:
    steps = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 200, -127.4, -128, -200]], np.float32)
    expected = [[0, 2, 2, 0, -2, 126, 127, 127, -127, -127, -127]]
    np.testing.assert_array_equal(quantize(steps * np.float32(0.25), np.array([0.25], np.float32)), expected)


@given(weight=WEIGHTS)
def test_absmax_reaches_every_number(weight: np.ndarray) -> None:
    """Nothing is clipped, and nothing is off by more than half a step."""
    scale = absmax_scale(weight)
    assert scale.dtype == np.float32
    assert (scale >= np.finfo(np.float32).tiny).all()
    error = np.abs(quantize(weight, scale) * scale[:, None].astype(np.float64) - weight)
    assert (error <= 0.5001 * scale[:, None]).all()


def test_rows_of_nothing_have_a_scale() -> None:
    weight = np.array([[0, 0], [1e-44, 0], [0, -254]], np.float32)
    scale = absmax_scale(weight)
    np.testing.assert_array_equal(scale, [1, np.finfo(np.float32).tiny, 2])
    np.testing.assert_array_equal(quantize(weight, scale), [[0, 0], [0, 0], [0, -127]])


@pytest.mark.parametrize(("columns", "size"), [(1, 16), (16, 16), (17, 32), (100, 128), (128, 128), (2048, 128)])
def test_block_size(columns: int, size: int) -> None:
    assert block_size(columns) == size


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (200, 128), (17, 32)])
def test_packed_weights_are_the_same_numbers(columns: int, size: int) -> None:
    """Bit for bit, as MatMulNBits is defined: 128 stands for zero, and each block has a scale."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (5, columns), np.int8)
    scale = generator.uniform(0.001, 0.1, 5).astype(np.float32)
    packed, scales = pack(weight, size), block_scales(scale, columns, size)
    assert packed.dtype == np.uint8
    assert packed.shape == (5, -(-columns // size), size)
    values = ((packed.astype(np.float32) - 128) * scales[:, :, None]).reshape(5, -1)
    np.testing.assert_array_equal(values[:, :columns], weight * scale[:, None])
    assert not values[:, columns:].any()
