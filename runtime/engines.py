"""TensorRT plans of a bundle: what their files are called, and whether one still belongs to the bundle it lies in."""

from __future__ import annotations

import shlex
from pathlib import Path

from runtime.bundle import DECODER_GRAPH, DECODER_WEIGHTS, VISION_GRAPH, VISION_WEIGHTS, EngineRecord, Manifest

FOLDER = "engines"
"""The folder of a bundle that plans lie in."""

WEIGHTS = {DECODER_GRAPH: DECODER_WEIGHTS, VISION_GRAPH: VISION_WEIGHTS}
"""The weights file of each graph that a plan is built from."""


def plan_name(graph: str, target: str, compute_capability: int, precision: str) -> str:
    """The name of a plan in its bundle and its manifest: ``engines/trt-sm87-bf16.decoder.plan``."""
    return f"{FOLDER}/{target}-sm{compute_capability}-{precision}.{Path(graph).stem}.plan"


def rebuild_command(record: EngineRecord, bundle: str | Path) -> str:
    """The command that builds an engine once more, in the place of this one."""
    # TensorRT builds for the GPU at hand; TensorRT for RTX is told which.
    chip = ["--sm", str(record.compute_capability)] if record.target == "trt-rtx" else []
    lengths = ["--max-length", str(record.max_length), "--max-batch", str(record.max_batch)]
    command = ["python", "-m", "export.engine", "--bundle", str(bundle), "--target", record.target]
    return shlex.join([*command, *chip, *lengths, "--overwrite"])


def why_stale(
    name: str, record: EngineRecord, manifest: Manifest, plugin_sha256: str | None, bundle: str | Path
) -> str | None:
    """Why a plan must not be used any more, in one line with the command that builds it again; None if it may.

    Args:
        name: of the plan in the manifest.
        record: what the manifest says of it.
        manifest: of the bundle as it is now.
        plugin_sha256: of the plugin library that would be loaded; None to leave that out.
        bundle: the bundle's folder, for the command.
    """
    now = manifest.files
    weights = WEIGHTS.get(record.graph)
    if weights is None or record.graph not in now:
        reason = f"was built from {record.graph}, which the bundle does not have"
    elif record.graph_sha256 != now[record.graph].sha256:
        reason = f"was built from another {record.graph} than the bundle has now"
    elif record.weights_sha256 != now[weights].sha256:
        reason = f"was built with other {weights} than the bundle has now"
    elif record.plugin_sha256 and plugin_sha256 is not None and record.plugin_sha256 != plugin_sha256:
        reason = (
            f"was built with another plugin library (SHA-256 {record.plugin_sha256[:12]}…, now {plugin_sha256[:12]}…)"
        )
    elif record.max_length > manifest.model.max_length:
        reason = f"was built for {record.max_length} tokens, the bundle has {manifest.model.max_length}"
    else:
        return None
    return f"{name} {reason}: build it again with: {rebuild_command(record, bundle)}"
