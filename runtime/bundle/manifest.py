"""The bundle: a folder that holds everything needed to answer, and the manifest that describes it.

Names of files, keys and versions are defined here and nowhere else. ``export.writer`` writes bundles.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError
from runtime.images.preprocess import ImageProcessor
from runtime.records import parse_json, read_record

T = TypeVar("T")

FORMAT = "monoedge-bundle"
FORMAT_VERSION = 1
"""Raised whenever a reader of the old version would misread a bundle."""

_AGAIN = "export the bundle again"

MANIFEST = "manifest.json"
VISION_GRAPH, VISION_WEIGHTS = "vision.onnx", "vision.weights"
DECODER_GRAPH, DECODER_WEIGHTS = "decoder.onnx", "decoder.weights"
VISUAL_DECODER_GRAPH, VISUAL_DECODER_WEIGHTS = "decoder_visual.onnx", "decoder_visual.weights"
"""The decoder of visual tokens, in bundles whose ``decoder.onnx`` takes text tokens alone (``Manifest.by_expert``)."""
EMBEDDINGS = "token_embeddings.bin"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.json"
RECORDING = "recording"
"""The folder of a bundle that its recorded set lies in; ``export.recording`` makes it from the bundle's own graphs."""
REQUIRED_FILES = (VISION_GRAPH, VISION_WEIGHTS, DECODER_GRAPH, DECODER_WEIGHTS, EMBEDDINGS, TOKENIZER, CHAT_TEMPLATE)

PRECISIONS: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
"""Number formats of a bundle, and how numpy holds them: it has no bfloat16, so uint16 keeps its bits."""


def to_format(values: npt.NDArray[np.float32], target: npt.NDArray[Any]) -> None:
    """Writes finite float32 values to an array of a bundle's number format. bfloat16 is bits, rounded half to even."""
    if target.dtype != np.uint16:
        target[...] = values
        return
    bits = np.ascontiguousarray(values).view(np.uint32)
    target[...] = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16


OPERATOR_VERSIONS = {
    family + form: 1
    for family in ("FusedMoE", "ExpertLinear")
    for form in ("", "TextW8A16", "W8A16", "TextW8A8", "W8A8", "TextNBits", "NBits")
}
"""The versions of the custom operators that this runtime understands. Quantized nodes are operators of their own, so
that an older runtime, which does not know them, refuses the bundle."""

MODES = ("w8a16", "w8a8")
"""INT8 weights: with activations in the bundle's number format, and with activations in INT8 too."""

W4A16 = "w4a16"
"""A mode of form ``cpu`` only: 4 bits for the experts' weights, 8 for the rest."""

QDQ, CPU = "qdq", "cpu"
"""Forms of a quantized decoder: ``qdq``, in ONNX's own operators, for TensorRT and any runtime; ``cpu``, for ONNX
Runtime on a CPU."""


