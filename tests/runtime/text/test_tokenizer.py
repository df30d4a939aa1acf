"""Decoding is that of the official tokenizer: sentencepiece's, cleaned, with its spaces around special tokens."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint.tokenizer import convert
from runtime.errors import BundleError, PromptError
from runtime.text.streaming import StreamDecoder
from runtime.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "data/golden"
TINY = GOLDEN / "tiny-v1/checkpoint"
REAL = os.environ.get("MONOEDGE_REAL_TOKENIZER")
UNSET = "MONOEDGE_REAL_TOKENIZER is not set: the folder of the released model's tokenizer"

CHAT = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
IMAGE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


class Case:
    """A tokenizer, and the official decoding of the same ids."""

    def __init__(self, folder, file):
        file.write_text(convert(folder), encoding="utf-8")
        self.tokenizer = Tokenizer.from_file(file)
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.size = self.sp.get_piece_size()
        self.special = {0: "<unk>", 1: "<s>", 2: "</s>"}
        self.special |= {self.size - 6 + index: token for index, token in enumerate(CHAT + IMAGE)}
        pieces = [self.sp.id_to_piece(index) for index in range(self.size)]
        # Tokens at whose borders the cleaning of spaces happens, or nearly.
        short = [index for index, piece in enumerate(pieces) if set(piece) & set("▁.?!,'") and len(piece) < 4]
        chinese, emoji = "中".encode(), "😀".encode()
        invalid = b"\xef\xbf\xbd\xed\xa0\x80\xc0\xf5"
        tokens = st.one_of(
            st.integers(0, self.size + 8),
            st.sampled_from(list(self.special)),
            st.sampled_from(short),
            st.integers(3, 258),
            st.sampled_from(chinese + emoji + invalid).map(lambda byte: byte + 3),
        )
        self.ids = st.one_of(st.lists(tokens, max_size=40), st.lists(st.sampled_from(short), max_size=40))

    def decode(self, ids, skip=True):
        parts, run = [], []
        for index in ids:
            if index in self.special and skip:
                continue
            if index >= self.size:
                parts += [self.to_string(run), self.special[index]] if run else [self.special[index]]
                run = []
            else:
                run.append(index)
        return " ".join([*parts, self.to_string(run)] if run else parts)

    def to_string(self, ids):
        text, run, after_special = "", [], False
        for index in ids:
            if index in self.special:
                text += ("" if after_special else " ") + self.pieces_to_text(run) + self.special[index]
                run = []
            else:
                run.append(index)
            after_special = index in self.special
        text += self.pieces_to_text(run)
        for old in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(old, old.strip())
        return text

    def pieces_to_text(self, ids):
        return self.sp.decode([self.sp.id_to_piece(index) for index in ids]) if ids else ""


@pytest.fixture(scope="module", params=["tiny", "real"])
def case(request, tmp_path_factory):
    if request.param == "real" and not REAL:
        pytest.skip(UNSET)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return Case(TINY if request.param == "tiny" else Path(REAL), file)


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.finish()]


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_decode_is_the_official_one(case, data):
    ids = data.draw(case.ids)
    assert case.tokenizer.decode(ids) == case.decode(ids)
    assert case.tokenizer.decode(ids, skip_special_tokens=False) == case.decode(ids, skip=False)


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_a_stream_adds_up_to_decode(case, data):
    """Every sequence of ids: so what a stream gave out can be continued by any token."""
    ids = data.draw(case.ids)
    assert "".join(stream(case.tokenizer, ids)) == case.tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<["), max_size=60))
def test_text_survives_but_for_the_cleaning(case, text):
    ids = case.tokenizer.encode(text)
    decoded = case.tokenizer.decode(ids)
    assert ids[0] == 1
    assert decoded.replace(" ", "") == text.replace("▁", "").replace(" ", "")
    assert case.tokenizer.encode(text, add_bos=False) == ids[1:]


def test_incomplete_characters_are_held_back(case):
    emoji = [byte + 3 for byte in "😀".encode()]
    assert stream(case.tokenizer, emoji) == ["", "", "", "😀", ""]
    assert stream(case.tokenizer, emoji[:3]) == ["", "", "", "\ufffd" * 3]
    first, *_ = case.tokenizer.encode("The", add_bos=False)
    text = case.decode([first])
    assert stream(case.tokenizer, [emoji[0], emoji[1], first]) == ["", "", "\ufffd" * 2 + text, ""]


def test_words_are_given_out_at_once_and_spaces_with_what_follows(case):
    ids = case.tokenizer.encode("The cat", add_bos=False)
    assert "".join(stream(case.tokenizer, ids)[:-1]) == "The cat"
    space, stop, letter = (case.tokenizer.encode(text, add_bos=False)[-1] for text in (" ", ".", "a"))
    if case.tokenizer.decode([space]) != " ":
        pytest.skip("no piece for a single space")
    assert stream(case.tokenizer, [space, stop, space, letter, space]) == ["", ".", "", " a", "", " "]


def test_special_tokens_interrupt_nothing_when_skipped(case):
    first, second, third = (byte + 3 for byte in "中".encode())
    end = case.tokenizer.id_of("<|im_end|>")
    assert case.tokenizer.decode([first, end, second, third]) == "中"
    assert stream(case.tokenizer, [first, end, second, third]) == ["", "", "", "中", ""]


def test_facts(case):
    assert case.tokenizer.vocab_size == case.size + 9
    for index, token in case.special.items():
        assert case.tokenizer.id_of(token) == index
    with pytest.raises(BundleError, match="<nothing>"):
        case.tokenizer.id_of("<nothing>")
    with pytest.raises(BundleError, match="<0x41>"):
        case.tokenizer.id_of("<0x41>")


@pytest.mark.parametrize("skip", [True, False])
def test_ids_out_of_range(case, skip):
    for index in (-1, case.tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"got {index}"):
            case.tokenizer.decode([index], skip_special_tokens=skip)
        with pytest.raises(ValueError, match=f"got {index}"):
            StreamDecoder(case.tokenizer).push(index)


def test_lone_surrogates(case):
    with pytest.raises(PromptError, match="lone surrogate at position 3"):
        case.tokenizer.encode("abc\ud800")


def test_golden_texts_of_the_real_tokenizer(tmp_path):
    if not REAL:
        pytest.skip(UNSET)
    tokenizer = Case(Path(REAL), tmp_path / "tokenizer.json").tokenizer
    for golden in json.loads((GOLDEN / "tokenizer_real.json").read_text(encoding="utf-8")):
        ids = golden["input_ids"]
        assert tokenizer.encode(golden["text"]) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == golden["decode"]
        assert tokenizer.decode(ids) == golden["decode_skip"]


@pytest.mark.parametrize("version", ["tiny-v1", "tiny-v15"])
def test_golden_responses(tmp_path, version):
    tokenizer = Case(GOLDEN / version / "checkpoint", tmp_path / "tokenizer.json").tokenizer
    files = [file for file in (GOLDEN / version).glob("*.json") if file.name != "tensors.json"]
    assert files
    for file in files:
        for turn in json.loads(file.read_text(encoding="utf-8"))["turns"]:
            ids = turn["generated_ids"]
            assert tokenizer.decode(ids).split("<|im_end|>")[0].strip() == turn["response"]
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_files_that_are_no_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_file(file)
    for damaged in (b"", b"\xff", b"{}", b"[1,\n2]", convert(TINY).encode()[:-5]):
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match="export the bundle again") as caught:
            Tokenizer.from_file(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (["normalizer"], None),
    ],
)
def test_what_the_package_raises_is_one_line(tmp_path, keys, value):
    """In reading, and in encoding: they pass ``except Exception``."""
    document = place = json.loads(convert(TINY))
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match="export the bundle again") as caught:
        Tokenizer.from_file(file).encode("Hello")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<|im_end|>"])
def test_special_tokens_that_text_does_not_give(tmp_path, token):
    """Of the vocabulary, but lost from every text: they would be encoded letter by letter."""
    document = json.loads(convert(TINY))
    document["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": token}, "content": "x"})
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=re.escape(f"expected {token} to be one token in text")):
        Tokenizer.from_file(file)


def test_a_prompt_is_never_cut_nor_filled_up(tmp_path):
    document = json.loads(convert(TINY))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    expected = Tokenizer.from_file(file).encode("Hello, who are you?")
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    file.write_text(json.dumps(document), encoding="utf-8")
    assert Tokenizer.from_file(file).encode("Hello, who are you?") == expected


def test_tokenizers_of_other_models(tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(file))
    with pytest.raises(BundleError, match=r"expected <\|plugin\|> to have id"):
        Tokenizer.from_file(file)

    document = json.loads(convert(TINY))
    vocabulary = document["model"]["vocab"]
    vocabulary["<img>"], vocabulary["</img>"] = vocabulary["</img>"], vocabulary["<img>"]
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match="expected <img> to have id 768 of 777, got 769"):
        Tokenizer.from_file(file)

    document = json.loads(convert(TINY))
    document["model"]["vocab"]["<0x00>"] = 4
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match="without gaps or repetitions"):
        Tokenizer.from_file(file)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at memory through /proc")
def test_memory_does_not_grow_with_the_texts(case):
    def memory() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1])

    for number in range(1000):
        case.tokenizer.encode(f"{number}: {'word ' * 40}")
    before = memory()
    for number in range(1000, 9000):
        case.tokenizer.encode(f"{number}: {'word ' * 40}")
    assert memory() - before < 8000
