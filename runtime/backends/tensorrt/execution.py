"""What the backend asks of an engine on a GPU: small protocols, and nothing that needs TensorRT.

``runtime.backends.tensorrt.engine`` implements them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from runtime.backends.cuda.device import Memory, Resource
from runtime.backends.tensorrt.plan import PlanInfo, Shape


class Execution(Resource, Protocol):
    """One way to run an engine: a profile, with shapes and addresses that stay until they are set anew."""

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Shapes of inputs."""

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Device addresses of inputs and outputs."""

    def enqueue(self) -> None:
        """Enqueues the work on the device's queue."""

    @property
    def capturable(self) -> bool:
        """Whether ``Device.capture`` may record ``enqueue`` now."""


class Engine(Protocol):
    """A plan, loaded."""

    info: PlanInfo

    def execution(self, profile: int, scratch: Memory, static: bool) -> Execution:
        """A way to run it.

        Args:
            profile: index of an optimization profile.
            scratch: where activations lie while it runs, at least ``info.scratch`` bytes. Whoever owns it sees to it
                that no two run at once: one queue does that.
            static: its shapes will never change, which is worth more preparation.
        """
