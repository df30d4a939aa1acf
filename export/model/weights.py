"""Streaming tensors of the checkpoint into the files of a bundle, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from export.checkpoint.config import ModelConfig
from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import decoder_parameters, vision_parameters
from export.model.modeling import RotaryTable
from export.model.trace import DTYPES, Graph
from export.writer import ALIGNMENT, BundleWriter
from runtime.bundle.manifest import EMBEDDINGS

Progress = Callable[[int], object]
"""Called with the number of bytes just written."""


def embeddings_size(config: ModelConfig, precision: str) -> int:
    """Size of the token embeddings file in bytes."""
    return config.vocab_size * config.hidden_size * DTYPES[precision].itemsize


def write_weights(
    writer: BundleWriter,
    graph: Graph,
    checkpoint: Checkpoint,
    precision: str,
    max_length: int,
    progress: Progress,
) -> None:
    """Writes the external data file of a graph, in the order of its slots.

    Raises:
        CheckpointError: a tensor holds values that cannot be exported.
    """
    blocks = blocks_by_name(checkpoint, max_length, DTYPES[precision])
    file = writer.open(graph.weights_file)
    try:
        for slot in graph.slots:
            file.pad_to(ALIGNMENT)
            if file.size != slot.offset:
                raise AssertionError(f"{slot.name} should start at {slot.offset}, the file is at {file.size}")
            for block in blocks(slot.name):
                data = as_bytes(block)
                file.write(data)
                progress(data.nbytes)
    finally:
        file.close()
    writer.add(graph.weights_file, file)


def write_embeddings(writer: BundleWriter, checkpoint: Checkpoint, precision: str, progress: Progress) -> None:
    """Writes the token embeddings, [vocab, hidden] row by row."""
    file = writer.open(EMBEDDINGS)
    try:
        for block in checkpoint.embedding_blocks(DTYPES[precision]):
            data = as_bytes(block)
            file.write(data)
            progress(data.nbytes)
    finally:
        file.close()
    writer.add(EMBEDDINGS, file)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major, little-endian. numpy has no bfloat16, so the bytes go as they are."""
    array: npt.NDArray[np.uint8] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return array.data


def blocks_by_name(
    checkpoint: Checkpoint, max_length: int, dtype: torch.dtype
) -> Callable[[str], Iterable[torch.Tensor]]:
    """What gives the values of a graph's initializer in consecutive blocks of rows."""
    config = checkpoint.config
    parameters = {item.name: item for item in vision_parameters(config) + decoder_parameters(config)}
    rope = RotaryTable(config, max_length)
    tables = {"rope.cos": rope.cos, "rope.sin": rope.sin}

    def blocks(name: str) -> Iterable[torch.Tensor]:
        if name in tables:
            return [tables[name].to(dtype)]
        return checkpoint.blocks(parameters[name], dtype)

    return blocks
