"""What TensorRT for RTX compiled for this GPU, kept on disk for the next start.

Its plans have no machine code: it is compiled on the device when a plan first runs, which takes most of the time until
the first answer. What is kept belongs to nobody but this GPU, and can be made again: it is not in a bundle's manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.backends.plugin_library import cache_folder
from runtime.console.files import replaced
from runtime.errors import BackendError
from runtime.records import find, read_bytes

SUFFIX = ".runtime_cache"


class RuntimeCacheFile:
    """The file of one plan: beside it, or in the folder for caches where that may not be written.

    It begins with a line of JSON, which says what it is for and the SHA-256 of what follows.

    Args:
        plan: the plan.
        made_for: what must be the same for the file to be used: the version of TensorRT, the GPU, the plan.
    """

    def __init__(self, plan: Path, made_for: Mapping[str, str]) -> None:
        self._plan, self._made_for = plan, dict(made_for)

    def _places(self) -> list[Path]:
        places = [self._plan.with_suffix(SUFFIX)]
        name = hashlib.sha256(os.fsencode(self._plan.absolute())).hexdigest()[:16]
        with contextlib.suppress(RuntimeError):  # of a user without a home
            places.append(cache_folder() / "runtime_caches" / f"{name}{SUFFIX}")
        return places

    def read(self) -> bytes | None:
        """Returns what was kept; None where there is nothing for this TensorRT, GPU and plan, or nothing whole."""
        return next(self._kept(), None)

    def _kept(self) -> Iterator[bytes]:
        for place in self._places():
            try:
                data = b"" if find(place, BackendError) is None else read_bytes(place, BackendError)
            except BackendError as error:
                _note(f"{error}: kernels are compiled again")
                continue
            head, _, content = data.partition(b"\n")
            if data and self._describes(head, content, place):
                yield content

    def _describes(self, head: bytes, content: bytes, place: Path) -> bool:
        """Whether a file's first line is of this TensorRT, GPU and plan, and of what follows."""
        try:
            said = json.loads(head)
            digest = said.pop("sha256")
        except (ValueError, AttributeError, KeyError, TypeError):
            said = digest = None
        if said is not None and said != self._made_for:
            return False
        if digest != hashlib.sha256(content).hexdigest():
            _note(f"{place} is damaged: kernels are compiled again")
            return False
        return True

    def write(self, content: bytes) -> None:
        """Keeps ``content`` in place of what there was, whole or not at all."""
        head = json.dumps(self._made_for | {"sha256": hashlib.sha256(content).hexdigest()})
        reasons = []
        for place in self._places():
            try:
                if place.parent != self._plan.parent:
                    place.parent.mkdir(parents=True, exist_ok=True)
                with replaced(place) as partial:
                    partial.write_bytes(head.encode() + b"\n" + content)
                return
            except OSError as error:
                reasons.append(f"{place} ({error.strerror})")
        _note(f"compiled kernels could not be kept in {' or '.join(reasons)}: the next start compiles them again")


def _note(text: str) -> None:
    warnings.warn(text, stacklevel=2)
