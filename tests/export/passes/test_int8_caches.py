"""INT8 caches: against PyTorch whose caches are rounded between the layers' steps, and through whole conversations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export.model.modeling
import runtime
from calibration.data import Example, digest, read_examples
from calibration.observed.observe import observe
from calibration.observed.record import Origin, Record, bundle_hash
from calibration.scales.choose import Choice, choose
from calibration.trial.candidate import candidate, layers_of, only, without
from calibration.trial.prober import Prober
from export.checkpoint.reader import Checkpoint
from export.errors import QuantizationError
from export.model.weights import load_decoder
from export.passes.int8_caches import FEW, NAME, CachePlan
from export.quantized.bundle import write_quantized
from export.quantized.plan import QuantizationPlan
from export.quantized.quantizable import choose_matrices, find_matrices
from export.quantized.weights import DecoderWeights
from runtime.backends.graph import cache_names
from runtime.backends.onnxruntime import backend as backend_module
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH, VISUAL_DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError
from runtime.generation import Sequence
from runtime.model import load

from ...plans import absmax_plan

GOLDEN = Path(__file__).resolve().parents[2] / "data/golden"
IMAGES = GOLDEN / "images"
CAPACITY, LAYERS = 512, 4


@dataclass
class Made:
    """A tiny model with float weights and INT8 caches, and what it was made from."""

    source: Path
    checkpoint: Path
    folder: Path
    plan: QuantizationPlan
    record: Record


@pytest.fixture(scope="module", params=["v1", "v15"])
def made(request: pytest.FixtureRequest, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Scales come from a picture and a text, as of a calibration."""
    source: Path = request.getfixturevalue(f"tiny_{request.param}_bundle")
    folder = tmp_path_factory.mktemp("caches")
    examples = [read_examples(pairs)[index] for index in (1, 21)]
    record = observed(source, examples, folder / "record.npz")
    chosen = choose(DecoderWeights(Bundle(source)), [], record, Choice(), lambda count: None, kv_cache=True)
    write_quantized(Bundle(source), folder / "bundle", chosen.plan, form="cpu")
    return Made(source, GOLDEN / f"tiny-{request.param}/checkpoint", folder / "bundle", chosen.plan, record)


def observed(folder: Path, examples: list[Example], file: Path) -> Record:
    weights = DecoderWeights(Bundle(folder))
    matrices = choose_matrices(find_matrices(weights.model))
    names = tuple(matrix.name for matrix in matrices)
    hashes = bundle_hash(weights.bundle.manifest), "test", digest(examples)
    record = Record.nothing(Origin(*hashes, len(examples), 0, None, 6, names), [matrix.channels for matrix in matrices])
    observe(weights, examples, record, file, lambda count: None)
    return record


def steps_of(plan: QuantizationPlan) -> list[np.ndarray | None]:
    """Scales [kv_heads, 1, head_dim] in the order of the caches; None for those that stay floats."""
    planned = {cache.layer: (cache.key[:, None], cache.value[:, None]) for cache in plan.caches}
    return [scale for layer in range(LAYERS) for scale in planned.get(layer, (None, None))]


