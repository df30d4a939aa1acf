"""Whether a target can be built with here, and for which GPU."""

from __future__ import annotations

import importlib.util

from runtime.bundle.targets import Target
from runtime.errors import BackendError, OptionError


def require_module(target: Target) -> None:
    """Checks that the target's module is installed, without importing it.

    Raises:
        BackendError: it is not, with what to do.
    """
    if importlib.util.find_spec(target.module) is None:
        raise BackendError(f"{target.module} is not installed; {target.remedy}")


def choose_capability(target: Target, named: int | None, present: int | None, build: bool = True) -> int:
    """The compute capability to build for, as 89 for 8.9.

    Args:
        target: what builds.
        named: by ``--sm``, if it was.
        present: that of the GPU in this machine, if there is one.
        build: False where nothing is built here: only names are made.

    Raises:
        OptionError: none is known, or one that cannot be built for.
        BackendError: the GPU that it takes is not here.
    """
    chosen = present if named is None else named
    known = ", ".join(map(str, target.capabilities))
    if target.capabilities:
        if chosen is None:
            raise OptionError(f"there is no GPU here: name the one to build for with --sm, one of {known}")
        if chosen not in target.capabilities:
            raise OptionError(f"{target.title} does not build for SM {chosen}, it knows --sm {known}")
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
            "there is no GPU here: name the one of the device with --sm, as 87 for Orin, 89 for Ada or 110 for Thor"
        )
    if chosen < 10:
        raise OptionError(f"--sm is a compute capability without its dot, as 87 for Orin's 8.7, got {chosen}")
    return chosen
