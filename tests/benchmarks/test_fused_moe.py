"""What the benchmark times is right, on a CPU: the contenders agree with each other, and our kernels, emulated, with
them. Only the timing itself needs a GPU."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fused_moe  # noqa: E402
import fused_moe_calls as calls  # noqa: E402
import fused_moe_cases as cases  # noqa: E402

from runtime.errors import MonoedgeError  # noqa: E402
from tests.plugins_trt.kernels import build_for_cpu  # noqa: E402

HIDDEN, INTER = 64, 96


@functools.cache
def case_of(rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> cases.Case:
    return cases.make_case(rows, cases.make_experts(HIDDEN, INTER, "cpu", dtype, seed))


def test_rows_are_whole_tiles_and_text_behind_them() -> None:
    assert [cases.visual_rows(rows) for rows in fused_moe.ROWS] == [0, 0, 0, 256, 1024, 2816]
    case = case_of(320)
    assert case.mask.tolist() == [True] * 256 + [False] * 64
    assert cases.weight_bytes(case, "bf16") == 2 * 2 * 3 * HIDDEN * INTER
    assert cases.weight_bytes(case, "w8a8") == (1 + 2) * 3 * HIDDEN * INTER
    assert cases.weight_bytes(case_of(8), "bf16") == 2 * 3 * HIDDEN * INTER
    assert [cases.down_bytes(case.experts, text) for text in cases.FORMATS] == [2 * 6144, 6144, 6144]


@pytest.mark.parametrize("rows", [1, 8, 320, 600])
def test_contenders_agree_in_float32(rows: int) -> None:
    case = case_of(rows, torch.float32)
    results = {name: layer(case) for name, layer in calls.torch_layers(case).items()}
    torch.testing.assert_close(results["both"], results["gather"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results["both"], cases.expected(case, "bf16"), rtol=1e-5, atol=1e-5)
    # The dense network is the text expert, which both are without an image.
    torch.testing.assert_close(results["dense"][~case.mask], results["both"][~case.mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 320])
def test_contenders_pass_the_check_in_bfloat16(rows: int) -> None:
    case = case_of(rows)
    for name, layer in calls.torch_layers(case).items():
        cases.check(case, "bf16", name, layer(case))


@pytest.mark.parametrize("text", cases.FORMATS)
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_our_kernels_pass_the_check(rows: int, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    case = case_of(rows)
    call = calls.our_call(case, text, kernels)
    cases.check(case, text, "FusedMoE", call())
    cases.check(case, text, "FusedMoE", call())


@pytest.mark.parametrize("text", cases.FORMATS)
def test_down_alone_is_the_text_experts(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    experts = case_of(1).experts
    product = torch.randn((20, INTER), generator=torch.Generator().manual_seed(0)).bfloat16()
    got = calls.our_down(experts, text, kernels, product)().float()
    expected = calls.torch_down(experts, product).float()
    # INT8 is another number than the bfloat16 that it was made of.
    assert float((got - expected).norm() / expected.norm()) < {"bf16": 0.005, "w8a16": 0.02, "w8a8": 0.03}[text]


def test_each_layer_of_a_chain_reads_what_the_one_before_wrote(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Seven layers over three cases: the last is the first case again, from the rows."""
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    chained = [case_of(20, seed=seed) for seed in range(3)]
    for layers in (1, 2, 3, 5, 7):
        rows = chained[0].rows.float()
        for index in range(layers):
            case = chained[index % 3]
            begin = case.rows.float() if index % 3 == 0 else rows
            rows = cases.expected(cases.Case(begin, case.mask, case.experts), "bf16")
        # Narrow layers let numbers grow or shrink more than those of the model do.
        assert 0.01 < float(rows.square().mean()) < 100
        for chain in (
            calls.torch_chain(chained, calls.dense, layers),
            calls.our_chain(chained, "bf16", kernels, layers),
        ):
            for _ in range(2):
                assert float((chain().float() - rows).norm() / rows.norm()) < 0.05


@pytest.mark.parametrize("text", cases.FORMATS)
def test_the_check_finds_what_is_wrong(text: str) -> None:
    case = case_of(300)
    right = cases.expected(case, text)
    cases.check(case, text, "it", right)
    other = cases.Case(case.rows, ~case.mask, case.experts)
    spoiled = right.clone()
    spoiled[299, 0] = torch.nan
    for wrong in (cases.expected(other, text), right.roll(1, 0), 1.05 * right, spoiled):
        with pytest.raises(MonoedgeError, match=f"it {text} with 300 rows is wrong: .* nothing is timed"):
            cases.check(case, text, "it", wrong)


def test_quantized_weights_are_near_their_originals() -> None:
    case = case_of(300, torch.float32)
    exact = cases.expected(case, "bf16")[~case.mask]
    for text, most in (("w8a16", 0.02), ("w8a8", 0.1)):
        got = cases.expected(case, text)[~case.mask]
        assert float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < most


def test_times() -> None:
    times = fused_moe.Times.of([float(value) for value in range(1, 12)])
    assert (times.median, times.low, times.high) == (6, 2, 10)
    assert str(times) == "6.0 (2.0 … 10.0)"