def prompt(folder: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and mask of a chunk: text, visual rows, text."""
    facts, rng = Bundle(folder).manifest.model, np.random.default_rng(seed)
    mask = np.zeros(70, bool)
    mask[9:50] = True
    model = load(folder)
    embeds = model.embed(rng.integers(0, facts.vocab_size, len(mask)))
    pixels = rng.standard_normal((1, 3, *[Bundle(folder).manifest.image.image_size] * 2)).astype("f")
    embeds[mask] = model.backend.encode_image(pixels)[: mask.sum()]
    return embeds, mask


def forward(
    folder: Path, embeds: np.ndarray, mask: np.ndarray, cuts: list[int], capacity: int = CAPACITY
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The last logits, and what the caches hold, of rows given in pieces."""
    context = OnnxRuntimeBackend(Bundle(folder)).new_context()
    context.reserve(capacity)
    bounds = [0, *cuts, len(embeds)]
    for start, stop in itertools.pairwise(bounds):
        logits = context.forward(embeds[start:stop], mask[start:stop], start)
    assert logits is not None
    for cache in context._caches:
        assert not cache[:, :, len(embeds) :].any()
    return logits, [cache[0, :, : len(embeds)] for cache in context._caches]


Pieces = list[tuple[np.ndarray, np.ndarray]]


def rounded_pytorch(
    made: Made, plan: QuantizationPlan, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The official order of things, except that rows are rounded as they go into a cache that is planned."""
    decoder = load_decoder(Checkpoint(made.checkpoint), torch.float32, CAPACITY)
    scatter, steps = export.model.modeling.tensor_scatter, itertools.cycle(steps_of(plan))

    def rounding(cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        if step is not None:
            update = (update / torch.from_numpy(step)).round().clip(-128, 127) * torch.from_numpy(step)
        return scatter(cache, update, write_indices)

    monkeypatch.setattr(export.model.modeling, "tensor_scatter", rounding)
    facts = Bundle(made.source).manifest.model
    shape = (1, facts.num_key_value_heads, CAPACITY, facts.head_dim)
    caches, start = [torch.zeros(shape) for _ in range(2 * facts.num_hidden_layers)], 0
    for embeds, mask in pieces:
        positions = torch.arange(start, start + len(embeds))[None]
        with torch.no_grad():
            inputs = torch.from_numpy(embeds)[None], torch.from_numpy(mask)[None]
            logits, caches = decoder(*inputs, positions, positions[:, 0], caches)
        start += len(embeds)
    return logits[0].numpy(), [cache[0, :, :start].numpy() for cache in caches]


def require_same_numbers(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Where float32 is just between two numbers, either is right, and few are."""
    for cache, numbers in zip(got, expected, strict=True):
        assert cache.dtype == np.int8
        difference = np.abs(cache.astype(int) - numbers.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


# The numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [69], [25, 30, 50, 66, 68, 69]], ids=["whole", "last", "pieces"])
def test_against_pytorch_with_rounded_caches(made: Made, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of both kinds, of few and of many rows, behind caches that are empty or filled."""
    embeds, mask = prompt(made.source)
    bounds = [0, *cuts, len(embeds)]
    pieces = [(embeds[start:stop], mask[start:stop]) for start, stop in itertools.pairwise(bounds)]
    assert len(cuts) < 2 or min(map(len, (piece for piece, _ in pieces))) <= FEW < len(pieces[0][0])
    expected, caches = rounded_pytorch(made, made.plan, pieces, monkeypatch)
    logits, got = forward(made.folder, embeds, mask, cuts)
    numbers = [np.rint(cache / scale) for cache, scale in zip(caches, steps_of(made.plan), strict=True)]
    require_same_numbers(got, numbers)
    assert all(np.abs(cache).max() > 60 for cache in numbers)
    # A number that is another by one moves a logit by some 1e-4.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)
    exact, _ = forward(made.source, embeds, mask, cuts)
    assert np.abs(expected - exact).max() > 1e-2  # so that the rounding is what is compared


def test_scales_leave_headroom(made: Made) -> None:
    """127 is a quarter more than the largest magnitude observed; a channel of zeros has a scale of 1."""
    names = cache_names(LAYERS)
    for name, step in zip(names, steps_of(made.plan), strict=True):
        assert step is not None
        np.testing.assert_allclose(step[:, 0] * 127, 1.25 * made.record.caches[name], rtol=1e-6)
        assert step.dtype == np.float32
    zeros = replace(made.record, caches={name: np.zeros_like(made.record.caches[name]) for name in names})
    plan = choose(DecoderWeights(Bundle(made.source)), [], zeros, Choice(), lambda count: None, kv_cache=True).plan
    assert all((step == 1).all() for step in steps_of(plan) if step is not None)


def test_first_layer_holds_the_nearest_numbers(made: Made) -> None:
    """Of the float caches: nothing was rounded before the first layer."""
    embeds, mask = prompt(made.source)
    _, floats = forward(made.source, embeds, mask, [])
    _, got = forward(made.folder, embeds, mask, [])
    nearest = [np.rint(cache / scale).clip(-128, 127) for cache, scale in zip(floats, steps_of(made.plan), strict=True)]
    require_same_numbers(got[:2], nearest[:2])


def test_it_does_not_matter_how_a_prompt_is_cut(made: Made) -> None:
    embeds, mask = prompt(made.source)
    logits, caches = forward(made.folder, embeds, mask, [])
    for cuts in ([69], [8, 9, 12], range(1, 70), range(FEW + 1, 70, FEW + 1)):
        others, numbers = forward(made.folder, embeds, mask, list(cuts))
        require_same_numbers(numbers, caches)
        np.testing.assert_allclose(others, logits, rtol=0, atol=2e-3)


def test_what_is_larger_than_ever_observed_is_clipped(made: Made, tmp_path: Path) -> None:
    tight = tuple(CachePlan(item.layer, item.key / 8, item.value / 8) for item in made.plan.caches)
    write_quantized(Bundle(made.source), tmp_path / "tight", replace(made.plan, caches=tight), form="cpu")
    embeds, mask = prompt(made.source)
    for cuts in ([], range(1, 70)):
        logits, caches = forward(tmp_path / "tight", embeds, mask, list(cuts))
        assert np.isfinite(logits).all()
        for cache in caches:
            assert (cache.min(), cache.max()) == (-128, 127)


def test_growing_keeps_what_is_held(made: Made) -> None:
    embeds, mask = prompt(made.source)
    grown, large = (OnnxRuntimeBackend(Bundle(made.folder)).new_context() for _ in range(2))
    grown.reserve(64)
    large.reserve(256)
    assert {cache.dtype for cache in grown._caches} == {np.dtype(np.int8)}
    for context in (grown, large):
        context.forward(embeds[:60], mask[:60], 0)
    held = [cache[:, :, :60].copy() for cache in grown._caches]
    grown.reserve(256)
    for cache, before in zip(grown._caches, held, strict=True):
        assert cache.dtype == np.int8
        np.testing.assert_array_equal(cache[:, :, :60], before)
        assert not cache[:, :, 60:].any()
    after = [context.forward(embeds[60:], mask[60:], 60) for context in (grown, large)]
    np.testing.assert_array_equal(*after)


# Conversations -----------------------------------------------------------------------------------------------------


TURNS = [(IMAGES / "portrait.png", "What is it?"), (None, "And then?"), (IMAGES / "wide.png", "And this?")]
"""A picture, a question about it, a second picture."""


def talk(model: runtime.Model, forgets: bool = False) -> list[runtime.Answer]:
    """The answers, on kept caches or each on empty ones."""
    session, answers = model.session(max_tiles=1, max_new_tokens=6, return_logits=True), []
    for image, question in TURNS:
        if forgets:
            session._sequence = Sequence(model.backend, model.embed)
        answers.append(session.ask(question, image))
        assert answers[-1].text is not None
    assert len(session.prompt_ids) > 512  # caches grew twice
    return answers


def test_turns_on_kept_caches_answer_as_fresh_ones(made: Made) -> None:
    model = load(made.folder)
    kept, fresh = talk(model), talk(model, forgets=True)
    assert [answer.stats.reused_tokens > 0 for answer in kept] == [False, True, True]
    assert not any(answer.stats.reused_tokens for answer in fresh)
    for answer, expected in zip(kept, fresh, strict=True):
        assert answer.text == expected.text
        np.testing.assert_allclose(np.asarray(answer.logits), np.asarray(expected.logits), rtol=0, atol=2e-3)


def test_with_int8_weights_too(made: Made, tmp_path: Path) -> None:
    """Of random weights. Seen: the first logits are 4.0 % and 7.0 % of their deviation from those of floats."""
    weights = DecoderWeights(Bundle(made.source))
    plan = replace(
        absmax_plan(weights, [matrix.name for matrix in find_matrices(weights.model)]), caches=made.plan.caches
    )
    write_quantized(Bundle(made.source), tmp_path / "bundle", plan, form="cpu")
    got, exact = (
        np.asarray(talk(load(folder))[0].logits, np.float64)[0] for folder in (tmp_path / "bundle", made.source)
    )
    assert 0 < np.sqrt(np.mean((got - exact) ** 2)) / exact.std() < 0.12


# Plans -------------------------------------------------------------------------------------------------------------


def test_layers_may_keep_their_caches(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a budget leaves as it is; the type of each cache is that of its input."""
    plan = without(made.plan, [1, None])
    assert {item.layer for item in plan.caches} == {0, 2, 3}
    assert [item.layer for item in only(made.plan, 1).caches] == [1]
    assert layers_of(made.plan) == {0, 1, 2, 3}
    manifest = write_quantized(Bundle(made.source), tmp_path / "some", plan, form="cpu")
    assert manifest.quantization is not None
    assert manifest.quantization.kv_cache
    for graph in (DECODER_GRAPH, VISUAL_DECODER_GRAPH):
        nodes = onnx.load(tmp_path / "some" / graph, load_external_data=False).graph.node
        kinds = [node.op_type for node in nodes if node.op_type in (NAME, "GroupQueryAttention")]
        assert kinds == [NAME, "GroupQueryAttention", NAME, NAME]
    embeds, mask = prompt(made.source)
    logits, caches = forward(tmp_path / "some", embeds, mask, [40, 69])
    assert [cache.dtype == np.int8 for cache in caches] == [layer != 1 for layer in range(LAYERS) for _ in range(2)]
    expected, _ = rounded_pytorch(made, plan, [(embeds, mask)], monkeypatch)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)


def test_what_is_tried_is_what_is_written(made: Made) -> None:
    example = Example("here", (IMAGES / "portrait.png",), "What is it?")
    logits = []
    for model in (candidate(DecoderWeights(Bundle(made.source)), made.plan, "cpu"), load(made.folder)):
        prober = Prober(model, 1, 5)
        logits.append(np.stack([item for _, item in prober.answer(prober.prompt(example))]))
    np.testing.assert_array_equal(*logits)


Change = Callable[[tuple[CachePlan, ...]], tuple[CachePlan, ...]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda caches: (*caches, caches[0]), "planned twice"),
        (lambda caches: (replace(caches[0], layer=9),), "layer 9 are planned, of 4 layers"),
        (lambda caches: (replace(caches[0], key=caches[0].key[:1]),), "layer 0: scales of the key cache should be"),
        (lambda caches: (replace(caches[0], value=-caches[0].value),), "scales of the value cache should be"),
    ],
    ids=["twice", "layer", "shape", "sign"],
)
def test_plans_that_do_not_fit(made: Made, change: Change, message: str, tmp_path: Path) -> None:
    plan = replace(made.plan, caches=change(made.plan.caches))
    with pytest.raises(QuantizationError, match=message):
        write_quantized(Bundle(made.source), tmp_path / "out", plan, form="cpu")
    assert not list(tmp_path.iterdir())


def test_form_for_tensorrt_has_none(made: Made, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"not for form qdq: choose --form cpu, or leave out --kv-cache"):
        write_quantized(Bundle(made.source), tmp_path / "out", made.plan)


def test_an_onnx_runtime_from_before_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module.ort, "__version__", "1.26.0")
    load(made.source)
    with pytest.raises(BackendError, match=r"onnxruntime 1\.26\.0 is too old for INT8 caches, expected 1\.27 or later"):
        load(made.folder)
