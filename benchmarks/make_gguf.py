"""Writes a GGUF file of InternLM2-1.8B's shape with random Q8_0 weights, to measure llama.cpp with.

That is the text half of Mono-InternVL-2B: what decoding reads. Of the weights, only one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from make_checkpoint import SIZES

from runtime.console.console import Console
from runtime.console.files import replaced
from runtime.console.run import run
from runtime.errors import MonoedgeError

_DESCRIPTION = """\
Writes a GGUF file with the shape of InternLM2-1.8B, the language model inside Mono-InternVL-2B, and random weights in
Q8_0 (norms in float32). It has no tokenizer: benchmarks/llama.py feeds token ids.

examples:
  pip install gguf llama-cpp-python pillow tokenizers
  python benchmarks/make_gguf.py build/internlm2.gguf                        # 2.0 GB, some ten seconds
  python benchmarks/make_gguf.py build/tiny.gguf --size tiny

Nothing is kept of a run that was interrupted or failed."""

HEAD_DIM = 128
"""InternLM2's, at every size."""

BLOCK, BLOCK_BYTES = 32, 34
"""A block of Q8_0: a float16 scale, then 32 int8 values."""


def main() -> None:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = _DESCRIPTION
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to make")
    parser.add_argument(
        "--size", choices=tuple(SHAPES), default="2b", help="tiny: 2 layers, 4 MB, for a first try (default 2b)"
    )
    arguments = parser.parse_args()
    need_pip(gguf="gguf")

    shape = SHAPES[arguments.size]
    with Console().bar("weights", sum(map(math.prod, tensors(shape).values()))) as advance:
        write(arguments.output, shape, advance)
    print(f"{arguments.output} is made", file=sys.stderr)


def need_pip(**packages: str) -> None:
    """Checks for modules that no extra of monoedge brings; each with the package that has it.

    Raises:
        MonoedgeError: one is missing, with the command that adds it.
    """
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise MonoedgeError(f"{module} is not installed; this adds it: pip install {package}")


Shape = dict[str, int]
"""Sizes by their names in a checkpoint's config.json."""

SHAPES: dict[str, Shape] = {
    "2b": SIZES["2b"]["llm_config"],
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1009,
    },
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes, [out, in], as llama.cpp expects them of the architecture ``internlm2``."""
    hidden, inter, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv_rows = shape["num_key_value_heads"] * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden)}
    for layer in range(shape["num_hidden_layers"]):
        block = f"blk.{layer}."
        found |= {
            block + "attn_norm.weight": (hidden,),
            block + "attn_q.weight": (hidden, hidden),
            block + "attn_k.weight": (kv_rows, hidden),
            block + "attn_v.weight": (kv_rows, hidden),
            block + "attn_output.weight": (hidden, hidden),
            block + "ffn_norm.weight": (hidden,),
            block + "ffn_gate.weight": (inter, hidden),
            block + "ffn_up.weight": (inter, hidden),
            block + "ffn_down.weight": (hidden, inter),
        }
    return found | {"output_norm.weight": (hidden,), "output.weight": (vocab, hidden)}


def write(target: Path, shape: Shape, progress: Callable[[int], object]) -> None:
    """Writes the file.

    Args:
        target: the file to make.
        shape: sizes.
        progress: called with the number of weights just written.

    Raises:
        MonoedgeError: the target exists or cannot be written, or the disk is too small.
    """
    import gguf

    if target.exists():
        raise MonoedgeError(f"{target} exists already: choose another name, or delete it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        size = sum(map(_bytes, tensors(shape).values()))
        if (free := shutil.disk_usage(target.parent).free) < size + (16 << 20):
            raise MonoedgeError(f"{target} needs {size / 1e9:.2f} GB, there are {free / 1e9:.2f} GB free there")
        with replaced(target) as partial:
            writer = gguf.GGUFWriter(partial, "internlm2")
            _write_facts(writer, shape)
            kinds = gguf.GGMLQuantizationType
            for name, sizes in tensors(shape).items():
                kind, dtype = (kinds.F32, np.float32) if len(sizes) == 1 else (kinds.Q8_0, np.uint8)
                # A quantized tensor is announced by the shape of its bytes.
                rows = sizes if len(sizes) == 1 else (sizes[0], _bytes(sizes) // sizes[0])
                writer.add_tensor_info(name, rows, np.dtype(dtype), _bytes(sizes), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, sizes in tensors(shape).items():
                writer.write_tensor_data(np.ones(sizes, np.float32) if len(sizes) == 1 else q8_0(name, sizes))
                progress(math.prod(sizes))
            writer.close()
    except OSError as error:
        raise MonoedgeError(f"writing {target} failed: {error.strerror or error}; nothing was kept") from None


def _write_facts(writer: object, shape: Shape) -> None:
    writer.add_name("InternLM2 shape, random weights")  # type: ignore[attr-defined] # gguf is imported when needed
    for add, value in (
        ("vocab_size", shape["vocab_size"]),
        ("context_length", 32768),
        ("block_count", shape["num_hidden_layers"]),
        ("embedding_length", shape["hidden_size"]),
        ("feed_forward_length", shape["intermediate_size"]),
        ("head_count", shape["num_attention_heads"]),
        ("head_count_kv", shape["num_key_value_heads"]),
        ("rope_freq_base", 1e6),
        ("layer_norm_rms_eps", 1e-5),
        ("tokenizer_model", "no_vocab"),
    ):
        getattr(writer, f"add_{add}")(value)


def q8_0(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Random weights of about unit gain in Q8_0, as bytes, [out, in / 32 · 34]; the same for the same name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = np.empty((math.prod(shape) // BLOCK, BLOCK_BYTES), np.uint8)
    # Values of -127 … 127 spread evenly have a standard deviation of 73.
    blocks[:, :2] = np.array([1 / 73 / math.sqrt(shape[1])], np.float16).view(np.uint8)
    blocks[:, 2:] = random.integers(-127, 128, (len(blocks), BLOCK), np.int8).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * shape[0] if len(shape) == 1 else math.prod(shape) // BLOCK * BLOCK_BYTES


if __name__ == "__main__":
    run(main)
