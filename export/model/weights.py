"""The tensors of a checkpoint: as sources of a graph's external data, or loaded into the PyTorch modules.

Both read a tensor block by block, so that never two copies of all weights are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt
import torch

from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import Parameter, decoder_parameters, vision_parameters
from export.external_data import NUMPY_DTYPES, TensorSource
from export.model.modeling import Decoder, RotaryTable, Vision, default_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_source(checkpoint: Checkpoint, parameter: Parameter, precision: str) -> TensorSource:
    """Returns the source of a parameter. Reading it raises ``CheckpointError`` for values that do not fit."""
    return _source(parameter.shape, precision, lambda: checkpoint.blocks(parameter, DTYPES[precision]))


def parameter_sources(checkpoint: Checkpoint, parameters: list[Parameter], precision: str) -> dict[str, TensorSource]:
    """Returns sources of parameters by name."""
    return {parameter.name: parameter_source(checkpoint, parameter, precision) for parameter in parameters}


def rotary_sources(checkpoint: Checkpoint, max_length: int, precision: str) -> dict[str, TensorSource]:
    """Returns sources of the decoder's rotary tables by name, each [max_length, head_dim / 2]."""
    rope = RotaryTable(checkpoint.config, max_length)

    def source(table: torch.Tensor) -> TensorSource:
        return _source(tuple(table.shape), precision, lambda: iter([table.to(DTYPES[precision])]))

    return {"rope.cos": source(rope.cos), "rope.sin": source(rope.sin)}


def _source(shape: tuple[int, ...], precision: str, blocks: Callable[[], Iterator[torch.Tensor]]) -> TensorSource:
    kind = NUMPY_DTYPES[precision]

    def arrays() -> Iterator[npt.NDArray[Any]]:
        for block in blocks():
            # numpy has no bfloat16 of its own, so the bytes are handed over.
            yield block.contiguous().flatten().view(torch.uint8).numpy().view(kind).reshape(-1, *shape[1:])

    return TensorSource(kind, shape, arrays)


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype, max_length: int, last_only: bool = True) -> Decoder:
    """Returns the PyTorch decoder with the checkpoint's weights, all in memory."""
    with default_dtype(dtype):
        module = Decoder(checkpoint.config, max_length, last_only).eval()
    _load(module, decoder_parameters(checkpoint.config), checkpoint, dtype)
    return module


def load_vision(checkpoint: Checkpoint, dtype: torch.dtype) -> Vision:
    """Returns the PyTorch vision module with the checkpoint's weights."""
    with default_dtype(dtype):
        module = Vision(checkpoint.config).eval()
    _load(module, vision_parameters(checkpoint.config), checkpoint, dtype)
    return module


def _load(module: torch.nn.Module, parameters: list[Parameter], checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    state = module.state_dict()
    for item in parameters:
        place = state[item.name].view(-1)
        for block in checkpoint.blocks(item, dtype):
            place[: block.numel()].copy_(block.flatten())
            place = place[block.numel() :]
