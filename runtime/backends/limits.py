"""Why a conversation can be no longer, in words that more than one backend says."""

from __future__ import annotations

from runtime.bundle.reader import Bundle


def bundle_length_limit(bundle: Bundle) -> str:
    """Where the bundle itself sets the limit."""
    return f"the bundle was exported for {bundle.manifest.model.max_length} (more take an export with --max-length)"
