"""Loads the plans of a bundle. Whatever can be checked is checked before TensorRT reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from runtime.backends.cuda.device import Device
from runtime.backends.plugin_library import plugin_library, require_code
from runtime.backends.tensorrt.check import PlanError, decoder_layout, vision_layout
from runtime.backends.tensorrt.engine import Engine, TensorRTRuntime
from runtime.backends.tensorrt.plan import DecoderLayout, PlanInfo, VisionLayout
from runtime.bundle.engines import Plans, choose_plans, rebuild_command, refused, why_foreign, why_stale
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH
from runtime.bundle.reader import Bundle, sha256_of
from runtime.bundle.targets import TARGETS, Target
from runtime.errors import BackendError
from runtime.records import find

Layout = TypeVar("Layout", DecoderLayout, VisionLayout)


class Loader:
    """The plans for a GPU.

    Args:
        bundle: what they belong to.
        device: the GPU.
        plans: the plans to load; by default those that the manifest has for this GPU.
        start: starts a TensorRT.

    Raises:
        BackendError: TensorRT or the plugin library is missing, or a plan may not be used here; with what to do.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        plans: Plans | None = None,
        start: Callable[[Target], TensorRTRuntime] = TensorRTRuntime,
    ) -> None:
        self._bundle, self._device = bundle, device
        self._plans = choose_plans(bundle, device.compute_capability) if plans is None else plans
        for path, record in self._plans.values():
            found = find(path, BackendError)
            size = None if found is None else found.st_size
            if size != record.size:
                what = "is missing" if size is None else f"has {size:,} bytes, its record says {record.size:,}"
                raise BackendError(refused(str(path), what, record, bundle.folder))
        self._tensorrt = start(TARGETS[self._plans[DECODER_GRAPH][1].target])
        library = plugin_library() if any(record.plugin_sha256 for _, record in self._plans.values()) else None
        plugin_sha256 = None if library is None else sha256_of(library)
        for path, record in self._plans.values():
            name, folder = str(path), bundle.folder
            reason = why_foreign(name, record, self._tensorrt.version, device.compute_capability, folder)
            reason = reason or why_stale(name, record, bundle.manifest, plugin_sha256, folder)
            if reason is not None:
                raise BackendError(reason)
        if library is not None:
            require_code(library, device.compute_capability)
            self._tensorrt.load_plugins(library, bundle.manifest.operators)

    @property
    def description(self) -> str:
        """What computes, for people."""
        graphs = "CUDA graphs" if self._device.has_graphs else "no CUDA graphs (pip install cuda-bindings adds them)"
        return f"{self._tensorrt.title} {self._tensorrt.version}, {self._device.name}, {graphs}"

    @property
    def length_limit(self) -> str:
        """Why a conversation can be no longer, for people."""
        record, most = self._plans[DECODER_GRAPH][1], self._bundle.manifest.model.max_length
        if record.max_length >= most:
            return self._bundle.length_limit
        command = rebuild_command(replace(record, max_length=most), self._bundle.folder)
        return f"the engine was built for {record.max_length} tokens; this builds one for {most}: {command}"

    def decoder(self) -> tuple[Engine, DecoderLayout]:
        """Loads the decoder's engine.

        Raises:
            BackendError: TensorRT refuses the plan, or it is not what its record says; with what to do where the plan
                is at fault.
        """
        manifest, length = self._bundle.manifest, self._plans[DECODER_GRAPH][1].max_length

        def layout(info: PlanInfo) -> DecoderLayout:
            layout = decoder_layout(info, manifest.model, manifest.precision)
            if layout.capacity != length:
                raise PlanError(f"has caches for {layout.capacity} tokens, its record says {length}")
            return layout

        return self._load(DECODER_GRAPH, layout)

    def vision(self) -> tuple[Engine, VisionLayout]:
        """Loads the vision graph's engine; raises as ``decoder`` does."""
        manifest = self._bundle.manifest
        return self._load(
            VISION_GRAPH, lambda info: vision_layout(info, manifest.model, manifest.image, manifest.precision)
        )

    def _load(self, graph: str, layout: Callable[[PlanInfo], Layout]) -> tuple[Engine, Layout]:
        if graph not in self._plans:
            raise BackendError(f"no plan of {graph} was given, only of {', '.join(self._plans)}")
        path, record = self._plans[graph]
        try:
            with self._device:
                engine = self._tensorrt.load(path, self._device, record.sha256)
        except BackendError:
            # Not looked at before, since that reads all of a plan.
            if sha256_of(path) != record.sha256:
                reason = "was altered since it was built, its SHA-256 is not the recorded one"
                raise BackendError(refused(str(path), reason, record, self._bundle.folder)) from None
            raise
        # Plans that are tried before they are put in place are not in the manifest.
        self._bundle.require_same(*(name for name in self._bundle.manifest.engines if self._bundle.path(name) == path))
        try:
            return engine, layout(engine.info)
        except PlanError as error:
            # A plan for several conversations at once is refused too.
            again = replace(record, max_batch=1)
            raise BackendError(refused(str(path), str(error), again, self._bundle.folder)) from None
