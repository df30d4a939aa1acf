"""The bundle: a folder that holds everything needed to answer, and the manifest that describes it.

The files of ``export`` are written through ``export.writer``. Names of files, keys and versions are written here and
nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import BundleError
from runtime.images.preprocess import ImageProcessor
from runtime.records import read_record

FORMAT = "monoedge-bundle"
FORMAT_VERSION = 1
"""Raised whenever a reader of the old version would misread a bundle."""

MANIFEST = "manifest.json"
VISION_GRAPH, VISION_WEIGHTS = "vision.onnx", "vision.weights"
DECODER_GRAPH, DECODER_WEIGHTS = "decoder.onnx", "decoder.weights"
VISUAL_DECODER_GRAPH, VISUAL_DECODER_WEIGHTS = "decoder_visual.onnx", "decoder_visual.weights"
"""Where they are, ``decoder.onnx`` is for text tokens alone, and these for visual ones (``Manifest.by_expert``)."""
EMBEDDINGS = "token_embeddings.bin"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.json"
RECORDING = "recording"
"""The folder of a bundle that a recorded set lies in, which ``export.recording`` makes: it is of these very graphs."""
REQUIRED_FILES = (
    VISION_GRAPH,
    VISION_WEIGHTS,
    DECODER_GRAPH,
    DECODER_WEIGHTS,
    EMBEDDINGS,
    TOKENIZER,
    CHAT_TEMPLATE,
)

PRECISIONS: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
"""Number formats of a bundle, and how numpy holds them: it has no bfloat16, so its bits are kept as uint16."""

OPERATOR_VERSIONS = {
    family + form: 1
    for family in ("FusedMoE", "ExpertLinear")
    for form in ("", "TextW8A16", "W8A16", "TextW8A8", "W8A8", "TextNBits", "NBits")
}
"""The versions of the custom operators that this runtime understands. What is quantized has operators of its own, so
that a runtime from before they were there refuses the bundle."""

MODES = ("w8a16", "w8a8")
"""INT8 weights with activations as they are, and with activations in INT8 too."""

W4A16 = "w4a16"
"""A mode of form ``cpu`` alone: 4 bits for the experts' weights, 8 for the rest."""

