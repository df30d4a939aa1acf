"""Times FusedMoE on a GPU against what PyTorch has for it. Sizes are those of the layers of Mono-InternVL-2B."""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from fused_moe_calls import (
    Call,
    in_turn,
    our_call,
    our_chain,
    our_down,
    products,
    torch_chain,
    torch_down,
    torch_layers,
)
from fused_moe_cases import FORMATS, Experts, Tensor, check, down_bytes, make_case, make_experts, weight_bytes

from runtime.console.run import run
from runtime.errors import MonoedgeError, OptionError
from tests.plugins_trt.kernels import Kernels, build_for_gpu

_DESCRIPTION = """\
Times layers of FusedMoE on this machine's GPU: our kernels, in each format of the text expert, and
  both      both experts on all rows, blended by the mask, as the official code has it
  gather    each expert's rows gathered, three matrix products each by cuBLAS, scattered back; which rows are whose is
            known beforehand, as a model knows it for all of its layers
  dense     one feed-forward network on as many rows, as a model without experts has it
  products  the two matrix products of that network and nothing between them
  bound     the longer of: reading each weight once at the copy bandwidth, all operations at the rate of a large product
and the same for the matrix down alone, on rows without a picture. Rows are one image span of whole tiles with text
behind it; up to one tile, text only.

examples:
  python benchmarks/fused_moe.py
  python benchmarks/fused_moe.py --rows 1 320 --json fused_moe.json

All results are compared with float32 before anything is timed. Layers stand one after the other in one CUDA graph, so
that a launch costs what it does in a model; each reads what the one before wrote, and as many have weights of their own
as make four times the L2 cache. A replay is timed by CUDA events and divided by the layers. Run it in a checkout with
numpy, ml_dtypes, a PyTorch that has CUDA, and nvcc; fix the clocks, or say that they were not."""

ROWS = (1, 8, 64, 320, 1280, 2900)
HIDDEN, INTER = 2048, 8192
LAYERS = 24
MOST_APART = 0.2
"""What results of a chain may differ by: each layer squares what goes in, and so doubles what rounding did before."""

COPIED = 512 << 20
"""Bytes whose copy bounds reading."""

LARGE = 8192
"""Rows, columns and depth of the product whose rate bounds operations."""


@dataclass(frozen=True)
class Times:
    """Microseconds of one layer: the median, and between which the middle 80 % lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> Times:
        """At least two times."""
        tenths = quantiles(times, n=10, method="inclusive")
        return cls(tenths[4], tenths[0], tenths[8])

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f} … {self.high:.1f})"


def timed(call: Call, repeats: int, layers: int = 1) -> Times:
    """Replays a call of some layers as a CUDA graph.

    Raises:
        MonoedgeError: the graph computes something else than the call does, or its result is no number.
    """
    expected = call().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    events = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    if not torch.equal(result, expected):
        # PyTorch may take another of cuBLAS's kernels when it captures. Written so that NaN fails.
        distance = float((result.float() - expected.float()).norm() / expected.float().norm())
        if not distance < MOST_APART:
            raise MonoedgeError(f"a captured graph is off by {distance:.2g} of what the calls give; nothing is told")
    return Times.of([1000 * begin.elapsed_time(end) / layers for begin, end in events[3:]])


def copy_bandwidth(repeats: int, device: str = "cuda") -> float:
    """Bytes a second that a large copy reads and writes together."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return 2 * source.nbytes / (timed(copy, repeats).median / 1e6)


