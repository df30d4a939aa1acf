"""``python -m export.recording``: what is recorded, how it is stored, and what other programs make of it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import runtime
from export.onnx import main as export
from export.recorded import files as recording_files
from export.recorded import format as recording_format
from export.recorded import make as recording_make
from export.recorded import run as recording_run
from export.recorded.compare import LIMITS, compare, signal_to_noise
from export.recorded.format import CALLS, FILES, MADE_OF, made_of, read, why_missing
from export.recording import main
from export.writer import rewrite_manifest
from runtime.backends.graph import INPUTS_EMBEDS, LOGITS, PAST, PIXEL_VALUES, POSITION_IDS, VISUAL_EMBEDS, VISUAL_MASK
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, RECORDING, VISION_GRAPH, EngineRecord, FileRecord, Manifest
from runtime.bundle.reader import Bundle, sha256_of
from runtime.errors import BundleError, MonoedgeError, OptionError

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "tests/data/golden/tiny-v1/checkpoint"
STEPS = recording_make.STEPS


@pytest.fixture
def copy(tiny_v1_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_v1_bundle, tmp_path / "bundle"))


def without_recording(folder: Path) -> Path:
    """A bundle from before there were recorded sets."""
    shutil.rmtree(folder / RECORDING)
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    others = {name: record for name, record in manifest.files.items() if name not in FILES}
    rewrite_manifest(folder, lambda manifest: replace(manifest, files=others))
    return folder


# What is recorded -----------------------------------------------------------------------------------------------------


def test_an_export_ends_with_it(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle, verify=True)
    assert set(FILES) <= set(bundle.manifest.files)
    assert why_missing(bundle) is None
    recording = read(bundle)
    (picture,) = recording[VISION_GRAPH]
    prompt, *steps = recording[DECODER_GRAPH]
    assert picture.inputs[PIXEL_VALUES].shape == (1, 3, 448, 448)
    assert prompt.inputs[VISUAL_MASK].sum() == bundle.manifest.image.tokens_per_tile
    assert [call.inputs[INPUTS_EMBEDS].shape[1] for call in steps] == [1] * STEPS
    # Both experts, in one call: the picture stands within text.
    assert not prompt.inputs[VISUAL_MASK][0, [0, -1]].any()
    visual = prompt.inputs[INPUTS_EMBEDS][prompt.inputs[VISUAL_MASK]]
    np.testing.assert_array_equal(visual, picture.outputs[VISUAL_EMBEDS][0])


def test_it_is_what_sessions_compute(tiny_bundle: Path) -> None:
    """The prompt's logits are those of a session asked the same; the runtime knows nothing of recordings."""
    model = runtime.load(tiny_bundle)
    picture = recording_make.picture(448)
    session = model.session(picture, recording_make.QUESTION, max_tiles=1, max_new_tokens=1, return_logits=True)
    assert session.text is not None
    call = read(Bundle(tiny_bundle))[DECODER_GRAPH][0]
    assert session.visual_mask.tolist() == call.inputs[VISUAL_MASK][0].tolist()
    assert session.logits is not None
    np.testing.assert_allclose(session.logits[0], call.outputs[LOGITS][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bytes_", [1, 200_000])
def test_pieces_give_what_the_whole_gives(
    one_decoder_bundle: Path, bytes_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node a piece, and some; caches cross their bounds, and calls follow each other within each."""
    bundle = Bundle(one_decoder_bundle)
    expected = read(bundle)
    monkeypatch.setattr(recording_run, "PIECE_BYTES", bytes_)
    done: list[int] = []
    recording = recording_make._record(bundle, done.append)
    assert len(done) > 10
    for graph, calls in recording.items():
        for call, before in zip(calls, expected[graph], strict=True):
            for name, array in call.outputs.items():
                np.testing.assert_allclose(array, before.outputs[name], rtol=0, atol=1e-5)


def test_steps_go_on_with_the_caches(tiny_bundle: Path) -> None:
    backend = OnnxRuntimeBackend(Bundle(tiny_bundle))
    context = backend.new_context()
    calls = read(Bundle(tiny_bundle))[DECODER_GRAPH]
    context.reserve(sum(call.inputs[INPUTS_EMBEDS].shape[1] for call in calls))
    for call in calls:
        start = int(call.inputs[POSITION_IDS][0, 0])
        logits = context.forward(call.inputs[INPUTS_EMBEDS][0], call.inputs[VISUAL_MASK][0], start)
        np.testing.assert_allclose(logits, call.outputs[LOGITS][0], rtol=0, atol=1e-4)


def test_bfloat16_is_computed_in_float32(tiny_v1_bundle: Path, tiny_v1_bf16_bundle: Path) -> None:
    """Of weights and inputs that bfloat16 has, without its rounding on the way: nearer to fp32 than bf16 comes."""
    exact, rounded = (read(Bundle(folder)) for folder in (tiny_v1_bundle, tiny_v1_bf16_bundle))
    for call, other in zip(exact[DECODER_GRAPH], rounded[DECODER_GRAPH], strict=True):
        embeds = other.inputs[INPUTS_EMBEDS]
        np.testing.assert_array_equal(embeds, embeds.astype(ml_dtypes.bfloat16).astype(np.float32))
        # The official code's own bf16 logits differ from fp32 by up to 0.29.
        np.testing.assert_allclose(other.outputs[LOGITS], call.outputs[LOGITS], rtol=0, atol=0.25)


def test_portable_graphs_give_the_same(tiny_v1_bundle: Path, tiny_v1_portable_bundle: Path) -> None:
    """Their caches come as the chunk alone."""
    first, second = (read(Bundle(folder))[DECODER_GRAPH] for folder in (tiny_v1_bundle, tiny_v1_portable_bundle))
    for call, other in zip(first, second, strict=True):
        np.testing.assert_allclose(other.outputs[LOGITS], call.outputs[LOGITS], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("length", "calls"), [(1, [1]), (5, [1, 1, 1, 1, 1]), (30, [22, *[1] * STEPS])])
def test_short_bundles(length: int, calls: list[int], tmp_path: Path) -> None:
    export(["--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "bundle"), "--max-length", str(length)])
    recording = read(Bundle(tmp_path / "bundle"))
    assert [call.inputs[INPUTS_EMBEDS].shape[1] for call in recording[DECODER_GRAPH]] == calls


def test_without_onnxruntime_the_export_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("export.bundle.find_spec", lambda name: None if name == "onnxruntime" else find(name))
    export(["--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "bundle")])
    assert f"later: python -m export.recording --bundle {tmp_path / 'bundle'}" in capsys.readouterr().err
    assert why_missing(Bundle(tmp_path / "bundle")) == "the bundle has no recorded set"


# In a bundle ----------------------------------------------------------------------------------------------------------


def test_an_older_bundle_is_recorded(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(Bundle(copy))
    without_recording(copy)
    with pytest.raises(BundleError, match=r"has no recorded set: record it with: python -m export\.recording"):
        read(Bundle(copy, verify=True))
    main(["--bundle", str(copy)])
    after = read(Bundle(copy, verify=True))
    np.testing.assert_array_equal(after[DECODER_GRAPH][0].outputs[LOGITS], before[DECODER_GRAPH][0].outputs[LOGITS])
    assert "recorded, since the bundle has no recorded set" in capsys.readouterr().err
    stamp = (copy / MADE_OF).stat().st_mtime_ns
    main(["--bundle", str(copy)])
    assert "is up to date; --overwrite records it again" in capsys.readouterr().err
    assert (copy / MADE_OF).stat().st_mtime_ns == stamp
    main(["--bundle", str(copy), "--overwrite"])
    assert (copy / MADE_OF).stat().st_mtime_ns != stamp
    assert [item.name for item in copy.iterdir() if item.name.startswith(".")] == []


def test_the_form_of_older_bundles_is_recorded_anew(copy: Path) -> None:
    """They held polygraphy's JSON; it is gone afterwards."""
    before = read(Bundle(copy))
    old = f"{RECORDING}/decoder.inputs.json"
    (copy / CALLS).rename(copy / old)
    rewrite_manifest(
        copy, lambda now: replace(now, files={old if name == CALLS else name: item for name, item in now.files.items()})
    )
    with pytest.raises(BundleError, match=r"older monoedge: record it again with: python -m export\.recording"):
        read(Bundle(copy))
    main(["--bundle", str(copy)])
    bundle = Bundle(copy, verify=True)
    assert old not in bundle.manifest.files
    assert {file.name for file in (copy / RECORDING).iterdir()} == {Path(name).name for name in FILES}
    np.testing.assert_array_equal(
        read(bundle)[DECODER_GRAPH][0].outputs[LOGITS], before[DECODER_GRAPH][0].outputs[LOGITS]
    )


def test_other_weights_need_another_recording(copy: Path) -> None:
    manifest = Bundle(copy).manifest
    weights = replace(manifest.files["decoder.weights"], sha256="0" * 64)
    rewrite_manifest(copy, lambda now: replace(now, files=now.files | {"decoder.weights": weights}))
    assert why_missing(Bundle(copy)) == "the bundle's recorded set is of other graphs or weights"


def test_a_quantized_bundle_is_recorded_anew(
    tiny_v1_bundle: Path, quantize: Callable[..., Path], tmp_path: Path
) -> None:
    """Of its own weights, and its own INT8: not what it was made of."""
    folder = Path(shutil.copytree(quantize(tiny_v1_bundle, "w8a8"), tmp_path / "bundle"))
    assert why_missing(Bundle(folder)) is not None
    main(["--bundle", str(folder)])
    bundle = Bundle(folder, verify=True)
    ratios = compare(OnnxRuntimeBackend(bundle), bundle.manifest, read(bundle), (DECODER_GRAPH,))
    assert ratios[DECODER_GRAPH] > LIMITS["fp32"]
    (before, after) = (read(Bundle(path))[DECODER_GRAPH][0] for path in (tiny_v1_bundle, folder))
    assert signal_to_noise(after.outputs[LOGITS], before.outputs[LOGITS]) < LIMITS["fp32"]


def test_a_bundle_opens_whenever_recording_stops(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: (copy / name).read_bytes() + b"\n" for name in FILES}
    for stop in (1, 2):
        calls: list[int] = []

        def stopping(folder: Path, change: object, stop: int = stop, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            rewrite_manifest(folder, change)  # type: ignore[arg-type]

        monkeypatch.setattr(recording_make, "rewrite_manifest", stopping)
        with pytest.raises(KeyboardInterrupt):
            recording_make.put(Bundle(copy), files)
        Bundle(copy, verify=True)
        assert [item.name for item in copy.iterdir() if item.name.startswith(".")] == []


def kept(name: str) -> bool:
    """Without the outputs of the decoder's last call."""
    return not name.startswith(f"{DECODER_GRAPH}/{STEPS}/outputs")


DAMAGES: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "not an archive": lambda arrays: arrays.clear(),
    "other tensors": lambda arrays: arrays.update({f"{DECODER_GRAPH}/0/outputs/logit": np.zeros(1, np.float32)}),
    "other graphs": lambda arrays: arrays.update({"head.onnx/0/inputs/x": np.zeros(1, np.float32)}),
    "other shapes": lambda arrays: arrays.update({f"{DECODER_GRAPH}/0/outputs/{LOGITS}": np.zeros(1, np.float32)}),
    "pickled": lambda arrays: arrays.update({f"{DECODER_GRAPH}/0/outputs/{LOGITS}": np.array([{}])}),
    "a call too few": lambda arrays: [arrays.pop(name) for name in list(arrays) if not kept(name)],
    "no calls": lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith(VISION_GRAPH)],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("hashed", [False, True])
def test_damaged(copy: Path, damage: Callable[[dict[str, np.ndarray]], object], hashed: bool) -> None:
    """Told in one line whether or not whoever damaged it knew the manifest."""
    file = copy / CALLS
    with np.load(file) as stored:
        arrays = dict(stored)
    damage(arrays)
    if arrays:
        np.savez(file, **arrays)
    else:
        file.write_bytes(file.read_bytes()[:-9])
    record = FileRecord(file.stat().st_size, sha256_of(file) if hashed else "0" * 64)
    rewrite_manifest(copy, lambda now: replace(now, files=now.files | {CALLS: record}))
    bundle = Bundle(copy)
    with pytest.raises(BundleError, match=r"calls\.npz of the recorded set is damaged .* --overwrite$") as caught:
        read(bundle)
    assert "\n" not in str(caught.value)


def test_numpy_reads_what_a_bundle_holds(tiny_v1_bundle: Path) -> None:
    recording = read(Bundle(tiny_v1_bundle))
    with np.load(tiny_v1_bundle / CALLS, allow_pickle=False) as arrays:
        assert len(arrays.files) == 2 + (STEPS + 1) * 5
        for graph, calls in recording.items():
            for index, call in enumerate(calls):
                for kind, values in (("inputs", call.inputs), ("outputs", call.outputs)):
                    for name, array in values.items():
                        np.testing.assert_array_equal(arrays[f"{graph}/{index}/{kind}/{name}"], array, strict=True)


def test_equal_sets_are_equal_files(tiny_v1_bundle: Path) -> None:
    """No time of day is in them."""
    bundle = Bundle(tiny_v1_bundle)
    runner = json.loads((tiny_v1_bundle / MADE_OF).read_text())["runner"]
    files = recording_format.to_files(read(bundle), made_of(bundle.manifest), runner)
    assert {name: sha256(data).hexdigest() for name, data in files.items()} == {
        name: bundle.manifest.files[name].sha256 for name in FILES
    }
    with zipfile.ZipFile(tiny_v1_bundle / CALLS) as archive:
        assert {item.date_time for item in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_numbers_survive_both_ways() -> None:
    values = np.array([[1.0, -0.0], [1e-3, 3e4]], np.float32)
    for precision in ("fp32", "fp16", "bf16"):
        kept = recording_format.rounded(values, precision)
        stored = recording_format.narrow(kept, precision)
        assert stored.dtype == runtime.bundle.manifest.PRECISIONS[precision]
        np.testing.assert_array_equal(recording_format.wide(stored, precision), kept)


# For other programs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def polygraphy() -> None:
    if importlib.util.find_spec("polygraphy") is None:
        pytest.skip("polygraphy is not installed")


def test_polygraphy_reads_what_is_written_for_it(polygraphy: None, tiny_v1_bundle: Path, tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    main(["--bundle", str(tiny_v1_bundle), "-o", str(tmp_path / "files")])
    for graph, (call, *_) in read(Bundle(tiny_v1_bundle)).items():
        stem = graph.removesuffix(".onnx")
        (given,) = load_json(str(tmp_path / f"files/{stem}.inputs.json"))
        ((_, (result,)),) = RunResults.load(str(tmp_path / f"files/{stem}.outputs.json")).items()
        caches = {name for name in given if name.startswith(PAST)}
        assert (graph == DECODER_GRAPH) == bool(caches)
        assert not any(given.pop(name).any() for name in caches)
        for expected, got in ((call.inputs, given), (call.outputs, dict(result.items()))):
            assert list(got) == list(expected)
            for name, array in expected.items():
                np.testing.assert_array_equal(got[name], array, strict=True)


def test_without_polygraphy_nothing_is_written(
    tiny_v1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "polygraphy" else find(name))
    with pytest.raises(MonoedgeError, match=r"^polygraphy is not installed; .*pip install [^\n]*$"):
        main(["--bundle", str(tiny_v1_bundle), "-o", str(tmp_path / "files")])
    assert list(tmp_path.iterdir()) == []


def test_printed_polygraphy_lines_pass(
    polygraphy: None, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--bundle", str(tiny_bundle), "-o", str(tmp_path / "files")])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["polygraphy", "run"]] * 2
    for _, *words in lines:
        command = [sys.executable, "-c", "from polygraphy.tools import main; main()", *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Pass Rate: 100.00%" in result.stdout


def test_files_for_trtexec(tiny_v1_bf16_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw, in the engine's number format; polygraphy's as torch has bfloat16, with caches of the engine's length."""
    folder = Path(shutil.copytree(tiny_v1_bf16_bundle, tmp_path / "bundle"))
    hashes = made_of(Bundle(folder).manifest)
    record = EngineRecord(
        1,
        "0" * 64,
        DECODER_GRAPH,
        "trt",
        "10.15.1.29",
        87,
        "1a",
        hashes[DECODER_GRAPH],
        hashes["decoder.weights"],
        400,
        1,
    )
    rewrite_manifest(folder, lambda now: replace(now, engines={"engines/trt-sm87-bf16.decoder.plan": record}))
    main(["--bundle", str(folder), "-o", str(tmp_path / "files")])
    polygraphy, trtexec = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    plan = str(folder / "engines/trt-sm87-bf16.decoder.plan")
    assert polygraphy[:2] == ["python", "-c"]
    assert "import sys, tensorrt; tensorrt.get_plugin_registry().load_library(" in polygraphy[2]
    assert polygraphy[3:6] == ["$MONOEDGE_PLUGIN_LIBRARY", "run", plan]
    assert polygraphy[-2:] == ["--snr-threshold", f"{LIMITS['bf16']:.0f}"]
    options = dict(word.partition("=")[::2] for word in trtexec[1:])
    assert trtexec[0] == "trtexec"
    assert options["--loadEngine"] == plan
    assert options["--staticPlugins"] == "$MONOEDGE_PLUGIN_LIBRARY"
    shapes = dict(item.split(":") for item in options["--shapes"].split(","))
    assert shapes["past_key_values.3.value"] == "1x2x400x32"
    call = read(Bundle(folder))[DECODER_GRAPH][0]
    files = dict(item.split(":") for item in options["--loadInputs"].split(","))
    assert set(files) == set(call.inputs)
    for name, file in files.items():
        expected = call.inputs[name]
        kind = ml_dtypes.bfloat16 if expected.dtype == np.float32 else expected.dtype
        got = np.fromfile(file, kind).reshape([int(size) for size in shapes[name].split("x")])
        np.testing.assert_array_equal(got.astype(expected.dtype), expected)

    (stored,) = json.loads((tmp_path / "files/decoder.inputs.json").read_text())
    tensors = {
        name: torch.load(io.BytesIO(base64.b64decode(value["tensor"])), weights_only=True)
        for name, value in stored.items()
    }
    assert tensors["past_key_values.0.key"].shape == (1, 2, 400, 32)
    assert {tensors[name].dtype for name in ("inputs_embeds", "past_key_values.0.key")} == {torch.bfloat16}
    np.testing.assert_array_equal(tensors[INPUTS_EMBEDS].float().numpy(), call.inputs[INPUTS_EMBEDS])


def test_polygraphy_with_our_plugins(polygraphy: None, library: Path) -> None:
    """The program of the printed lines, as far as it goes without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    names = "[creator.name for creator in tensorrt_rtx.get_plugin_registry().all_creators]"
    program = f"import atexit; atexit.register(lambda: print({names})); "
    program += recording_files._WITH_PLUGIN.format(module="tensorrt_rtx")
    command = [sys.executable, "-c", program, str(library), "run", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "usage: " in result.stdout
    assert "FusedMoE" in result.stdout.splitlines()[-1], result.stderr


def test_the_folder_is_tried_before_the_recording(polygraphy: None, copy: Path) -> None:
    before = (copy / MADE_OF).stat()
    with pytest.raises(MonoedgeError, match="/proc/x cannot be made: "):
        main(["--bundle", str(copy), "--overwrite", "-o", "/proc/x"])
    assert (copy / MADE_OF).stat() == before


def test_refused(copy: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    with pytest.raises(OptionError, match="--max-length 9 does not fit: the recorded call has"):
        main(["--bundle", str(copy), "-o", str(files), "--max-length", "9"])
    with pytest.raises(OptionError, match="--max-length is for the files of -o"):
        main(["--bundle", str(copy), "--max-length", "400"])
    files.mkdir()
    with pytest.raises(OptionError, match="exists already"):
        main(["--bundle", str(copy), "-o", str(files)])
    assert list(files.iterdir()) == []
