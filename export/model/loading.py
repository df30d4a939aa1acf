"""The PyTorch modules with a checkpoint's weights in memory: the reference that exports are compared with."""

from __future__ import annotations

import torch

from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import Parameter, decoder_parameters, vision_parameters
from export.model.modeling import Decoder, Vision, default_dtype


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype, max_length: int, last_only: bool = True) -> Decoder:
    """The PyTorch decoder with the checkpoint's weights, all in memory."""
    with default_dtype(dtype):
        module = Decoder(checkpoint.config, max_length, last_only).eval()
    _load(module, decoder_parameters(checkpoint.config), checkpoint, dtype)
    return module


def load_vision(checkpoint: Checkpoint, dtype: torch.dtype) -> Vision:
    """The PyTorch vision module with the checkpoint's weights."""
    with default_dtype(dtype):
        module = Vision(checkpoint.config).eval()
    _load(module, vision_parameters(checkpoint.config), checkpoint, dtype)
    return module


def _load(module: torch.nn.Module, parameters: list[Parameter], checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    # In place, block by block: a second copy of all weights would not fit where the first one just does.
    state = module.state_dict()
    for item in parameters:
        place = state[item.name].view(-1)
        for block in checkpoint.blocks(item, dtype):
            place[: block.numel()].copy_(block.flatten())
            place = place[block.numel() :]
