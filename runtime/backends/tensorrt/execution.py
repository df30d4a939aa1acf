"""What the backend needs of an engine on a GPU, as protocols.

``runtime.backends.tensorrt.engine`` implements them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from runtime.backends.cuda.device import Memory, Resource
from runtime.backends.tensorrt.plan import PlanInfo, Shape


class Execution(Resource, Protocol):
    """One way to run an engine: a profile, with shapes and addresses that stay until they are set again."""

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Sets shapes of inputs."""

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Sets device addresses of inputs and outputs."""

    def enqueue(self) -> None:
        """Enqueues the work on the device's queue."""

    @property
    def capturable(self) -> bool:
        """Whether ``Device.capture`` may record ``enqueue`` now."""


class Engine(Protocol):
    """A loaded plan."""

    info: PlanInfo

    def execution(self, profile: int, scratch: Memory, static: bool) -> Execution:
        """Makes a way to run it.

        Args:
            profile: index of an optimization profile.
            scratch: memory for activations, at least ``info.scratch`` bytes. Executions may share it if no two run at
                once, as on one queue.
            static: whether its shapes never change, so that more preparation pays off.
        """
