"""Builds and registers plans, once the options of ``python -m export.engine`` are known to be right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from export.engines import store
from export.engines.options import Options
from export.engines.plan import plans, record
from export.engines.process import build_plan
from export.engines.verify import verify
from runtime.backends.cuda.driver import Device
from runtime.bundle.engines import WEIGHTS, plan_name
from runtime.bundle.manifest import EngineRecord, FileRecord
from runtime.bundle.reader import Bundle, sha256_of, size_text
from runtime.console.console import Console
from runtime.errors import BackendError, BundleError, OptionError


def build(bundle: Bundle, options: Options, device: Device | None, console: Console) -> None:
    """Builds the plans of a bundle and enters them in its manifest; all of them, or none.

    Raises:
        BundleError: a graph cannot be read, or the bundle cannot be written.
        BackendError: TensorRT cannot build a plan, the GPU is too small, or a plan disagrees with what was recorded.
    """
    planned = plans(bundle, options)
    store.refuse_existing(bundle, [plan.name for plan in planned], options)
    sizes = [bundle.manifest.files[WEIGHTS[plan.graph]].size for plan in planned]
    require_memory(options, device, max(sizes), console)
    staged: dict[str, tuple[Path, EngineRecord]] = {}
    with store.staging_folder(bundle, sum(sizes)) as folder:
        for plan in planned:
            console.say(f"building {plan.name}")
            output = folder / Path(plan.name).name
            file, version = build_plan(plan, options, bundle.path(plan.graph), output, console)
            staged[plan.name] = output, record(bundle.manifest, options, plan.graph, file, version)
            profiles = f"{len(plan.profiles)} profile{'s' * (len(plan.profiles) > 1)}"
            title = f"{options.target.title} {version}"
            console.say(f"{bundle.path(plan.name)}: {size_text(file.size)}, {profiles}, {title}")
        _finish(bundle, staged, options, device, console)


def register(bundle: Bundle, options: Options, paths: list[Path], device: Device | None, console: Console) -> None:
    """Takes plans that another program built into a bundle, and says what is known of them and what is not.

    The ``options`` are what the plans are said to be built with and for.

    Raises:
        BackendError: one disagrees with what was recorded.
        BundleError: a file is no plan, or the bundle cannot be written.
        OptionError: a name does not say which graph the plan is of.
    """
    versions = {path: store.plan_version(path, options.target) for path in paths}
    graphs = {path: _graph(path) for path in paths}
    names = {
        path: plan_name(graph, options.target.name, options.capability, bundle.manifest.precision)
        for path, graph in graphs.items()
    }
    if len(set(names.values())) < len(paths):
        raise OptionError("--register takes one plan for each graph")
    outside = [path for path in paths if path.resolve() != bundle.path(names[path]).resolve()]
    store.refuse_existing(bundle, [names[path] for path in outside], options)
    staged: dict[str, tuple[Path, EngineRecord]] = {}
    with store.staging_folder(bundle, sum(path.stat().st_size for path in outside)) as folder:
        for path, name in names.items():
            file = bundle.path(name)
            if path in outside:
                file = folder / file.name
                try:
                    shutil.copyfile(path, file)
                except OSError as error:
                    raise BundleError(f"{path} cannot be copied to {folder}: {error.strerror}") from None
            facts = FileRecord(file.stat().st_size, sha256_of(file))
            staged[name] = file, record(bundle.manifest, options, graphs[path], facts, versions[path])
        _finish(bundle, staged, options, device, console)
    for name, (_, entry) in staged.items():
        console.say(
            f"{bundle.path(name)}: {size_text(entry.size)}; its header says TensorRT {entry.tensorrt}\n"
            f"taken on trust: SM {entry.compute_capability}, {entry.max_length} tokens, batch {entry.max_batch}, "
            f"built from {entry.graph} as it is now{f', with {options.plugin}' if entry.plugin_sha256 else ''}"
        )


def _finish(bundle: Bundle, staged: store.Staged, options: Options, device: Device | None, console: Console) -> None:
    try:
        verify(bundle, {entry.graph: (file, entry) for file, entry in staged.values()}, options.plugin, device, console)
    except BackendError as error:
        raise BackendError(f"{error}; nothing was registered") from None
    store.put_in_place(bundle, staged)


def require_memory(options: Options, device: Device | None, weights: int, console: Console) -> None:
    """Compares free memory with the weights, the least that a build needs, before it begins.

    Raises:
        BackendError: TensorRT measures on the GPU, which has no room even for the weights.
    """
    if device is not None and not options.target.capabilities:
        room = f"{size_text(device.free_memory)} of {size_text(device.total_memory)} free"
        if device.free_memory < weights:
            raise BackendError(
                f"the weights alone are {size_text(weights)}, {device.name} has {room}: end what else is using it, or "
                "build on a larger one"
            )
        console.say(f"{device.name}: {room} for {size_text(weights)} of weights")
    free = _available_memory()
    # The network holds them, and the plan that is being made holds them again.
    if free is not None and free < 2 * weights:
        console.say(
            f"the build needs {size_text(2 * weights)} of memory, twice the weights, but {size_text(free)} are free: "
            "it may fail"
        )


def _available_memory() -> int | None:
    """Returns the bytes of main memory that a new program may use; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def _graph(path: Path) -> str:
    for graph in WEIGHTS:
        if path.name.endswith(f".{Path(graph).stem}.plan"):
            return graph
    endings = " or ".join(f".{Path(graph).stem}.plan" for graph in WEIGHTS)
    raise OptionError(f"--register {path}: which graph is it? Its name should end in {endings}")
