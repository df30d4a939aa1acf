"""The GPU day's command: order, limits, what a kill leaves, what a second call does. Steps and tools are stand-ins."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_day import carry, ncu  # noqa: E402
from benchmarks.gpu_day.day import Day  # noqa: E402
from benchmarks.gpu_day.steps import Step, steps  # noqa: E402
from benchmarks.gpu_day.summary import Summary  # noqa: E402
from runtime.errors import MonoedgeError  # noqa: E402

NEVER_ENDS = "exec tail -f /dev/null"
FAKE_SMI = 'if [ "$1" = -L ]; then echo "GPU 0: Fake GPU (UUID: GPU-0)"; else echo facts; fi'


def step(name: str, script: str, limit: float = 60, **more: object) -> Step:
    return Step(name, f"what {name} proves", ("sh", "-c", script), limit, gpu=False, **more)


def day(out: Path, steps: Sequence[Step], budget: float = 600, gpu: str | None = "a GPU") -> Day:
    out.mkdir(exist_ok=True)
    return Day(steps, Summary(out, steps), budget, gpu, "0123")


def outcomes(out: Path, steps: Sequence[Step], budget: float = 600, again: Sequence[str] = ()) -> dict[str, str]:
    """Of what one call ran."""
    return {step.name: record.outcome for step, record in day(out, steps, budget).run(again)}


def record_of(out: Path, name: str) -> dict[str, object]:
    return json.loads((out / "summary.json").read_text())["steps"][name]


# Running --------------------------------------------------------------------------------------------------------------


def test_a_failure_does_not_end_the_day(tmp_path: Path) -> None:
    chosen = [
        step("first", "echo '| a | b |'; echo all is well"),
        step("second", "echo the reason; exit 3"),
        Step("third", "", ("no-such-program",), 60, gpu=False),
        step("fourth", "echo ==== 5 passed ===="),
    ]
    assert outcomes(tmp_path, chosen) == {
        "first": "passed",
        "second": "failed",
        "third": "failed",
        "fourth": "passed",
    }
    second = record_of(tmp_path, "second")
    assert (second["exit"], second["said"], second["gpu"], second["tries"]) == (3, "the reason", "a GPU", 1)
    assert record_of(tmp_path, "third")["said"] == "no-such-program: No such file or directory"
    assert record_of(tmp_path, "fourth")["said"] == "5 passed"
    assert (tmp_path / "second.log").read_text() == "the reason\n"
    page = (tmp_path / "summary.md").read_text()
    assert "| second | failed | 0 | the reason | what second proves |" in page
    assert "## second: failed\n\n```text\nthe reason\n```" in page
    assert "## first\n\n| a | b |" in page


def test_each_step_is_kept_as_it_ends(tmp_path: Path) -> None:
    """The second sees the first one's result, and itself as cut off: what a kill would leave."""
    summary = tmp_path / "summary.json"
    outcomes(tmp_path, [step("first", "true"), step("second", f"cat {summary}")])
    seen = json.loads((tmp_path / "second.log").read_text())["steps"]
    assert {name: record["outcome"] for name, record in seen.items()} == {"first": "passed", "second": "cut off"}