def product_rates(repeats: int, device: str = "cuda") -> dict[str, float]:
    """Operations a second of one large product by cuBLAS, in bf16 and in INT8."""
    a, b = (torch.randn(LARGE, LARGE, device=device).bfloat16() for _ in range(2))
    whole = [(10 * matrix).clamp(-127, 127).to(torch.int8) for matrix in (a, b)]
    calls: dict[str, Call] = {"bf16": lambda: a @ b.T, "int8": lambda: torch._int_mm(whole[0], whole[1].T)}
    return {name: 2 * LARGE**3 / (timed(call, repeats).median / 1e6) for name, call in calls.items()}


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second; operations a second of bf16 and of INT8."""

    bandwidth: float
    rates: dict[str, float]

    def bound(self, read: int, operations: dict[str, float]) -> float:
        """Microseconds that reading these bytes, or these operations of each kind, take at least."""
        computing = sum(count / self.rates[kind] for kind, count in operations.items())
        return 1e6 * max(read / self.bandwidth, computing)


def measure(
    rows: int,
    formats: Sequence[str],
    kernels: Kernels,
    experts: Sequence[Experts],
    ceilings: Ceilings,
    repeats: int,
    layers: int,
) -> dict[str, Any]:
    """Checks and times all contenders at one number of rows."""
    cases = [make_case(rows, each) for each in experts]
    first, visual = cases[0], int(cases[0].mask.sum())
    result: dict[str, Any] = {"rows": rows, "visual_rows": visual, "torch": {}, "ours": {}, "bound": {}, "down": {}}
    for name, layer in torch_layers(first).items():
        check(first, "bf16", name, layer(first))
        result["torch"][name] = timed(torch_chain(cases, layer, layers), repeats, layers)
    # These begin with the rows in each layer: there is nothing between that would keep results of one size.
    result["torch"]["products"] = timed(in_turn([partial(products, case) for case in cases], layers), repeats, layers)
    product = torch.randn(rows, INTER, device=first.rows.device).bfloat16()
    downs = [partial(torch_down, each, product) for each in experts]
    result["torch"]["down"] = timed(in_turn(downs, layers), repeats, layers)
    for text in formats:
        check(first, text, "FusedMoE", our_call(first, text, kernels)())
        result["ours"][text] = timed(our_chain(cases, text, kernels, layers), repeats, layers)
        of_row, kind = 6.0 * HIDDEN * INTER, "int8" if text == "w8a8" else "bf16"
        operations = {"bf16": visual * of_row}
        operations[kind] = operations.get(kind, 0.0) + (rows - visual) * of_row
        result["bound"][text] = ceilings.bound(weight_bytes(first, text), operations)
        downs = [our_down(each, text, kernels, product) for each in experts]
        result["down"][text] = {
            "ours": timed(in_turn(downs, layers), repeats, layers),
            "bound": ceilings.bound(down_bytes(experts[0], text), {kind: rows * of_row / 3}),
        }
    return result


def build(folder: Path) -> Kernels:
    """The kernels for this GPU.

    Raises:
        MonoedgeError: there is no nvcc, or it fails.
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise MonoedgeError(
            "nvcc is not installed, which compiles the kernels: https://developer.nvidia.com/cuda-downloads"
        )
    try:
        return build_for_gpu(folder, nvcc)
    except subprocess.CalledProcessError as error:
        raise MonoedgeError(
            f"nvcc cannot compile the kernels, exit code {error.returncode}; what it says is above"
        ) from None


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each format and number of rows, and how it stands to the contenders and the bound."""
    names = ("both", "gather", "dense", "products")
    lines = [
        f"| text expert | rows | of them visual | ours, µs a layer | {' | '.join(names)} "
        "| against both | against dense | bound | bound, of ours |",
        "| --- |" + " ---: |" * (7 + len(names)),
    ]
    for result in results:
        others = result["torch"]
        for text, times in result["ours"].items():
            bound = result["bound"][text]
            cells = [text, result["rows"], result["visual_rows"], times, *(others[name] for name in names)]
            cells += [f"{others[name].median / times.median:.2f}×" for name in ("both", "dense")]
            cells += [f"{bound:.1f}", f"{100 * bound / times.median:.0f} %"]
            lines.append(_row(cells))
    lines += ["", "| down alone | rows | ours, µs | bf16 by cuBLAS | bound | bound, of ours |"]
    lines.append("| --- |" + " ---: |" * 5)
    for result in results:
        for text, down in result["down"].items():
            times, bound = down["ours"], down["bound"]
            cells = [text, result["rows"], times, result["torch"]["down"], f"{bound:.1f}"]
            lines.append(_row([*cells, f"{100 * bound / times.median:.0f} %"]))
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def facts() -> dict[str, Any]:
    """What the numbers depend on."""
    properties = torch.cuda.get_device_properties(0)
    driver = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver_cuda": f"{driver.value // 1000}.{driver.value % 1000 // 10}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "hidden": HIDDEN,
        "inter": INTER,
    }


def main() -> None:
    """Reads the command line, checks, times, and prints the tables."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=list(ROWS), metavar="N", help=f"rows of a call (default {ROWS})")
    add("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="of the text expert (default: all)")
    add("--repeats", type=int, default=50, metavar="N", help="replays that the median is of (default 50)")
    add("--layers", type=int, default=LAYERS, metavar="N", help=f"in one CUDA graph (default {LAYERS})")
    add("--library", type=Path, metavar="FILE", help="the kernels, compiled already")
    add("--json", type=Path, metavar="FILE", help="write the raw numbers too")
    arguments = parser.parse_args()
    repeats, layers = arguments.repeats, arguments.layers
    if min(*arguments.rows, layers) < 1 or repeats < 2:
        raise OptionError("expected --rows and --layers of at least 1 and --repeats of at least 2")
    if not torch.cuda.is_available():
        raise MonoedgeError("there is no CUDA GPU that PyTorch could use: this measures kernels on one")

    # Products in float32 are compared with, and tf32 would round their inputs.
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = facts()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        kernels = Kernels(arguments.library.absolute()) if arguments.library else build(Path(folder))
        ceilings = Ceilings(copy_bandwidth(repeats), product_rates(repeats))
        results |= {"copy_bytes_per_second": ceilings.bandwidth, "operations_per_second": ceilings.rates}
        # INT8 weights of one expert and layer, the fewest that a layer may read.
        distinct = max(4, -(-4 * results["l2_bytes"] // (3 * HIDDEN * INTER)))
        results |= {"layers": layers, "of_them_distinct": distinct}
        print(", ".join(f"{name} {value}" for name, value in results.items()), "\n", flush=True)
        experts = [make_experts(HIDDEN, INTER, "cuda", seed=seed) for seed in range(distinct)]
        cases = results["cases"] = []
        for rows in arguments.rows:
            print(f"{rows} rows …", file=sys.stderr, flush=True)
            cases.append(measure(rows, arguments.formats, kernels, experts, ceilings, repeats, layers))
            if arguments.json:
                text = json.dumps(results, indent=2, default=vars)
                arguments.json.write_text(text + "\n", encoding="utf-8")
    print(table(cases))


if __name__ == "__main__":
    run(main)
