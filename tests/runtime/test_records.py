"""Files that anyone may have made: whatever they hold, reading ends, and says in one line what was wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.errors import BundleError
from runtime.records import LARGEST, find, parse_json, read_json, read_text, require_file, user_path

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        ("1" * 5000, "4300 digits"),
        ("[NaN]", "NaN is no finite number"),
        ("-Infinity", "-Infinity is no finite number"),
        ("1e999", "1e999 is no finite number"),
        ('{"a": 1, "a": 2}', "a key stands twice"),
        (r'"\ud800"', "surrogates not allowed"),
        (r'{"\udfff": 1}', "surrogates not allowed"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"^that is not valid JSON .*{words}.*: do this$") as caught:
        parse_json(text, "that", remedy=": do this")
    assert len(str(caught.value)) < 400
    (tmp_path / "file").write_text(text)
    with pytest.raises(BundleError, match="file is not valid JSON"):
        read_json(tmp_path / "file")


def test_json() -> None:
    assert parse_json(r'{"\u00e9": [1, 2.5, null, "\ud83d\ude00"]}', "that") == {"é": [1, 2.5, None, "😀"]}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": "\xef\xbb\xbf"}\r\n')
    assert read_json(tmp_path / "file") == {"a": "\ufeff"}
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf\xff")
    with pytest.raises(BundleError, match="file cannot be read: "):
        read_text(tmp_path / "file")


def test_what_is_no_file(tmp_path: Path) -> None:
    """None of these is waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(BundleError, match=f"^{path} is not a file$"):
            read_text(path)
    with pytest.raises(BundleError, match="Too many levels of symbolic links"):
        read_text(tmp_path / "loop")
    for path in (tmp_path / "none", tmp_path / "pipe/below"):
        assert find(path) is None
        with pytest.raises(BundleError, match=f"^{path} is missing: do this$"):
            require_file(path, remedy=": do this")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(BundleError, match=r"has more than 268,435,456 bytes"):
        read_text(tmp_path / "file")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a" * 5000])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(BundleError, match="cannot be read: "):
        find(Path(name))


def test_a_user_who_is_not_there() -> None:
    assert user_path("~no such user/x") == Path("~no such user/x")
    assert user_path("~") == Path.home()