QDQ, CPU = "qdq", "cpu"
"""Forms of a quantized decoder: in ONNX's own operators, for TensorRT and any runtime; for ONNX Runtime on a CPU."""


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime needs to know of the model; sizes in elements, lengths in tokens."""

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
    """One TensorRT plan of the bundle, and everything that it was made from.

    Attributes:
        graph: the graph that was built, ``decoder.onnx`` or ``vision.onnx``.
        target: ``trt``, or ``trt-rtx`` for TensorRT for RTX.
        tensorrt: version of that TensorRT.
        compute_capability: the GPU that it was built for, 89 for 8.9.
        plugin_sha256: of the plugin library; empty for a plan without plugins.
        graph_sha256: of the graph file, as the manifest gave it at that time.
        weights_sha256: of the graph's weights, likewise.
        max_length: tokens that the decoder's caches hold; a vision plan carries that of its decoder.
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
    """What of the decoder is stored in INT8.

    Attributes:
        mode: one of ``MODES``, or ``W4A16``.
        form: ``QDQ`` or ``CPU``.
        experts: ``text``, or ``text`` and ``visual``; empty where none is.
        attention: the attention's matrices too; of experts, those of ``experts``.
        lm_head: the head's matrix too.
        kv_cache: caches too, of all layers or some, as their graph inputs say; in form ``CPU`` alone. Left out of
            manifests where it is false, so that a runtime from before it was there refuses the others only.
    """

    mode: str
    form: str
    experts: tuple[str, ...]
    attention: bool
    lm_head: bool
    kv_cache: bool = False

    def __post_init__(self) -> None:
        # Raised by what a newer monoedge wrote, or by what is damaged.
        if self.mode not in (*MODES, W4A16) or self.form not in (QDQ, CPU):
            raise BundleError(
                f"the bundle is quantized as {self.mode!r} in form {self.form!r}, this runtime reads "
                f"{', '.join((*MODES, W4A16))} in {QDQ} and {CPU}: update monoedge"
            )
        if not set(self.experts) <= {"text", "visual"}:
            raise BundleError(f"the bundle has quantized experts {list(self.experts)}: update monoedge")
        if any(type(part) is not bool for part in (self.attention, self.lm_head, self.kv_cache)):
            raise TypeError("attention, lm_head and kv_cache should be true or false")
        if self.kv_cache and self.form != CPU:
            raise BundleError(
                f"the bundle has INT8 caches in form {self.form}, this runtime reads them in {CPU}: update monoedge"
            )


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what the bundle holds and what made it.

    ``opset`` is that of the graphs' standard operators; 24 in manifests that do not say.
    ``engines`` are not in ``files``: a bundle answers without them, and does so after one was deleted.
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
        """Whether each kind of tokens has a decoder of its own, as ONNX Runtime on a CPU likes it.

        Both take what ``runtime.backends.graph`` lists without a mask, and write the same caches; that of visual tokens
        gives no logits.
        """
        return VISUAL_DECODER_GRAPH in self.files

    def to_json(self) -> str:
        """The manifest as indented JSON, keys in a fixed order."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self),
        }
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
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{MANIFEST} is not valid JSON ({error}); export the bundle again") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise BundleError(f'{MANIFEST} is not a bundle manifest: key "format" should be "{FORMAT}"')
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            advice = "update monoedge" if isinstance(version, int) and version > FORMAT_VERSION else "export it again"
            raise BundleError(f"the bundle has format version {version}, this runtime reads {FORMAT_VERSION}: {advice}")
        try:
            manifest = cls(
                name=_typed(values, "name", str),
                precision=_typed(values, "precision", str),
                model=_record(ModelFacts, _typed(values, "model", dict)),
                image=read_record(ImageProcessor, values["image"], f"{MANIFEST}, image"),
                operators=_typed(values, "operators", dict),
                created_by=_typed(values, "created_by", dict),
                opset=_typed({"opset": cls.opset} | values, "opset", int),
                files={name: _record(FileRecord, record) for name, record in _typed(values, "files", dict).items()},
                engines={
                    name: _record(EngineRecord, record)
                    for name, record in _typed({"engines": {}} | values, "engines", dict).items()
                },
                quantization=read_record(Quantization, values["quantization"], f"{MANIFEST}, quantization")
                if "quantization" in values
                else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST} is damaged: {error}; export the bundle again") from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.precision not in PRECISIONS:
            raise BundleError(
                f"the bundle has precision {self.precision!r}, this runtime reads {', '.join(PRECISIONS)}: "
                "update monoedge"
            )
        for name, version in self.operators.items():
            if OPERATOR_VERSIONS.get(name) != version:
                raise BundleError(
                    f"the bundle uses version {version} of operator {name}, this runtime knows "
                    f"{OPERATOR_VERSIONS.get(name, 'none')}: export it again with the monoedge installed here"
                )
        for name in (*self.files, *self.engines):
            if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
                raise BundleError(f"{MANIFEST} names {name!r}, which lies outside the bundle: not a bundle to trust")
        for name in REQUIRED_FILES:
            if name not in self.files:
                raise BundleError(f"{MANIFEST} does not list {name}: export the bundle again")


def _typed(values: dict[str, Any], key: str, kind: type) -> Any:  # noqa: ANN401 - checked right here
    value = values[key]
    if type(value) is not kind:
        raise TypeError(f"{key} should be {kind.__name__}, got {json.dumps(value)}")
    return value


def _record(kind: type, values: dict[str, Any]) -> Any:  # noqa: ANN401 - an instance of ``kind``
    types = {item.name: {"int": int, "str": str}[str(item.type)] for item in fields(kind)}
    return kind(**{name: _typed(values, name, expected) for name, expected in types.items()})
