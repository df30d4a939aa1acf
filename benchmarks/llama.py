"""llama.cpp on a GGUF file, measured as ``python -m runtime.bench`` measures bundles."""

from __future__ import annotations

import argparse
import ctypes
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from make_gguf import need_pip

from runtime.bench.machine import cores
from runtime.bench.measure import Loaded, measure
from runtime.bench.record import Workload, workload, workload_parser
from runtime.console.run import run
from runtime.errors import BackendError

if TYPE_CHECKING:
    from types import ModuleType

_DESCRIPTION = """\
Measures a language model in llama.cpp and prints one record, a line of JSON. A contender for

  python benchmarks/make_gguf.py build/internlm2.gguf
  python -m runtime.bench --bundle bundle/ --tiles 0 --compare "python benchmarks/llama.py --gguf build/internlm2.gguf"

It sees no pictures: visual tokens are computed as so many text tokens more, which is the same work. Settings are
llama.cpp's own: caches in float16, chunks of 512 tokens, the file mapped. Layers stay on the CPU unless
--gpu-layers moves them."""

TOKENS_PER_TILE = 256
"""Mono-InternVL's."""


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = workload_parser("python benchmarks/llama.py", _DESCRIPTION)
    parser.add_argument("--gguf", type=Path, metavar="FILE", required=True, help="the model")
    parser.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="layers to put on a GPU (default 0)")
    arguments = parser.parse_args()
    need_pip(llama_cpp="llama-cpp-python", gguf="gguf")
    what = workload(arguments)
    what = replace(what, text_tokens=what.text_tokens + TOKENS_PER_TILE * what.tiles, tiles=0)
    print(measure(what, lambda: _loaded(arguments, what)).to_json())


def _loaded(arguments: argparse.Namespace, what: Workload) -> Loaded:
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = arguments.gpu_layers
    model = llama_cpp.llama_model_load_from_file(str(arguments.gguf).encode(), parameters)
    if not model:
        raise BackendError(f"--gguf: llama.cpp cannot load {arguments.gguf}: is it there, and of a model it knows?")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    threads = what.threads or cores()
    length = what.text_tokens + what.new_tokens
    description = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')}), {threads} threads"
    name = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(model, name, len(name))
    words = name.value.decode().split()  # architecture, size, format
    return Loaded(
        backend=LlamaBackend(llama_cpp, model, length, threads, vocab_size, silence),
        embed=lambda ids: ids,
        vocab_size=vocab_size,
        image_id=-1,
        image_processor=None,
        facts={
            "name": f"{arguments.gguf}: {words[0]}, {llama_cpp.llama_model_n_layer(model)} layers, hidden "
            f"{llama_cpp.llama_model_n_embd(model)}",
            "precision": words[-1],
            "computes": description,
        },
        weight_bytes=lambda: _weight_bytes(arguments.gguf),
    )


def _weight_bytes(file: Path) -> int:
    """All weights but the embeddings, of which a token reads one row."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors if tensor.name != "token_embd.weight")


class LlamaBackend:
    """llama.cpp as a backend of the runtime. It is fed ids, which stand where the runtime has embeddings."""

    def __init__(
        self,
        library: ModuleType,
        model: Any,  # noqa: ANN401 - a pointer
        length: int,
        threads: int,
        vocab_size: int,
        silence: Any,  # noqa: ANN401 - kept alive for as long as the library may call it
    ) -> None:
        self.library, self.model, self.threads = library, model, threads
        self.vocab_size, self._silence = vocab_size, silence
        self.description, self.chunk = "llama.cpp", length  # it cuts by itself
        self.max_length, self.length_limit = length, "its caches are made for the workload"

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Never called: there are no pictures."""
        raise NotImplementedError

    def new_context(self) -> LlamaContext:
        """Empty caches for a new sequence."""
        return LlamaContext(self)


class LlamaContext:
    """A context of llama.cpp, made with its full length at the first call for room."""

    def __init__(self, backend: LlamaBackend) -> None:
        self.capacity = 0
        self._backend, self._context = backend, None

    def reserve(self, capacity: int) -> None:
        """Makes the caches, for all tokens that are to come."""
        library, length = self._backend.library, self._backend.max_length
        parameters = library.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_threads = parameters.n_threads_batch = self._backend.threads
        self._context = library.llama_init_from_model(self._backend.model, parameters)
        if not self._context:
            raise BackendError(f"llama.cpp cannot make caches for {length} tokens: measure fewer")
        self.capacity = length

    def forward(
        self, inputs_embeds: npt.NDArray[np.int64], visual_mask: npt.NDArray[np.bool_], start: int
    ) -> npt.NDArray[np.float32]:
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        library = self._backend.library
        ids = (ctypes.c_int32 * len(inputs_embeds))(*inputs_embeds.tolist())
        # Positions go on from what the context holds.
        status = library.llama_decode(self._context, library.llama_batch_get_one(ids, len(ids)))
        if status:
            raise BackendError(f"llama.cpp failed on tokens {start} to {start + len(ids)} with status {status}")
        logits = library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._backend.vocab_size,)).copy()

    def __del__(self) -> None:
        if self._context:
            self._backend.library.llama_free(self._context)


if __name__ == "__main__":
    run(main)
