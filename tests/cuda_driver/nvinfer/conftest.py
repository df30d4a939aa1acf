"""NVIDIA's Python module of TensorRT on the libnvinfer of this folder, and bundles with plans for it."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import runtime
from export.engines.options import Options
from export.engines.plan import plans
from runtime.backends.plugin_library import VARIABLE
from runtime.backends.tensorrt.plan import Shape, TensorInfo
from runtime.bundle.engines import WEIGHTS
from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, EngineRecord
from runtime.bundle.reader import Bundle, sha256_of
from runtime.bundle.targets import TARGETS

from ...runtime.backends.tensorrt.host_device import POISON, plan_info
from . import building

VERSION = "NVINFER_BINDINGS"
"""Environment variable that names the version of NVIDIA's module to run."""

# tensorrt.DataType
_CODES = {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "BF16": 7, "INT64": 8}
_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}

CAPACITY = 2048
"""Tokens that plans are for."""


class Nvinfer:
    """The libnvinfer of this process, and who computes what is enqueued on it.

    ONNX Runtime runs a plan's graph on the memory that was bound, when the driver comes to it: as work of the stream,
    which a CUDA graph can record and replay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._library = library = ctypes.CDLL(str(folder / "libnvinfer.so.10"), ctypes.RTLD_GLOBAL)
        for name in ("libnvinfer_plugin.so.10", "libnvonnxparser.so.10"):
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        self._driver = ctypes.CDLL("libcuda.so.1")
        library.nvinferGraph.restype = library.nvinferComplaints.restype = ctypes.c_char_p
        library.nvinferScratch.restype = library.nvinferAddress.restype = ctypes.c_void_p
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._work: list[Any] = []
        self.enqueued: list[str] = []
        """The graphs that contexts were enqueued for; what a CUDA graph replays is enqueued once."""
        self.ran: list[str] = []
        """The graphs that ran."""
        self.recordable = True
        """Whether contexts may be enqueued while a CUDA graph is recorded."""
        self._enqueue = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)(self._on_enqueue)
        library.nvinferOnEnqueue(self._enqueue)

    @property
    def live(self) -> int:
        """How many runtimes, engines, contexts and configurations there are."""
        return int(self._library.nvinferLive())

    @property
    def complaints(self) -> str:
        """What real TensorRT would have ended the process for."""
        text: bytes = self._library.nvinferComplaints()
        return text.decode()

    def forget_plugins(self) -> None:
        """Empties the registry of plugins, as a new process has it."""
        self._library.nvinferForgetPlugins()

    def start(self, works: bool) -> None:
        """Chooses whether TensorRT starts."""
        self._library.nvinferStarts(works)

    def log(self, message: str, thread: bool = False) -> None:
        """Logs an error as what belongs to no engine does; ``thread``: from a thread of TensorRT's own."""
        self._library.nvinferLog(message.encode(), thread)

    def _session(self, graph: str) -> ort.InferenceSession:
        if graph not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            self._sessions[graph] = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return self._sessions[graph]

    def _on_enqueue(self, context: int, stream: int | None) -> bool:
        where, status = ctypes.c_void_p(context), ctypes.c_int()
        self._driver.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
        if status.value and not self.recordable:
            return False
        graph: str = self._library.nvinferGraph(where).decode()
        session = self._session(graph)
        size, sizes = ctypes.c_int64(), (ctypes.c_int64 * 8)()
        scratch = self._library.nvinferScratch(where, ctypes.byref(size))
        inputs, outputs = [], []
        for value in session.get_inputs():
            rank = self._library.nvinferShape(where, value.name.encode(), sizes)
            address = self._library.nvinferAddress(where, value.name.encode())
            inputs.append((value.name, tuple(sizes[:rank]), _NUMPY[value.type], address))
        for value in session.get_outputs():
            outputs.append((value.name, self._library.nvinferAddress(where, value.name.encode())))

        def work(_: int) -> None:
            self.ran.append(graph)
            # Whoever ran before left something there.
            ctypes.memset(scratch, POISON, size.value)
            feeds = {name: _array(address, shape, kind) for name, shape, kind, address in inputs}
            for (_, address), value in zip(outputs, session.run([name for name, _ in outputs], feeds), strict=True):
                ctypes.memmove(address, np.ascontiguousarray(value).ctypes.data, value.nbytes)

        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
        self._work.append(function)
        self.enqueued.append(graph)
        return bool(self._driver.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None) == 0)


