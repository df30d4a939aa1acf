"""A small tokenizer grown to the size of a large one, so that a checkpoint can have the real vocabulary's size."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from export.checkpoint.sentencepiece import NORMAL, Piece, read_pieces
from runtime.text.tokenizer import CHAT_TOKENS, IMAGE_TOKENS


def write_tokenizer(template: Path, folder: Path, vocab_size: int) -> None:
    """The tokenizer of the folder ``template`` with pieces added, so that it has ``vocab_size`` tokens.

    They go in front of the chat tokens, which have to be the last pieces, and their scores are below all others:
    a text is first cut as the template's tokenizer cuts it.
    """
    data = (template / "tokenizer.model").read_bytes()
    pieces = read_pieces(template / "tokenizer.model")
    first_moved = len(pieces) - len(CHAT_TOKENS)
    normal = [piece for piece in pieces if piece.kind == NORMAL]
    lowest = min(piece.score for piece in normal)
    count = vocab_size - len(IMAGE_TOKENS) - len(pieces)
    texts = itertools.islice(_new_texts([piece.text for piece in normal]), count)
    added = [Piece(text, lowest - number, NORMAL) for number, text in enumerate(texts, start=1)]
    if len(added) != count:
        raise AssertionError(f"{count} pieces are needed, there are {len(added)}")
    place = data.index(_piece_bytes(pieces[first_moved]))
    (folder / "tokenizer.model").write_bytes(data[:place] + b"".join(map(_piece_bytes, added)) + data[place:])

    def moved(index: int) -> int:
        return index + count if index >= first_moved else index

    ids = json.loads((template / "added_tokens.json").read_text(encoding="utf-8"))
    _write_json(folder / "added_tokens.json", {token: moved(index) for token, index in ids.items()})
    settings = json.loads((template / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {str(moved(int(index))): token for index, token in decoder.items()}
    _write_json(folder / "tokenizer_config.json", settings)
    shutil.copyfile(template / "special_tokens_map.json", folder / "special_tokens_map.json")


def _new_texts(known: list[str]) -> Iterator[str]:
    """Texts of new pieces: letters and ideographs, then what two known pieces of one word make together."""
    seen = set(known)
    letters = map(chr, [*range(0x21, 0x7F), *range(0xA1, 0x100), *range(0x4E00, 0xA000)])
    pairs = (left + right for left in known for right in known if not right.startswith("▁"))
    for text in itertools.chain(letters, pairs):
        if text not in seen:
            seen.add(text)
            yield text


def _piece_bytes(piece: Piece) -> bytes:
    """A piece as field 1 of SentencePiece's ModelProto; all lengths fit into one byte."""
    text = piece.text.encode()
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", piece.score)
    if piece.kind != NORMAL:  # protobuf leaves a default out
        body += b"\x18" + bytes([piece.kind])
    return b"\x0a" + bytes([len(body)]) + body


def _write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
