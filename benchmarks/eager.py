"""The model of ``export.model.modeling`` in eager PyTorch, measured as ``python -m runtime.bench`` measures bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from runtime.bench.measure import Loaded, measure
from runtime.bench.record import workload, workload_parser
from runtime.console.run import need, run

if TYPE_CHECKING:
    import torch

    from export.model.modeling import Decoder, Vision

_DESCRIPTION = """\
Measures a checkpoint in PyTorch, without an export, and prints one record, a line of JSON. A contender for

  python -m runtime.bench --bundle bundle/ --compare "python benchmarks/eager.py --ckpt CKPT --dtype bf16"

The modules are those that are traced for a bundle, run eagerly with all weights in memory. They are written to be
read: a cache is copied with each chunk, as ONNX's TensorScatter is defined, and attention repeats shared heads."""

DTYPES = ("fp32", "bf16", "fp16")

CHUNK, MAX_LENGTH = 512, 8192
"""Tokens computed at a time, as on ONNX Runtime, and tokens that a sequence may have."""


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = workload_parser("python benchmarks/eager.py", _DESCRIPTION)
    parser.add_argument("--ckpt", type=Path, metavar="CKPT", required=True, help="the folder of a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="what to compute in (default fp32)")
    arguments = parser.parse_args()
    need("torch", "onnx", "safetensors")
    what = workload(arguments)
    print(measure(what, lambda: _loaded(arguments.ckpt, arguments.dtype, what.threads, what.tiles > 0)).to_json())


def _loaded(folder: Path, precision: str, threads: int | None, images: bool) -> Loaded:
    import torch

    from export.bundle import image_processor
    from export.checkpoint.reader import Checkpoint
    from export.checkpoint.tensors import embedding_parameter
    from export.model.weights import DTYPES, load_decoder, load_vision

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint, dtype = Checkpoint(folder), DTYPES[precision]
    config = checkpoint.config
    decoder = load_decoder(checkpoint, dtype, MAX_LENGTH)
    embeddings = torch.cat(list(checkpoint.blocks(embedding_parameter(checkpoint.config), dtype)))
    text = [parameter for name, parameter in decoder.named_parameters() if ".visual_" not in name]
    return Loaded(
        backend=EagerBackend(decoder, load_vision(checkpoint, dtype) if images else None, dtype),
        embed=lambda ids: _to_numpy(embeddings[torch.from_numpy(ids)]),
        vocab_size=config.vocab_size,
        image_id=Tokenizer.from_str(checkpoint.tokenizer_json).token_to_id(str(checkpoint.template["image_context"])),
        image_processor=image_processor(config),
        facts={
            "name": f"{folder}: Mono-InternVL {config.version}, {config.num_hidden_layers} layers, hidden "
            f"{config.hidden_size}",
            "precision": precision,
            "computes": f"PyTorch {torch.__version__}, eager, {torch.get_num_threads()} threads",
        },
        weight_bytes=lambda: sum(parameter.nbytes for parameter in text),
    )


class EagerBackend:
    """The PyTorch modules as a backend of the runtime; ``vision`` may be None where there are no pictures."""

    def __init__(self, decoder: Decoder, vision: Vision | None, dtype: torch.dtype) -> None:
        self.decoder, self.vision, self.dtype = decoder, vision, dtype
        self.description, self.chunk, self.max_length = "PyTorch", CHUNK, MAX_LENGTH
        self.length_limit = f"the rotary table made here ends at {MAX_LENGTH}"

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """[tiles, 3, size, size] → [tiles · tokens_per_tile, hidden]."""
        import torch

        assert self.vision is not None  # noqa: S101 - there are no pictures without it
        with torch.inference_mode():
            return _to_numpy(self.vision(torch.from_numpy(pixel_values).to(self.dtype)).flatten(0, 1))

    def new_context(self) -> EagerContext:
        """Empty caches for a new sequence."""
        return EagerContext(self)


class EagerContext:
    """Caches that grow as the runtime asks."""

    def __init__(self, backend: EagerBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._caches: list[torch.Tensor] = []

    def reserve(self, capacity: int) -> None:
        """Grows the caches to at least ``capacity`` tokens; what they hold stays."""
        import torch

        attention: Any = self._backend.decoder.layers[0].attention
        shape = (1, attention.kv_heads, capacity, attention.head_dim)
        grown = [torch.zeros(shape, dtype=self._backend.dtype) for _ in range(2 * len(self._backend.decoder.layers))]
        for old, new in zip(self._caches, grown, strict=False):  # none at first
            new[:, :, : self.capacity] = old
        self._caches, self.capacity = grown, capacity

    def forward(self, inputs_embeds: npt.NDArray[Any], visual_mask: npt.NDArray[np.bool_], start: int) -> Any:  # noqa: ANN401
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        import torch

        positions = torch.arange(start, start + len(inputs_embeds))[None]
        embeds = _to_torch(inputs_embeds, self._backend.dtype)[None]
        with torch.inference_mode():
            mask = torch.from_numpy(visual_mask)[None]
            logits, self._caches = self._backend.decoder(embeds, mask, positions, positions[:, 0], self._caches)
        return logits[0].numpy()


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """bfloat16, which numpy lacks, as its bits, as a bundle holds it."""
    import torch

    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _to_torch(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.from_numpy(array).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(array)


if __name__ == "__main__":
    run(main)
