"""The benchmark asks what it says it asks and reports what it saw; how fast that was is not a test's business."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import runtime
from runtime.bench.bundle import weight_bytes
from runtime.bench.machine import Memory, MemoryWatch, cached_part, gpu_bytes
from runtime.bench.measure import Loaded, measure
from runtime.bench.record import Record, Workload
from runtime.bench.table import case_table, context_table
from runtime.bundle.manifest import Quantization
from runtime.bundle.reader import Bundle
from runtime.errors import MonoedgeError, OptionError, PromptError

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("--new-tokens", "3", "--rounds", "1", "--warmup", "0", "--repeats", "2")
SMALL_WORKLOAD = Workload(text_tokens=20, tiles=0, new_tokens=3, warmup=1, repeats=2)
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="looks at memory through /proc, and at processes through pidfd"
)


def bench(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.bench", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MONOEDGE_BUNDLE": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


# ---- the command -----------------------------------------------------------------------------------------


def test_contenders_take_turns_and_every_number_is_written(tiny_v1_bundle, tiny_v15_bundle, tmp_path):
    raw = tmp_path / "run.json"
    other = f"{sys.executable} -m runtime.bench.bundle --bundle {tiny_v15_bundle}"
    arguments = ("--tiles", "0", "1", "--context", "300", "--rounds", "2", "--json", raw)
    done = bench("--bundle", tiny_v1_bundle, "--compare", other, *SMALL, *arguments)
    assert done.returncode == 0, done.stderr

    told = [line for line in done.stderr.splitlines() if line.startswith("[")]
    # Rounds, in them prompts, in them contenders.
    assert [str(tiny_v15_bundle) in line for line in told] == [False, True] * 6
    assert ["300 text tokens" in line for line in told] == ([False] * 4 + [True] * 2) * 2

    results = json.loads(raw.read_text())
    assert results["machine"]["cores"] >= 1
    assert results["speed_before"]["bytes_per_second"] > 0
    expected = [(54, 0), (54 + 256, 256), (300, 0)]
    for contender, version in zip(results["contenders"], ("1.0", "1.5"), strict=True):
        for case, sizes in zip(contender["cases"], expected, strict=True):
            assert len(case["records"]) == 2
            for record in case["records"]:
                assert f"Mono-InternVL {version}" in record["contender"]["name"]
                assert (record["prompt_tokens"], record["visual_tokens"]) == sizes
                assert [len(steps) for steps in record["steps"]] == [2, 2]
                assert len(record["first_token"]) == len(record["image"]) == 2
                assert "onnxruntime" in record["software"]
    assert done.stdout.count("| decode, tokens/s ") == 3
    assert "after 300 text tokens" in done.stdout
    assert list(tmp_path.iterdir()) == [raw]


def test_cold_runs_and_threads_reach_the_processes(tiny_v1_bundle):
    done = bench("--bundle", tiny_v1_bundle, *SMALL, "--cold", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "threads: 1; files dropped" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected --bundle DIR, or the environment variable MONOEDGE_BUNDLE"),
        (["--bundle", "no-such-bundle"], "error: no-such-bundle: no such bundle"),
        (["--bundle", "{bundle}", "--compare", "no-such-bundle"], "error: no-such-bundle: no such bundle"),
        (["--bundle", "{bundle}", "--compare", "no-such-program -v"], "no program 'no-such-program' is here"),
        (["--bundle", "{bundle}", "--compare", "say 'it"], "is no command (No closing quotation)"),
        (["--bundle", "{bundle}", "--json", "no-such-folder/x"], "--json: no-such-folder is not a folder"),
        (["--bundle", "{bundle}", "--rounds", "0"], "--rounds must be a whole number from 1 to 1000000, got 0"),
        (["--bundle", "{bundle}", "--tiles", "-1"], "--tiles must be a whole number from 0 to 1000000, got -1"),
        (["--bundle", "{bundle}", "--new-tokens", "1"], "--new-tokens must be a whole number from 2 to 1000000, got 1"),
        (
            ["--bundle", "{bundle}", "--repeats", "9" * 30],
            "--repeats must be a whole number from 1 to 1000000",
        ),
        (["--bundle", "{bundle}", "--json", "{bundle}"], "--json: {bundle} is a folder, expected the file to write"),
        (["--bundle", "{bundle}", "--json", "/proc/x"], "--json: /proc/x cannot be written: "),
        (["--bundle", "{bundle}", "--tiles"], "nothing to measure: give --tiles or --context a number"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_v1_bundle, tmp_path, arguments, told):
    done = bench(*(word.format(bundle=tiny_v1_bundle) for word in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert told.format(bundle=tiny_v1_bundle) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_a_contender_says_is_heard(tiny_v1_bundle, tiny_v1_bf16_bundle, tmp_path):
    done = bench("--bundle", tiny_v1_bundle, "--compare", tiny_v1_bf16_bundle, *SMALL, "--json", tmp_path / "run.json")
    assert done.returncode == 2
    *_, theirs, ours = done.stderr.splitlines()
    assert "holds bf16" in theirs
    assert f"error: {tiny_v1_bf16_bundle} stopped with exit code 2" in ours
    assert list(tmp_path.iterdir()) == []


@linux
def test_an_end_of_the_benchmark_ends_its_process(tiny_v1_bundle):
    command = [
        sys.executable,
        "-m",
        "runtime.bench",
        "--bundle",
        tiny_v1_bundle,
        "--compare",
        "sh -c 'echo $$ >&2; exec sleep 600'",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, *SMALL], env=environment, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        child = os.pidfd_open(next(int(line) for line in lines if line.strip().isdigit()))
        process.terminate()
        assert process.wait(timeout=60) == 143
    # Readable when it has ended, even where nobody collects what became of it.
    assert select.select([child], [], [], 60)[0]
    os.close(child)


def test_a_separator_in_a_name_ends_no_line(tiny_v1_bundle, tmp_path):
    (tmp_path / "a\u2028b").symlink_to(tiny_v1_bundle)
    done = bench("--bundle", tmp_path / "a\u2028b", *SMALL, "--tiles", "0")
    assert done.returncode == 0, done.stderr


def test_other_output_is_refused(tiny_v1_bundle):
    done = bench("--bundle", tiny_v1_bundle, "--compare", "echo fast", *SMALL)
    assert done.returncode == 2
    assert "error: expected a record as the last line of a contender's output" in done.stderr.splitlines()[-1]


# ---- one process -----------------------------------------------------------------------------------------


class Watched:
    """A real backend that counts what it is asked to compute."""

    def __init__(self, backend: runtime.backends.Backend) -> None:
        self.backend, self.calls = backend, []
        self.tiles = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.tiles += len(pixel_values)
        return self.backend.encode_image(pixel_values)

    def new_context(self) -> WatchedContext:
        return WatchedContext(self)


class WatchedContext:
    def __init__(self, watched: Watched) -> None:
        self.watched, self.context = watched, watched.backend.new_context()

    def __getattr__(self, name: str) -> object:
        return getattr(self.context, name)

    def forward(self, embeds: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_], start: int) -> object:
        self.watched.calls.append((start, len(embeds), int(mask.sum())))
        return self.context.forward(embeds, mask, start)


def watched(bundle: Path) -> tuple[Watched, Loaded]:
    model = runtime.load(bundle)
    backend = Watched(model.backend)
    image_id = model.tokenizer.id_of(model.template.image_context)
    vocab = model.bundle.manifest.model.vocab_size
    return backend, Loaded(backend, model.embed, vocab, image_id, model.image_processor, {}, lambda: 7)


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_exactly_the_prompt_is_computed(tiny_v1_bundle, tiles):
    what = replace(SMALL_WORKLOAD, tiles=tiles)
    backend, loaded = watched(tiny_v1_bundle)
    record = measure(what, lambda: loaded)
    answers = what.warmup + what.repeats
    starts = [index for index, (start, _, _) in enumerate(backend.calls) if start == 0]
    assert len(starts) == answers
    for begin, end in zip(starts, [*starts[1:], len(backend.calls)], strict=True):
        calls = backend.calls[begin:end]
        assert sum(count for _, count, _ in calls) == 20 + 256 * tiles + what.new_tokens - 1
        assert sum(visual for _, _, visual in calls) == 256 * tiles
        assert [count for _, count, _ in calls[-2:]] == [1, 1]
    assert backend.tiles == tiles * answers
    assert (record.prompt_tokens, record.visual_tokens, record.weight_bytes) == (20 + 256 * tiles, 256 * tiles, 7)
    assert len(record.first_token) == len(record.steps) == what.repeats
    assert Record.from_json(record.to_json()) == record


def test_prompts_that_do_not_fit_are_refused(tiny_v1_bundle):
    _, loaded = watched(tiny_v1_bundle)
    with pytest.raises(OptionError, match=r"no picture is cut into 2 tiles.*expected one of 0, 1, 3, 4"):
        measure(replace(SMALL_WORKLOAD, tiles=2), lambda: loaded)
    most = loaded.backend.max_length
    with pytest.raises(
        PromptError, match=rf"the prompt has {most} tokens and 3 are to follow, together {most + 3}, but"
    ):
        measure(replace(SMALL_WORKLOAD, text_tokens=most), lambda: loaded)
    with pytest.raises(OptionError, match="sees no pictures"):
        measure(replace(SMALL_WORKLOAD, tiles=1), lambda: replace(loaded, image_processor=None))


def test_weights_of_a_text_token(tiny_bundle):
    """Against the sizes of the initializers; norms and the rotary table are what is left out."""
    graph = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph
    matrices = [item for item in graph.initializer if len(item.dims) == 2 and not item.name.startswith("rope")]
    expected = sum(4 * int(np.prod(item.dims)) for item in matrices if "visual_" not in item.name)
    manifest = Bundle(tiny_bundle).manifest
    assert weight_bytes(manifest) == expected
    everything = Quantization("w8a16", "cpu", ("text",), attention=True, lm_head=True)
    assert weight_bytes(replace(manifest, quantization=everything)) == expected // 4
    experts = sum(
        3 * int(np.prod(item.dims)) for item in matrices if ".text_gate" in item.name or ".text_down" in item.name
    )
    int4 = replace(everything, mode="w4a16")
    assert weight_bytes(replace(manifest, quantization=int4)) == expected // 4 - experts // 3 // 2
    only_experts = replace(everything, attention=False, lm_head=False)
    assert weight_bytes(replace(manifest, quantization=only_experts)) == expected - experts


# ---- the machine -----------------------------------------------------------------------------------------


@linux
def test_memory_remembers_the_most():
    watch = MemoryWatch()
    watch.sample()
    before = watch.most.anonymous
    block = np.ones(200 << 17)  # 200 MiB
    watch.sample()
    held = watch.most.anonymous
    assert before is not None
    assert held is not None
    assert held - before > 190 << 20
    del block
    watch.sample()
    assert watch.most.anonymous == held
    assert watch.most.peak >= watch.most.anonymous


def test_memory_of_a_gpu_is_that_of_this_process():
    # As nvidia-smi --query-compute-apps=pid,used_gpu_memory --format=csv,noheader,nounits prints it.
    lines = ["4021, 1310", "77, 5", "4021, 20", "9, [N/A]"]
    assert gpu_bytes(lines, 4021) == 1330 << 20
    assert gpu_bytes(lines, 9) is None
    assert gpu_bytes([""], 4021) is None


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="asks Linux's page cache")
def test_what_was_just_written_is_cached(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    part = cached_part(tmp_path)
    assert part == 0 or part == pytest.approx(1)  # some file systems cannot tell


# ---- tables ----------------------------------------------------------------------------------------------


def record(first_token: list[float], step: float) -> Record:
    return Record(
        contender={"name": "n", "precision": "p", "computes": "c"},
        software={},
        prompt_tokens=100,
        visual_tokens=0,
        load=2.0,
        cold_first_token=9.0,
        image=[0.0] * len(first_token),
        first_token=first_token,
        steps=[[step, step]] * len(first_token),
        memory=Memory(peak=3_000_000_000),
        weight_bytes=10**9,
    )


def test_medians_spread_and_ratios():
    cases = [
        [record([1.0, 2.0], 0.1), record([4.0], 0.1)],
        [record([1.0], 0.05)],
    ]
    beside = [[[40e9, 30e9], [20e9, 40e9]], [[25e9, 20e9]]]
    contenders = [
        {"cases": [{"title": "100 text tokens", "records": each, "cached_before": [], "bytes_per_second": speeds}]}
        for each, speeds in zip(cases, beside, strict=True)
    ]
    results = {"contenders": contenders}
    rows = {
        title.strip(): [cell.strip() for cell in cells]
        for title, *cells in (line.strip("|").split("|") for line in case_table(results, 0).splitlines())
    }
    assert rows["100 text tokens"] == ["A", "B"]
    assert rows["time to first token, s"] == ["2.00 (1.00 … 4.00)", "1.00, ×0.500"]
    assert rows["prefill, tokens/s"] == ["50.0 (25.0 … 100)", "100, ×2.00"]
    assert rows["decode, tokens/s"] == ["10.0", "20.0, ×2.00"]
    assert rows["peak memory, GB"] == ["3.00", "3.00, ×1.00"]
    assert rows["weights read while decoding, GB/s"] == ["10.0", "20.0, ×2.00"]
    assert rows["the same, % of the next line's larger value"] == ["25.0", "80.0"]
    assert rows["the cores read just before and after, GB/s"] == ["35.0 (20.0 … 40.0)", "22.5 (20.0 … 25.0)"]
    assert "anonymous memory, GB" not in rows
    assert context_table(results) is None


def test_decoding_by_context():
    short, long = record([1.0], 0.1), replace(record([1.0], 0.125), prompt_tokens=4000)
    cases = [{"title": title, "records": [each]} for title, each in (("4000 t", long), ("100 t", short))]
    *_, first, second = (context_table({"contenders": [{"cases": cases}]}) or "").splitlines()
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["after 100 t", "10.0, 1.00"]
    assert [cell.strip() for cell in second.strip("|").split("|")] == ["after 4000 t", "8.00, 0.80"]


def test_a_damaged_record_is_refused():
    for line in ("", "fast", "{}", "[]", '{"memory": 3}'):
        with pytest.raises(MonoedgeError, match="expected a record"):
            Record.from_json(line)
