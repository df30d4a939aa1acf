"""The plugin library: where it is, which GPUs it is for, whether it loads, and whether TensorRT takes its plugins."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from runtime.backends.plugin_library import BUILD_COMMAND, gpu_code, install_folder, plugin_library, require_code
from runtime.doctor.children import TrialError, attempt
from runtime.doctor.gpu import Gpu
from runtime.doctor.libraries import MODULES
from runtime.doctor.report import MISSING, OK, TENSORRT, WRONG, Finding
from runtime.errors import BackendError, MonoedgeError

LIBRARY = "library"
"""What the line about the library itself is called."""

KERNELS = {"FusedMoE": "monoedgeFusedMoe", "ExpertLinear": "monoedgeExpertLinear"}
"""The entries of the operators' kernels, by operator; what tells their workspace has ``Workspace`` behind its name."""

SYMBOLS = ["setLoggerFinder", "getCreators", "monoedgeResizeToTiles"]
SYMBOLS += [entry + what for entry in KERNELS.values() for what in ("", "Workspace")]
"""What TensorRT, the runtime and the doctor call in it (``plugins_trt/trt/exports.map``)."""

_MACHINES = {62: "x86_64", 183: "aarch64"}
"""``e_machine`` of an ELF file, as ``platform.machine`` names it."""


def plugin(gpu: Gpu, versions: Mapping[str, str], operators: Mapping[str, int]) -> Iterator[Finding]:
    """Looks at the library and tries it.

    Args:
        gpu: what it should have code for.
        versions: of the modules of TensorRT, by their names.
        operators: names and versions of the plugins that it should have.
    """
    what = LIBRARY
    try:
        library = plugin_library()
    except BackendError as error:
        yield Finding(what, MISSING, str(error), needed_by=TENSORRT)
        return
    place = "" if library.parent == install_folder() else f" -o {shlex.quote(str(library))}"
    wrong = Finding(what, WRONG, "", f"build it again with: {BUILD_COMMAND}{place}", TENSORRT)
    try:
        if reason := _wrong_file(library):
            yield replace(wrong, found=f"{library} {reason}")
            return
        missing = attempt("plugin", library=str(library), symbols=SYMBOLS)
    except (TrialError, BackendError) as error:
        yield replace(wrong, found=f"{library}: {error}")
        return
    if missing:
        yield replace(wrong, found=f"{library} has no {', '.join(missing)}: it is another library, or an older one")
        return
    yield Finding(what, OK, f"{library} loads", needed_by=TENSORRT)
    yield _fit(library, gpu)
    for module, version in versions.items() if operators else ():
        target = MODULES[module]
        named = f"plugins in {module}"
        try:
            attempt("register", target=target.name, library=str(library), operators=dict(operators))
        except TrialError as error:
            yield replace(wrong, what=named, found=str(error))
        else:
            has = ", ".join(operators)
            yield Finding(named, OK, f"{target.title} {version} takes {has}", needed_by=TENSORRT)


def _wrong_file(library: Path) -> str:
    """Why a file is no library for this processor; empty where it is one. The loader says "no such file" of others."""
    try:
        with library.open("rb") as stream:
            head = stream.read(20)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return "is no library"
    machine = _MACHINES.get(int.from_bytes(head[18:20], "little"), "another processor")
    return "" if machine == platform.machine() else f"is for {machine}, this is {platform.machine()}"


def _fit(library: Path, gpu: Gpu) -> Finding:
    what = "code for GPUs"
    try:
        has = ", ".join(f"{'PTX of ' * is_ptx}SM {number}" for is_ptx, number in sorted(gpu_code(library)))
        if gpu.device is None:
            return Finding(what, OK, f"{has or 'none that can be found'}; no GPU is here to compare it with")
        require_code(library, gpu.device.capability)
    except MonoedgeError as error:
        return Finding(what, WRONG, str(error), needed_by=TENSORRT)
    return Finding(what, OK, f"{has or 'none that can be found'}; this GPU is SM {gpu.device.capability}")