def _array(address: int, shape: Shape, kind: type) -> np.ndarray:
    dtype = np.dtype(kind)
    memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape).copy()


@pytest.fixture(scope="session")
def loaded_nvinfer() -> Nvinfer:
    """NVIDIA's module, importable as ``tensorrt``, on the libnvinfer of this folder."""
    module = building.bindings(os.environ.get(VERSION, building.RUN_ON))
    found = Nvinfer(building.build_libraries())
    # NVIDIA's package of that name imports this from the other one, and libraries that are not here.
    package = found.folder / "python/tensorrt"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    sys.path[:0] = [str(module), str(package.parent)]
    importlib.invalidate_caches()
    return found


@pytest.fixture
def nvinfer(loaded_nvinfer: Nvinfer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nvinfer]:
    """The same with an empty registry and the plugin library of the tiny models; at the end nothing may be left."""
    loaded_nvinfer.forget_plugins()
    loaded_nvinfer.start(True)
    loaded_nvinfer.recordable = True
    loaded_nvinfer.enqueued.clear()
    loaded_nvinfer.ran.clear()
    monkeypatch.setenv(VARIABLE, str(loaded_nvinfer.folder / building.PLUGIN))
    yield loaded_nvinfer
    loaded_nvinfer.start(True)
    gc.collect()
    assert loaded_nvinfer.complaints == ""
    assert loaded_nvinfer.live == 0


Make = Callable[..., Path]


@pytest.fixture
def make(tiny_v1_portable_bundle: Path, nvinfer: Nvinfer, tmp_path: Path) -> Make:
    """Makes a bundle with plans; ``change`` alters the text of the decoder's before it is registered."""
    import tensorrt

    def make(change: Callable[[str], str] = lambda text: text, name: str = "bundle") -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_v1_portable_bundle, folder)
        (folder / "engines").mkdir()
        bundle = Bundle(folder)
        manifest, engines = bundle.manifest, {}
        for plan in plans(bundle, Options(TARGETS["trt10.3"], 89, CAPACITY, 1)):
            decodes = plan.graph == DECODER_GRAPH
            info = plan_info(plan, scratch=1000 if decodes else 5000)
            head = f"plan {bundle.path(plan.graph)} scratch {info.scratch} profiles {len(plan.profiles)}"
            text = "\n".join([head, *map(_tensor, info.tensors), ""])
            file = bundle.path(plan.name)
            file.write_text(change(text) if decodes else text)
            engines[plan.name] = EngineRecord(
                size=file.stat().st_size,
                sha256=sha256_of(file),
                graph=plan.graph,
                target="trt10.3",
                tensorrt=tensorrt.__version__,
                compute_capability=89,
                plugin_sha256=sha256_of(Path(os.environ[VARIABLE])) if decodes else "",
                graph_sha256=manifest.files[plan.graph].sha256,
                weights_sha256=manifest.files[WEIGHTS[plan.graph]].sha256,
                max_length=CAPACITY,
                max_batch=1,
            )
        (folder / MANIFEST).write_text(replace(manifest, engines=engines).to_json())
        return folder

    return make


def _tensor(tensor: TensorInfo) -> str:
    """A line of a plan."""
    shapes = [tensor.shape]
    for range_ in tensor.ranges:
        shapes += [range_.minimum, range_.optimum, range_.maximum]
    numbers = (str(number) for shape in shapes for number in (len(shape), *shape))
    return f"{'in' if tensor.is_input else 'out'} {tensor.name} {_CODES[tensor.type]} {' '.join(numbers)}"


def refusal(folder: Path) -> str:
    """The line that loading a bundle's engines ends with."""
    with pytest.raises(runtime.BackendError) as caught:
        runtime.load(folder, backend="tensorrt")
    message = str(caught.value)
    assert "\n" not in message
    return message
