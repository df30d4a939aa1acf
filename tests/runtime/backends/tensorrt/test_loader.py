"""Which plans are loaded, and the line that is said about those that are not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runtime
from export.engines.options import Options
from export.engines.plan import plans
from runtime.backends.plugin_library import VARIABLE
from runtime.backends.tensorrt.loader import Loader
from runtime.bundle.engines import WEIGHTS, choose_plans, plan_name
from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, VISION_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS, Target

from .host_device import HostDevice, HostEngine

RTX, TRT = "trt-rtx", "trt"


class Started:
    """Stands for the module of a TensorRT: has a version, and loads engines in host memory."""

    version = "1.7.1.116"
    operators: dict[str, int] | None = None

    def __init__(self, folder: Path, lengths: dict[str, int]) -> None:
        self._bundle, self._lengths = Bundle(folder), lengths

    def __call__(self, target: Target) -> Started:
        self.title = target.title
        return self

    def load_plugins(self, library: Path, operators: dict[str, int]) -> None:
        self.operators = operators

    def load(self, path: Path, device: HostDevice, sha256: str) -> HostEngine:
        length = self._lengths[path.name]
        built = plans(self._bundle, Options(TARGETS[TRT], 89, length, 1))
        plan = next(plan for plan in built if Path(plan.graph).stem in path.name)
        return HostEngine(device, plan, str(self._bundle.path(plan.graph)))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library that is found; its hash."""
    (tmp_path / "plugin.so").write_bytes(b"plugin")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "plugin.so"))
    return hashlib.sha256(b"plugin").hexdigest()


Make = Callable[..., Path]


