"""``monoedge plugin``, and what a wheel has to carry for it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from plugins_trt.build import main
from runtime.backends.cuda.driver import Device
from runtime.backends.plugin_library import VARIABLE
from runtime.errors import MonoedgeError, OptionError

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "build/tensorrt_headers/kernel_lens/include/tensorrt"
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools puts arguments of its own there
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of this checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__")
    for item in ("runtime", "export", "calibration", "plugins_trt"):
        shutil.copytree(ROOT / item, source / item, ignore=ignore)
    for item in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt", "CHANGELOG.md"):
        shutil.copy(ROOT / item, source)
    command = [sys.executable, "-c", BUILD, str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


def sources(root: Path) -> set[str]:
    """What the plugin is made of, by path from the root."""
    folder = root / "plugins_trt"
    files = {path for path in folder.rglob("*") if path.suffix in {".cu", ".cuh", ".h", ".cpp", ".map", ".cmake"}}
    return {str(path.relative_to(root)) for path in (*files, folder / "CMakeLists.txt")}


def test_wheel_carries_what_the_plugin_is_made_of(packed: Path) -> None:
    (wheel,) = packed.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "monoedge = runtime.console.monoedge:main" in archive.read(entry_points).decode()
    assert len(sources(ROOT)) > 20
    assert sources(ROOT) <= names
    python = {
        str(path.relative_to(ROOT))
        for room in ("runtime", "export", "calibration")
        for path in (ROOT / room).rglob("*.py")
    }
    assert python <= names
    assert "export/engines/parsers/trt10.3.json" in names
    assert not any(name.startswith("tests/") for name in names)


def test_sdist_carries_what_the_plugin_is_made_of(packed: Path) -> None:
    (sdist,) = packed.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources(ROOT) | {"CMakeLists.txt", "pyproject.toml", "LICENSE"} <= names


@pytest.fixture
def tools() -> None:
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, which builds the plugin library")


@pytest.mark.usefixtures("tools")
def test_plugin_from_an_unpacked_wheel(packed: Path, tmp_path: Path) -> None:
    if not HEADERS.is_dir():
        pytest.skip("TensorRT's headers are not here; this fetches them: make build/tensorrt_headers")
    (wheel,) = packed.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")  # noqa: S202 - made a moment ago
    library = tmp_path / "lib/library.so"
    command = [sys.executable, "-m", "plugins_trt.build", "--arch", "120", "--headers", HEADERS, "-o", library]
    result = subprocess.run(command, cwd=tmp_path / "site", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{library}: the plugin library for SM 120" in result.stderr
    assert f"export {VARIABLE}={library}\n" in result.stderr
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    count = ctypes.c_int32()
    assert ctypes.CDLL(str(library)).getCreators(ctypes.byref(count))
    assert count.value > 0


def test_no_gpu_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins_trt.build.find_device", lambda: None)
    with pytest.raises(OptionError, match="name the one to build for with --arch"):
        main([])


@pytest.mark.parametrize("arguments", [["--arch", "75"], ["--arch", "89", "62"], []], ids=str)
def test_gpus_that_are_too_old(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Named, or at hand."""
    monkeypatch.setattr("plugins_trt.build.find_device", lambda: Device("Quadro RTX 4000", 75, 12, 9))
    with pytest.raises(OptionError, match=r"^there are no kernels for SM (75|62), only for SM 80 and later: [^\n]+$"):
        main(arguments)


@pytest.mark.parametrize("arch", ["8.9", "sm_89", "8"])
def test_bad_architectures(arch: str) -> None:
    with pytest.raises(OptionError, match="without its dot"):
        main(["--arch", arch])


def test_all_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("plugins_trt.build.CUDA", tmp_path)
    with pytest.raises(MonoedgeError) as caught:
        main(["--arch", "89"])
    message = str(caught.value)
    assert all(word in message for word in ("nvcc", "a C++ compiler", "CMake 3.22"))
    assert "\n" not in message


def test_output_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is a folder, expected the file to make"):
        main(["--arch", "89", "-o", str(tmp_path)])


def test_headers_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no NvInferRuntime.h in it"):
        main(["--arch", "89", "--headers", str(tmp_path)])


