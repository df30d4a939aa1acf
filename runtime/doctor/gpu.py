"""The GPU: NVIDIA's driver, the device, its packages for Python, and what is particular to a Jetson."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.backends.cuda.driver import Device
from runtime.doctor.children import TrialError, attempt
from runtime.doctor.host import package_finding
from runtime.doctor.report import MISSING, NOBODY, OK, ON_GPU, TENSORRT, WRONG, Finding

_INSTALL = (
    "install NVIDIA's driver (https://www.nvidia.com/drivers); in a container, start it with --gpus all, on a Jetson "
    "with --runtime nvidia"
)
_REMEDIES = {
    34: "a stub, made for linking, is found before the driver: take its folder out of LD_LIBRARY_PATH",
    100: "no GPU is shown to this process: nvidia-smi lists those that are there, CUDA_VISIBLE_DEVICES hides some",
    802: "the machine is still starting its GPUs: start nvidia-fabricmanager, or wait",
    803: "the driver was updated and the kernel runs the old one: restart the machine",
}
"""By the status of ``cuInit`` (``CUresult`` in CUDA's driver API)."""


@dataclass
class Gpu:
    """What is known of the GPU.

    Attributes:
        device: the first GPU; None where there is none.
        cuda: the newest CUDA that the driver runs, as (13, 0); None without a driver.
        jetson: the board's model, where it is a Jetson.
    """

    device: Device | None = None
    cuda: tuple[int, int] | None = None
    jetson: str = ""
    findings: list[Finding] = field(default_factory=list)


def find_gpu(root: Path = Path("/")) -> Gpu:
    """Looks for driver, GPU and board.

    Args:
        root: the folder that stands for the system's ``/proc``, ``/etc`` and so on.
    """
    gpu = Gpu(jetson=_model(root))
    gpu.findings += _driver(gpu, root)
    if gpu.jetson:
        gpu.findings += jetson(gpu, root)
    return gpu


def _driver(gpu: Gpu, root: Path) -> Iterator[Finding]:
    what = "driver"
    try:
        facts = attempt("driver")
    except TrialError as error:
        missing = "libcuda.so.1" in str(error) and "no such file" in str(error).lower()
        remedy = "sudo apt install nvidia-jetpack" if gpu.jetson and missing else _INSTALL
        yield Finding(what, MISSING if missing else WRONG, str(error), remedy, ON_GPU)
        return
    gpu.cuda = (facts["cuda"] // 1000, facts["cuda"] % 1000 // 10)
    module = re.search(r"Kernel Module(?: for \S+)? +([\d.]+)", read(root, "proc/driver/nvidia/version"))
    release = f"{module[1]}, " if module else ""
    found = f"{release}runs CUDA {dotted(gpu.cuda)} and older, {facts['file']}"
    if facts["status"]:
        failed = f"{found}: it does not start, {facts['error'] or 'CUDA error'} ({facts['status']})"
        yield Finding(what, WRONG, failed, _REMEDIES.get(facts["status"], "restart the machine; nvidia-smi"), ON_GPU)
        return
    yield Finding(what, OK, found, needed_by=ON_GPU)
    try:
        answer = attempt("device")
    except TrialError as error:
        yield Finding("GPU", WRONG, str(error), "nvidia-smi; dmesg may tell why", ON_GPU)
        return
    if answer is None:
        remedy = "end what else is using it; nvidia-smi lists that"
        yield Finding("GPU", MISSING, f"of {facts['count']} GPUs the first cannot be entered", remedy, ON_GPU)
        return
    gpu.device = device = Device(**answer)
    free = f"{device.free_memory / 1e9:.2f} of {device.total_memory / 1e9:.2f} GB free"
    others = f"; the first of {facts['count']} GPUs" if facts["count"] > 1 else ""
    yield Finding("GPU", OK, f"{device.name}, SM {device.capability}, {free}{others}", needed_by=ON_GPU)


def packages(gpu: Gpu) -> Iterator[Finding]:
    """Looks at PyCUDA, and at cuda-bindings, without which answers come without CUDA graphs."""
    finding = package_finding("pycuda", "pycuda", TENSORRT)
    if finding.status == OK and gpu.cuda is not None:
        try:
            compiled = attempt("pycuda")
            finding = replace(finding, found=f"{finding.found}, compiled with CUDA {dotted(compiled[:2])}")
        except TrialError as error:
            remedy = "pip install --force-reinstall --no-cache-dir --no-binary pycuda pycuda, with this driver's CUDA"
            finding = replace(finding, status=WRONG, found=f"{finding.found}: {error}", remedy=remedy)
    yield finding
    finding = package_finding("cuda-bindings", "cuda.bindings.driver", NOBODY)
    if finding.status == MISSING:
        remedy = f"pip install 'cuda-bindings<{gpu.cuda[0] + 1}'" if gpu.cuda else finding.remedy
        found = f"{finding.found}: answers come without CUDA graphs, more slowly"
        yield replace(finding, found=found, remedy=remedy)
    else:
        major = re.match(r"\d+", finding.found)
        yield fits(finding, int(major[0]) if major else 0, gpu, "pip install 'cuda-bindings<{}'")


def fits(finding: Finding, major: int, gpu: Gpu, remedy: str = "") -> Finding:
    """Compares the CUDA that a package is made for with the driver's, which runs its own and older ones.

    Args:
        finding: about the package.
        major: of its CUDA; 0 where it does not say.
        gpu: with the driver's CUDA.
        remedy: what else to do than to update the driver; ``{}`` is the first CUDA that is too new.
    """
    if finding.status != OK or gpu.cuda is None or major <= gpu.cuda[0]:
        return finding
    found = f"{finding.found}, made for CUDA {major}; the driver runs CUDA {dotted(gpu.cuda)} and older"
    update = f"update the driver to one that runs CUDA {major}"
    both = f"{remedy.format(gpu.cuda[0] + 1)}, or {update}" if remedy else update
    return replace(finding, status=WRONG, found=found, remedy=both)


def jetson(gpu: Gpu, root: Path) -> Iterator[Finding]:
    """Looks at a Jetson's releases, power mode, clocks and memory."""
    yield Finding("Jetson", OK, gpu.jetson)
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", read(root, "etc/nv_tegra_release"))
    packs = re.search(
        r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", read(root, "var/lib/dpkg/status"), re.MULTILINE
    )
    linux = f"Jetson Linux {release[1]}.{release[2]}" if release else "of an unknown release"
    if packs:
        yield Finding("JetPack", OK, f"{packs[1]}, {linux}")
    else:
        found = f"the package nvidia-jetpack is not installed; {linux}"
        yield Finding("JetPack", MISSING, found, "sudo apt install nvidia-jetpack (CUDA, TensorRT and its module)")
    yield Finding("power mode", OK, _power_mode(root))
    yield Finding("clocks", OK, _clocks(root))
    total, free = memory(root, "MemTotal"), memory(root, "MemAvailable")
    if total and free:
        shared = f"{total / 1e9:.2f} GB that CPU and GPU share, {free / 1e9:.2f} GB available"
        yield Finding("memory", OK, f"{shared} (sudo init 3 frees what the desktop takes)")


def _power_mode(root: Path) -> str:
    """Reads what ``nvpmodel -q`` tells: the mode that was set, or the default, and its name."""
    settings = read(root, "etc/nvpmodel.conf")
    chosen = re.search(r"pmode:(\d+)", read(root, "var/lib/nvpmodel/status")) or re.search(
        r"PM_CONFIG DEFAULT=(\d+)", settings
    )
    if chosen is None:
        return "unknown (sudo nvpmodel -q tells it)"
    names = dict(re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", settings))
    names = {int(number): name for number, name in names.items()}
    others = ", ".join(f"{number} {name}" for number, name in names.items())
    return f"{int(chosen[1])} {names.get(int(chosen[1]), '')}".strip() + f" of {others}" * bool(others)


def _clocks(root: Path) -> str:
    """Whether the GPU's clock is fixed, as ``jetson_clocks`` fixes it."""
    for folder in sorted(root.glob("sys/class/devfreq/*gpu*")) + sorted(root.glob("sys/class/devfreq/*.gv11b")):
        low, high = (read(folder, name).strip() for name in ("min_freq", "max_freq"))
        if low.isdigit() and high.isdigit():
            span = f"GPU {int(low) / 1e6:.0f} to {int(high) / 1e6:.0f} MHz"
            fixed = "fixed" if low == high else "not fixed (sudo jetson_clocks does it, for builds and measurements)"
            return f"{span}, {fixed}"
    return "unknown (sudo jetson_clocks --show tells them)"


def _model(root: Path) -> str:
    model = read(root, "proc/device-tree/model").strip("\0\n ")
    return model if re.search("jetson|orin|thor|nvidia", model, re.IGNORECASE) else ""


def memory(root: Path, key: str) -> int | None:
    """Returns a number of ``/proc/meminfo`` in bytes; None where the system does not say."""
    found = re.search(rf"^{key}: *(\d+) kB$", read(root, "proc/meminfo"), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def dotted(numbers: tuple[int, ...]) -> str:
    """Returns numbers as a version."""
    return ".".join(map(str, numbers))


def read(root: Path, name: str) -> str:
    """Reads one of the system's files; empty where it is not there."""
    try:
        return (root / name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
