"""Building and registering: what ``python -m export.engine`` does once its options are known to be right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from export.engines import store
from export.engines.plan import Options, Plan, record
from export.engines.process import build_plan
from export.engines.verify import verify
from runtime.backends.cuda.driver import Device
from runtime.backends.plugin_library import plugin_library
from runtime.bundle.engines import WEIGHTS, plan_name
from runtime.bundle.manifest import EngineRecord
from runtime.bundle.reader import Bundle, sha256_of, size_text
from runtime.console.console import Console
from runtime.errors import BackendError, OptionError


def find_plugin(named: Path | None) -> Path:
    """The plugin library: the one named, or the one that is found.

    Raises:
        BackendError: there is none, with how to build it.
    """
    if named is not None:
        if not named.is_file():
            raise BackendError(f"--plugin {named}: no such file")
        return named.absolute()
    return plugin_library()


def build(
    bundle: Bundle,
    options: Options,
    plans: tuple[Plan, ...],
    device: Device | None,
    console: Console,
) -> dict[str, EngineRecord]:
    """Builds plans into a bundle and stamps them in its manifest; all of them, or none.

    Args:
        bundle: an opened bundle.
        options: the checked options.
        plans: what to build.
        device: the GPU here, if there is one.
        console: told each step, and the progress.

    Raises:
        BundleError: the bundle cannot be written, or not enough.
        BackendError: TensorRT cannot build it, the GPU is too small, or a plan disagrees with what was recorded.
    """
    plugin_sha256 = _plugin_sha256(options)
    store.refuse_existing(bundle, [plan.name for plan in plans], plugin_sha256, options.overwrite)
    sizes = {plan.graph: bundle.manifest.files[WEIGHTS[plan.graph]].size for plan in plans}
    require_memory(options, device, max(sizes.values()), console)
    records: dict[str, EngineRecord] = {}
    with store.staging_folder(bundle) as folder:
        store.require_space(folder, sum(sizes.values()))
        for plan in plans:
            console.say(f"building {plan.name}")
            with console.phases(Path(plan.name).name) as tell:
                file, version = build_plan(
                    plan, options, bundle.path(plan.graph), folder / Path(plan.name).name, tell, console
                )
            records[plan.name] = record(bundle.manifest, options, plan.graph, file, version, plugin_sha256)
            profiles = f"{len(plan.profiles)} profile{'s' if len(plan.profiles) > 1 else ''}"
            console.say(
                f"{bundle.path(plan.name)}: {size_text(file.size)}, {profiles}, {options.target.title} {version}"
            )
        partial = {plan.name: folder / Path(plan.name).name for plan in plans}
        _verify(bundle, partial, records, options, device, console)
        store.put_in_place(bundle, partial, records)
    return records


def _plugin(options: Options) -> Path:
    assert options.plugin is not None  # noqa: S101 - export.engine found it
    return options.plugin


def _plugin_sha256(options: Options) -> str:
    return sha256_of(_plugin(options))


def _verify(
    bundle: Bundle,
    partial: Mapping[str, Path],
    records: Mapping[str, EngineRecord],
    options: Options,
    device: Device | None,
    console: Console,
) -> None:
    """What disagrees with the recorded set is not registered; see ``engine_verify.verify``."""
    new = {record.graph: (partial.get(name, bundle.path(name)), record) for name, record in records.items()}
    try:
        verify(bundle, new, bundle.manifest.engines, _plugin(options), device, console)
    except BackendError as error:
        raise BackendError(f"{error}; nothing was registered") from None


def require_memory(options: Options, device: Device | None, weights: int, console: Console) -> None:
    """Looks at memory before a long build: weights are the least that is needed.

    Raises:
        BackendError: TensorRT is to measure on a GPU on which not even the weights have room.
    """
    if device is not None and not options.target.capabilities:
        if device.free_memory < weights:
            raise BackendError(
                f"the weights alone are {size_text(weights)}, {device.name} has {size_text(device.free_memory)} of "
                f"{size_text(device.total_memory)} free: end what else is using it, or build on a larger one"
            )
        console.say(
            f"{device.name}: {size_text(device.free_memory)} of {size_text(device.total_memory)} free for "
            f"{size_text(weights)} of weights"
        )
    free = available_memory()
    # The network holds them once, the plan that is being made once more.
    if free is not None and free < 2 * weights:
        console.say(
            f"building holds {size_text(weights)} of weights twice, {size_text(free)} of memory are free: it may fail"
        )


def available_memory() -> int | None:
    """Bytes of main memory that a new program may use, caches that can be dropped included; None if nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else 1024 * int(found[1])


def register(
    bundle: Bundle,
    options: Options,
    paths: list[Path],
    device: Device | None,
    console: Console,
) -> dict[str, EngineRecord]:
    """Takes plans that another program built into a bundle, and says what is known of them and what is not.

    Raises:
        BackendError: one disagrees with what was recorded.
        BundleError: a file is no plan, or the bundle cannot be written.
        OptionError: a name that does not tell the graph.
    """
    plugin, plugin_sha256 = _plugin(options), _plugin_sha256(options)
    versions = {path: store.plan_version(path, options.target) for path in paths}
    graphs = {path: _graph(path) for path in paths}
    names = {
        path: plan_name(graph, options.target.name, options.capability, bundle.manifest.precision)
        for path, graph in graphs.items()
    }
    if len(set(names.values())) < len(paths):
        raise OptionError("--register takes one plan for each graph")
    outside = [path for path in paths if path.resolve() != bundle.path(names[path]).resolve()]
    store.refuse_existing(bundle, [names[path] for path in outside], plugin_sha256, options.overwrite)
    records, partial = {}, {}
    with store.staging_folder(bundle) as folder:
        store.require_space(folder, sum(path.stat().st_size for path in outside))
        for path in paths:
            name = names[path]
            if path in outside:
                partial[name] = folder / Path(name).name
                file = store.copy_plan(path, partial[name])
            else:
                file = store.file_record(path)
            records[name] = record(bundle.manifest, options, graphs[path], file, versions[path], plugin_sha256)
        _verify(bundle, partial, records, options, device, console)
        store.put_in_place(bundle, partial, records)
    for name, entry in records.items():
        console.say(
            f"{bundle.path(name)}: {size_text(entry.size)}; its header says TensorRT {entry.tensorrt}\n"
            f"taken on trust: SM {entry.compute_capability}, {entry.max_length} tokens, batch {entry.max_batch}, "
            + (f"built of {entry.graph} as it is now" + (f", with {plugin}" if entry.plugin_sha256 else ""))
        )
    return records


def _graph(path: Path) -> str:
    for graph in WEIGHTS:
        if path.name.endswith(f".{Path(graph).stem}.plan"):
            return graph
    endings = " or ".join(f".{Path(graph).stem}.plan" for graph in WEIGHTS)
    raise OptionError(f"--register {path}: which graph is it? Its name should end in {endings}")
