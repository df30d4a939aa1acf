"""Prompts against those of the official code, and the templates and prompts that must be refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint.templates import TEMPLATES, template
from export.errors import CheckpointError
from runtime.errors import BundleError, PromptError
from runtime.text.template import ChatTemplate

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES = sorted(path for path in GOLDEN.glob("tiny-*/*.json") if path.name != "tensors.json")
TEMPLATE = ChatTemplate.from_json(template("internlm2-chat"))
WORDS = st.text(st.characters(blacklist_characters="<", blacklist_categories=["Cs"]), min_size=1).filter(str.strip)


# ---- the official prompts --------------------------------------------------------------------------------


def test_the_golden_cases_were_found():
    assert len(CASES) >= 14


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_prompts_are_the_official_ones(case):
    facts = json.loads(case.read_text())
    answered: list[tuple[str, str | None]] = []
    tiles = facts["num_patches_list"]
    for question, turn in zip(facts["questions"], facts["turns"], strict=True):
        placed = TEMPLATE.place_images(question, tiles, tokens_per_tile=256)
        assert TEMPLATE.render([*answered, (placed, None)]) == turn["prompt"]
        answered.append((placed, turn["response"]))
        tiles = []  # the images came with the first question


@pytest.mark.parametrize("model", ["tiny-v1", "tiny-v15"])
def test_the_template_that_a_checkpoint_names_is_known(model):
    config = json.loads((GOLDEN / model / "checkpoint" / "config.json").read_text())
    assert ChatTemplate.from_json(template(config["template"])).stop_tokens == ("<|im_end|>",)


# ---- conversations ---------------------------------------------------------------------------------------


def test_another_system_message():
    expected = "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    assert TEMPLATE.render([("Hi", None)], system="Be brief.") == expected
    assert TEMPLATE.render([], system="") == "<|im_start|>system\n<|im_end|>"


def test_an_empty_answer_is_closed():
    assert TEMPLATE.render([("Hi", "")]).endswith("<|im_start|>assistant\n<|im_end|>")


@settings(deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), question=WORDS)
def test_a_conversation_only_ever_grows_at_its_end(turns, question):
    opened = TEMPLATE.render([*turns[:-1], (turns[-1][0], None)])
    answered = TEMPLATE.render(turns)
    assert answered == opened + turns[-1][1] + TEMPLATE.separator
    assert TEMPLATE.render([*turns, (question, None)]).startswith(answered)


def test_only_the_last_turn_may_be_open():
    with pytest.raises(PromptError, match="turn 1 of 2"):
        TEMPLATE.render([("one", None), ("two", None)])


@pytest.mark.parametrize(
    ("turns", "system", "what"),
    [
        ([("Hi", None)], "a <IMG_CONTEXT>", "the system message"),
        ([("Hi", "Ho"), ("Hi", "<IMG_CONTEXT>"), ("Hi", None)], None, "answer 2"),
    ],
)
def test_image_tokens_outside_a_question_are_refused(turns, system, what):
    with pytest.raises(PromptError, match=f"{what} contains <IMG_CONTEXT>"):
        TEMPLATE.render(turns, system)


# ---- images in a question --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "tiles", "expected"),
    [
        ("Hi", [], "Hi"),
        ("Hi", [1], "<img>CC</img>\nHi"),
        ("Hi", [2, 1], "<image 1> (图1):<img>CCCC</img><image 2> (图2):<img>CC</img>\nHi"),
        ("<image>", [1], "<img>CC</img>"),
        ("a <image><image> b", [1, 3], "a <img>CC</img><img>CCCCCC</img> b"),
        ("<image 1> or <Image>?", [1], "<img>CC</img>\n<image 1> or <Image>?"),
    ],
)
def test_images_stand_where_they_belong(question, tiles, expected):
    placed = TEMPLATE.place_images(question, tiles, tokens_per_tile=2)
    assert placed == expected.replace("C", "<IMG_CONTEXT>")


@settings(deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=5), placeholders=st.booleans(), data=st.data())
def test_every_image_gets_its_tokens_and_the_text_is_kept(texts, placeholders, data):
    count = len(texts) - 1 if placeholders else data.draw(st.integers(0, 4))
    tiles = data.draw(st.lists(st.integers(1, 13), min_size=count, max_size=count))
    question = "<image>".join(texts) if placeholders else "".join(texts)
    placed = TEMPLATE.place_images(question, tiles, tokens_per_tile=4)

    runs = [run.split("</img>")[0] for run in placed.split("<img>")[1:]]
    assert runs == ["<IMG_CONTEXT>" * (4 * number) for number in tiles]
    if placeholders:
        rest = placed.replace("<IMG_CONTEXT>", "").replace("<img></img>", "<image>")
        assert rest == question
    else:
        assert placed.endswith(question)


@pytest.mark.parametrize(
    ("question", "tiles", "got"),
    [
        ("What does <image> mean?", [], "got 1 in the prompt and 0 new images"),
        ("<image> and <image>", [1], "got 2 in the prompt and 1 new"),
        ("<image>", [1, 1, 1], "got 1 in the prompt and 3 new"),
    ],
)
def test_as_many_placeholders_as_images(question, tiles, got):
    with pytest.raises(PromptError, match=got):
        TEMPLATE.place_images(question, tiles, 256)


@pytest.mark.parametrize("tiles", [[], [1]])
@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("", "blank"),
        (" \n\t", "blank"),
        (None, "NoneType"),
        (b"Hi", "bytes"),
        ("count the <IMG_CONTEXT>", "the prompt contains <IMG_CONTEXT>"),
    ],
)
def test_unusable_prompts_are_refused_in_one_line(question, says, tiles):
    with pytest.raises(PromptError, match=says) as caught:
        TEMPLATE.place_images(question, tiles, 256)
    assert "\n" not in str(caught.value)


def test_a_template_may_have_other_tokens():
    other = replace(TEMPLATE, image_start="[", image_end="]", image_context="*", image_label="({number})")
    assert other.place_images("<IMG_CONTEXT>?", [1, 2], 3) == "(1)[***](2)[******]\n<IMG_CONTEXT>?"


# ---- reading a template ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_survive_json(name):
    data = template(name)
    assert data["name"] == name
    template_read = ChatTemplate.from_json(json.loads(json.dumps(data)))
    assert json.loads(json.dumps(asdict(template_read))) == data


@pytest.mark.parametrize("key", sorted(asdict(TEMPLATE)))
def test_missing_and_mistyped_values_are_refused(key):
    data = asdict(TEMPLATE)
    for value in (None, 3, [], [""], ["<|im_end|>", 2], {}):
        with pytest.raises(BundleError, match=f"template: {key} must be"):
            ChatTemplate.from_json(data | {key: value})
    if key != "system_message":
        with pytest.raises(BundleError, match=f"template: {key} must be"):
            ChatTemplate.from_json(data | {key: ""})
    del data[key]
    with pytest.raises(BundleError, match="expected the keys"):
        ChatTemplate.from_json(data)


@pytest.mark.parametrize("data", [None, "internlm2-chat", [], {}, asdict(TEMPLATE) | {"sep2": ""}])
def test_other_things_are_refused(data):
    with pytest.raises(BundleError, match="expected the keys"):
        ChatTemplate.from_json(data)


def test_a_template_without_system_message():
    assert ChatTemplate.from_json(asdict(TEMPLATE) | {"system_message": ""}).render([]) == (
        "<|im_start|>system\n<|im_end|>"
    )


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(CheckpointError, match="one of 'internlm2-chat', got 'phi3-chat'"):
        template("phi3-chat")


def test_changing_a_given_template_changes_no_other():
    template("internlm2-chat")["name"] = "mine"
    assert template("internlm2-chat")["name"] == "internlm2-chat"
