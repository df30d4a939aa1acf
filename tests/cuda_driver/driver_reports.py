"""What the driver tells a test, and what a test can order of it."""

from __future__ import annotations

import ctypes

MEMORY = 8 << 30
"""Bytes of device memory, unless a test sets others."""

_KINDS = ("device bytes", "host bytes", "streams", "events", "graphs", "executables", "retains", "pushed")


class Driver:
    """The driver of this process; see ``driver/report.c``."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        for name in ("fake_alive", "fake_done"):
            getattr(self.library, name).restype = ctypes.c_long

    def take_complaints(self) -> list[str]:
        """Returns what the driver complained of, and lets it forget that."""
        text = ctypes.create_string_buffer(4096)
        self.library.fake_complaints(text, ctypes.c_size_t(len(text)))
        return text.value.decode().splitlines()

    def alive(self) -> dict[str, int]:
        """Returns how much of each kind there is, of what there is at all."""
        return {kind: count for kind in _KINDS if (count := self.library.fake_alive(kind.encode()))}

    def done(self, deed: str) -> int:
        """Returns how many "copies", "launches" of graphs, "waits" or "captures" there were in this process."""
        count: int = self.library.fake_done(deed.encode())
        assert count >= 0, deed
        return count

    def set_memory(self, size: int = MEMORY) -> None:
        """Sets the bytes of device memory."""
        self.library.fake_set_memory(ctypes.c_size_t(size))

    def fail(self, name: str | None, error: int = 0, call: int = 1, times: int = 1) -> None:
        """Lets a call of a function fail, the next or a later one, or some in a row, with CUDA's number of an error."""
        self.library.fake_fail(name.encode() if name else None, call, error, times)

    def is_allocated(self, address: int, size: int) -> bool:
        """Returns whether bytes lie in one block of memory, of the host or of the device."""
        return bool(self.library.fake_is_allocated(ctypes.c_void_p(address), ctypes.c_size_t(size)))