def test_missing_headers_are_told_with_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed, which looks for the headers")
    if any(Path("/usr").glob("include/*/NvInferRuntime.h")) or Path("/usr/local/tensorrt").exists():
        pytest.skip("TensorRT is installed here, with its headers")
    (tmp_path / "cmake").symlink_to(Path(cmake).resolve())
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CUDACXX", "CUDA_HOME", "TENSORRT_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("plugins_trt.build.CUDA", tmp_path)
    monkeypatch.setattr("plugins_trt.build._FETCHED", tmp_path / "fetched")
    with pytest.raises(MonoedgeError) as caught:
        main(["--arch", "89"])
    message = str(caught.value)
    assert all(word in message for word in ("nvcc", "a C++ compiler", "NvInferRuntime.h", "--fetch-headers"))
    assert "CMake" not in message
    # A folder that has them is found.
    folder = tmp_path / "fetched/kernel_lens/include/tensorrt"
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    with pytest.raises(MonoedgeError) as caught:
        main(["--arch", "89"])
    assert "NvInferRuntime.h" not in str(caught.value)


@pytest.mark.usefixtures("tools")
def test_warnings_end_our_builds_and_nobody_elses(tmp_path: Path) -> None:
    """A compiler that is newer than ours may warn of more."""
    (tmp_path / "NvInferRuntime.h").touch()
    configure = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DMONOEDGE_TENSORRT_HEADERS={tmp_path}"]
    configure += ["-DCMAKE_CUDA_ARCHITECTURES=89", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    for option, ends in ((), False), (("-DMONOEDGE_WERROR=ON",), True):
        subprocess.run([*configure, *option], check=True, capture_output=True)
        commands = json.loads((tmp_path / "build/compile_commands.json").read_text())
        assert len([entry for entry in commands if "core/experts.cu" in entry["file"]]) == 1
        assert {"-Werror" in entry["command"] for entry in commands} == {ends}
        assert {"--Werror=all-warnings" in entry["command"] for entry in commands if "core/" in entry["file"]} == {ends}


@pytest.mark.usefixtures("tools")
def test_an_architecture_that_nvcc_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    with pytest.raises(MonoedgeError, match=r"asks for 999, this nvcc knows \d+"):
        main(["--arch", "999", "--headers", str(tmp_path), "-o", str(tmp_path / "library.so")])


@pytest.mark.usefixtures("tools")
def test_fetched_headers_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a folder of packages in the place of the index, first an empty one; architectures are looked at later."""
    packages, fetched = tmp_path / "packages", tmp_path / "cache/fetched"
    packages.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setattr("plugins_trt.build._FETCHED", fetched)
    command = ["--arch", "999", "-o", str(tmp_path / "library.so")]
    with pytest.raises(MonoedgeError, match=r"^kernel-lens==2.0.1 cannot be installed: [^\n]+$"):
        main([*command, "--fetch-headers"])
    assert list(fetched.parent.iterdir()) == []

    with zipfile.ZipFile(packages / "kernel_lens-2.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("kernel_lens/include/tensorrt/NvInferRuntime.h", "")
        metadata = {
            "METADATA": "Metadata-Version: 2.1\nName: kernel-lens\nVersion: 2.0.1\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in metadata.items():
            wheel.writestr(f"kernel_lens-2.0.1.dist-info/{name}", text)
    with pytest.raises(MonoedgeError, match="asks for 999"):
        main([*command, "--fetch-headers"])
    shutil.rmtree(packages)
    for again in ([*command, "--fetch-headers"], command):
        with pytest.raises(MonoedgeError, match="asks for 999"):
            main(again)


@pytest.mark.usefixtures("tools")
def test_a_build_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    """No file, and no compiler that works on."""
    if not HEADERS.is_dir():
        pytest.skip("TensorRT's headers are not here; this fetches them: make build/tensorrt_headers")
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()

    def compilers() -> list[bytes]:
        lines = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(file.read_bytes())
            except OSError:  # it ended
                continue
        return [line for line in lines if str(work).encode() in line and b"experts.cu" in line]

    command = [
        sys.executable,
        "-m",
        "plugins_trt.build",
        "--arch",
        "89",
        "--headers",
        HEADERS,
        "-o",
        out / "library.so",
    ]
    environment = {**os.environ, "TMPDIR": str(work)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not compilers():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    while compilers():  # killed, and gone soon
        time.sleep(0.05)
    assert list(work.iterdir()) == []
    assert list(out.iterdir()) == []


@pytest.mark.usefixtures("tools")
def test_a_build_that_fails_leaves_nothing_and_names_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Headers that are none of TensorRT's: CMake finds them, the compiler refuses."""
    monkeypatch.setattr("plugins_trt.build._CACHE", tmp_path / "cache")
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers/NvInferRuntime.h").write_text("#error this is not TensorRT\n")
    with pytest.raises(MonoedgeError, match="this is not TensorRT") as caught:
        main(["--arch", "120", "--headers", str(tmp_path / "headers"), "-o", str(tmp_path / "out/library.so")])
    assert str(tmp_path / "cache/plugin-build.log") in str(caught.value)
    assert (tmp_path / "cache/plugin-build.log").is_file()
    assert list((tmp_path / "out").iterdir()) == []
