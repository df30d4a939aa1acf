"""A quantized bundle from one that is not, and a plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx

from calibration.errors import CalibrationError
from calibration.plan import QuantizationPlan
from calibration.rewrite import Rewritten, rewrite
from calibration.weights import DecoderWeights
from plugins_trt.schema import DOMAIN, VERSION
from runtime.bundle import (
    CPU,
    DECODER_GRAPH,
    DECODER_WEIGHTS,
    MODES,
    QDQ,
    Bundle,
    Manifest,
    Quantization,
)
from runtime.bundle_writer import ALIGNMENT, Bar, BundleWriter, MakeBar


def write_quantized(
    source: Bundle,
    target: Path,
    plan: QuantizationPlan,
    *,
    form: str = QDQ,
    record: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    make_bar: MakeBar | None = None,
) -> Manifest:
    """Writes a bundle whose decoder is quantized; what else a bundle holds is shared with the source.

    Memory stays bounded: weights are read, smoothed, quantized and written some rows at a time.

    Args:
        source: not quantized.
        target: the folder to make.
        plan: what to quantize, and with which scales.
        form: ``qdq``, for TensorRT and as the reference; or ``cpu``, for ONNX Runtime on a CPU, which takes an fp32
            source and a plan of mode w8a16.
        record: further files of the bundle by name, as the calibration's record.
        overwrite: replace a bundle that is there already.
        make_bar: a progress bar over a number of bytes.

    Raises:
        CalibrationError: the source is quantized already, or the plan does not fit it or the form.
        BundleError: the target cannot be written.
    """
    check_source(source.manifest, plan.mode, form)
    weights = DecoderWeights(source, plan.smoothing)
    rewritten = rewrite(weights, plan, form)
    with BundleWriter(target, overwrite) as writer:
        size = sum(content.size for content in rewritten.contents.values())
        # The graph, and zeros between weights, are a few megabytes.
        writer.require_space(size + (16 << 20))
        with nullcontext(_NoBar()) if make_bar is None else make_bar(size) as bar:
            _write_weights(writer, rewritten, bar)
        writer.write(DECODER_GRAPH, rewritten.model.SerializeToString(deterministic=True))
        for name in source.manifest.files:
            if name not in (DECODER_GRAPH, DECODER_WEIGHTS):
                writer.link(name, source)
        for name, data in (record or {}).items():
            writer.write(name, data)
        _check_graph(writer.folder / DECODER_GRAPH)
        return writer.commit(_manifest(source.manifest, plan, form, rewritten.model))


def check_source(manifest: Manifest, mode: str, form: str) -> None:
    """Whether a bundle can be quantized so at all, before any work.

    Raises:
        CalibrationError: it cannot.
    """
    if manifest.quantization is not None:
        raise CalibrationError(
            f"the bundle is quantized already ({manifest.quantization.mode}): choose the bundle that it was made from"
        )
    if mode not in MODES:
        raise CalibrationError(f"mode {mode!r} is not known, expected one of: {', '.join(MODES)}")
    if form not in (QDQ, CPU):
        raise CalibrationError(f"form {form!r} is not known, expected one of: {QDQ}, {CPU}")
    if form == CPU and manifest.precision != "fp32":
        raise CalibrationError(
            f"the bundle is {manifest.precision}, and a CPU computes in fp32 beside INT8: export it with --dtype fp32"
        )
    if form == CPU and mode != "w8a16":
        raise CalibrationError(
            f"ONNX Runtime's CPU kernels scale activations themselves, so {mode} is not for them: choose w8a16"
        )


class _NoBar:
    def update(self, n: int) -> None:
        """Nothing is shown."""


def _write_weights(writer: BundleWriter, rewritten: Rewritten, bar: Bar) -> None:
    file = writer.open(DECODER_WEIGHTS)
    try:
        for name, content in rewritten.contents.items():
            file.pad_to(ALIGNMENT)
            start = file.size
            for block in content.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
                file.write(data.data)
                bar.update(data.nbytes)
            if file.size - start != content.size:
                raise AssertionError(f"{name} should have {content.size} bytes, got {file.size - start}")
    finally:
        file.close()
    writer.add(DECODER_WEIGHTS, file)


def _check_graph(path: Path) -> None:
    try:
        # By path: external data is looked at without being read into memory.
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CalibrationError(
            f"the quantized decoder does not pass ONNX's checks, please report this: {str(error).splitlines()[0]}"
        ) from None


def _manifest(source: Manifest, plan: QuantizationPlan, form: str, model: onnx.ModelProto) -> Manifest:
    names = [matrix.name for matrix in plan.matrices]
    experts = tuple(e for e in ("text", "visual") if any(f".feed_forward.{e}_" in name for name in names))
    return replace(
        source,
        operators=dict.fromkeys(sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN}), VERSION),
        created_by={**source.created_by, "quantized_by": f"monoedge {version('monoedge')}"},
        engines={},
        quantization=Quantization(
            mode=plan.mode,
            form=form,
            experts=experts,
            attention=any(".attention." in name for name in names),
            lm_head="lm_head.weight" in names,
        ),
    )
