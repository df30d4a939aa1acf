"""Mono-InternVL as it is trained: the modules that the exporter traces, with gradients, and their way into a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from export.checkpoint.config import ModelConfig
from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import (
    Parameter,
    Source,
    decoder_parameters,
    embedding_parameter,
    stream,
    unused_sources,
    vision_parameters,
)
from export.model.modeling import Decoder, Vision


@dataclass(frozen=True)
class Batch:
    """Conversations of one length, padded at the end.

    Attributes:
        ids: int64 [batch, sequence].
        labels: int64 [batch, sequence], the next token where it belongs to an answer, otherwise -100.
        seen: bool [batch, sequence], the places of what is seen: visual tokens, or words that stand for them.
        pixels: float32 [batch, 3, size, size], or None where words stand for the picture.
        words: int64 [seen places, words], padded with 0.
        weights: float32 [seen places, words], how much of each word; 0 is padding.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    seen: torch.Tensor
    pixels: torch.Tensor | None = None
    words: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class Student(nn.Module):
    """The whole model: token embeddings, vision and decoder.

    Args:
        config: sizes.
        max_length: tokens that a conversation may have in training.
    """

    def __init__(self, config: ModelConfig, max_length: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.vision = Vision(config)
        self.decoder = Decoder(config, max_length, last_only=False)

    def reset(self, seed: int) -> None:
        """Random weights: normal, narrower the more inputs are summed; norms one, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        # As loud as what the layers add to them: much quieter words are drowned, and lookups learned much later.
        tables = {"embedding": 0.5, "vision.position_embedding": 0.5}
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter.fill_(float(name.endswith("norm.weight")))
                else:
                    std = tables.get(name, parameter[0].numel() ** -0.5)
                    if name.endswith(("output.weight", "_down")):  # what is added to the residual stream
                        std /= (2 * self.config.num_hidden_layers) ** 0.5
                    parameter.normal_(0, std, generator=generator)

    def start_visual_experts(self) -> None:
        """Visual experts begin as copies of the text experts, as the official recipe has it."""
        state = self.state_dict()
        for name, value in state.items():
            if "visual_" in name:
                value.copy_(state[name.replace("visual_", "text_")])

    def visual_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What delta tuning trains: patch embedding, projector and visual experts."""
        return ((name, item) for name, item in self.named_parameters() if is_visual(name))

    def language_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What delta tuning leaves as it is: everything else."""
        return ((name, item) for name, item in self.named_parameters() if not is_visual(name))

    def train_only(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Freezes all parameters but these, which are returned."""
        wanted = set(names)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        return [parameter for name, parameter in self.named_parameters() if name in wanted]

    def in_words(self, batch: Batch) -> torch.Tensor:
        """What the seen places of a batch are in words: [seen places, hidden], their embeddings added up."""
        assert batch.words is not None  # noqa: S101 - the caller's batch has them
        return F.embedding_bag(batch.words, self.embedding, per_sample_weights=batch.weights, mode="sum")

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits after every token, float32 [batch, sequence, vocab]."""
        x, (rows, length) = F.embedding(batch.ids, self.embedding), batch.ids.shape
        if batch.pixels is not None:
            x = x.masked_scatter(batch.seen[..., None], self.vision(batch.pixels))
            visual_mask = batch.seen
        else:
            if batch.words is not None:
                x = x.masked_scatter(batch.seen[..., None], self.in_words(batch))
            visual_mask = torch.zeros_like(batch.seen)
        cache = x.new_zeros(rows, self.config.num_key_value_heads, length, self.config.head_dim)
        positions = torch.arange(length).expand(rows, length)
        start = torch.zeros(rows, dtype=torch.int64)
        logits, _ = self.decoder(x, visual_mask, positions, start, [cache] * (2 * len(self.decoder.layers)))
        result: torch.Tensor = logits
        return result


def is_visual(name: str) -> bool:
    """Whether a parameter of ``Student`` belongs to the visual part."""
    return name.startswith("vision.") or "visual_" in name


# ---- files -----------------------------------------------------------------------------------------------


def write_config(template: Path, changes: dict[str, dict[str, Any]], folder: Path) -> None:
    """Writes a checkpoint's config.json with other values, by section."""
    config: dict[str, Any] = json.loads((template / "config.json").read_text(encoding="utf-8"))
    for section, values in changes.items():
        config[section] |= values
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def save(student: Student, template: Path, changes: dict[str, dict[str, Any]], folder: Path) -> None:
    """Writes a checkpoint in the official layout, bf16.

    Args:
        student: the weights, on values that bf16 has or will be rounded to.
        template: a checkpoint whose tokenizer and remaining config it shares.
        changes: what differs from the template's config.json, by section.
        folder: where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in template.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json" and file.resolve() != folder / file.name:
            shutil.copyfile(file, folder / file.name)
    write_config(template, changes, folder)
    weights = folder / "model.safetensors"
    save_file(official_tensors(student), weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def official_tensors(student: Student) -> dict[str, torch.Tensor]:
    """The weights under the names and in the layout of official checkpoints, bf16."""
    config, tensors = student.config, dict[str, torch.Tensor]()

    def put(source: Source) -> torch.Tensor:
        return tensors.setdefault(source.name, torch.zeros(source.shape, dtype=torch.bfloat16))

    (embedding,) = embedding_parameter(config).sources
    put(embedding).copy_(student.embedding.detach())
    for source in unused_sources(config):
        put(source)
    for module, parameters in (
        (student.vision, vision_parameters(config)),
        (student.decoder, decoder_parameters(config)),
    ):
        state = module.state_dict()
        for parameter in parameters:
            _scatter(parameter, state[parameter.name], config, [put(source) for source in parameter.sources])
    return tensors


def _scatter(parameter: Parameter, value: torch.Tensor, config: ModelConfig, targets: list[torch.Tensor]) -> None:
    """Undoes ``export.checkpoint.tensors.stream``.

    Numbered places are read through it, which tells where each value belongs.
    """
    starts = dict(
        zip(parameter.sources, torch.tensor([0, *map(torch.numel, targets)]).cumsum(0).tolist(), strict=False)
    )
    by_name = {source.name: source for source in parameter.sources}

    def places(name: str, start: int, stop: int) -> torch.Tensor:
        source = by_name[name]
        size = torch.Size(source.shape).numel()
        return (starts[source] + torch.arange(size)).reshape(source.shape)[start:stop]

    order = torch.cat([block.flatten() for block in stream(parameter, config, places)])
    flat = torch.cat([target.flatten() for target in targets])
    flat[order] = value.flatten().to(flat.dtype)
    for target, part in zip(targets, flat.split([target.numel() for target in targets]), strict=True):
        target.copy_(part.reshape(target.shape))


def load(folder: Path, max_length: int) -> Student:
    """A student with a checkpoint's weights.

    Raises:
        CheckpointError: it is none.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    student = Student(config, max_length)
    state = student.state_dict()
    items = [("", embedding_parameter(config))]
    items += [("vision.", item) for item in vision_parameters(config)]
    items += [("decoder.", item) for item in decoder_parameters(config)]
    for prefix, item in items:
        values = torch.cat([block.flatten() for block in checkpoint.blocks(item, torch.float32)])
        state[prefix + item.name].copy_(values.reshape(item.shape))
    return student
