"""A checkpoint on disk: found, checked as a whole before any work, and read block by block.

Only safetensors are read: other formats (pickled ``.bin`` files) can execute code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from export.checkpoint import tensors
from export.checkpoint.config import ModelConfig, read_config, read_json
from export.checkpoint.templates import template
from export.checkpoint.tokenizer import convert
from export.errors import CheckpointError
from runtime.bundle.manifest import MANIFEST
from runtime.records import find, is_folder, require_file, user_path

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the number formats that weights may have."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def locate(checkpoint: str) -> Path:
    """Returns the folder of a checkpoint: a local folder, or a hub id, which is downloaded.

    Raises:
        CheckpointError: neither a folder nor a hub id, or the download failed.
    """
    folder = user_path(checkpoint)
    if is_folder(folder, CheckpointError):
        if find(folder / MANIFEST, CheckpointError) and not find(folder / "config.json", CheckpointError):
            raise CheckpointError(f"{checkpoint} is a bundle already: name the checkpoint that it was made from")
        return folder
    if find(folder, CheckpointError) is not None:
        raise CheckpointError(f"{checkpoint} is a file: expected the folder that holds config.json")
    if not _HUB_ID.fullmatch(checkpoint) or checkpoint.startswith("."):
        raise CheckpointError(f"{checkpoint}: no such folder, and not a hub id like OpenGVLab/Mono-InternVL-2B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint}: no such folder here, and it could not be downloaded from the hub ({reason})"
        ) from None


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """A checkpoint whose config, tokenizer and tensors fit each other.

    Args:
        folder: where config.json, safetensors and tokenizer.model lie.

    Raises:
        CheckpointError: the first thing found that does not fit, in one line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: ModelConfig = read_config(folder)
        self.template = template(self.config.template)
        self.tokenizer_json = convert(folder, self.config.vocab_size)
        self._entries = _read_index(folder)
        self._check_tensors()

    @property
    def source_bytes(self) -> int:
        """Size of all tensors in the checkpoint."""
        return sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in self._entries.values())

    def blocks(self, parameter: tensors.Parameter, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yields the values of a parameter in consecutive blocks, in the number format ``dtype``.

        Raises:
            CheckpointError: a value is NaN or infinite, or too large for ``dtype``.
        """
        for block in tensors.stream(parameter, self.config, self._read_rows):
            yield _converted(block, dtype, parameter.name, self.folder)

    def _read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        # Opened anew for each block: pages that were read through a mapping count as this process's memory
        # until it is unmapped, and a checkpoint can be larger than the machine's memory.
        with safe_open(self._entries[name].file, framework="pt") as file:
            rows: torch.Tensor = file.get_slice(name)[start:stop]
            return rows.clone()

    def _check_tensors(self) -> None:
        expected = {source.name: source for source in tensors.all_sources(self.config)}
        layout = f"a Mono-InternVL {self.config.version} checkpoint with this config.json"
        for name, source in expected.items():
            if name not in self._entries:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing, {layout} has one of {source.shape}")
            entry = self._entries[name]
            if entry.shape != source.shape:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} has shape {entry.shape}, {layout} has {source.shape}"
                )
        for name, entry in self._entries.items():
            if name not in expected:
                raise CheckpointError(f"{entry.file}: tensor {name} is unexpected, {layout} has none of that name")


def _converted(block: torch.Tensor, dtype: torch.dtype, name: str, folder: Path) -> torch.Tensor:
    if not _is_finite(block):
        raise CheckpointError(f"{folder}: tensor {name} holds NaN or infinite values; the file is damaged")
    result = block.to(dtype)
    if dtype == torch.float16 and not _is_finite(result):
        raise CheckpointError(
            f"{folder}: tensor {name} holds {block.abs().max().item():g}, more than float16 can (65504); "
            "use --dtype bf16"
        )
    return result


def _is_finite(block: torch.Tensor) -> bool:
    # By the extremes, to which NaN spreads: many times faster than asking of each value.
    return bool(torch.isfinite(torch.stack(torch.aminmax(block))).all())


def _read_index(folder: Path) -> dict[str, _Entry]:
    """Reads names, shapes and files of all tensors; every shard is opened, so a truncated one is found here."""
    if find(folder / INDEX_FILE, CheckpointError) is not None:
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_FILE}: key weight_map should map tensor names to files")
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{folder / INDEX_FILE}: {shard!r:.200} is not a file name in the same folder")
            shards.setdefault(shard, []).append(name)
    elif find(folder / SINGLE_FILE, CheckpointError) is not None:
        shards = {SINGLE_FILE: []}
    else:
        raise CheckpointError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}; other formats are not read")
    entries: dict[str, _Entry] = {}
    for shard, names in shards.items():
        found = _read_shard(folder / shard)
        for name in names:
            if name not in found:
                raise CheckpointError(f"{folder / shard}: tensor {name} is missing, {INDEX_FILE} places it there")
        entries.update(found)
    return entries


def _read_shard(file: Path) -> dict[str, _Entry]:
    require_file(file, CheckpointError, f", {INDEX_FILE} names it; download the checkpoint again")
    try:
        with safe_open(file, framework="pt") as opened:
            entries = {}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                item = opened.get_slice(name)
                if (dtype := item.get_dtype()) not in DTYPES:
                    raise CheckpointError(f"{file}: tensor {name} is {dtype}, expected one of {', '.join(DTYPES)}")
                entries[name] = _Entry(file, tuple(item.get_shape()), DTYPES[dtype])
            return entries
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); download the checkpoint again") from None