def test_what_hangs_is_killed_with_its_children_and_the_next_runs(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    hangs = step("hangs", f"(echo alive; {NEVER_ENDS}) > {pipe} & echo begun; {NEVER_ENDS}", limit=2)
    assert outcomes(tmp_path / "out", [hangs, step("next", "true")]) == {"hangs": "timed out", "next": "passed"}
    assert os.read(reader, 100) == b"alive\n"
    # Readable, with nothing to read: no process holds the other end any more.
    assert select.select([reader], [], [], 60)[0]
    assert os.read(reader, 100) == b""
    os.close(reader)
    record = record_of(tmp_path / "out", "hangs")
    assert (record["exit"], record["said"]) == (None, "begun")


def test_the_end_of_a_call_cuts_a_step_off_which_is_tried_once_more(tmp_path: Path) -> None:
    chosen = [step("endless", NEVER_ENDS, limit=1000), step("next", "true")]
    assert outcomes(tmp_path, chosen, budget=1) == {"endless": "cut off"}
    assert outcomes(tmp_path, chosen, budget=1) == {"endless": "timed out"}
    assert outcomes(tmp_path, chosen, budget=1) == {"next": "passed"}
    assert outcomes(tmp_path, chosen) == {}


def test_results_are_kept_by_later_calls(tmp_path: Path) -> None:
    made = tmp_path / "made"
    chosen = [
        step("once", f"echo x >> {tmp_path}/count"),
        step("fails", "false"),
        step("makes", f"touch {made}", makes=(made,)),
        step("machine", "true", always=True),
    ]
    everything = ["once", "fails", "makes", "machine"]
    assert list(outcomes(tmp_path, chosen)) == everything
    assert list(outcomes(tmp_path, chosen)) == ["machine"]
    made.unlink()
    assert list(outcomes(tmp_path, chosen)) == ["makes", "machine"]
    assert (tmp_path / "count").read_text() == "x\n"
    assert list(outcomes(tmp_path, chosen, again=["once"])) == ["once", "machine"]
    assert (tmp_path / "count").read_text() == "x\nx\n"


def test_other_sources_are_compiled_again_and_try_again_what_failed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    chosen = [step("passes", "true"), step("makes", f"touch {made}", makes=(made,)), step("fails", "false")]

    def run(gpu: str, sources: str) -> list[str]:
        tmp_path.mkdir(exist_ok=True)
        return [each.name for each, _ in Day(chosen, Summary(tmp_path, chosen), 60, gpu, sources).run()]

    assert run("a GPU", "before") == ["passes", "makes", "fails"]
    assert run("a GPU", "before") == []
    assert run("a GPU", "after") == ["makes", "fails"]
    page = (tmp_path / "summary.md").read_text()
    assert "| passes | passed of before | 0 |" in page
    assert "| fails | failed of after | 0 |" in page
    assert run("another GPU", "after") == ["makes"]
    assert "| makes | passed of another GPU of after | 0 |" in (tmp_path / "summary.md").read_text()


def outcomes_and_reasons(out: Path, chosen: Sequence[Step], gpu: str | None) -> dict[str, tuple[str, str]]:
    return {step.name: (record.outcome, record.said) for step, record in day(out, chosen, gpu=gpu).run()}


def test_what_is_missing_is_named_and_looked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    chosen = [
        step("tool", "true", programs=("no-such-program",), instead="other"),
        step("package", "true", packages=("no_such_package", "numpy")),
        step("file", "true", files=(file,)),
        Step("gpu", "", ("true",), 60),
    ]
    assert outcomes_and_reasons(tmp_path, chosen, None) == {
        "tool": ("skipped", "no no-such-program; see other"),
        "package": ("skipped", "no no_such_package"),
        "file": ("skipped", "no library.so"),
        "gpu": ("skipped", "no GPU"),
    }
    file.touch()
    assert outcomes_and_reasons(tmp_path, chosen[2:], "a GPU") == {"file": ("passed", ""), "gpu": ("passed", "")}


def test_tests_that_are_all_skipped_show_nothing(tmp_path: Path) -> None:
    chosen = [step("tests", "echo === 356 skipped in 1 s ===", shown_by=" passed")]
    for _ in range(2):
        assert outcomes(tmp_path, chosen) == {"tests": "skipped"}
    assert record_of(tmp_path, "tests")["said"] == "356 skipped in 1 s"
    chosen = [step("tests", "echo === 3 passed, 353 skipped in 1 s ===", shown_by=" passed")]
    assert outcomes(tmp_path, chosen) == {"tests": "passed"}


def test_a_foreign_summary_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"steps": {"machine": 3}}')
    with pytest.raises(MonoedgeError, match="is no summary of a GPU day: name another folder"):
        day(tmp_path, [])


