"""``python -m calibration``, from data to a bundle and its report, and every way in which it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from calibration import CalibrationError
from calibration.__main__ import main
from calibration.data import digest, read_examples
from calibration.observed.record import Record
from export.errors import QuantizationError
from export.quantized.weights import DecoderWeights
from runtime.bundle.manifest import DECODER_WEIGHTS
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError, BundleError, MonoedgeError, OptionError

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["--samples", "16", "--test-samples", "8", "--max-new-tokens", "8"]


def calibrate(bundle: Path, pairs: Path, target: Path, *options: str) -> dict:
    """The report of a calibration."""
    main(["--bundle", str(bundle), "--data", str(pairs), "-o", str(target), *SMALL, *options])
    return json.loads((target / "calibration.json").read_text())


def compare(before: Path, after: Path, pairs: Path, report: Path, *options: str) -> dict:
    command = ["--compare", str(before), str(after), "--data", str(pairs), "--test-samples", "8"]
    main([*command, "--max-new-tokens", "8", "--report", str(report), *options])
    return json.loads(report.with_name(report.name + ".json").read_text())


@pytest.fixture(scope="module")
def made(shapes_bundle: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made with nothing but the defaults."""
    target = tmp_path_factory.mktemp("made") / "int8"
    calibrate(shapes_bundle, pairs, target)
    return target


