"""Writes a checkpoint of Mono-InternVL-2B's shape with random weights, to measure with.

Layout, sizes and number format are the official ones, so that files, memory and times are those of the real
model; its answers are noise. Of the weights, only one block of one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.console.console import Console
from runtime.console.files import new_folder
from runtime.console.run import need, run
from runtime.errors import MonoedgeError

if TYPE_CHECKING:
    from export.checkpoint.tensors import Source

_DESCRIPTION = """\
Writes a checkpoint with the shape of Mono-InternVL-2B and random weights in bf16: config.json, sharded
safetensors and a tokenizer with as many tokens as the real one. It exports, loads and runs like the real
model, with the same sizes and times; only its answers are noise.

examples:
  python benchmarks/make_checkpoint.py /tmp/checkpoint                       # 1.5, 6.8 GB, a minute or two
  python benchmarks/make_checkpoint.py /tmp/checkpoint-v1 --version 1.0
  python -m export.onnx --ckpt /tmp/checkpoint -o /tmp/bundle
  python -m runtime.bench --bundle /tmp/bundle --compare "python benchmarks/eager.py --ckpt /tmp/checkpoint"

Run it in a checkout that is installed with: pip install -e '.[export]'
The same seed gives the same bytes. Nothing is kept of a run that was interrupted or failed."""

TEMPLATE = Path(__file__).parents[1] / "tests" / "data" / "golden" / "tiny-v15" / "checkpoint"
"""A small checkpoint in the official layout: what is not a size is taken from it."""

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "2b": {
        "llm_config": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 92553,
        },
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    },
    "tiny": {"llm_config": {"num_hidden_layers": 2, "vocab_size": 1009}},
}
"""What differs from the template's config.json."""

SHARD_BYTES = 2_000_000_000
BLOCK_VALUES = 1 << 22
"""How many random values are in memory at a time."""

Progress = Callable[[int], object]
"""Called with the number of bytes just written."""


def main() -> None:
    """Reads the command line and writes the checkpoint."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = _DESCRIPTION
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--version",
        choices=("1.0", "1.5"),
        default="1.5",
        help="1.5 has visual experts in the attention too (default 1.5)",
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="2b", help="tiny: 2 layers, 2 MB, for a first try (default 2b)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, 0 or more (default 0)")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"argument --seed: expected 0 or more, got {arguments.seed}")

    need("torch", "onnx", "safetensors")

    output: Path = arguments.output

    make_checkpoint(output, Console(), arguments.version, arguments.size, arguments.seed)
    print(f"{output} is made; try\n  python -m export.onnx --ckpt {output} -o bundle/", file=sys.stderr)


def make_checkpoint(
    target: Path,
    console: Console,
    version: str = "1.5",
    size: str = "2b",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint.

    Args:
        target: the folder to make.
        console: shown the progress.
        version: ``1.0`` or ``1.5``.
        size: one of ``SIZES``.
        seed: of the weights; the same seed gives the same bytes.
        shard_bytes: size of the largest safetensors file, a tensor that is larger by itself excepted.

    Raises:
        MonoedgeError: the target exists or cannot be written, or the disk is too small.
    """
    from grown_tokenizer import write_tokenizer

    from export.checkpoint.config import read_config
    from export.checkpoint.reader import INDEX_FILE, Checkpoint
    from export.checkpoint.tensors import all_sources

    with new_folder(target) as folder:
        config = _config(version, size)
        _write_json(folder / "config.json", config)
        shutil.copyfile(TEMPLATE / "generation_config.json", folder / "generation_config.json")
        write_tokenizer(TEMPLATE, folder, config["llm_config"]["vocab_size"])
        sources = all_sources(read_config(folder))
        total = sum(map(_bytes, sources))
        # Config, tokenizer and index are a few megabytes.
        _require_space(folder.parent, total + (16 << 20))
        shards = list(_shards(sources, shard_bytes))
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        with console.bar("weights", total, "B") as advance:
            for name, shard in zip(names, shards, strict=True):
                _write_shard(folder / name, shard, seed, advance)
        weight_map = {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_FILE, index)
        Checkpoint(folder)  # what the exporter would refuse should not be found out there


def _config(version: str, size: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((TEMPLATE / "config.json").read_text(encoding="utf-8"))
    for section, values in SIZES[size].items():
        config[section] |= values
    config["torch_dtype"] = "bfloat16"
    if version == "1.0":
        del config["llm_config"]["attention_ve"]
    return config


# ---- weights ---------------------------------------------------------------------------------------------


def _write_shard(file: Path, sources: list[Source], seed: int, progress: Progress) -> None:
    """One safetensors file, by hand: the package's own writer wants all of its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        begin, end = end, end + _bytes(source)
        header[source.name] = {"dtype": "BF16", "shape": source.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for source in sources:
            for block in _values(source, seed):
                bits = _bfloat16(block)
                stream.write(bits.data)
                progress(bits.nbytes)


def _values(source: Source, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Random values in blocks, which keep activations near 1 in every layer.

    Each tensor has a generator of its own, so that its bytes depend on the seed and its name only.
    """
    random = np.random.default_rng([seed, zlib.crc32(source.name.encode())])
    mean, std = 0.0, 1 / math.sqrt(_fan_in(source.shape))
    if len(source.shape) == 1:
        mean, std = float(source.name.endswith(".weight")), 0.02  # a norm's weight, or a bias
    left = math.prod(source.shape)
    while left:
        block = random.standard_normal(min(left, BLOCK_VALUES), np.float32)
        block *= np.float32(std)
        block += np.float32(mean)
        yield block
        left -= len(block)


def _fan_in(shape: tuple[int, ...]) -> int:
    """How many values an output is a sum of; tables such as [1, positions, channels] are rows, not sums."""
    return math.prod(shape[1:]) if shape[0] > 1 else shape[-1]


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite values rounded to bfloat16, ties to even; overwrites ``values``."""
    bits = values.view("<u4")
    bits += 0x7FFF + (bits >> 16 & 1)
    bits >>= 16
    return bits.astype("<u2")


def _shards(sources: list[Source], shard_bytes: int) -> Iterator[list[Source]]:
    shard: list[Source] = []
    for source in sources:
        if shard and sum(map(_bytes, shard)) + _bytes(source) > shard_bytes:
            yield shard
            shard = []
        shard.append(source)
    yield shard


def _bytes(source: Source) -> int:
    return 2 * math.prod(source.shape)


# ---- files -----------------------------------------------------------------------------------------------


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise MonoedgeError(
            f"the checkpoint needs {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free: "
            "free some space, or choose another disk"
        )


def _write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
