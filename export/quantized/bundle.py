"""A quantized bundle from one that is not, and a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import runtime
from export.errors import QuantizationError
from export.external_data import operators, write_graphs
from export.quantized.plan import QuantizationPlan
from export.quantized.quantizable import Matrix
from export.quantized.rewrite import decoder_files
from export.quantized.weights import DecoderWeights
from export.writer import BundleWriter, require_space
from plugins_trt.function import OPSET
from plugins_trt.schema import W8A8
from runtime.bundle.manifest import (
    CPU,
    DECODER_GRAPH,
    DECODER_WEIGHTS,
    MODES,
    PRECISIONS,
    QDQ,
    RECORDING,
    W4A16,
    Manifest,
)
from runtime.bundle.reader import Bundle
from runtime.console.console import SILENT, Console


def write_quantized(
    source: Bundle | DecoderWeights,
    target: Path,
    plan: QuantizationPlan,
    *,
    form: str = QDQ,
    record: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    console: Console = SILENT,
) -> Manifest:
    """Writes a bundle whose decoder is quantized; what else a bundle holds is shared with the source.

    Memory stays bounded: weights are read, smoothed, quantized and written some rows at a time.

    Args:
        source: not quantized; or its weights, where the graph is parsed already.
        target: the folder to make.
        plan: what to quantize, and with which scales.
        form: ``qdq``, for TensorRT and as the reference; or ``cpu``, for ONNX Runtime on a CPU, which takes an fp32
            source and a plan of mode w8a16 or w4a16.
        record: further files of the bundle by name, such as the report of a calibration.
        overwrite: replace a bundle that is there already.
        console: shows each step and the progress.

    Raises:
        QuantizationError: the source is quantized already, or the plan does not fit it or the form.
        BundleError: the source cannot be read, or the target cannot be written.
    """
    weights = DecoderWeights(source) if isinstance(source, Bundle) else source
    source = weights.bundle
    check_source(source.manifest, plan.mode, form, kv_cache=bool(plan.caches))
    graphs = decoder_files(weights.smoothed(plan.smoothing), plan, form, source.manifest.model)
    kept = _kept(source.manifest)
    with BundleWriter(target, overwrite) as writer:
        write_graphs(writer, graphs, console, other_bytes=sum(source.manifest.files[name].size for name in kept))
        for name in kept:
            writer.copy(name, source)
        for name, data in (record or {}).items():
            writer.write(name, data)
        made_by = {**source.manifest.created_by, "quantized_by": f"monoedge {runtime.__version__}"}
        entry = plan.manifest_entry(form)
        return writer.commit(
            replace(source.manifest, operators=operators(graphs), created_by=made_by, engines={}, quantization=entry)
        )


def require_room(source: Bundle, target: Path, matrices: Collection[Matrix]) -> None:
    """Checks that the disk holds what ``write_quantized`` will make in 8 bits, before any work.

    Raises:
        BundleError: it does not, with both numbers.
    """
    manifest = source.manifest
    saved = sum(matrix.out * matrix.channels for matrix in matrices) * (PRECISIONS[manifest.precision].itemsize - 1)
    require_space(target, sum(manifest.files[name].size for name in (DECODER_WEIGHTS, *_kept(manifest))) - saved)


def _kept(manifest: Manifest) -> list[str]:
    """Names the files that a quantized bundle shares: all but the decoder and its recorded set."""
    decoder = (DECODER_GRAPH, DECODER_WEIGHTS)
    return [name for name in manifest.files if name not in decoder and Path(name).parts[0] != RECORDING]


def check_source(manifest: Manifest, mode: str, form: str, kv_cache: bool = False) -> None:
    """Checks that a bundle can be quantized in this way, before any work.

    Raises:
        QuantizationError: it cannot be.
    """
    if manifest.quantization is not None:
        raise QuantizationError(
            f"the bundle is quantized already ({manifest.quantization.mode}): choose the bundle that it was made from"
        )
    if form not in (QDQ, CPU):
        raise QuantizationError(f"form {form!r} is not known, expected one of: {QDQ}, {CPU}")
    known = (*MODES, W4A16) if form == CPU else MODES
    if mode not in known:
        raise QuantizationError(f"mode {mode!r} is not known, expected one of: {', '.join(known)}")
    if manifest.by_expert:
        raise QuantizationError("the bundle is made for a CPU already: export one without --target cpu")
    if form == CPU and manifest.precision != "fp32":
        raise QuantizationError(
            f"the bundle is {manifest.precision}, and a CPU computes in fp32 beside INT8: export it with --dtype fp32"
        )
    if form == CPU and mode == W8A8:
        raise QuantizationError(
            f"mode {mode} fixes scales of activations, which ONNX Runtime's CPU kernels choose themselves: choose w8a16"
        )
    if form != CPU and kv_cache:
        raise QuantizationError(f"INT8 caches are not for form {form}: choose --form cpu, or leave out --kv-cache")
    if kv_cache and manifest.opset < OPSET:
        raise QuantizationError(
            f"INT8 caches need graphs of opset {OPSET}, and the bundle's are of opset {manifest.opset}: export it "
            "without --target"
        )
