"""What TensorRT for RTX compiles is compiled once for a GPU, and not for every length of a prompt.

Real: our code, and the files. Not real: TensorRT for RTX, which loads plans on a GPU only. Classes here stand in for
its own, with the calls that ``test_signatures`` finds in NVIDIA's module; a kernel is a line of text.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from export.engines.store import put_in_place
from runtime.backends.cuda.device import Memory
from runtime.backends.tensorrt.engine import Engine
from runtime.backends.tensorrt.library import TensorRT
from runtime.backends.tensorrt.runtime_cache import SUFFIX, RuntimeCacheFile
from runtime.bundle.engines import WEIGHTS, plan_name
from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS

from .host_device import HostDevice

GPU = {"tensorrt": "1.7.1.116", "gpu": "NVIDIA GeForce RTX 4090, SM 89", "plan": "ab" * 32}


class Cache:
    def __init__(self, accepts: bool) -> None:
        self.kernels: set[str] = set()
        self._accepts = accepts

    def deserialize(self, blob: bytes) -> bool:
        if self._accepts:
            self.kernels = set(blob.decode().splitlines())
        return self._accepts

    def serialize(self) -> bytes:
        return "\n".join(sorted(self.kernels)).encode()


class Config:
    def __init__(self, engine: RtxEngine) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"
        self._engine = engine

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        assert strategy == "USER_MANAGED"

    def create_runtime_cache(self) -> Cache:
        self._engine.caches.append(Cache(self._engine.accepts))
        return self._engine.caches[-1]

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Context:
    """Compiles for its profile when it first runs, and for its shapes if it is told to."""

    def __init__(self, engine: RtxEngine, config: Config) -> None:
        self._engine, self._config = engine, config

    def set_device_memory(self, address: int, size: int) -> None:
        pass

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        kernels = {f"profile {self._profile}"}
        if self._config.dynamic_shapes_kernel_specialization_strategy != "NONE":
            kernels.add(f"profile {self._profile} shape {self._shape}")
        cache = self._config.cache
        self._engine.compiled += sorted(kernels - cache.kernels)
        cache.kernels |= kernels
        return True


class RtxEngine:
    num_io_tensors = device_memory_size_v2 = 0

    def __init__(self, accepts: bool = True) -> None:
        self.accepts = accepts
        self.compiled: list[str] = []
        self.caches: list[Cache] = []
        self.configs: list[weakref.ref[Config]] = []

    def create_runtime_config(self) -> Config:
        config = Config(self)
        self.configs.append(weakref.ref(config))
        return config

    def create_execution_context(self, config: Config) -> Context:
        return Context(self, config)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    class Logger:
        Severity = SimpleNamespace(ERROR=1)

    class Module:
        ILogger = Logger
        ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
        DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="LAZY", EAGER="EAGER", NONE="NONE")
        __version__ = GPU["tensorrt"]

    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    return TensorRT(TARGETS["trt-rtx"])


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines/trt-rtx-sm89-bf16.decoder.plan"


Start = Callable[..., tuple[RtxEngine, Engine]]


@pytest.fixture
def start(tensorrt: TensorRT, plan: Path) -> Start:
    """Loads a plan, as a new process does."""

    def start(accepts: bool = True, **change: str) -> tuple[RtxEngine, Engine]:
        rtx = RtxEngine(accepts)
        file = RuntimeCacheFile(plan, GPU | change)
        return rtx, Engine(tensorrt, rtx, HostDevice(), file)  # type: ignore[arg-type]

    return start


def run(engine: Engine, profile: int, tokens: int) -> None:
    execution = engine.execution(profile, Memory(256, 0, lambda: None), static=tokens == 1)
    execution.set_shapes({"inputs_embeds": (1, tokens, 64)})
    execution.enqueue()
    execution.enqueue()


TOKEN = ["profile 1", "profile 1 shape (1, 1, 64)"]
"""What is compiled for tokens."""


def test_prompts_of_all_lengths_share_their_kernels(start: Start) -> None:
    rtx, engine = start()
    for tokens in (7, 30, 31):
        run(engine, 0, tokens)
    run(engine, 1, 1)
    assert rtx.compiled == ["profile 0", *TOKEN]
    # One cache, which what made it outlives.
    assert len(rtx.caches) == 1
    assert [config() is not None for config in rtx.configs] == [True, True]


def test_the_next_start_compiles_nothing(start: Start, plan: Path) -> None:
    first, engine = start()
    run(engine, 0, 7)
    run(engine, 1, 1)
    assert first.compiled
    assert [file.name for file in plan.parent.iterdir()] == ["trt-rtx-sm89-bf16.decoder.runtime_cache"]
    second, engine = start()
    written = plan.with_suffix(SUFFIX).stat().st_mtime_ns
    run(engine, 0, 9)
    run(engine, 1, 1)
    assert second.compiled == []
    assert plan.with_suffix(SUFFIX).stat().st_mtime_ns == written


def test_kept_after_the_first_run_whatever_comes_then(start: Start, plan: Path) -> None:
    """A device is switched off, not shut down."""
    _, engine = start()
    run(engine, 0, 7)
    again, engine = start()
    run(engine, 0, 7)
    run(engine, 1, 1)
    assert again.compiled == TOKEN


@pytest.mark.parametrize("change", [{"tensorrt": "1.8.0.5"}, {"gpu": "NVIDIA GeForce RTX 4060, SM 89"}, {"plan": "…"}])
def test_never_of_another(start: Start, change: dict[str, str]) -> None:
    """Neither read, nor an error: what this GPU compiles takes its place."""
    run(start()[1], 0, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for compiled in (["profile 0"], []):
            rtx, engine = start(**change)
            run(engine, 0, 7)
            assert rtx.compiled == compiled


def test_what_tensorrt_refuses_is_compiled_again(start: Start, plan: Path) -> None:
    """As after another driver."""
    run(start()[1], 0, 7)
    refusing, engine = start(accepts=False)
    run(engine, 0, 7)
    assert refusing.compiled == ["profile 0"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data[:-1] + b"x",
        lambda data: b"\xff\x00",
        lambda data: b"[]\nx",
        lambda data: b"{}\n",
    ],
    ids=["short", "head", "altered", "binary", "list", "empty"],
)
def test_a_damaged_file_is_told_and_replaced(start: Start, plan: Path, damage: Callable[[bytes], bytes]) -> None:
    run(start()[1], 0, 7)
    file = plan.with_suffix(SUFFIX)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    rtx, engine = start()
    with pytest.warns(UserWarning, match=r"decoder\.runtime_cache is damaged: kernels are compiled again"):
        run(engine, 0, 7)
    assert rtx.compiled == ["profile 0"]
    assert file.read_bytes() == whole


def test_something_else_of_that_name(start: Start, plan: Path, cache_home: Path) -> None:
    plan.with_suffix(SUFFIX).mkdir()
    with pytest.warns(UserWarning, match=r"runtime_cache is not a file: kernels are compiled again"):
        run(start()[1], 0, 7)
    assert len(list((cache_home / "monoedge/runtime_caches").iterdir())) == 1


def test_beside_a_plan_that_nothing_can_be_written_beside(start: Start, plan: Path, cache_home: Path) -> None:
    plan.parent.rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(start()[1], 0, 7)
        rtx, engine = start()
        run(engine, 0, 7)
    assert rtx.compiled == []
    assert [file.suffix for file in (cache_home / "monoedge/runtime_caches").iterdir()] == [SUFFIX]


def test_nowhere_to_keep_it(start: Start, plan: Path, cache_home: Path) -> None:
    plan.parent.rmdir()
    cache_home.write_text("a file")
    with pytest.warns(UserWarning, match=r"could not be kept in .* or .*: the next start compiles them again"):
        run(start()[1], 0, 7)


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    file = RuntimeCacheFile(small_disk / "decoder.plan", GPU)
    file.write(b"small")
    before = list(small_disk.iterdir())
    file.write(b"x" * 9_000_000)
    assert list(small_disk.iterdir()) == before
    assert file.read() == b"small"


def test_a_bundle_with_it_is_whole(start: Start, tiny_v1_bundle: Path, tmp_path: Path) -> None:
    """It is not in the manifest. A plan that was tried before it was put in place brings it along."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_v1_bundle, folder)
    (folder / "engines").mkdir()
    bundle = Bundle(folder)
    name = plan_name(DECODER_GRAPH, "trt-rtx", 89, "fp32")
    tried = tmp_path / "engines" / Path(name).name
    tried.write_bytes(b"plan")
    RuntimeCacheFile(tried, GPU).write(b"kernels")
    files = bundle.manifest.files
    hashes = (files[DECODER_GRAPH].sha256, files[WEIGHTS[DECODER_GRAPH]].sha256)
    digest = hashlib.sha256(b"plan").hexdigest()
    record = EngineRecord(4, digest, DECODER_GRAPH, "trt-rtx", GPU["tensorrt"], 89, "", *hashes, 512, 1)
    put_in_place(bundle, {name: (tried, record)})
    assert RuntimeCacheFile(folder / name, GPU).read() == b"kernels"
    assert not tried.with_suffix(SUFFIX).exists()
    assert list(Bundle(folder, verify=True).manifest.engines) == [name]
    assert SUFFIX not in (folder / MANIFEST).read_text()
