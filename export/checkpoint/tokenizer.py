"""The SentencePiece tokenizer of a checkpoint as a tokenizer.json for the ``tokenizers`` package.

sentencepiece merges, again and again, the two neighbours whose concatenation is the piece with the best
score, the leftmost such pair first, and never looks at how that piece was cut. ``tokenizers`` has a list of
pairs instead, and merges the pair that comes first in it. Both give the same ids for every text because:

- Until a merge crosses the border of a stretch of text, the stretch is merged as if it stood alone. So when
  two symbols become a piece, they are the last two symbols of that piece tokenized alone: each piece has
  exactly one pair, and the pairs are listed by falling score.
- Where pieces share a score, sentencepiece takes the leftmost and ``tokenizers`` the first listed. That makes
  no difference as long as their pairs cannot overlap and what they make cannot be merged at that score or a
  better one; a model in which that could happen is refused.
- User-defined pieces are taken out first by both, leftmost and longest first: as added tokens here. The last
  six of them are the chat tokens, so their names in text mean chat tokens too: the normalizer replaces them.

A NUL has a piece in the released model. sentencepiece up to 0.2.1, with which it was made, uses it, and so
does this; 0.2.2 refuses the model and 0.2.3 falls back to the byte piece.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from export.checkpoint.config import read_json
from export.checkpoint.sentencepiece import NORMAL, USER_DEFINED, Piece, read_pieces
from export.errors import CheckpointError
from runtime.records import find
from runtime.text.tokenizer import CHAT_TOKENS, CONTROL_TOKENS, IMAGE_TOKENS, SPACE

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"

_REMEDY = "take the file of the official checkpoint"


def convert(folder: Path, vocab_size: int | None = None) -> str:
    """Converts the tokenizer of a checkpoint folder; the same folder always gives the same text.

    Args:
        folder: where tokenizer.model and tokenizer_config.json lie; added_tokens.json and
            special_tokens_map.json are checked when they are there.
        vocab_size: rows of the model's embedding, if they are to be checked.

    Raises:
        CheckpointError: the first thing found that does not fit, in one line.
    """
    file = folder / MODEL_FILE
    try:
        pieces = read_pieces(file)
        merges = _merges(pieces)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}: {_REMEDY}") from None

    size = len(pieces)
    special = {token: index for index, token in enumerate(CONTROL_TOKENS)}
    special |= {token: index for index, token in enumerate(CHAT_TOKENS + IMAGE_TOKENS, size - len(CHAT_TOKENS))}
    _check_config(folder, special)
    total = size + len(IMAGE_TOKENS)
    if vocab_size is not None and vocab_size != total:
        raise CheckpointError(
            f"{file}: expected the model's vocab_size to be {total}, {size} pieces and {len(IMAGE_TOKENS)} "
            f"image tokens, got {vocab_size}: take config.json and {MODEL_FILE} from the same checkpoint"
        )
    return json.dumps(_tokenizer_json(pieces, merges, special), ensure_ascii=False, separators=(",", ":"))


def _tokenizer_json(pieces: list[Piece], merges: list[tuple[str, str]], special: dict[str, int]) -> dict[str, object]:
    chat = len(pieces) - len(CHAT_TOKENS)
    vocabulary = {piece.text: index for index, piece in enumerate(pieces[:chat])} | special
    aliases = [
        (piece.text, token) for piece, token in zip(pieces[chat:], CHAT_TOKENS, strict=True) if piece.text != token
    ]
    # Matched in the normalized text, the special tokens too: the normalizer is what makes a chat token of its
    # other name, and ``tokenizers`` knows only one added token an id.
    added = {piece.text: index for index, piece in enumerate(pieces[:chat]) if piece.kind == USER_DEFINED} | special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    first: list[dict[str, object]] = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags, "special": token in special}
            for token, index in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in [*aliases, (" ", SPACE)]
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [special["<s>"]], "tokens": ["<s>"]}},
        },
        # For readers other than runtime.text.tokenizer, which decodes invalid bytes as sentencepiece does.
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": CONTROL_TOKENS[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Returns the one pair of each piece, best score first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    pairs: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        pair = _last_pair(piece, scores)
        if pair is None:  # no text gives this piece
            continue
        for part in pair:
            if part not in scores:
                raise ValueError(f"expected {part!r}, a part of {piece!r}, to be a normal piece, got none")
        pairs.append(pair)
    _check_ties(pairs, scores)
    return pairs


def _last_pair(piece: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """Returns the last two symbols when sentencepiece's algorithm makes this piece of its characters."""
    symbols = list(piece)
    while len(symbols) > 2:
        candidates = [
            (-scores[pair], index)
            for index, pair in enumerate(map(str.__add__, symbols, symbols[1:]))
            if pair in scores
        ]
        if not candidates:
            return None
        _, index = min(candidates)
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
    return (symbols[0], symbols[1]) if len(symbols) == 2 else None


def _check_ties(pairs: list[tuple[str, str]], scores: Mapping[str, float]) -> None:
    """Refuses pieces of the same score between which the order of merging could matter."""
    best: defaultdict[str, float] = defaultdict(lambda: float("-inf"))
    ties: defaultdict[float, list[tuple[str, str]]] = defaultdict(list)
    for pair in pairs:
        score = scores[pair[0] + pair[1]]
        ties[score].append(pair)
        for part in pair:
            best[part] = max(best[part], score)
    for score, tied in ties.items():
        if len(tied) == 1:
            continue
        starts: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        for pair in tied:
            starts[pair[0]].add(pair)
        for pair in tied:
            piece = "".join(pair)
            if best[piece] >= score or starts[pair[1]] - {pair}:
                raise ValueError(
                    f"expected piece {piece!r} to have a score of its own, got {score} for it and for pieces "
                    "that compete with it, which cannot be converted exactly"
                )


def _check_config(folder: Path, special: Mapping[str, int]) -> None:
    """Compares what the checkpoint's JSON files say about special tokens with where they must stand."""
    file = folder / CONFIG_FILE
    config = read_json(file)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    expected = {str(index): {"content": token, **flags} for token, index in special.items()}
    _compare(file, "added_tokens_decoder", config.get("added_tokens_decoder"), expected)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for name, value in {**named, "add_bos_token": True, "add_eos_token": False}.items():
        _compare(file, name, _content(config.get(name, value)), value)
    # The official tokenizer cleans decoded text whatever this says; true would do it a second time.
    _compare(file, "clean_up_tokenization_spaces", config.get("clean_up_tokenization_spaces", False), False)

    if find(file := folder / "added_tokens.json", CheckpointError):
        added = read_json(file)
        _compare(file, "the added tokens", added, {token: special[token] for token in IMAGE_TOKENS})
    if find(file := folder / "special_tokens_map.json", CheckpointError):
        names = read_json(file)
        for name, value in named.items():
            _compare(file, name, _content(names.get(name, value)), value)
        more = names.get("additional_special_tokens")
        listed = {str(_content(token)) for token in more} if isinstance(more, list) else more
        _compare(file, "additional_special_tokens", listed, {*CHAT_TOKENS, *IMAGE_TOKENS})


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _compare(file: Path, name: str, got: object, expected: object) -> None:
    if got == expected:
        return
    if isinstance(got, dict) and isinstance(expected, dict):
        key = min(key for key in {*got, *expected} if got.get(key) != expected.get(key))
        name, got, expected = f"{key!r} in {name}", got.get(key), expected.get(key)
    raise CheckpointError(f"{file}: expected {name} {expected!s:.200}, got {got!s:.200}: {_REMEDY}")
