"""What strangers wrote, as messages show it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import runtime
from runtime.bundle.manifest import MANIFEST
from runtime.bundle.reader import Bundle

RETITLED = "\x1b]0;owned\x07\x9b31m\x7f"


def refusal(bundle: Path, tmp_path: Path, precision: str) -> str:
    """The message about a bundle whose manifest names this number format."""
    shutil.copytree(bundle, tmp_path / "bundle")
    file = tmp_path / "bundle" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"precision": precision}))
    with pytest.raises(runtime.BundleError) as caught:
        Bundle(tmp_path / "bundle")
    return str(caught.value)


@pytest.mark.parametrize("text", [RETITLED, "a\nerror: b\rc", "abc\u202etxt.exe\u2066", "\u2028\u2029\x85"])
def test_nothing_reaches_the_terminal_that_it_acts_on(text: str, tmp_path: Path, tiny_v1_bundle: Path) -> None:
    message = refusal(tiny_v1_bundle, tmp_path, text)
    assert message.isprintable()
    assert len(message.splitlines()) == 1
    assert "this runtime reads fp32" in message
    # Errors that are raised elsewhere too.
    assert str(runtime.OptionError(text)).isprintable()


def test_what_is_seen_stays() -> None:
    for text in ("größer als 4 µs: …", "模型", "עברית", "👩‍🚀", "/a/very/" + 30 * "long/path name"):
        assert str(runtime.OptionError(text)) == text


@pytest.mark.parametrize("text", ["x" * 1_000_000, "x y " * 250_000, "x/y" * 250_000])
def test_nothing_is_repeated_at_length(text: str, tmp_path: Path, tiny_v1_bundle: Path) -> None:
    message = refusal(tiny_v1_bundle, tmp_path, text)
    assert len(message) < 600
    assert message.endswith("this runtime reads fp32, fp16, bf16: update monoedge")
    assert len(str(runtime.OptionError(f"{text}: do this"))) < 2100
    assert str(runtime.OptionError(f"{text}: do this")).endswith(": do this")


def test_half_characters_are_shown() -> None:
    str(runtime.OptionError("a\ud800b")).encode()
