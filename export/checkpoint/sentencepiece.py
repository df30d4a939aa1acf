"""tokenizer.model: a SentencePiece model, read and checked.

The file is a protobuf message, read by the numbers of its fields with the library that onnx brings. The class in the
sentencepiece package is of no use: it refuses every protobuf older than the one it was generated with, and so most of
those that onnx works with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from export.errors import CheckpointError
from runtime.records import read_bytes
from runtime.text.tokenizer import CHAT_TOKENS, CONTROL_TOKENS, IMAGE_TOKENS, byte_token

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)
"""The types of pieces."""

_RESERVED = {*CONTROL_TOKENS, *CHAT_TOKENS, *IMAGE_TOKENS}

_MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
_PIECES = 1
_SETTINGS: dict[tuple[int, int], tuple[str, int | bytes, int | bytes]] = {
    (2, 3): ("model_type", 1, 2),
    (2, 35): ("byte_fallback", 0, 1),
    (3, 2): ("precompiled_charsmap", b"", b""),
    (3, 3): ("add_dummy_prefix", 1, 0),
    (3, 4): ("remove_extra_whitespaces", 1, 0),
    (3, 5): ("escape_whitespaces", 1, 1),
    (5, 2): ("precompiled_charsmap of the denormalizer", b"", b""),
}
"""Fields of ModelProto and its messages: name, protobuf's default, the supported value."""


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int


def read_pieces(file: Path) -> list[Piece]:
    """Reads the pieces of a tokenizer.model whose settings are those of Mono-InternVL.

    Raises:
        CheckpointError: the file cannot be read.
        ValueError: the first thing found that does not fit.
    """
    pieces = []
    settings = {field: default for field, (_, default, _) in _SETTINGS.items()}
    try:
        for field, value in _fields(read_bytes(file, CheckpointError)):
            if field == _PIECES:
                pieces.append(_piece(value))
            elif any(field == message for message, _ in _SETTINGS):
                settings |= {(field, number): setting for number, setting in _fields(value)}
    except (DecodeError, UnicodeDecodeError, AttributeError, TypeError, struct.error):
        raise ValueError("it is not a SentencePiece model, or damaged") from None
    if not pieces:
        raise ValueError("it is not a SentencePiece model: it has no pieces")
    for key, (name, _, expected) in _SETTINGS.items():
        if settings[key] != expected:
            raise ValueError(f"expected {name} {_shown(name, expected)}, got {_shown(name, settings[key])}")
    _check_ids(pieces)
    _check_overlaps(pieces)
    return pieces


def _piece(message: bytes) -> Piece:
    fields: dict[int, Any] = {1: b"", 2: 0, 3: NORMAL, **dict(_fields(message))}
    (score,) = struct.unpack("<f", struct.pack("<I", fields[2]))
    return Piece(fields[1].decode(), score, fields[3])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the fields of a protobuf message by number: bytes, or an int, which has the bits of a float too."""
    for field in UnknownFieldSet(Empty.FromString(message)):
        yield field.field_number, field.data


def _shown(name: str, value: int | bytes) -> str:
    if isinstance(value, bytes):
        return f"of {len(value)} bytes" if value else "empty"
    return f"{value} ({_MODEL_TYPES.get(value, 'unknown')})" if name == "model_type" else str(value)


def _check_ids(pieces: list[Piece]) -> None:
    """Refuses pieces that cannot be converted, and special tokens that do not have their ids."""
    texts = {piece.text for piece in pieces}
    if len(texts) != len(pieces) or "" in texts:
        raise ValueError("expected pieces that are all different and none empty")
    if {piece.text for piece in pieces if piece.kind == BYTE} != {byte_token(byte) for byte in range(256)}:
        raise ValueError("expected one byte piece for each of the 256 bytes")
    chat = len(pieces) - len(CHAT_TOKENS)
    for index, piece in enumerate(pieces):
        if index < len(CONTROL_TOKENS):
            expected = f"the control piece {CONTROL_TOKENS[index]}"
            fits = piece.text == CONTROL_TOKENS[index] and piece.kind == (CONTROL if index else UNKNOWN)
        elif index < chat:
            expected = "a normal, user-defined or byte piece"
            fits = piece.kind in (NORMAL, USER_DEFINED, BYTE) and piece.text not in _RESERVED
        else:
            # The model knows a chat token by its own name, or by another that was kept free for it.
            token = CHAT_TOKENS[index - chat]
            expected = f"a user-defined piece for {token}"
            fits = piece.kind == USER_DEFINED and piece.text not in _RESERVED - {token}
        if not fits:
            place = f"as piece {index} of {len(pieces)}"
            raise ValueError(f"expected {expected} {place}, got {piece.text!r} of type {piece.kind}")


def _check_overlaps(pieces: list[Piece]) -> None:
    """Refuses user-defined pieces that compete with special tokens for the same characters.

    The official tokenizer takes special tokens out of a text first and user-defined pieces out of what
    remains. Without overlaps the order does not matter.
    """
    special = _RESERVED | {piece.text for piece in pieces[-len(CHAT_TOKENS) :]}
    for piece in pieces:
        if piece.kind == USER_DEFINED:
            for other in special - {piece.text}:
                if _overlap(piece.text, other) or _overlap(other, piece.text):
                    raise ValueError(f"the user-defined piece {piece.text!r} overlaps with {other!r}")
            if " " in piece.text:
                raise ValueError(f"the user-defined piece {piece.text!r} has a space that is not written ▁")


def _overlap(left: str, right: str) -> bool:
    return right in left or any(left.endswith(right[:size]) for size in range(1, len(right)))
