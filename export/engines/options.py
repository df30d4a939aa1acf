"""The options of a build, and whether they fit the bundle, the GPU and each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from plugins_trt.schema import PLUGIN_OPERATORS, VERSION
from runtime.backends.plugin_library import OLDEST, cache_folder
from runtime.bundle.manifest import Manifest
from runtime.bundle.reader import sha256_of
from runtime.bundle.targets import Target
from runtime.errors import BackendError, BundleError, OptionError
from runtime.options import require_whole

_MOST_BATCH = 4096
"""Of conversations computed at once. A thousandth of it fills a GPU; far beyond, TensorRT's shapes overflow."""


@dataclass(frozen=True)
class Options:
    """What to build plans with and for.

    Attributes:
        target: the TensorRT.
        capability: compute capability of the GPU, as 89 for 8.9.
        max_length: tokens that the decoder's caches hold.
        max_batch: conversations computed at once.
        plugin: the plugin library; None only where nothing is built or registered.
        timing_cache: the file of measurements to read and renew, if the target has one.
        overwrite: whether plans and files that exist are replaced.
    """

    target: Target
    capability: int
    max_length: int
    max_batch: int = 1
    plugin: Path | None = None
    timing_cache: Path | None = None
    overwrite: bool = False

    @cached_property
    def plugin_sha256(self) -> str:
        """SHA-256 of the plugin library."""
        return "" if self.plugin is None else sha256_of(self.plugin)


def default_timing_cache(capability: int) -> Path:
    """Returns the file in the user's cache folder that keeps measurements of a GPU."""
    return cache_folder() / f"trt-sm{capability}.timing"


def check_bundle(manifest: Manifest) -> None:
    """Checks that plans can be built from a bundle at all.

    Raises:
        BundleError: it has operators that the plugin has not, is in fp32, or is made for a CPU.
    """
    if manifest.by_expert:
        raise BundleError("the bundle is made for ONNX Runtime on a CPU: for TensorRT export one with --dtype bf16")
    ours = {operator.name for operator in PLUGIN_OPERATORS}
    for name, version in manifest.operators.items():
        if name not in ours or version != VERSION:
            raise BundleError(
                f"the bundle uses version {version} of operator {name}, the plugin has "
                f"{VERSION if name in ours else 'none'}: export it again with the monoedge installed here"
            )
    if manifest.precision == "fp32":
        raise BundleError(
            "the bundle is fp32, and TensorRT's fused attention has no fp32 kernel: export it again with --dtype bf16"
        )


def check_lengths(manifest: Manifest, max_length: int | None, max_batch: int) -> int:
    """Returns how many tokens the caches hold: ``max_length``, or as many as the bundle allows.

    Raises:
        OptionError: ``max_length`` is more than the bundle allows, or a number is out of range.
    """
    most = manifest.model.max_length
    if max_length is not None and not 1 <= max_length <= most:
        raise OptionError(f"--max-length {max_length} does not fit: the bundle was exported with --max-length {most}")
    require_whole("--max-batch", max_batch, 1, _MOST_BATCH)
    return most if max_length is None else max_length


def choose_capability(target: Target, named: int | None, present: int | None, build: bool = True) -> int:
    """Chooses the compute capability to build for, as 89 for 8.9.

    Args:
        target: the TensorRT.
        named: the value of ``--sm``, if it was given.
        present: that of the GPU in this machine, if there is one.
        build: False if nothing is built here, so that no GPU is needed.

    Raises:
        OptionError: none was given and there is no GPU, or the target or the plugin's kernels are not for it.
        BackendError: the target builds for the GPU at hand only, and there is none.
    """
    chosen = present if named is None else named
    known = ", ".join(map(str, target.capabilities))
    if chosen is not None and not 10 <= chosen < 1000:
        raise OptionError(f"--sm is a compute capability without its dot, as 87 for Orin's 8.7, got {chosen}")
    if chosen is not None and chosen < OLDEST:
        raise OptionError(
            f"the plugin has no kernels for SM {chosen}, only for SM {OLDEST} and later: build for a newer GPU, or "
            "export a bundle with --target cpu"
        )
    if target.capabilities:
        if chosen is None:
            raise OptionError(f"there is no GPU here: name the one to build for with --sm, one of {known}")
        if chosen not in target.capabilities:
            raise OptionError(f"{target.title} does not build for SM {chosen}, only for --sm {known}")
        return chosen
    if build and present is None:
        raise BackendError(
            "TensorRT measures its kernels on the GPU that it builds for, and there is none here: run this on the "
            "device, print the commands for it with --print-trtexec, or build for an RTX GPU: --target trt-rtx --sm NN"
        )
    if build and chosen != present:
        raise OptionError(f"TensorRT builds for the GPU at hand, SM {present}: leave out --sm {chosen}")
    if chosen is None:
        raise OptionError(
            "there is no GPU here: name the device's with --sm, as 87 for Orin, 89 for Ada or 110 for Thor"
        )
    return chosen