def test_everything_but_the_clock_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each call that would be timed is made, on emulated kernels, and takes 100 µs a layer."""
    made = []

    def timed(call: calls.Call, repeats: int, layers: int = 1) -> fused_moe.Times:
        made.append(layers)
        assert bool(torch.isfinite(call()).all())
        return fused_moe.Times(100.0, 90.0, 110.0)

    for name, value in {"timed": timed, "HIDDEN": HIDDEN, "INTER": INTER, "COPIED": 1000, "LARGE": 32}.items():
        monkeypatch.setattr(fused_moe, name, value)
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    ceilings = fused_moe.Ceilings(fused_moe.copy_bandwidth(5, "cpu"), fused_moe.product_rates(5, "cpu"))
    assert ceilings.bandwidth == pytest.approx(2000 / 1e-4)
    assert ceilings.rates == pytest.approx(dict.fromkeys(("bf16", "int8"), 2 * 32**3 / 1e-4))
    experts = [cases.make_experts(HIDDEN, INTER, "cpu", seed=seed) for seed in range(3)]
    results = [fused_moe.measure(rows, list(cases.FORMATS), kernels, experts, ceilings, 5, 7) for rows in (1, 300)]
    # A copy and two products; then four of PyTorch's ways and its down, ours and our down in three formats.
    assert made == [1] * 3 + [7] * 2 * (5 + 2 * 3)
    assert [result["visual_rows"] for result in results] == [0, 256]
    whole, down = 3 * HIDDEN * INTER, HIDDEN * INTER
    assert results[0]["bound"]["w8a16"] == pytest.approx(1e6 * whole / ceilings.bandwidth)
    assert results[1]["bound"]["w8a8"] == pytest.approx(1e6 * 300 * 2 * whole / ceilings.rates["bf16"])
    assert results[1]["down"]["bf16"]["bound"] == pytest.approx(1e6 * 300 * 2 * down / ceilings.rates["bf16"])
    assert fused_moe.table(results).count("100.0 (90.0 … 110.0)") == 2 * 3 * (5 + 2)
    json.dumps(results, default=vars)


def test_bounds() -> None:
    ceilings = fused_moe.Ceilings(bandwidth=1e12, rates={"bf16": 1e14, "int8": 2e14})
    assert ceilings.bound(100_000_000, {"bf16": 1e9}) == pytest.approx(100)
    assert ceilings.bound(100_000_000, {"bf16": 2e10, "int8": 2e10}) == pytest.approx(300)


def test_table() -> None:
    def times(value: float) -> fused_moe.Times:
        return fused_moe.Times(value, value - 1, value + 1)

    result = {
        "rows": 320,
        "visual_rows": 256,
        "torch": {
            "both": times(300),
            "gather": times(220),
            "dense": times(120),
            "products": times(110),
            "down": times(40),
        },
        "ours": {"bf16": times(150), "w8a8": times(100)},
        "bound": {"bf16": 90.0, "w8a8": 75.0},
        "down": {"bf16": {"ours": times(50), "bound": 30.0}, "w8a8": {"ours": times(25), "bound": 20.0}},
    }
    layers, downs = (part.splitlines() for part in fused_moe.table([result]).split("\n\n"))
    for lines in (layers, downs):
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert layers[2] == (
        "| bf16 | 320 | 256 | 150.0 (149.0 … 151.0) | 300.0 (299.0 … 301.0) | 220.0 (219.0 … 221.0) "
        "| 120.0 (119.0 … 121.0) | 110.0 (109.0 … 111.0) | 2.00× | 0.80× | 90.0 | 60 % |"
    )
    assert layers[3].endswith("| 3.00× | 1.20× | 75.0 | 75 % |")
    assert downs[3] == "| w8a8 | 320 | 25.0 (24.0 … 26.0) | 40.0 (39.0 … 41.0) | 20.0 | 80 % |"
    assert json.loads(json.dumps(result, default=vars))["ours"]["bf16"]["median"] == 150


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "0"], "error: expected --rows and --layers of at least 1"),
        (["--layers", "0"], "error: expected --rows and --layers of at least 1"),
        (["--repeats", "1"], "error: expected --rows and --layers of at least 1 and --repeats of at least 2"),
        (["--formats", "fp8"], "invalid choice: 'fp8'"),
        ([], "error: there is no CUDA GPU that PyTorch could use"),
    ],
)
def test_told_in_one_line(arguments: list[str], told: str) -> None:
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks/fused_moe.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert told in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_it_measures(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    command = [sys.executable, str(ROOT / "benchmarks/fused_moe.py"), "--rows", "1", "320", "--repeats", "3"]
    result = subprocess.run([*command, "--json", raw], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(raw.read_text())
    assert [case["rows"] for case in measured["cases"]] == [1, 320]
    assert all(set(case["ours"]) == set(cases.FORMATS) for case in measured["cases"])
    assert measured["copy_bytes_per_second"] > 1e9
