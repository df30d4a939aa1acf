"""The model of an app: a loaded bundle that begins conversations."""

from __future__ import annotations

from typing import Any

from runtime.loaded import Images, LoadedBundle
from runtime.session import Session


class Model(LoadedBundle):
    """A loaded bundle. Sessions of one model may run in several threads."""

    def session(self, image: Images = None, prompt: str | None = None, **options: Any) -> Session:  # noqa: ANN401
        """Begins a conversation with this model; takes what ``Session`` takes."""
        return Session(image, prompt, model=self, **options)


load = Model.load