@pytest.fixture
def make(tiny_v1_bundle: Path, tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a bundle with engines of these targets and chips; what their records say may be changed."""
    monkeypatch.setattr("runtime.bundle.targets.find_spec", lambda module: object())

    def make(*built: tuple[str, int], **change: Any) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(tiny_v1_bundle, folder)
        (folder / "engines").mkdir()
        manifest = Bundle(folder).manifest
        engines = {}
        for target, chip in built:
            for graph in (DECODER_GRAPH, VISION_GRAPH):
                record = EngineRecord(
                    size=4,
                    sha256="…",
                    graph=graph,
                    target=target,
                    tensorrt=Started.version,
                    compute_capability=chip,
                    plugin_sha256=plugin if graph == DECODER_GRAPH else "",
                    graph_sha256=manifest.files[graph].sha256,
                    weights_sha256=manifest.files[WEIGHTS[graph]].sha256,
                    max_length=512,
                    max_batch=1,
                )
                name = plan_name(graph, target, chip, "fp32")
                (folder / name).write_bytes(b"plan")
                engines[name] = replace(record, **(change if graph == DECODER_GRAPH else {}))
        (folder / MANIFEST).write_text(replace(manifest, engines=engines).to_json())
        return folder

    return make


def load(folder: Path, **lengths: int) -> Loader:
    started = Started(folder, {Path(name).name: 512 for name in Bundle(folder).manifest.engines} | lengths)
    loader = Loader(Bundle(folder), HostDevice(), start=started)  # type: ignore[arg-type]
    assert started.operators == {"FusedMoE": 1}
    return loader


def refusal(folder: Path) -> str:
    with pytest.raises(runtime.BackendError) as caught:
        load(folder).decoder()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loads_what_was_built_for_this_gpu(make: Make) -> None:
    loader = load(make((RTX, 86), (RTX, 89)))
    _, layout = loader.decoder()
    assert layout.capacity == 512
    assert loader.vision()[1].chunk == 13
    assert loader.description == "TensorRT for RTX 1.7.1.116, memory of the host, CUDA graphs"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Chooses the modules that are installed, as far as can be seen."""

    def choose(*names: str) -> None:
        monkeypatch.setattr("runtime.bundle.targets.find_spec", lambda name: object() if name in names else None)

    return choose


def chosen(folder: Path, chip: int) -> dict[str, str]:
    """Names of the plans that a GPU of a chip would run."""
    bundle = Bundle(folder)
    plans = choose_plans(bundle, chip)
    for path, record in plans.values():
        assert bundle.manifest.engines[str(path.relative_to(folder))] == record
    return {graph: str(path.relative_to(folder)) for graph, (path, _) in plans.items()}


def test_full_tensorrt_comes_first(make: Make, modules: Callable[..., None]) -> None:
    folder = make((RTX, 89), (TRT, 89))
    modules("tensorrt_rtx", "tensorrt")
    assert chosen(folder, 89) == {graph: plan_name(graph, TRT, 89, "fp32") for graph in WEIGHTS}
    modules("tensorrt_rtx")
    assert chosen(folder, 89) == {graph: plan_name(graph, RTX, 89, "fp32") for graph in WEIGHTS}


@pytest.mark.parametrize(
    ("target", "module"), [(TRT, "tensorrt"), ("trt10.3", "tensorrt"), (RTX, "tensorrt_rtx")], ids=str
)
def test_plans_of_every_target_are_run_by_its_module(
    make: Make, modules: Callable[..., None], target: str, module: str
) -> None:
    assert TARGETS.keys() == {TRT, "trt10.3", RTX}
    folder = make((target, 87))
    modules(module)
    assert chosen(folder, 87) == {graph: plan_name(graph, target, 87, "fp32") for graph in WEIGHTS}
    modules({"tensorrt": "tensorrt_rtx", "tensorrt_rtx": "tensorrt"}[module])
    with pytest.raises(runtime.BackendError, match=rf"has no engines for .*, only for {target} on SM 87: build them"):
        chosen(folder, 87)


def test_no_tensorrt(make: Make, modules: Callable[..., None]) -> None:
    folder = make((RTX, 89))
    modules()
    message = refusal(folder)
    assert message.startswith(
        "neither tensorrt nor tensorrt_rtx is installed. TensorRT: on Jetson it comes with JetPack"
    )
    assert "pip install tensorrt-rtx-cu13==" in message


def test_no_engine_for_this_gpu(make: Make) -> None:
    folder = make((RTX, 86), (TRT, 87))
    assert refusal(folder) == (
        f"{folder} has no engines for TensorRT or TensorRT for RTX on SM 89, only for trt on SM 87, trt-rtx on SM 86: "
        f"build them with: python -m export.engine --bundle {folder} --target trt"
    )


def test_no_engine_at_all(make: Make, modules: Callable[..., None]) -> None:
    folder = make()
    modules("tensorrt_rtx")
    assert refusal(folder) == (
        f"{folder} has no engines for TensorRT for RTX on SM 89: build them with: "
        f"python -m export.engine --bundle {folder} --target trt-rtx --sm 89"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tensorrt": "1.8.0.5"}, "was built by version 1.8.0.5 of TensorRT, version 1.7.1.116 is here"),
        ({"tensorrt": "1.7.1"}, None),  # where the module leaves out the build
        ({"plugin_sha256": "2" * 64}, "was built with another plugin (SHA-256 222222222222…, now "),
        ({"graph_sha256": "0"}, "was built from another decoder.onnx than the bundle has now"),
        ({"weights_sha256": "0"}, "was built with other decoder.weights than the bundle has now"),
        ({"size": 5}, "has 4 bytes, its record says 5"),
        ({"max_length": 256}, "has caches for 512 tokens, its record says 256"),
    ],
    ids=str,
)
def test_another_plan_is_refused_with_the_line_that_builds_it(
    make: Make, change: dict[str, Any], reason: str | None
) -> None:
    folder = make((RTX, 89), **change)
    if reason is None:
        assert load(folder).decoder()
        return
    message = refusal(folder)
    name = plan_name(DECODER_GRAPH, RTX, 89, "fp32")
    assert message.startswith(f"{folder / name} {reason}")
    length = change.get("max_length", 512)
    assert message.endswith(
        f": build it again with: python -m export.engine --bundle {folder} --target trt-rtx --sm 89 "
        f"--max-length {length} --max-batch 1 --overwrite"
    )


