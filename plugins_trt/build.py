"""``python -m plugins_trt.build``: the plugin library, compiled where the GPU is and put where the runtime finds it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.backends.cuda.driver import find_device
from runtime.backends.plugin_library import (
    LIBRARY,
    OLDEST,
    VARIABLE,
    cache_folder,
    install_folder,
    is_checkout,
    plugin_library,
)
from runtime.console.console import Console
from runtime.console.files import replaced
from runtime.console.run import make_parser, run
from runtime.errors import BackendError, MonoedgeError, OptionError
from runtime.records import user_path

_DESCRIPTION = """\
Builds the TensorRT plugin library, which implements the custom operators of bundles, for the GPU of this machine
or for those named. It needs CUDA from 12.6 on (nvcc), CMake from 3.22 on, a C++ compiler, and TensorRT's headers.

examples:
  monoedge plugin                        # for the GPU at hand
  monoedge plugin --arch 120             # for RTX 50, on any machine that has nvcc
  monoedge plugin --arch 87 89           # for Orin and Ada, in one library
  monoedge plugin --arch all             # for all GPUs that monoedge has kernels for
  monoedge plugin --arch 89 --fetch-headers    # where TensorRT is not installed, as for TensorRT for RTX

python -m plugins_trt.build is the same. The compute capability is written without its dot: 87 for 8.7."""

HEADERS = "kernel-lens==2.0.1"
"""A package that carries NVIDIA's Apache-2.0 headers of TensorRT 10.14."""

_SOURCES = Path(__file__).parent
_CACHE = cache_folder()
_FETCHED = (_SOURCES.parent / "build" if is_checkout() else _CACHE) / "tensorrt_headers"
CUDA = Path("/usr/local/cuda")
"""Where CUDA installs itself; JetPack leaves nvcc out of PATH."""

