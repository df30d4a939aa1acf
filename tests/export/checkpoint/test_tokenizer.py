"""The converted tokenizer gives the official ids: sentencepiece, between special tokens, is the oracle."""

import json
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from export.checkpoint.tokenizer import convert
from export.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[2] / "data/golden"
TINY = GOLDEN / "tiny-v1/checkpoint"
REAL = os.environ.get("MONOEDGE_REAL_TOKENIZER")

CONTROL = ["<unk>", "<s>", "</s>"]
CHAT = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
IMAGE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
SPECIAL = re.compile("(" + "|".join(map(re.escape, CONTROL + CHAT + IMAGE)) + ")")
NORMAL, UNKNOWN, CONTROL_KIND, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Oracle:
    """Special tokens out first, then sentencepiece."""

    def __init__(self, model):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self.sp.get_piece_size()
        self.pieces = [self.sp.id_to_piece(index) for index in range(self.size)]
        self.special = dict(zip(CONTROL, range(3), strict=True))
        self.special |= {token: self.size - 6 + index for index, token in enumerate(CHAT + IMAGE)}

    def encode(self, text):
        ids = []
        for part in SPECIAL.split(text):
            ids += [self.special[part]] if part in self.special else self._encode(part)
        return ids

    def _encode(self, text):
        # From 0.2.2 on sentencepiece ignores a piece for NUL, which the released model has and was trained with.
        if "\0" not in self.pieces:
            return self.sp.encode(text)
        first, *others = map(self.sp.encode, text.split("\0"))
        return first + [index for ids in others for index in [self.pieces.index("\0"), *ids]]


class Case:
    def __init__(self, folder):
        self.json = convert(folder)
        self.tokenizer = tokenizers.Tokenizer.from_str(self.json)
        self.oracle = Oracle((folder / "tokenizer.model").read_bytes())
        added = self.tokenizer.get_added_tokens_decoder().values()
        user_defined = [token.content for token in added if not token.special] + self.oracle.pieces[-6:]
        runs = st.builds(str.__mul__, st.sampled_from(" \n\t▁-=*a.\0"), st.integers(1, 70))
        words = st.sampled_from([piece.replace("▁", " ") for piece in self.oracle.pieces])
        names = st.sampled_from(CONTROL + CHAT + IMAGE + user_defined)
        halves = st.builds(lambda name, size: name[:size], names, st.integers(0, 9))
        parts = st.one_of(st.text(max_size=20), runs, words, names, halves)
        self.texts = st.lists(parts, max_size=12).map("".join)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["tiny", "real"])
def case(request):
    if request.param == "real" and not REAL:
        pytest.skip("MONOEDGE_REAL_TOKENIZER is not set: the folder of the released model's tokenizer")
    return Case(TINY if request.param == "tiny" else Path(REAL))


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_ids_are_those_of_sentencepiece(case, data):
    text = data.draw(case.texts)
    assert case.encode(text) == case.oracle.encode(text)


@pytest.mark.parametrize("character", [" ", "\n", "\t", "-", "▁", "a", "哈", "😀", "\0", "\x7f", "１"])
def test_runs(case, character):
    for length in range(1, 150):
        for text in (character * length, "x" + character * length, character * length + "x y"):
            assert case.encode(text) == case.oracle.encode(text)


def test_long_text(case):
    text = Path(__file__).read_text(encoding="utf-8") * 10
    assert case.encode(text) == case.oracle.encode(text)


def test_names_of_pieces_in_text(case):
    """What sentencepiece keeps free for a chat token means it; the names of bytes mean nothing."""
    first = case.oracle.size - 6
    for index, piece in enumerate(case.oracle.pieces[-6:], first):
        assert case.encode(f"a{piece}b") == [*case.encode("a"), index, *case.encode("b")]
    assert 3 + 0x41 not in case.encode("<0x41>")


def test_every_special_token_and_bos(case):
    for token, index in case.oracle.special.items():
        assert case.encode(f" {token} ") == [*case.encode(" "), index, *case.encode(" ")]
    assert case.tokenizer.encode("").ids == [1]
    assert case.tokenizer.encode("a").ids == [1, *case.encode("a")]


def test_tokenizers_alone_decode(case):
    text = "  two  spaces,\n\ttabs, 你好 and 😀 <0x41>"
    assert case.tokenizer.decode(case.encode(text)) == text


def test_vocabulary_is_contiguous(case):
    assert sorted(case.tokenizer.get_vocab().values()) == list(range(case.oracle.size + 9))