def test_a_missing_plan(make: Make) -> None:
    folder = make((RTX, 89))
    (folder / plan_name(VISION_GRAPH, RTX, 89, "fp32")).unlink()
    assert "vision.plan is missing: build it again with: python -m export.engine" in refusal(folder)


def test_a_plan_that_was_replaced_meanwhile(make: Make) -> None:
    """A picture's plan is loaded with the first picture."""
    folder = make((RTX, 89))
    loader = load(folder)
    loader.decoder()
    plan = folder / plan_name(VISION_GRAPH, RTX, 89, "fp32")
    shutil.copy(plan, folder / "new")
    (folder / "new").replace(plan)
    with pytest.raises(runtime.BundleError, match=r"was replaced while it was in use .*vision"):
        loader.vision()


def test_a_plan_outside_the_bundle(make: Make, tmp_path: Path) -> None:
    folder = make((RTX, 89))
    plan = folder / plan_name(DECODER_GRAPH, RTX, 89, "fp32")
    plan.rename(tmp_path / "elsewhere.plan")
    plan.symlink_to(tmp_path / "elsewhere.plan")
    assert load(folder).decoder()  # the owner's own link, to what its record says
    with (tmp_path / "elsewhere.plan").open("ab") as file:
        file.write(b"x")
    assert "bytes, its record says" in refusal(folder)


def test_no_plugin_library(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make((RTX, 89))
    monkeypatch.setenv(VARIABLE, "nowhere.so")
    assert f"{VARIABLE} is nowhere.so, which is no file" in refusal(folder)


def test_plans_that_are_not_registered(make: Make, tmp_path: Path) -> None:
    """What ``export.engine`` needs to try a plan before it puts it in place."""
    folder = make((RTX, 89))
    bundle = Bundle(folder)
    chosen = {}
    for name, record in bundle.manifest.engines.items():
        shutil.move(folder / name, tmp_path / Path(name).name)
        chosen[record.graph] = (tmp_path / Path(name).name, record)
    values = json.loads((folder / MANIFEST).read_text())
    del values["engines"]
    (folder / MANIFEST).write_text(json.dumps(values))
    started = Started(folder, {path.name: 512 for path, _ in chosen.values()})
    loader = Loader(Bundle(folder), HostDevice(), chosen, started)  # type: ignore[arg-type]
    assert loader.decoder()[1].capacity == 512
    blind = Loader(Bundle(folder), HostDevice(), {DECODER_GRAPH: chosen[DECODER_GRAPH]}, started)  # type: ignore[arg-type]
    with pytest.raises(runtime.BackendError, match=r"no plan of vision.onnx was given, only of decoder.onnx"):
        blind.vision()
    other = {graph: (path, replace(record, compute_capability=86)) for graph, (path, record) in chosen.items()}
    with pytest.raises(runtime.BackendError, match=r"decoder.plan was built for SM 86, this GPU is SM 89: build it"):
        Loader(Bundle(folder), HostDevice(), other, started)  # type: ignore[arg-type]


def test_length_limit(make: Make) -> None:
    folder = make((RTX, 89))
    assert load(folder).length_limit == (
        f"the engine was built for 512 tokens; this builds one for 8192: python -m export.engine --bundle {folder} "
        "--target trt-rtx --sm 89 --max-length 8192 --max-batch 1 --overwrite"
    )
    values = json.loads((folder / MANIFEST).read_text())
    for record in values["engines"].values():
        record["max_length"] = 8192
    (folder / MANIFEST).write_text(json.dumps(values))
    assert load(folder).length_limit == "the bundle was exported with --max-length 8192"