def test_pictures_may_be_read_as_stored(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    data = pairs.with_name("one.jsonl")
    data.write_text(pairs.read_text().splitlines()[0])
    for options in ([], ["--as-stored"]):
        report = compare(tiny_v1_bundle, tiny_v1_bundle, data, tmp_path / "compared", *options)
        assert report["tested"]["data"] == digest(read_examples(data, as_stored=bool(options)))


def test_a_bundle_and_its_report(made: Path, shapes_bundle: Path, pairs: Path) -> None:
    bundle = Bundle(made, verify=True)
    quantization = bundle.manifest.quantization
    assert quantization is not None
    assert (quantization.mode, quantization.form, quantization.experts) == ("w8a16", "cpu", ("text",))
    report = json.loads((made / "calibration.json").read_text())
    layers = bundle.manifest.model.num_hidden_layers
    assert [matrix["name"] for matrix in report["matrices"]] == [
        f"layers.{layer}.feed_forward.text_{name}" for layer in range(layers) for name in ("gate_up", "down")
    ]
    assert report["figures"]["all"]["mean_kl"] < 1e-2
    assert report["figures"]["all"]["questions"] == 8
    assert all(0 < matrix["error"] < 1e-3 for matrix in report["matrices"])
    assert report["sizes"]["after"] < 0.85 * report["sizes"]["before"]
    record = Record.load(made.parent / "int8.observed.npz")
    assert record.complete
    assert record.origin.data == report["observed"]["data"]


def test_int8_caches_of_the_same_record(
    made: Path, shapes_bundle: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was observed tells their scales too; the figures in memory are those of the files."""
    record = made.parent / "int8.observed.npz"
    report = calibrate(shapes_bundle, pairs, tmp_path / "int8", "--kv-cache", "--record", str(record))
    assert "observed 16 examples in" not in capsys.readouterr().err
    assert report["settings"]["kv_cache"] is True
    assert json.loads((made / "calibration.json").read_text())["settings"]["kv_cache"] is False
    manifest = Bundle(tmp_path / "int8").manifest
    assert manifest.quantization is not None
    assert manifest.quantization.kv_cache
    before = compare(made, tmp_path / "int8", pairs, tmp_path / "compared")
    assert before["compared"]["after"]["quantization"]["kv_cache"] is True
    assert 0 < before["figures"]["all"]["mean_kl"] < 1e-2
    assert runtime.Session(pairs.parent / "1.png", "How many shapes are there?", bundle=tmp_path / "int8").text


def test_disk_without_room(small_disk: Path, shapes_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    """It is told before the model answers a question."""
    (small_disk / "other").write_bytes(bytes(6 << 20))
    record = tmp_path / "observed.npz"
    with pytest.raises(BundleError, match=r"the bundle needs .* MB, .*/disk has 2\.\d MB free"):
        calibrate(shapes_bundle, pairs, small_disk / "int8", "--record", str(record))
    assert [item.name for item in small_disk.iterdir()] == ["other"]
    assert not record.exists()


def test_each_graph_is_parsed_once(
    tiny_v1_bundle: Path, tiny_v1_bf16_bundle: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of both bundles that are read; the one that is written is checked as it is in memory."""
    parsed: Counter[Path] = Counter()
    parse = onnx.load

    def counting(file: Path, *arguments: object, **options: object) -> onnx.ModelProto:
        parsed[Path(file).resolve()] += 1
        return parse(file, *arguments, **options)

    for name in ("load", "load_model"):
        monkeypatch.setattr(onnx, name, counting)
    options = ["--mode", "w8a8", "--max-kl", "10", "--apply-to", str(tiny_v1_bf16_bundle)]
    calibrate(tiny_v1_bundle, pairs, tmp_path / "int8", *options)
    read = [(folder / "decoder.onnx").resolve() for folder in (tiny_v1_bundle, tiny_v1_bf16_bundle)]
    assert parsed == dict.fromkeys(read, 1)


class Page(HTMLParser):
    """Tags, and what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]


def test_the_page_needs_no_other_file(made: Path) -> None:
    page = Page()
    page.feed((made / "calibration.html").read_text())
    assert page.loaded == []
    assert page.tags.count("svg") >= 4
    assert "script" not in page.tags


def test_questions_are_escaped(shapes_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    prompt = "<script>alert(1)</script>"
    lines = [json.dumps({"image": None, "prompt": f"{prompt} {number}"}) for number in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    calibrate(shapes_bundle, tmp_path / "data.jsonl", tmp_path / "int8")
    text = (tmp_path / "int8/calibration.html").read_text()
    assert prompt not in text
    assert "&lt;script&gt;" in text


@pytest.mark.slow
def test_what_was_measured_is_what_was_written(
    shapes_bundle: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures of the report come from the decoder in memory; ``--compare`` takes them from the files."""
    tests = tmp_path / "tests.jsonl"
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    chosen = [{**line, "image": line["image"] and str(pairs.parent / line["image"])} for line in lines[-8:]]
    tests.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    for mode, form, *caches in (("w8a16", "cpu"), ("w8a16", "cpu", "--kv-cache"), ("w8a16", "qdq"), ("w8a8", "qdq")):
        target = tmp_path / "-".join((mode, form, *caches))
        report = calibrate(
            shapes_bundle, pairs, target, "--mode", mode, "--form", form, *caches, "--test-data", str(tests),
            "--experts", "text,visual", "--attention", "--lm-head", "--record", str(tmp_path / "record.npz"),
        )  # fmt: skip
        again = compare(shapes_bundle, target, tests, tmp_path / "compared")
        for kind in ("all", "image", "text"):
            for name, value in report["figures"][kind].items():
                assert again["figures"][kind][name] == pytest.approx(value, rel=1e-3, abs=1e-9), (form, kind, name)
        files = Bundle(target).manifest.files
        size = sum(record.size for name, record in files.items() if name.endswith(".weights") and "decoder" in name)
        assert report["sizes"]["after"] <= size < report["sizes"]["after"] + 4096 * 60
    output = capsys.readouterr()
    assert output.err.count("observed 16 examples in") == 1  # the record was used again
    assert "same answer" in output.out


@pytest.mark.slow
def test_every_number_format_and_layout(
    tiny_v15_bundle: Path,
    tiny_v15_bf16_bundle: Path,
    tiny_v15_portable_bundle: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Version 1.5 with everything quantized; scales of an fp32 bundle applied to bf16; graphs of older operators."""
    everything = ["--experts", "text,visual", "--attention", "--lm-head", "--form", "qdq"]
    report = calibrate(tiny_v15_bundle, pairs, tmp_path / "int8", *everything)
    names = {matrix["name"] for matrix in report["matrices"]}
    assert {"layers.0.attention.qkv.text_weight", "layers.3.attention.output.visual_weight", "lm_head.weight"} <= names
    calibrate(tiny_v15_bundle, pairs, tmp_path / "bf16", *everything, "--apply-to", str(tiny_v15_bf16_bundle))
    assert Bundle(tmp_path / "bf16").manifest.precision == "bf16"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  python")]
    assert [line.split()[2] for line in told] == ["runtime.chat", "export.engine"]
    assert Bundle(tmp_path / "bf16").manifest.quantization == Bundle(tmp_path / "int8").manifest.quantization
    weights = [Int8Weights(tmp_path / name) for name in ("int8", "bf16")]
    for name in names:
        # The checkpoint is in float32, so that its weights were rounded to bf16 before they were rounded to INT8.
        difference = weights[0].int8(name).astype(np.int32) - weights[1].int8(name)
        assert np.abs(difference).max() <= 1
    calibrate(tiny_v15_portable_bundle, pairs, tmp_path / "portable")


class Int8Weights:
    """The INT8 matrices of a bundle in the form ``qdq``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = onnx.load(folder / "decoder.onnx", load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def int8(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
        return np.memmap(self.folder / DECODER_WEIGHTS, np.int8, "r", offset, tuple(tensor.dims))


def test_another_model_is_not_applied_to(
    tiny_v15_bundle: Path, tiny_v1_bf16_bundle: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="is another model than"):
        calibrate(tiny_v15_bundle, pairs, tmp_path / "x", "--apply-to", str(tiny_v1_bf16_bundle))
    assert list(tmp_path.iterdir()) == []


def planted(bundle: Path, target: Path, factor: float, layers: range) -> Path:
    """A copy of a bundle in which one channel of some layers is so much larger, and its weights as much smaller.

    As far as floats go it is the same model.
    """
    shutil.copytree(bundle, target)
    weights = DecoderWeights(Bundle(bundle))
    names = [f"layers.{layer}.{name}" for layer in layers for name in OUTLIER_WEIGHTS]
    for tensor in weights.model.graph.initializer:
        if tensor.name in names:
            offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
            stored = np.memmap(target / DECODER_WEIGHTS, np.float32, "r+", offset, tuple(tensor.dims))
            stored[..., 11] *= factor if tensor.name.endswith("norm.weight") else 1 / factor
    return target


OUTLIER_WEIGHTS = ("ffn_norm.weight", "feed_forward.text_gate_up", "feed_forward.visual_gate_up")
PLAIN = ["--weights", "absmax", "--activations", "absmax", "--smoothing", "off", "--form", "qdq"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_planted_outlier(shapes_bundle: Path, pairs: Path, tmp_path: Path, mode: str) -> None:
    """A budget that the default holds with every layer in INT8, and plain absmax does not."""
    layers = range(Bundle(shapes_bundle).manifest.model.num_hidden_layers)
    bundle = planted(shapes_bundle, tmp_path / "planted", 100, layers)
    common = ["--mode", mode, "--form", "qdq", "--record", str(tmp_path / "record.npz")]
    plain = calibrate(bundle, pairs, tmp_path / "plain", *common, *PLAIN)
    budget = plain["figures"]["all"]["mean_kl"] / 3
    report = calibrate(bundle, pairs, tmp_path / "int8", *common, "--max-kl", str(budget))
    assert report["figures"]["all"]["mean_kl"] <= budget
    assert report["kept"] == []
    for before, after in zip(plain["matrices"], report["matrices"], strict=True):
        if "gate_up" in after["name"]:
            assert after["exponent"] is not None
            assert after["error"] < before["error"] / 10


def test_a_budget_that_cannot_be_held(shapes_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"--max-kl 1e-12 cannot be held: .* nothing was written"):
        calibrate(shapes_bundle, pairs, tmp_path / "int8", "--max-kl", "1e-12")
    assert [file.name for file in tmp_path.iterdir()] == ["int8.observed.npz"]  # of use with another budget


def test_a_budget_keeps_the_worst_layer(shapes_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    """One layer is spoiled, so that everybody can say which is the worst."""
    bundle = planted(shapes_bundle, tmp_path / "planted", 1000, range(1, 2))
    common = [*PLAIN, "--mode", "w8a8", "--record", str(tmp_path / "record.npz")]
    whole = calibrate(bundle, pairs, tmp_path / "whole", *common)["figures"]["all"]["mean_kl"]
    report = calibrate(bundle, pairs, tmp_path / "int8", *common, "--max-kl", str(whole / 5))
    assert report["kept"] == ["layer 1"]
    assert max(report["sensitivity"], key=report["sensitivity"].__getitem__) == "layer 1"
    assert report["figures"]["all"]["mean_kl"] <= whole / 5
    layers = set(range(Bundle(bundle).manifest.model.num_hidden_layers))
    assert {matrix["layer"] for matrix in report["matrices"]} == layers - {1}
    names = set(Int8Weights(tmp_path / "int8").tensors)
    assert "layers.0.feed_forward.text_down_scale" in names
    assert "layers.1.feed_forward.text_down_scale" not in names


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        (["--bundle", "{quantized}"], QuantizationError, "is quantized already"),
        (["--bundle", "{bf16}"], BackendError, "bf16"),
        (["--bundle", "{nowhere}"], BundleError, "no such bundle"),
        (["--bundle", "{bundle}", "-o", "{quantized}"], BundleError, "exists already"),
        (["--bundle", "{bundle}", "--data", "{nowhere}"], CalibrationError, "does not exist"),
        (["--bundle", "{bundle}", "--form", "cpu", "--mode", "w8a8"], QuantizationError, "choose w8a16"),
        (["--bundle", "{bundle}", "--form", "qdq", "--kv-cache"], QuantizationError, "choose --form cpu, or leave out"),
        (["--bundle", "{bundle}", "--mode", "w8a8", "--kv-cache"], QuantizationError, "not for form qdq: choose"),
        (["--bundle", "{portable}", "--kv-cache"], QuantizationError, "INT8 caches need graphs of opset 24"),
        (["--bundle", "{bundle}", "--record", "{strange}"], CalibrationError, "another bundle"),
        (["--bundle", "{bundle}", "--max-tiles", "0"], OptionError, "--max-tiles must be a whole number from 1"),
        (["--bundle", "{bundle}", "--max-new-tokens", "9000"], CalibrationError, "are more than the"),
        (["--bundle", "{bundle}", "--data", "{corrupt}"], CalibrationError, "corrupt.jsonl, line 2"),
    ],
)
def test_refusals(
    options: list[str],
    error: type[MonoedgeError],
    expected: str,
    made: Path,
    tiny_v1_bundle: Path,
    tiny_v1_bf16_bundle: Path,
    tiny_v1_portable_bundle: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    """One line, and nothing written."""
    (tmp_path / "broken.png").write_bytes((pairs.parent / "1.png").read_bytes()[:400])
    lines = [{"image": None, "prompt": "fine?"}, {"image": "broken.png", "prompt": "what?"}]
    (tmp_path / "corrupt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = {
        "bundle": tiny_v1_bundle,
        "quantized": made,
        "bf16": tiny_v1_bf16_bundle,
        "portable": tiny_v1_portable_bundle,
        "nowhere": tmp_path / "nowhere",
        "strange": made.parent / "int8.observed.npz",
        "corrupt": tmp_path / "corrupt.jsonl",
    }
    before = sorted(tmp_path.rglob("*"))
    defaults = ["--data", str(pairs), "-o", str(tmp_path / "out"), *SMALL]
    with pytest.raises(error) as caught:
        main([*defaults, *(option.format(**places) for option in options)])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["samples", "test-samples", "max-tiles", "max-new-tokens", "threads", "seed"])
def test_numbers_have_bounds(option: str) -> None:
    for number in (-1, 10**30):
        with pytest.raises(OptionError, match=rf"^--{option} must be a whole number .*, got {number}$"):
            main(["--inspect", "b", f"--{option}={number}"])


def test_outputs_are_tried_before_the_work(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    """Nothing is observed: where a file stands in the way, or a folder, or where the system lets nobody write."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    small = ["--data", str(pairs), *SMALL]
    for options, words in (
        (["--report", tmp_path / "folder"], "--report: .*/folder.json is a folder, expected the file to write"),
        (["--report", tmp_path / "none/x"], "--report: .*/none is not a folder: make it"),
        (["--report", "/proc/x"], "--report: /proc/x.json cannot be written: "),
        (["--record", tmp_path], "--record: .* is a folder"),
        (["-o", "/proc/x"], "/proc/x cannot be made: "),
        (["-o", tmp_path / "file/x"], "/file/x cannot be made: Not a directory"),
    ):
        given = ["--bundle", tiny_v1_bundle, "-o", tmp_path / "out", *small, *options]
        with pytest.raises(MonoedgeError, match=words):
            main(list(map(str, given)))
    assert {file.name for file in tmp_path.iterdir()} == {"folder.json", "file"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected one of --bundle, --compare and --inspect"),
        (["--bundle", "b", "--inspect", "x"], "expected one of --bundle, --compare and --inspect"),
        (["--bundle", "b", "-o", "c"], "--data is needed"),
        (["--bundle", "b", "--data", "d"], "-o is needed"),
        (["--inspect", "b", "--max-kl", "0"], "--max-kl: expected a number above 0"),
        (["--inspect", "b", "--smoothing", "2"], "expected auto, off or an exponent from 0 to 1, got '2'"),
        (["--inspect", "b", "--mode", "w4a16"], "invalid choice"),
    ],
)
def test_bad_command_lines(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("module", ["onnx", "ml_dtypes", "matplotlib"])
def test_missing_package_names_its_extra(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(MonoedgeError) as caught:
        main(["--inspect", str(tmp_path / "record.npz")])
    package = module.replace("_", "-")
    assert str(caught.value).startswith(f"{module} is not installed; this installs it: pip install ")
    assert str(caught.value).split("pip install ")[1].lstrip("'").startswith(package)


def test_a_record_for_people(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--inspect", str(made.parent / "int8.observed.npz")])
    output = capsys.readouterr().out
    assert "examples  16 of 16" in output
    assert "layers.0.feed_forward.text_gate_up" in output
    assert "\n0.key " in output


def test_the_process(shapes_bundle: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line, as users meet it."""
    command = [sys.executable, "-m", "calibration", "--bundle", shapes_bundle, "--data", tmp_path, "-o", tmp_path / "x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} is a folder of pictures: say what to ask")
    assert result.stderr.count("\n") == 1


def test_the_quantized_bundle_answers(made: Path, pairs: Path) -> None:
    assert runtime.Session(pairs.parent / "1.png", "How many shapes are there?", bundle=made).text
