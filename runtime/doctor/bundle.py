"""A bundle: whether it is whole, whether it fits, its engines, and the backends that would answer from it here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from runtime.backends import NAMES
from runtime.bundle.engines import WEIGHTS, choose_plans, next_command, refused, why_foreign, why_stale
from runtime.bundle.manifest import PRECISIONS, RECORDING, EngineRecord, Manifest, weights_of
from runtime.bundle.reader import Bundle, sha256_of, size_text
from runtime.bundle.targets import TARGETS
from runtime.console.console import Console
from runtime.doctor.children import TrialError, attempt
from runtime.doctor.gpu import Gpu, memory
from runtime.doctor.report import ALL, CPU, MISSING, OK, TENSORRT, WRONG, Finding
from runtime.errors import BackendError, BundleError
from runtime.records import find


def opened(folder: str, verify: bool, console: Console) -> tuple[Finding, Bundle | None]:
    """Opens a bundle; its files are read whole only to verify them."""
    try:
        bundle = Bundle(folder)
        compared = "sizes are right"
        if verify:
            whole = sum(record.size for record in (bundle.manifest.files | bundle.manifest.engines).values())
            with console.bar("verifying", whole, "B") as advance:
                bundle = Bundle(folder, verify=True, progress=advance)
            compared = "sizes and SHA-256 are right"
    except BundleError as error:
        return Finding("files", WRONG, str(error), needed_by=ALL), None
    manifest = bundle.manifest
    size = size_text(sum(record.size for record in manifest.files.values()))
    kind = manifest.precision
    if manifest.quantization is not None:
        kind += f", {manifest.quantization.mode} of form {manifest.quantization.form}"
    facts = f"{manifest.name}, {kind}, opset {manifest.opset}, {len(manifest.files)} files, {size}"
    return Finding("files", OK, f"{folder}: {facts}; {compared}", needed_by=ALL), bundle


def fit(bundle: Bundle, gpu: Gpu, root: Path = Path("/")) -> Iterator[Finding]:
    """Compares what answering takes with the memory that is free."""
    manifest = bundle.manifest
    weights = sum(manifest.files[weights_of(name)].size for name in manifest.files if name.endswith(".onnx"))
    longest = _caches(manifest, manifest.model.max_length)
    needs = f"weights {size_text(weights)}, caches up to {size_text(longest)} for {manifest.model.max_length} tokens"
    free = memory(root, "MemAvailable")
    if free is not None:
        found = f"{needs}; {size_text(free)} available"
        remedy = "end what takes memory, or calibrate to INT8 (docs/calibration.md): weights are read from disk again"
        if weights <= free:
            yield Finding("main memory", OK, found, needed_by=CPU)
        else:
            yield Finding("main memory", WRONG, found, f"{remedy} and again", CPU)
    if gpu.device is None or manifest.by_expert:
        return
    device = gpu.device
    # What CUDA calls free on a Jetson leaves out what the system would give back (CUDA for Tegra, "Memory Selection").
    room = max(device.free_memory, (free or 0) if gpu.jetson else 0)
    here = _here(manifest, device.capability)
    if here:
        length = max(record.max_length for record in here.values())
        plans = sum(record.size for record in here.values())
        total, what = plans + _caches(manifest, length), f"engines {size_text(plans)}, caches for {length} tokens"
        remedy = "build the engine for fewer tokens (--max-length), calibrate to INT8, or end what takes the memory"
    else:
        total, what = max(manifest.files[name].size for name in WEIGHTS.values()), "a build, the weights at least"
        remedy = "build on a larger GPU of this kind, or calibrate to INT8 first (docs/calibration.md)"
    found = f"{size_text(total)} for {what}; {size_text(room)} of {size_text(device.total_memory)} free"
    status = OK if total <= room else WRONG
    yield Finding("GPU's memory", status, found, remedy * (status != OK), TENSORRT)


def engines(bundle: Bundle, gpu: Gpu, versions: Mapping[str, str], library: Path | None) -> Iterator[Finding]:
    """Looks at the engines in the manifest: those for this GPU, stale ones, and whether this GPU has any.

    Args:
        bundle: that they are of.
        gpu: that they should be for.
        versions: of the modules of TensorRT, by their names.
        library: the plugin library that they should be built with; None where there is none that can be used.
    """
    manifest, folder = bundle.manifest, bundle.folder
    if manifest.by_expert:
        yield Finding("engines", OK, "none: the bundle is made for ONNX Runtime on a CPU")
        return
    plugin_sha256 = sha256_of(library) if manifest.engines and library is not None else None
    for name, record in manifest.engines.items():
        version = versions.get(TARGETS[record.target].module) if record.target in TARGETS else None
        reason = _why_not(bundle, name, record, plugin_sha256)
        is_for = f"{record.target} {record.tensorrt}, SM {record.compute_capability}, {record.max_length} tokens"
        if gpu.device is not None and record.compute_capability != gpu.device.capability:
            yield Finding(name, OK, f"for {is_for}: another GPU than this one, which is SM {gpu.device.capability}")
            continue
        if gpu.device is not None and version and not reason:
            reason = why_foreign(name, record, version, gpu.device.capability, folder)
        if reason:
            yield Finding(name, WRONG, reason.removeprefix(f"{name} "), needed_by=TENSORRT)
        else:
            yield Finding(name, OK, f"for {is_for}; of this bundle")
    if gpu.device is not None:
        try:
            choose_plans(bundle, gpu.device.capability)
        except BackendError as error:
            yield Finding("engines", MISSING, str(error), needed_by=TENSORRT)
    elif not manifest.engines and manifest.precision == "fp32":
        found = "none, and TensorRT builds none from fp32"
        yield Finding("engines", MISSING, found, "for a GPU export the bundle with --dtype bf16", TENSORRT)
    elif not manifest.engines:
        yield Finding("engines", MISSING, "none", f"on the device: {next_command(manifest, folder)}", TENSORRT)


def backends(bundle: Bundle) -> Iterator[Finding]:
    """Lets each backend do all that it does before it reads weights."""
    for name in NAMES:
        try:
            found = attempt("backend", name=name, bundle=str(bundle.folder.absolute()))
        except TrialError as error:
            yield Finding(name, MISSING, str(error), needed_by=(name,))
        else:
            yield Finding(name, OK, f"{found}, ready to read weights", needed_by=(name,))


def why_untried(bundle: Bundle, capability: int) -> tuple[str, str]:
    """Returns why the engines of a GPU cannot be compared with what was recorded, and what to do; empty if they can."""
    if not _here(bundle.manifest, capability):
        return "the bundle has none for this GPU", ""
    if not any(name.startswith(f"{RECORDING}/") for name in bundle.manifest.files):
        remedy = f"python -m export.recording --bundle {shlex.quote(str(bundle.folder))}"
        return "the bundle has no recorded set to compare them with", remedy
    return "", ""


def _why_not(bundle: Bundle, name: str, record: EngineRecord, plugin_sha256: str | None) -> str | None:
    found = find(bundle.path(name))
    if found is None or found.st_size != record.size:
        what = "is missing" if found is None else f"has {found.st_size:,} bytes, its record says {record.size:,}"
        return refused(name, what, record, bundle.folder)
    return why_stale(name, record, bundle.manifest, plugin_sha256, bundle.folder)


def _here(manifest: Manifest, capability: int) -> dict[str, EngineRecord]:
    """Returns the engines for a GPU, by their graphs."""
    return {item.graph: item for item in manifest.engines.values() if item.compute_capability == capability}


def _caches(manifest: Manifest, tokens: int) -> int:
    """Returns the bytes of a conversation's caches; those that are INT8 take less."""
    model = manifest.model
    numbers = prod((2, model.num_hidden_layers, model.num_key_value_heads, model.head_dim, tokens))
    return numbers * PRECISIONS[manifest.precision].itemsize
