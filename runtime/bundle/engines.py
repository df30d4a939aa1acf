"""TensorRT plans of a bundle: what their files are called, which may be used on a device, and why others may not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, VISION_GRAPH, VISION_WEIGHTS, EngineRecord, Manifest
from runtime.bundle.targets import TARGETS, Target
from runtime.errors import BackendError

FOLDER = "engines"
"""The folder of a bundle that plans lie in."""

WEIGHTS = {DECODER_GRAPH: DECODER_WEIGHTS, VISION_GRAPH: VISION_WEIGHTS}
"""The weights file of each graph that a plan is built from."""


def plan_name(graph: str, target: str, compute_capability: int, precision: str) -> str:
    """The name of a plan in its bundle and its manifest: ``engines/trt-sm87-bf16.decoder.plan``."""
    return f"{FOLDER}/{target}-sm{compute_capability}-{precision}.{Path(graph).stem}.plan"


def build_command(
    target: str,
    compute_capability: int,
    bundle: str | Path,
    max_length: int | None = None,
    max_batch: int | None = None,
) -> str:
    """The command that builds engines; what is None is left to it."""
    # TensorRT builds for the GPU at hand; TensorRT for RTX is told which.
    chip = ["--sm", str(compute_capability)] if target == "trt-rtx" else []
    length = [] if max_length is None else ["--max-length", str(max_length)]
    batch = [] if max_batch is None else ["--max-batch", str(max_batch)]
    command = ["python", "-m", "export.engine", "--bundle", str(bundle), "--target", target]
    return shlex.join([*command, *chip, *length, *batch])


def rebuild_command(record: EngineRecord, bundle: str | Path) -> str:
    """The command that builds an engine once more, in the place of this one."""
    command = build_command(record.target, record.compute_capability, bundle, record.max_length, record.max_batch)
    return f"{command} --overwrite"


def refused(name: str, reason: str, record: EngineRecord, bundle: str | Path) -> str:
    """Why a plan is not used, in one line with the command that builds it again."""
    return f"{name} {reason}: build it again with: {rebuild_command(record, bundle)}"


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
    return refused(name, reason, record, bundle)


def choose_target(
    manifest: Manifest, compute_capability: int, installed: Iterable[str], bundle: str | Path
) -> tuple[Target, dict[str, str]]:
    """Chooses the TensorRT to answer with on a GPU.

    Args:
        manifest: of the bundle.
        compute_capability: of the GPU, as 89 for 8.9.
        installed: modules of ``TARGETS`` that are there.
        bundle: the bundle's folder, for commands.

    Returns:
        The target, and the names of its plans by graph.

    Raises:
        BackendError: no TensorRT, or no plans of one that is here for this GPU; with what to do.
    """
    modules = set(installed)
    here = [target for target in TARGETS.values() if target.module in modules]
    if not here:
        ways = {target.title: f"{target.title}: {target.remedy}" for target in TARGETS.values()}
        names = dict.fromkeys(target.module for target in TARGETS.values())
        raise BackendError(f"neither {' nor '.join(names)} is installed. {'; '.join(ways.values())}")
    for target in here:
        plans = {
            record.graph: name
            for name, record in manifest.engines.items()
            if (record.target, record.compute_capability) == (target.name, compute_capability)
        }
        if all(graph in plans for graph in WEIGHTS):
            return target, plans
    built = sorted({f"{record.target} on SM {record.compute_capability}" for record in manifest.engines.values()})
    titles = dict.fromkeys(target.title for target in here)
    raise BackendError(
        f"{bundle} has no engines for {' or '.join(titles)} on SM {compute_capability}"
        f"{', only for ' + ', '.join(built) if built else ''}: build them with: "
        f"{build_command(here[0].name, compute_capability, bundle)}"
    )


def why_refused(
    name: str,
    record: EngineRecord,
    manifest: Manifest,
    plugin_sha256: str | None,
    bundle: str | Path,
    version: str,
    compute_capability: int,
) -> str | None:
    """Why a plan cannot run here, in one line with the command that builds it again; None if it can.

    Args:
        name: of the plan.
        record: what is known of it.
        manifest: of the bundle as it is now.
        plugin_sha256: of the plugin library that would be loaded.
        bundle: the bundle's folder, for the command.
        version: of the TensorRT that would run it.
        compute_capability: of the GPU.
    """
    if record.compute_capability != compute_capability:
        reason = f"was built for SM {record.compute_capability}, this GPU is SM {compute_capability}"
    elif not _same_version(record.tensorrt, version):
        reason = f"was built by version {record.tensorrt} of TensorRT, version {version} is here"
    else:
        return why_stale(name, record, manifest, plugin_sha256, bundle)
    return refused(name, reason, record, bundle)


def _same_version(a: str, b: str) -> bool:
    """Some modules leave out the last number, the build."""
    return all(x == y or "" in (x, y) for x, y in zip_longest(a.split("."), b.split("."), fillvalue=""))
