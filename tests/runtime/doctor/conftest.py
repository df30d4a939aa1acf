"""Machines that tests share, and what is compiled for them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from runtime.doctor.plugin import SYMBOLS

from .machines import BASE, Machine

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def gcc() -> str:
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("gcc is not installed, which compiles what stands for NVIDIA's libraries")
    return found


@pytest.fixture(scope="session")
def driver(gcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a driver with one GPU, named as the driver's own is."""
    folder = tmp_path_factory.mktemp("driver")
    real = folder / "libcuda.so.580.65.06"
    command = [gcc, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", HERE / "driver.c", "-o", real]
    subprocess.run(command, check=True)
    (folder / "libcuda.so.1").symlink_to(real)
    return folder


@pytest.fixture
def machine(tmp_path: Path, driver: Path) -> Machine:
    """An empty environment, whose driver shows no GPU whatever this machine has."""
    variables = {"LD_LIBRARY_PATH": str(driver), "DRIVER_STATUS": "100"}
    return Machine(tmp_path / "machine", variables)


@pytest.fixture
def equipped(machine: Machine) -> Machine:
    """The same with all that answering on a CPU needs."""
    machine.install(*BASE, "onnxruntime")
    return machine


@pytest.fixture
def with_gpu(equipped: Machine) -> Machine:
    """The same with a GPU, of SM 89 if nothing else is said."""
    equipped.variables["DRIVER_STATUS"] = "0"
    return equipped


MakeLibrary = Callable[..., Path]


@pytest.fixture
def make_library(gcc: str, tmp_path: Path) -> MakeLibrary:
    """Compiles what looks like the plugin library: its functions, and code for GPUs that is none."""

    def make(*capabilities: int, body: str = "", symbols: Sequence[str] = SYMBOLS) -> Path:
        # The container of GPUs' code as NVIDIA's tools write it: a header, then for each kind a header and its bytes.
        parts = b"".join(struct.pack("<HHIQ12xI", 2, 0, 64, 0, number).ljust(64, b"\0") for number in capabilities)
        code = b"\x50\xed\x55\xba\x01\x00\x10\x00" + struct.pack("<Q", len(parts)) + parts
        lines = [f"const unsigned char code[] = {{{', '.join(map(str, code))}}};", body]
        lines += [f"int {symbol}(void) {{ return 0; }}" for symbol in symbols]
        source, library = tmp_path / "plugin.c", tmp_path / "libmonoedge_plugins.so"
        source.write_text("\n".join(lines) + "\n")
        subprocess.run([gcc, "-shared", "-fPIC", source, "-o", library], check=True)
        return library

    return make