def test_golden_ids_of_the_real_tokenizer():
    if not REAL:
        pytest.skip("MONOEDGE_REAL_TOKENIZER is not set: the folder of the released model's tokenizer")
    tokenizer = tokenizers.Tokenizer.from_str(convert(Path(REAL), 92553))
    for golden in json.loads((GOLDEN / "tokenizer_real.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(golden["text"]).ids == golden["input_ids"]


@pytest.mark.parametrize("version", ["tiny-v1", "tiny-v15"])
def test_golden_prompts(version):
    tokenizer = tokenizers.Tokenizer.from_str(convert(GOLDEN / version / "checkpoint", 777))
    files = [file for file in (GOLDEN / version).glob("*.json") if file.name != "tensors.json"]
    assert files
    for file in files:
        turns = json.loads(file.read_text(encoding="utf-8"))["turns"]
        tensors = load_file(file.with_suffix(".safetensors"))
        for number, turn in enumerate(turns):
            prefix = f"turn{number}." if len(turns) > 1 else ""
            assert tokenizer.encode(turn["prompt"]).ids == tensors[f"{prefix}input_ids"].tolist()


def test_same_folder_same_text():
    assert convert(TINY) == convert(TINY)


# A model of our own making, to see what is refused and that odd vocabularies are not converted wrongly.


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


TRAINER = field(3, 2) + field(35, 1)
NORMALIZER = field(3, 0) + field(4, 0)
FIRST = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL_KIND), ("</s>", 0.0, CONTROL_KIND)]
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
LETTERS = [(letter, -1000.0 - index, NORMAL) for index, letter in enumerate("hwy▁")]
LAST = [(f"[UNUSED_TOKEN_{index}]", 0.0, USER_DEFINED) for index in range(6)]


def model(pieces, trainer=TRAINER, normalizer=NORMALIZER, more=b""):
    messages = [field(1, text.encode()) + field(2, score) + field(3, kind) for text, score, kind in pieces]
    body = b"".join(field(1, message) for message in messages)
    return body + field(2, trainer) + field(3, normalizer) + more


def checkpoint(folder, data):
    """A checkpoint folder around a model, with the JSON files that belong to its size."""
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    ids = [0, 1, 2, *range(size - 6, size + 9)]
    config = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = config["added_tokens_decoder"].values()
    config["added_tokens_decoder"] = dict(zip(map(str, ids), tokens, strict=True))
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def converted_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        try:
            return convert(checkpoint(Path(folder), data))
        except CheckpointError as error:
            if re.search("that compete with it|to be a normal piece", str(error)):
                return None
            raise


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_odd_vocabularies_are_converted_exactly_or_refused(data):
    """Pieces that no text gives, better scores for longer pieces, and pieces of the same score."""
    texts = data.draw(st.lists(st.text("hwy▁", min_size=2, max_size=6), max_size=15, unique=True))
    scores = data.draw(st.lists(st.integers(-40, 0), min_size=len(texts), max_size=len(texts)))
    user_defined = data.draw(st.lists(st.text("hwz", min_size=1, max_size=3), max_size=2, unique=True))
    odd = [(text, float(score), NORMAL) for text, score in zip(texts, scores, strict=True)]
    pieces = [piece for piece in [*FIRST, *BYTES, *LETTERS, *odd] if piece[0] not in user_defined]
    proto = model([*pieces, *((text, 0.0, USER_DEFINED) for text in user_defined), *LAST])
    converted = converted_or_refused(proto)
    assume(converted)
    tokenizer = tokenizers.Tokenizer.from_str(converted)
    oracle = Oracle(proto)
    names = st.sampled_from(["<s>", *user_defined, *(text for text, _, _ in LAST)])
    strings = st.lists(st.one_of(st.text("hwy ▁z", max_size=30), names), max_size=4).map("".join)
    for text in data.draw(st.lists(strings, min_size=5, max_size=5)):
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text)