def weights_of(graph: str) -> str:
    """Returns the name of the file that holds a graph's weights."""
    return graph.removesuffix(".onnx") + ".weights"


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime needs to know about the model; sizes in elements, lengths in tokens."""

    version: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_length: int


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class EngineRecord(FileRecord):
    """One TensorRT plan of the bundle, and everything that it was built from.

    Attributes:
        graph: the graph, ``decoder.onnx`` or ``vision.onnx``.
        target: ``trt``, or ``trt-rtx`` for TensorRT for RTX.
        tensorrt: the version of TensorRT.
        compute_capability: that of the GPU that it runs on, 89 for 8.9.
        plugin_sha256: SHA-256 of the plugin library; empty for a plan without plugins.
        graph_sha256: SHA-256 of the graph's file.
        weights_sha256: SHA-256 of the graph's weights.
        max_length: tokens that the decoder's caches hold; a vision plan has the number of its decoder.
        max_batch: conversations that the decoder computes at once; likewise.
    """

    graph: str
    target: str
    tensorrt: str
    compute_capability: int
    plugin_sha256: str
    graph_sha256: str
    weights_sha256: str
    max_length: int
    max_batch: int


@dataclass(frozen=True)
class Quantization:
    """Which parts of the decoder are quantized.

    Attributes:
        mode: one of ``MODES``, or ``W4A16``.
        form: ``QDQ`` or ``CPU``.
        experts: the quantized experts: ``text``, ``text`` and ``visual``, or none.
        attention: whether the attention's matrices are; where experts have their own, those of ``experts``.
        lm_head: whether the head's matrix is.
        kv_cache: whether caches of some layers are INT8, as their graph inputs say; in form ``CPU`` only. Manifests
            leave it out where it is false, so that an older runtime refuses only bundles with such caches.
    """

    mode: str
    form: str
    experts: tuple[str, ...]
    attention: bool
    lm_head: bool
    kv_cache: bool = False

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, W4A16) or self.form not in (QDQ, CPU):
            raise BundleError(
                f"the bundle is quantized as {self.mode!r} in form {self.form!r}, this runtime reads "
                f"{', '.join((*MODES, W4A16))} in {QDQ} and {CPU}: update monoedge"
            )
        if not set(self.experts) <= {"text", "visual"}:
            raise BundleError(f"the bundle's experts are {list(self.experts)}, not text or visual: update monoedge")
        for name in ("attention", "lm_head", "kv_cache"):
            _typed(vars(self), name, bool)
        if self.kv_cache and self.form != CPU:
            raise BundleError(f"the bundle has INT8 caches in form {self.form}, not {CPU}: update monoedge")


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what the bundle holds and what made it.

    Attributes:
        name: that of the checkpoint.
        precision: one of ``PRECISIONS``.
        model: facts of the model.
        image: how images are cut.
        operators: the custom operators in the graphs, with their versions.
        created_by: packages that made the bundle, with their versions.
        opset: that of the graphs' standard operators; 24 in manifests that do not say.
        files: all files but the engines, which a bundle can answer without.
        engines: the TensorRT plans.
        quantization: None for a float decoder.
    """

    name: str
    precision: str
    model: ModelFacts
    image: ImageProcessor
    operators: dict[str, int]
    created_by: dict[str, str]
    opset: int = 24
    files: dict[str, FileRecord] = field(default_factory=dict)
    engines: dict[str, EngineRecord] = field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def by_expert(self) -> bool:
        """Whether text and visual tokens have a decoder each, which is faster in ONNX Runtime on a CPU.

        Both take the inputs of ``runtime.backends.graph`` without the mask, and write the same caches; that of visual
        tokens gives no logits.
        """
        return VISUAL_DECODER_GRAPH in self.files

    def to_json(self) -> str:
        """Returns the manifest as indented JSON, keys in a fixed order."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        for optional in ("engines", "quantization"):
            if not values[optional]:
                del values[optional]
        if self.quantization is not None and not self.quantization.kv_cache:
            del values["quantization"]["kv_cache"]
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads a manifest.

        Raises:
            BundleError: not a manifest, or of a version that this runtime does not understand.
        """
        values = parse_json(text, MANIFEST, remedy=f"; {_AGAIN}")
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise BundleError(f'{MANIFEST} is not the manifest of a bundle: expected "{FORMAT}" under the key "format"')
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            advice = "update monoedge" if isinstance(version, int) and version > FORMAT_VERSION else "export it again"
            known = f"this runtime reads {FORMAT_VERSION}"
            raise BundleError(f"the bundle has format version {version!r:.200}, {known}: {advice}")
        values = {"opset": cls.opset, "engines": {}, "quantization": None} | values
        kinds = {"name": str, "precision": str, "operators": dict, "created_by": dict, "opset": int}
        quantization, of_what = values["quantization"], f"{MANIFEST}, quantization"
        try:
            manifest = cls(
                **{name: _typed(values, name, kind) for name, kind in kinds.items()},
                model=_record(ModelFacts, _typed(values, "model", dict)),
                image=read_record(ImageProcessor, values["image"], f"{MANIFEST}, image"),
                files=_records(FileRecord, _typed(values, "files", dict)),
                engines=_records(EngineRecord, _typed(values, "engines", dict)),
                quantization=None if quantization is None else read_record(Quantization, quantization, of_what),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST} is damaged: {error}; {_AGAIN}") from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.precision not in PRECISIONS:
            known = f"this runtime reads {', '.join(PRECISIONS)}"
            raise BundleError(f"the bundle has precision {self.precision!r:.200}, {known}: update monoedge")
        for name, version in self.operators.items():
            if type(version) is not int or OPERATOR_VERSIONS.get(name) != version:
                raise BundleError(
                    f"the bundle uses version {version} of operator {name}, this runtime knows "
                    f"{OPERATOR_VERSIONS.get(name, 'none')}: export it again with the monoedge installed here"
                )
        facts: dict[str, Any] = {**vars(self.model), **vars(self.image), "opset": self.opset}
        for name, value in facts.items():
            most = {"num_hidden_layers": 1 << 10, "image_size": 1 << 14}.get(name, 1 << 31)
            if type(value) is int and not 1 <= value <= most:
                raise BundleError(f"{MANIFEST}: {name} should be from 1 to {most:,}, got {value:,}: {_AGAIN}")
        for name in REQUIRED_FILES:
            if name not in self.files:
                raise BundleError(f"{MANIFEST} does not list {name}: {_AGAIN}")


def _typed(values: dict[str, Any], key: str, kind: type) -> Any:  # noqa: ANN401 - checked right here
    value = values[key]
    if type(value) is int and not 0 <= value < 1 << 63:
        raise TypeError(f"{key} is out of range: {value!r:.200}")
    if type(value) is not kind:
        raise TypeError(f"{key} should be {kind.__name__}, got {value!r:.200}")
    return value


def _record(kind: type[T], values: dict[str, Any]) -> T:
    """Reads a dataclass of whole numbers and strings; what else is there is of a newer monoedge."""
    types = {item.name: {"int": int, "str": str}[str(item.type)] for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: _typed(values, name, expected) for name, expected in types.items()})


def _records(kind: type[T], values: dict[str, Any]) -> dict[str, T]:
    for name in values:
        # Written as pathlib writes it, so that no file has two names.
        whole = bool(name) and name.isprintable() and "\\" not in name and str(PurePosixPath("/", name)) == f"/{name}"
        if not whole or ".." in name.split("/"):
            raise BundleError(f"{MANIFEST} names {name!r:.200}, which lies outside the bundle: do not trust it")
    return {name: _record(kind, record) for name, record in values.items()}