_STEP = re.compile(r"\[ *(\d+)%\] (.*)")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, by default this process's, and builds."""
    parser = make_parser("plugins_trt.build", _DESCRIPTION)
    parser.add_argument("--arch", nargs="+", metavar="NN", help="GPUs to build for, or all (default: the GPU at hand)")
    parser.add_argument("--headers", type=Path, metavar="DIR", help="the folder of TensorRT's NvInferRuntime.h")
    parser.add_argument("--fetch-headers", action="store_true", help=f"get these headers from the package {HEADERS}")
    place, what = install_folder() / LIBRARY, "the library to make (default: %(default)s)"
    parser.add_argument("-o", "--output", type=Path, default=place, metavar="FILE", help=what)
    arguments = parser.parse_args(argv)
    architectures = _architectures(arguments.arch)
    headers = [f"-DMONOEDGE_FETCHED_HEADERS={_FETCHED}"]
    if arguments.headers is not None:
        if not (arguments.headers / "NvInferRuntime.h").is_file():
            raise OptionError(f"--headers {arguments.headers}: there is no NvInferRuntime.h in it")
        headers.append(f"-DMONOEDGE_TENSORRT_HEADERS={arguments.headers.absolute()}")
    console, output = Console(), user_path(arguments.output).absolute()
    if output.is_dir():
        raise OptionError(f"-o {arguments.output} is a folder, expected the file to make, as {output / LIBRARY}")
    nvcc = _require_tools(None if arguments.fetch_headers else headers)
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", *headers]
    if architectures is not None:
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    names = "all GPUs" if architectures is None else f"SM {architectures.replace('-real', '').replace(';', ', ')}"
    try:
        if arguments.fetch_headers:
            _fetch_headers(console)
        console.say(f"building the plugin library for {names}, which can take minutes")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="monoedge-plugin-") as folder, replaced(output) as partial:
            log: list[str] = []
            with console.phases("building") as tell:
                _run(["cmake", "-S", str(_SOURCES), "-B", folder, *options], folder, log, tell)
                _run(["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)], folder, log, tell)
            shutil.copyfile(Path(folder) / LIBRARY, partial)
    except OSError as error:
        raise MonoedgeError(f"{error.filename or output} cannot be written: {error.strerror or error}") from None
    console.say(f"{output}: the plugin library for {names}, {output.stat().st_size / 1e6:.1f} MB")
    if not _is_used(output):
        console.say(f"so that the runtime uses this one: export {VARIABLE}={output}")


def _run(command: Sequence[str], folder: str, log: list[str], tell: Callable[[str, float], None]) -> None:
    """Runs a part of the build; adds its output to the log and tells the progress in it."""
    with subprocess.Popen(  # noqa: S603 - our own options
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": folder},  # where compilers leave files when they are killed
        start_new_session=True,  # so that its compilers end with it
    ) as process:
        assert process.stdout is not None  # noqa: S101 - a pipe, as started
        try:
            for line in process.stdout:
                log.append(line)
                if match := _STEP.match(line):
                    tell(match[2], int(match[1]) / 100)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.read()  # ends when the last of them has
            raise
    if process.returncode:
        file = _CACHE / "plugin-build.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(log), encoding="utf-8")
        raise MonoedgeError(f"the plugin library cannot be built: {_reason(log)} ({file} has all that was said)")


def _reason(log: Sequence[str]) -> str:
    """The first complaint of CMake or a compiler, in one line."""
    for index, line in enumerate(log):
        if line.startswith("CMake Error"):
            # It ends before its call stack, or before the next message.
            rest = (item.strip() for item in log[index + 1 : index + 16])
            words = itertools.takewhile(lambda item: not item.startswith(("Call Stack", "CMake ", "-- ")), rest)
            return " ".join(filter(None, words))
        if "error" in line.lower():
            return line.strip()
    return log[-1].strip() if log else "nothing was said"


def _architectures(named: Sequence[str] | None) -> str | None:
    """The architectures for CMake, with semicolons between them; None for all."""
    if named == ["all"]:
        return None
    if named is None:
        device = find_device()
        if device is None:
            raise OptionError(
                "there is no GPU here: name the one to build for with --arch, as 87 for Orin, 89 for Ada, 110 for Thor "
                "or 120 for RTX 50, or --arch all"
            )
        named = [str(device.capability)]
    wrong = [name for name in named if not re.fullmatch(r"\d{2,3}", name)]
    if wrong:
        raise OptionError(f"--arch {wrong[0]}: expected a compute capability without its dot, as 87 for 8.7, or all")
    old = [name for name in named if int(name) < OLDEST]
    if old:
        raise OptionError(f"there are no kernels for SM {old[0]}, only for SM {OLDEST} and later: name a newer GPU")
    return ";".join(f"{name}-real" for name in dict.fromkeys(named))


def _require_tools(headers: Sequence[str] | None) -> Path:
    """Finds nvcc; raises with everything that is missing at once.

    Args:
        headers: options of CMake that say where TensorRT's headers may be; None where they are fetched later.
    """
    home = os.environ.get("CUDA_HOME")
    places = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), CUDA / "bin/nvcc")
    nvcc = next((Path(place) for place in places if place and Path(place).is_file()), None)
    missing = [] if nvcc else ["nvcc, of CUDA 12.6 or later (install CUDA, or set CUDACXX or CUDA_HOME)"]
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing.append("a C++ compiler (apt install g++)")
    version = re.search(r"(\d+)\.(\d+)", _said(["cmake", "--version"]) or "")
    if version is None or (int(version[1]), int(version[2])) < (3, 22):
        got = "" if version is None else f", this is {version[0]}"
        missing.append(f"CMake 3.22 or later{got} (apt install cmake, or pip install cmake)")
    elif headers is not None and _said(["cmake", *headers, "-P", str(_SOURCES / "headers.cmake")]) is None:
        missing.append(
            "TensorRT's headers, NvInferRuntime.h (install TensorRT, name their folder with --headers DIR, or add "
            "--fetch-headers)"
        )
    if missing or nvcc is None:
        raise MonoedgeError(f"the plugin library needs what is not here: {'; '.join(missing)}")
    return nvcc


def _said(command: Sequence[str]) -> str | None:
    """The output of a program; None where it fails or is not here."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own words
    except (OSError, subprocess.CalledProcessError):
        return None


def _is_used(library: Path) -> bool:
    """Whether the runtime uses this library now."""
    try:
        return plugin_library() == library
    except BackendError:
        return False


def _fetch_headers(console: Console) -> None:
    if (_FETCHED / "kernel_lens/include/tensorrt/NvInferRuntime.h").is_file():
        return
    console.say(f"installing {HEADERS} in {_FETCHED}")
    shutil.rmtree(_FETCHED, ignore_errors=True)
    _FETCHED.parent.mkdir(parents=True, exist_ok=True)
    with replaced(_FETCHED) as partial:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), HEADERS]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
        if result.returncode:
            words = (result.stderr.strip() or "pip failed").splitlines()[-1]
            raise MonoedgeError(f"{HEADERS} cannot be installed: {words}")


if __name__ == "__main__":
    run(main)
