"""Where the plugin library is looked for, and what is said where it is not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from runtime.backends import plugin_library as module
from runtime.backends.plugin_library import LIBRARY, VARIABLE, install_folder, plugin_library, require_code
from runtime.backends.tensorrt.loader import Loader
from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, EngineRecord
from runtime.bundle.reader import Bundle, sha256_of
from runtime.errors import BackendError

from .tensorrt.host_device import HostDevice


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout's package folder in the place of ours, and no library in the system's folders."""
    checkout = tmp_path / "checkout"
    folder = checkout / "plugins_trt"
    folder.mkdir(parents=True)
    (checkout / "CMakeLists.txt").touch()
    monkeypatch.setattr(module, "_CHECKOUT", checkout)
    monkeypatch.setattr(module, "_SYSTEM", (tmp_path / "lib",))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return folder


def place(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIBRARY).touch()
    return folder / LIBRARY


def test_order(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "home/monoedge"
    for folder in (tmp_path / "lib", own, tmp_path / "venv/lib", package, package.parent / "build"):
        expected = place(folder)
        assert plugin_library() == expected
    named = tmp_path / "mine.so"
    named.touch()
    monkeypatch.setenv(VARIABLE, str(named))
    assert plugin_library() == named


def test_build_folder_counts_in_a_checkout_only(package: Path) -> None:
    place(package.parent / "build")
    (package.parent / "CMakeLists.txt").unlink()
    with pytest.raises(BackendError):
        plugin_library()


@pytest.mark.parametrize("place_of", ["checkout", "environment", "person"])
def test_what_is_built_is_found(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place_of: str) -> None:
    """In a checkout, in an environment that can be written to, and in the system's Python."""
    if place_of != "checkout":
        (package.parent / "CMakeLists.txt").unlink()
    if place_of == "environment":
        (tmp_path / "venv/lib").mkdir(parents=True)
    expected = {"checkout": package.parent / "build", "environment": tmp_path / "venv/lib"}
    assert install_folder() == expected.get(place_of, tmp_path / "home/monoedge")
    assert place(install_folder()) == plugin_library()


def test_nowhere(package: Path) -> None:
    with pytest.raises(BackendError) as error:
        plugin_library()
    message = str(error.value)
    assert f"{LIBRARY} is in none of {package.parent / 'build'}, {package}, " in message
    assert "build it with: monoedge plugin" in message
    assert "\n" not in message


def test_named_but_not_there(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(package)
    monkeypatch.setenv(VARIABLE, "elsewhere/x.so")
    with pytest.raises(BackendError, match=f"^{VARIABLE} is elsewhere/x.so, which is no file: "):
        plugin_library()


NVCC = shutil.which("nvcc")


def compiled_for(names: Sequence[str], library: Path) -> Path:
    """Makes a library with code for these GPUs, as nvcc calls them."""
    source = library.with_suffix(".cu")
    source.write_text("__global__ void f(float* x) { *x = 1; }\nvoid g(float* x) { f<<<1, 1>>>(x); }\n")
    codes = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in names]
    assert NVCC
    subprocess.run([NVCC, "-shared", "-Xcompiler=-fPIC", *codes, source, "-o", library], check=True)
    return library


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, which says what it compiled for")
@pytest.mark.parametrize(
    ("compiled", "runs", "not_on"),
    [
        (["sm_89"], [89], [80, 86, 87, 90, 110, 120]),
        (["sm_80"], [80, 86, 89], [87, 90, 110, 120]),
        (["sm_87"], [87], [80, 86, 89, 110]),
        (["sm_86"], [86, 89], [80, 87, 90]),
        (["sm_100"], [100, 103], [90, 110, 120]),
        (["sm_110"], [110], [100, 120]),
        (["sm_89", "sm_120"], [89, 120, 121], [87, 90, 110]),
        (["sm_87", "compute_90"], [87, 90, 110, 120, 121], [80, 86, 89]),
    ],
)
def test_code_for_a_gpu(package: Path, compiled: list[str], runs: list[int], not_on: list[int], tmp_path: Path) -> None:
    """Which GPU runs what nvcc compiled is said in the CUDA Programming Guide, "Binary Compatibility" and "PTX"."""
    library = compiled_for(compiled, tmp_path / "mine.so")
    for capability in runs:
        require_code(library, capability)
    for capability in not_on:
        with pytest.raises(BackendError) as error:
            require_code(library, capability)
        message = str(error.value)
        assert message.startswith(f"{library} has no code for SM {capability}, only for SM ")
        assert message.endswith(f": build it with: monoedge plugin --arch {capability} -o {library}")
    # Where it is searched first, the command needs no place.
    install_folder().mkdir(parents=True)
    shutil.move(library, install_folder() / LIBRARY)
    with pytest.raises(BackendError, match=f" --arch {not_on[0]}$"):
        require_code(install_folder() / LIBRARY, not_on[0])


class Started:
    """Stands for the module of a TensorRT; no library is to come to it."""

    title, version = "TensorRT", "10.14.1"

    def load_plugins(self, library: Path, operators: Mapping[str, int]) -> None:
        raise AssertionError(library)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, which says what it compiled for")
def test_an_engine_is_not_loaded_with_a_library_for_another_gpu(
    tiny_v1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was built with this very library, on the board that it is for."""
    library = compiled_for(["sm_87"], tmp_path / "orin.so")
    monkeypatch.setenv(VARIABLE, str(library))
    bundle = Bundle(tiny_v1_bundle)
    sums = {name: bundle.manifest.files[name].sha256 for name in (DECODER_GRAPH, DECODER_WEIGHTS)}
    plan = tmp_path / "decoder.plan"
    plan.write_bytes(b"plan")
    record = EngineRecord(
        4,
        "…",
        DECODER_GRAPH,
        "trt",
        Started.version,
        89,
        sha256_of(library),
        *sums.values(),
        max_length=64,
        max_batch=1,
    )
    with pytest.raises(BackendError, match=rf"^{library} has no code for SM 89, only for SM 87: build it with: "):
        Loader(bundle, HostDevice(), {DECODER_GRAPH: (plan, record)}, lambda target: Started())  # type: ignore[arg-type]
