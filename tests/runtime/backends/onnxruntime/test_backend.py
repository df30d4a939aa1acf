"""Graphs in memory and the observer, against ONNX Runtime called by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from runtime.backends.graph import PAST, PRESENT, UPDATE, GraphInMemory, cache_names
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.model import load

CHUNKS = (5, 1, 1)
Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize("layout", ["tiny_v1_bundle", "tiny_v1_portable_bundle"])
def test_what_an_observer_is_given(layout: str, request: pytest.FixtureRequest) -> None:
    """Further outputs come by name, whatever the size of the chunk; caches hold the chunk's keys and values."""
    bundle = Bundle(request.getfixturevalue(layout))
    model = onnx.load(bundle.path(DECODER_GRAPH), load_external_data=False)
    # Two values inside the graph, of which the later one is asked for first.
    inner = [node.output[0] for node in model.graph.node if node.op_type in ("RMSNormalization", "Mul")]
    further = inner[2:0:-1]
    assert len(further) == 2
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in further)
    seen: list[tuple[Arrays, Arrays]] = []

    def observe(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        seen.append(tuple({name: value.copy() for name, value in items.items()} for items in (inputs, outputs)))

    backend = OnnxRuntimeBackend(bundle, 1, {DECODER_GRAPH: GraphInMemory(model.SerializeToString())}, observe)
    context, facts = backend.new_context(), bundle.manifest.model
    context.reserve(16)
    embeds = load(bundle.folder).embed(np.random.default_rng(0).integers(0, facts.vocab_size, sum(CHUNKS)))
    mask, start = np.zeros(len(embeds), np.bool_), 0

    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = (1, facts.num_key_value_heads, 16, facts.head_dim)
    caches = {name: np.zeros(shape, np.float32) for name in cache_names(facts.num_hidden_layers)}
    for size in CHUNKS:
        stop = start + size
        logits = context.forward(embeds[start:stop], mask[start:stop], start)
        inputs, outputs = seen.pop()
        positions = np.arange(start, stop)
        given = {
            "inputs_embeds": embeds[None, start:stop],
            "visual_mask": mask[None, start:stop],
            "position_ids": positions[None],
            "write_indices": positions[:1],
        }
        feeds = given | {PAST + name: cache for name, cache in caches.items()}
        names = [item.name for item in session.get_outputs()]
        taken = {item.name for item in session.get_inputs()}
        expected = session.run(None, {name: value for name, value in feeds.items() if name in taken})
        values = dict(zip(names, expected, strict=True))
        for name, cache in caches.items():
            if PRESENT + name in values:
                cache[...] = values[PRESENT + name]
            else:
                cache[:, :, start:stop] = values[UPDATE + name]
        assert not seen
        assert list(outputs) == further
        for name in further:
            np.testing.assert_allclose(outputs[name], values[name], rtol=0, atol=1e-5, err_msg=name)
        assert set(inputs) == set(feeds)
        for name, value in (given | {PAST + name: cache for name, cache in caches.items()}).items():
            np.testing.assert_allclose(inputs[name], value, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(logits, values["logits"][0], rtol=0, atol=1e-4)
        start = stop


def test_weights_from_memory(tiny_v1_bundle: Path) -> None:
    """A head of zeros gives logits of zeros; all other weights are the file's."""
    bundle = Bundle(tiny_v1_bundle)
    model = onnx.load(bundle.path(DECODER_GRAPH), load_external_data=False)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight")
    logits = []
    for weights in ({}, {head.name: np.zeros(tuple(head.dims), np.float32)}):
        graph = GraphInMemory(model.SerializeToString(), weights)
        context = OnnxRuntimeBackend(bundle, graphs={DECODER_GRAPH: graph}).new_context()
        context.reserve(4)
        embeds = load(tiny_v1_bundle).embed(np.array([5, 6, 7]))
        logits.append(context.forward(embeds, np.zeros(3, np.bool_), 0))
    assert logits[0].any()
    assert not logits[1].any()