def test_profiles_stay_behind_where_results_grow_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    chosen = [step("profiles", f"cd {out}; head -c 300000 /dev/urandom > a.ncu-rep; echo text > a.txt")]
    for most, names in ((1 << 20, {"a.ncu-rep", "a.txt"}), (1 << 17, {"a.txt"})):
        monkeypatch.setattr("benchmarks.gpu_day.summary.MOST_ARCHIVED", most)
        out.mkdir(exist_ok=True)
        assert [*Day(chosen, Summary(out, chosen, copy), 60, "a GPU", "").run(["profiles"])]
        with tarfile.open(copy / "results.tar.gz") as archive:
            assert set(archive.getnames()) == names | {"profiles.log", "summary.json", "summary.md"}


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment with a GPU's tools that do nothing: nvcc "compiles" a program that prints a table."""
    folder = tmp_path / "tools"
    folder.mkdir()
    target = 'for word; do [ "$last" = {option} ] && target=$word; last=$word; done; '
    scripts = {
        "nvidia-smi": FAKE_SMI,
        "nvcc": target.format(option="-o") + "printf '#!/bin/sh\\necho \"| bf16 | 1 |\"' > $target; chmod +x $target",
        "compute-sanitizer": 'echo "$@"; echo "========= ERROR SUMMARY: 0 errors"',
        "ncu": target.format(option="--export") + '[ -z "$target" ] || echo report > $target; echo details',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def command(*arguments: str | Path, root: Path = ROOT) -> list[str]:
    return [sys.executable, str(root / "benchmarks/gpu_day"), *map(str, arguments)]


def call(arguments: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)


def test_a_day_with_tools_that_do_nothing(tmp_path: Path, tools: dict[str, str]) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    chosen = ("ncu", "machine", "memcheck", "build-kernels", "racecheck", "kernels", "layers")
    arguments = command("--out", out, "--copy", copy, "--arch", "90", "--only", *chosen, "--skip", "racecheck")
    result = call(arguments, tools)
    told = {line.split(":")[0]: line.split(": ", 2)[1:] for line in result.stdout.splitlines()[1:-1]}
    assert list(told) == ["machine", "build-kernels", "kernels", "memcheck", "layers", "ncu"]
    assert result.stdout.startswith("Fake GPU; ")
    # There is no driver under the tools, and the next steps run all the same.
    assert told["kernels"][0].startswith("failed")
    assert {name for name, (outcome, *_) in told.items() if outcome.startswith("passed")} == {*told} - {"kernels"}
    assert told["memcheck"][-1] == "ERROR SUMMARY: 0 errors"
    assert result.stdout.splitlines()[-1] == f"not as they should be: kernels; see {out}/summary.md"
    assert result.returncode == 1
    assert (out / "memcheck.log").read_text().startswith("--tool memcheck --error-exitcode 9 ")
    assert "## layers\n\n| bf16 | 1 |" in (copy / "summary.md").read_text()
    assert (copy / "summary.json").read_text() == (out / "summary.json").read_text()
    with tarfile.open(copy / "results.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"summary.json", "memcheck.log", "ncu-bf16-1.ncu-rep", "ncu-bf16-1.txt"} <= names
    assert not any(name.startswith("built") for name in names)
    assert (out / "built/libkernels.so").exists()

    again = call(arguments, tools)
    assert [line.split(":")[0] for line in again.stdout.splitlines()[1:-1]] == ["machine"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_call_loses_nothing(tmp_path: Path, tools: dict[str, str], number: signal.Signals) -> None:
    out, pipe = tmp_path / "out", tmp_path / "pipe"
    os.mkfifo(pipe)
    tool = tmp_path / "tools/compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nexec 3> {pipe}\necho $$ >&3\n{NEVER_ENDS}\n")
    arguments = command("--out", out, "--arch", "90", "--only", "build-kernels", "memcheck")
    process = subprocess.Popen(arguments, env=tools, stdout=subprocess.DEVNULL)
    with pipe.open() as reader:
        child = int(reader.readline())
        process.send_signal(number)
        process.wait()
        if number == signal.SIGKILL:
            os.kill(child, signal.SIGKILL)
        assert select.select([reader], [], [], 60)[0], "what it ran lives on"
        assert reader.read() == ""
    assert record_of(out, "build-kernels")["outcome"] == "passed"
    assert record_of(out, "memcheck")["outcome"] == "cut off"
    tool.write_text("#!/bin/sh\necho done\n")
    result = call(arguments, tools)
    assert [line.split(",")[0] for line in result.stdout.splitlines()[1:]] == ["memcheck: passed"]
    assert result.returncode == 0


def test_list_tells_the_order_and_the_size(tmp_path: Path) -> None:
    result = call(command("--list", "--out", tmp_path / "none"))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    names = [each.name for each in steps(tmp_path, None, None)]
    assert [line.split()[0] for line in lines[:-1:2]] == names
    assert lines[-1] == f"to carry: {carry.size() / 1e6:.1f} MB"
    assert not (tmp_path / "none").exists()


def test_steps_are_in_order_of_worth_and_need_only_earlier_ones(tmp_path: Path) -> None:
    everything = steps(tmp_path, "90", ROOT)
    names = [each.name for each in everything]
    worth = ["machine", "build-kernels", "pytest", "memcheck", "plugin", "device", "decode", "ncu"]
    assert [name for name in names if name in worth] == worth
    made: set[Path] = set()
    for each in everything:
        assert {file for file in each.files if file.is_relative_to(tmp_path)} <= made, each.name
        made |= set(each.makes)
        assert set(each.instead.split(", ")) - {""} <= set(names), each.name


def test_the_page_has_each_step_and_its_limit(tmp_path: Path) -> None:
    section = (ROOT / "docs/benchmarks.md").read_text().split("## GPU day")[1]
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (\d+) \|$", section, re.M)
    assert rows == [(each.name, str(each.limit)) for each in steps(tmp_path, None, None)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "nothing"], "error: there is no step nothing: expected some of machine, build-kernels, "),
        (["--skip", "nothing"], "error: there is no step nothing"),
        (["--budget", "0"], "error: --budget 0.0: expected minutes, more than 0 and at most a day"),
        (["--again"], "error: --again runs steps once more that --only names"),
    ],
)
def test_told_in_one_line(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = call(command("--out", tmp_path / "out", *arguments))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(told)
    assert result.stderr.count("\n") == 1


# What is carried ------------------------------------------------------------------------------------------------------


def test_an_unpacked_archive_is_enough(tmp_path: Path) -> None:
    result = call(command("--pack", tmp_path / "day.tar.gz"))
    assert result.returncode == 0, result.stderr
    # As a user unpacks it: Debian 12's Python 3.11.2 has no safe way of its own.
    subprocess.run(["tar", "--extract", "--file", tmp_path / "day.tar.gz", "--directory", tmp_path], check=True)
    root = tmp_path / "monoedge"
    listed = call(command("--list", root=root))
    assert listed.returncode == 0, listed.stderr
    # Plans are built in a whole checkout.
    assert listed.stdout.split("\ntensorrt")[0] == call(command("--list")).stdout.split("\ntensorrt")[0]
    modules = ("agree", "build", "machine", "ncu", "pixels", "device")
    imports = "; ".join(f"import benchmarks.gpu_day.{module}" for module in modules)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for words in (
        ["-c", imports],
        ["benchmarks/fused_moe.py", "--help"],
        ["-m", "pytest", "-m", "gpu", "--noconftest", "--collect-only", "-q", "tests/plugins_trt/test_kernels_gpu.py"],
    ):
        result = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, env=clean)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "tests collected" in result.stdout


def test_too_much_to_carry_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carry.size() < 4 << 20
    monkeypatch.setattr(carry, "MOST", 1 << 20)
    with pytest.raises(MonoedgeError, match="needs 1 MiB of the checkout, expected at most 1 MiB"):
        carry.size()


# Profiles -------------------------------------------------------------------------------------------------------------


def test_what_is_furthest_from_its_bound_is_profiled_first(tmp_path: Path) -> None:
    assert ncu.by_distance(tmp_path) == list(ncu.CASES)
    ours = {"bf16": {"median": 40.0}, "w8a8": {"median": 60.0}}
    case = {"rows": 2900, "ours": ours, "bound": {"bf16": 20.0, "w8a8": 10.0}}
    (tmp_path / "prefill.json").write_text(json.dumps({"cases": [case]}))
    (tmp_path / "decode.json").write_text("{")
    assert ncu.by_distance(tmp_path)[:3] == [("w8a8", 2900), ("bf16", 2900), ("bf16", 1)]
