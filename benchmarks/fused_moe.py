"""Times FusedMoE on a GPU against what PyTorch has for it. Sizes are those of one layer of Mono-InternVL-2B."""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from fused_moe_cases import FORMATS, Call, Tensor, check, make_case, our_call, torch_calls, visual_rows, weight_bytes

from runtime.console.run import run
from runtime.errors import MonoedgeError, OptionError
from tests.plugins_trt.kernels import Kernels, build_for_gpu

_DESCRIPTION = """\
Times one FusedMoE node on this machine's GPU: our kernels, in each format of the text expert, and
  both     both experts on all rows, blended by the mask, as the official code has it
  gather   each expert's rows gathered, three matrix products each by cuBLAS, scattered back; which rows are whose is
           known beforehand, as a model knows it for all of its layers
  dense    one feed-forward network on as many rows, as a model without experts has it
Rows are one image span of whole tiles with text behind it; below one tile, text only.

examples:
  python benchmarks/fused_moe.py
  python benchmarks/fused_moe.py --rows 1 320 --json fused_moe.json

All results are compared with float32 before anything is timed. Each is a CUDA graph, replayed with the L2 cache
overwritten in between, and timed by CUDA events. Run it in a checkout with pip install -e '.[dev,export]', a PyTorch
that has CUDA, and nvcc; fix the clocks, or say that they were not."""

ROWS = (1, 8, 64, 320, 1280, 2900)
HIDDEN, INTER = 2048, 8192


@dataclass(frozen=True)
class Times:
    """Microseconds of one replay: the median, and between which the middle 80 % lie."""

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


def timed(call: Call, flush: Tensor, repeats: int) -> Times:
    """Replays a call as a CUDA graph; the L2 cache is overwritten before each."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = []
    for _ in range(repeats + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return Times.of([1000 * begin.elapsed_time(end) for begin, end in events[3:]])


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a copy of 512 MiB reads and writes together."""
    source = torch.ones(512 << 20, dtype=torch.uint8, device="cuda")
    target, nothing = torch.empty_like(source), torch.empty(1, device="cuda")

    def copy() -> Tensor:
        return target.copy_(source)

    return 2 * source.nbytes / (timed(copy, nothing, repeats).median / 1e6)


def measure(rows: int, formats: list[str], kernels: Kernels, flush: Tensor, repeats: int) -> dict[str, Any]:
    """Checks and times all contenders at one number of rows."""
    case = make_case(rows, HIDDEN, INTER, "cuda")
    result: dict[str, Any] = {
        "rows": rows,
        "visual_rows": visual_rows(rows),
        "torch": {},
        "ours": {},
        "weight_bytes": {},
    }
    for name, call in torch_calls(case).items():
        check(case, "bf16", name, call())
        result["torch"][name] = timed(call, flush, repeats)
    for text in formats:
        call = our_call(case, text, kernels)
        check(case, text, "FusedMoE", call())
        result["ours"][text] = timed(call, flush, repeats)
        result["weight_bytes"][text] = weight_bytes(case, text)
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


def table(results: list[dict[str, Any]], bandwidth: float) -> str:
    """Markdown: a row for each format and number of rows, and how it stands to the contenders."""
    lines = [
        "| text expert | rows | of them visual | ours, µs | both | gather | dense | against both | against dense "
        "| weights, of copy bandwidth |",
        "| --- |" + " ---: |" * 9,
    ]
    for result in results:
        others = result["torch"]
        for text, times in result["ours"].items():
            part = result["weight_bytes"][text] / (times.median / 1e6) / bandwidth
            cells = [
                text,
                result["rows"],
                result["visual_rows"],
                times,
                *(others[name] for name in ("both", "gather", "dense")),
                f"{others['both'].median / times.median:.2f}×",
                f"{others['dense'].median / times.median:.2f}×",
                f"{100 * part:.0f} %",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


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
    """Reads the command line, checks, times, and prints the table."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=list(ROWS), metavar="N", help=f"rows of a call (default {ROWS})")
    add("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="of the text expert (default: all)")
    add("--repeats", type=int, default=50, metavar="N", help="replays that the median is of (default 50)")
    add("--json", type=Path, metavar="FILE", help="write the raw numbers too")
    arguments = parser.parse_args()
    if min(arguments.rows) < 1 or arguments.repeats < 2:
        raise OptionError("expected --rows of at least 1 and --repeats of at least 2")
    if not torch.cuda.is_available():
        raise MonoedgeError("there is no CUDA GPU that PyTorch could use: this measures kernels on one")

    # Products in float32 are compared with, and tf32 would round their inputs.
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = facts()
    flush = torch.empty(4 * results["l2_bytes"], dtype=torch.uint8, device="cuda")
    bandwidth = results["copy_bytes_per_second"] = copy_bandwidth(arguments.repeats)
    print(", ".join(f"{name} {value}" for name, value in results.items()), "\n")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        kernels = build(Path(folder))
        cases = results["cases"] = []
        for rows in arguments.rows:
            print(f"{rows} rows …", file=sys.stderr, flush=True)
            cases.append(measure(rows, arguments.formats, kernels, flush, arguments.repeats))
    print(table(cases, bandwidth))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2, default=vars) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