GOOD = [*FIRST, *BYTES, *LETTERS, ("hw", -1.0, NORMAL), *LAST]
TIED = [*GOOD[:-6], ("wy", -1.0, NORMAL), *LAST]
BAD_MODELS = {
    "no message": (b"not a model", "not a SentencePiece model"),
    "empty": (b"", "no pieces"),
    "cut off": (model(GOOD)[:-30], "or damaged"),
    "unigram": (model(GOOD, trainer=field(3, 1) + field(35, 1)), r"model_type 2 \(BPE\), got 1 \(UNIGRAM\)"),
    "no byte fallback": (model(GOOD, trainer=field(3, 2)), "byte_fallback 1, got 0"),
    "dummy prefix": (model(GOOD, normalizer=field(4, 0)), "add_dummy_prefix 0, got 1"),
    "extra spaces": (model(GOOD, normalizer=field(3, 0)), "remove_extra_whitespaces 0, got 1"),
    "raw spaces": (model(GOOD, normalizer=NORMALIZER + field(5, 0)), "escape_whitespaces 1, got 0"),
    "normalizer": (model(GOOD, normalizer=NORMALIZER + field(2, b"nfkc")), "charsmap empty, got of 4 bytes"),
    "denormalizer": (model(GOOD, more=field(5, field(2, b"x"))), "denormalizer empty, got of 1 bytes"),
    "unused piece": (model([*GOOD[:-6], ("wy", -2.0, UNUSED), *LAST]), "piece 264 of 271, got 'wy' of type 5"),
    "twice": (model([*GOOD[:-6], ("hw", -2.0, NORMAL), *LAST]), "all different"),
    "255 bytes": (model([*FIRST, *BYTES[1:], *GOOD[259:]]), "256 bytes"),
    "other order": (model([FIRST[0], FIRST[2], FIRST[1], *GOOD[3:]]), "control piece <s> as piece 1"),
    "chat tokens elsewhere": (model([*GOOD[:-1], ("wy", -2.0, NORMAL)]), r"<\|im_start\|> as piece 269 of 270"),
    "chat tokens swapped": (model([*GOOD[:-1], ("<|im_end|>", 0.0, USER_DEFINED)]), r"<\|im_start\|> as piece"),
    "image token inside": (model([*GOOD[:-6], ("<img>", 0.0, USER_DEFINED), *LAST]), "got '<img>'"),
    "overlap": (model([*GOOD[:-6], ("h<", 0.0, USER_DEFINED), *LAST]), "'h<' overlaps with"),
    "space": (model([*GOOD[:-6], ("h w", 0.0, USER_DEFINED), *LAST]), "has a space"),
    "tie": (model(TIED), "expected piece 'hw' to have a score of its own, got -1.0"),
    "missing part": (model([*GOOD[:-6], ("hx", -2.0, NORMAL), *LAST]), "expected 'x', a part of 'hx'"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_are_refused(tmp_path, name):
    data, message = BAD_MODELS[name]
    checkpoint(tmp_path, model(GOOD))
    convert(tmp_path, 270 + 9)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is missing"):
        convert(tmp_path)


def test_another_vocab_size():
    with pytest.raises(CheckpointError, match="vocab_size to be 777, 768 pieces and 9 image tokens, got 778"):
        convert(TINY, 778)


def change(file, keys, value):
    document = json.loads(file.read_text(encoding="utf-8"))
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "keys", "value", "message"),
    [
        ("tokenizer_config.json", ["added_tokens_decoder", "766", "content"], "<end>", "'766' in added_tokens_d"),
        ("tokenizer_config.json", ["added_tokens_decoder", "768", "lstrip"], True, "'768' in added_tokens_decoder"),
        ("tokenizer_config.json", ["added_tokens_decoder", "777"], {}, "'777' in added_tokens_decoder None, got {}"),
        ("tokenizer_config.json", ["add_bos_token"], False, "add_bos_token True, got False"),
        ("tokenizer_config.json", ["bos_token"], {"content": "<b>"}, "bos_token <s>, got <b>"),
        ("tokenizer_config.json", ["clean_up_tokenization_spaces"], True, "spaces False, got True"),
        ("added_tokens.json", ["<img>"], 769, "'<img>' in the added tokens 768, got 769"),
        ("special_tokens_map.json", ["eos_token"], "<|im_end|>", r"eos_token </s>, got <\|im_end\|>"),
        ("special_tokens_map.json", ["additional_special_tokens"], ["<img>"], "additional_special_tokens"),
    ],
)
def test_json_files_that_do_not_fit(tmp_path, file, keys, value, message):
    for path in [*TINY.glob("*token*.json"), TINY / "tokenizer.model"]:
        shutil.copy(path, tmp_path)
    assert convert(tmp_path) == convert(TINY)
    change(tmp_path / file, keys, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path)
    assert "\n" not in str(caught.value)


def test_json_files_that_are_missing_or_damaged(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is missing"):
        convert(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        convert(tmp_path)
    # The other two repeat what is known without them.
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    assert convert(tmp_path) == convert(TINY)
