"""TensorRT plans of a bundle: what their files are called, which may be used on a device, and why others may not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, VISION_GRAPH, VISION_WEIGHTS, EngineRecord, Manifest
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import PORTABLE_TARGET, TARGETS, Target
from runtime.errors import BackendError

FOLDER = "engines"
"""The folder of a bundle that plans lie in."""

WEIGHTS = {DECODER_GRAPH: DECODER_WEIGHTS, VISION_GRAPH: VISION_WEIGHTS}
"""The weights file of each graph that a plan is built from."""

Plans = Mapping[str, tuple[Path, EngineRecord]]
"""The plan of each graph: its file, and what is known of it."""


def plan_name(graph: str, target: str, compute_capability: int, precision: str) -> str:
    """Returns the name of a plan in its bundle and its manifest: ``engines/trt-sm87-bf16.decoder.plan``."""
    return f"{FOLDER}/{target}-sm{compute_capability}-{precision}.{Path(graph).stem}.plan"


def build_command(target: Target, compute_capability: int, bundle: str | Path, *options: object) -> str:
    """Returns the command that builds engines for a GPU; what ``options`` leave out has its default."""
    # TensorRT builds for the GPU at hand; TensorRT for RTX is told which.
    chip = ["--sm", compute_capability] if target.capabilities else []
    command = ["python", "-m", "export.engine", "--bundle", bundle, "--target", target.name, *chip, *options]
    return shlex.join(map(str, command))


def next_command(manifest: Manifest, bundle: str | Path, picture: bool = True) -> str:
    """Returns the command that a new bundle is for: a question, or for bf16, which no CPU computes, engines.

    Args:
        manifest: of the bundle.
        bundle: its folder.
        picture: whether the question is about a picture.
    """
    if manifest.precision == "bf16":
        return build_command(TARGETS["trt" if manifest.opset >= Manifest.opset else PORTABLE_TARGET], 0, bundle)
    asked = '--image PHOTO "What is in the picture?"' if picture else '"Who are you?"'
    return f"python -m runtime.chat --bundle {shlex.quote(str(bundle))} {asked}"


def rebuild_command(record: EngineRecord, bundle: str | Path) -> str:
    """Returns the command that builds an engine again, in the place of this one."""
    lengths = ("--max-length", record.max_length, "--max-batch", record.max_batch)
    return build_command(TARGETS[record.target], record.compute_capability, bundle, *lengths, "--overwrite")


def refused(name: str, reason: str, record: EngineRecord, bundle: str | Path) -> str:
    """Returns one line: why a plan is not used, and the command that builds it again."""
    return f"{name} {reason}: build it again with: {rebuild_command(record, bundle)}"


def why_stale(
    name: str, record: EngineRecord, manifest: Manifest, plugin_sha256: str | None, bundle: str | Path
) -> str | None:
    """Returns why a plan does not belong to the bundle as it is now, with the command that builds it again.

    Args:
        name: of the plan.
        record: what is known of it.
        manifest: of the bundle as it is now.
        plugin_sha256: of the plugin library that would be loaded; None compares no library.
        bundle: the bundle's folder, for the command.

    Returns:
        One line, or None for a plan that may be used.
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
        reason = f"was built with another plugin (SHA-256 {record.plugin_sha256[:12]}…, now {plugin_sha256[:12]}…)"
    elif record.max_length > manifest.model.max_length:
        reason = f"was built for {record.max_length} tokens, the bundle has {manifest.model.max_length}"
    else:
        return None
    return refused(name, reason, record, bundle)


def why_foreign(
    name: str, record: EngineRecord, version: str, compute_capability: int, bundle: str | Path
) -> str | None:
    """Returns why a plan cannot run on this machine, with the command that builds it again.

    Args:
        name: of the plan.
        record: what is known of it.
        version: of the TensorRT that would run it.
        compute_capability: of the GPU.
        bundle: the bundle's folder, for the command.

    Returns:
        One line, or None for a plan that can run.
    """
    if record.compute_capability != compute_capability:
        reason = f"was built for SM {record.compute_capability}, this GPU is SM {compute_capability}"
    elif not _same_version(record.tensorrt, version):
        reason = f"was built by version {record.tensorrt} of TensorRT, version {version} is here"
    else:
        return None
    return refused(name, reason, record, bundle)


def choose_plans(bundle: Bundle, compute_capability: int) -> Plans:
    """Chooses the plans to answer with on a GPU: those of the first installed TensorRT that has both.

    Raises:
        BackendError: no TensorRT is installed, or the bundle has no plans of one for this GPU; with what to do.
    """
    here = [target for target in TARGETS.values() if target.installed]
    if not here:
        modules = dict.fromkeys(target.module for target in TARGETS.values())
        ways = dict.fromkeys(f"{target.title}: {target.remedy}" for target in TARGETS.values())
        raise BackendError(f"neither {' nor '.join(modules)} is installed. {'; '.join(ways)}")
    engines = bundle.manifest.engines
    for target in here:
        plans = {
            record.graph: (bundle.path(name), record)
            for name, record in engines.items()
            if (record.target, record.compute_capability) == (target.name, compute_capability)
        }
        if all(graph in plans for graph in WEIGHTS):
            return plans
    titles = dict.fromkeys(target.title for target in here)
    built = sorted({f"{record.target} on SM {record.compute_capability}" for record in engines.values()})
    raise BackendError(
        f"{bundle.folder} has no engines for {' or '.join(titles)} on SM {compute_capability}"
        f"{', only for ' + ', '.join(built) if built else ''}: build them with: "
        f"{build_command(here[0], compute_capability, bundle.folder)}"
    )


def _same_version(a: str, b: str) -> bool:
    """Some modules leave out the last number, the build."""
    return all(x == y or "" in (x, y) for x, y in zip_longest(a.split("."), b.split("."), fillvalue=""))
