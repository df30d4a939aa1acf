"""CUDA's toolkit, the TensorRTs, and folders of LD_LIBRARY_PATH that put other libraries in front of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.bundle.targets import PORTABLE_TARGET, TARGETS, Target
from runtime.doctor.children import TrialError, attempt
from runtime.doctor.gpu import Gpu, dotted, fits
from runtime.doctor.host import distributions, numbers
from runtime.doctor.report import MISSING, OK, TENSORRT, WRONG, Finding

SEARCHED = "LD_LIBRARY_PATH"

DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
"""Where CUDA installs it; JetPack leaves it out of PATH."""

MODULES: dict[str, Target] = {}
"""The first target of each TensorRT, by its module."""
for _target in TARGETS.values():
    MODULES.setdefault(_target.module, _target)


def toolkit() -> Finding:
    """Looks for nvcc, which the plugin library is built with and nothing else needs."""
    home = os.environ.get("CUDA_HOME")
    places = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), DEFAULT_NVCC)
    nvcc = next((place for place in places if place and Path(place).is_file()), None)
    if nvcc is None:
        remedy = "install CUDA 12.6 or later (https://developer.nvidia.com/cuda-downloads), or set CUDACXX or CUDA_HOME"
        return Finding("nvcc", MISSING, "not found; it builds the plugin library, nothing else needs it", remedy)
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", WRONG, f"{nvcc} cannot be run: {error}", "install CUDA again, or set CUDACXX")
    release = re.search(r"release (\d+)\.(\d+)", said)
    version = f"CUDA {release[1]}.{release[2]}" if release else "of an unknown release"
    if release and (int(release[1]), int(release[2])) < (12, 6):
        return Finding("nvcc", WRONG, f"{version}, {nvcc}; expected 12.6 or later", "install a later CUDA")
    return Finding("nvcc", OK, f"{version}, {nvcc}")


def tensorrts(gpu: Gpu) -> Iterator[tuple[Finding, str, str]]:
    """Imports each TensorRT that is installed; yields its line, its module, and its version where it can be used."""
    there = [target for target in MODULES.values() if target.installed]
    for target in there:
        try:
            facts = attempt("tensorrt", target=target.name)
        except TrialError as error:
            yield Finding(target.module, WRONG, str(error), target.remedy, TENSORRT), target.module, ""
        else:
            yield _tensorrt(target, facts, gpu), target.module, facts["version"]
    if not there:
        usable = (target for target in MODULES.values() if not (gpu.jetson and target.capabilities))
        ways = (f"{target.title}: {target.remedy}" for target in usable)
        found = f"neither {' nor '.join(MODULES)} is installed"
        yield Finding("TensorRT", MISSING, found, "; ".join(ways), TENSORRT), "", ""


def _tensorrt(target: Target, facts: dict[str, Any], gpu: Gpu) -> Finding:
    version, libraries = facts["version"], facts["libraries"]
    for file, own in libraries.items():
        if own != list(numbers(version)[:3]):
            found = f"{target.module} {version} loads {file}, which is {dotted(own)}"
            remedy = f"take that file's folder out of {SEARCHED}, or install the module of that version"
            return Finding(target.module, WRONG, found, remedy, TENSORRT)
    least = PORTABLE_TARGET.removeprefix("trt")
    if not target.capabilities and numbers(version) < numbers(least):
        found = f"{target.title} {version}; expected {least} or later"
        return Finding(target.module, WRONG, found, "on Jetson update JetPack, elsewhere TensorRT", TENSORRT)
    found = f"{target.title} {version} ({target.needs}){''.join(f', {file}' for file in libraries)}"
    made_for = re.search(r"cu(\d\d)\b", " ".join(distributions(target.module)))
    finding = Finding(target.module, OK, found, needed_by=TENSORRT)
    return fits(finding, int(made_for[1]) if made_for else 0, gpu)


def search_path(gpu: Gpu, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Looks for libraries of NVIDIA in the folders of LD_LIBRARY_PATH, which come before those of the system.

    Args:
        gpu: with the driver's CUDA.
        versions: of the modules of TensorRT, by their names.
    """
    folders = [folder for folder in os.environ.get(SEARCHED, "").split(os.pathsep) if folder]
    trapped = False
    for folder in folders:
        rest = os.pathsep.join(other for other in folders if other != folder)
        remedy = f"export {SEARCHED}={shlex.quote(rest)}" if rest else f"unset {SEARCHED}"
        for trap in _traps(Path(folder), gpu, versions):
            trapped = True
            yield Finding(SEARCHED, WRONG, trap, remedy)
    if not trapped:
        found = f"{os.pathsep.join(folders)}, in which nothing hides a library that is needed" if folders else "not set"
        yield Finding(SEARCHED, OK, found)


def _traps(folder: Path, gpu: Gpu, versions: Mapping[str, str]) -> Iterator[str]:
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError:  # nothing is found in it
        return
    drivers = [name for name in names if re.fullmatch(r"libcuda\.so(\.1)?", name)]
    # The driver's own folder has the file with its release, as libcuda.so.580.65.06, or libcuda.so.1.1 on a Jetson.
    if drivers and not any(re.fullmatch(r"libcuda\.so\.(\d{2,}|1)\..+", name) for name in names):
        yield f"{folder} has {' and '.join(drivers)}, but not the driver's: a stub to link with, or a copy"
    for name in names:
        library = re.fullmatch(r"libnvinfer\.so\.(\d+\.\d+\.\d+)", name)
        here = versions.get("tensorrt", "")
        if library and here and not f"{here}.".startswith(f"{library[1]}."):
            yield f"{folder} has {name}, the module tensorrt is {here}"
        cudart = re.fullmatch(r"libcudart\.so\.(\d+)", name)
        if cudart and gpu.cuda is not None and int(cudart[1]) > gpu.cuda[0]:
            yield f"{folder} has {name}, the driver runs CUDA {dotted(gpu.cuda)} and older"
