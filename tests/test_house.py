"""The house as drawn in docs/architecture.md: who imports whom, and what is imported only when it is chosen."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"export", "plugins_trt", "runtime", "calibration"}
BASE = {"numpy", "PIL", "tokenizers", "tqdm"}
"""What installing monoedge without extras brings."""
BACKENDS = {"onnxruntime", "pycuda", "cuda"}
"""What backends import, each when it is chosen."""

# What each of our packages may import of ours beside itself.
ARROWS = {
    "runtime": set(),
    "plugins_trt": {"runtime"},
    "export": {"plugins_trt", "runtime"},
    "calibration": {"export", "plugins_trt", "runtime"},
}


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", sorted(OURS))
def test_arrows(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert imported(file) & OURS <= ARROWS[package] | {package}, file


def test_only_export_imports_torch() -> None:
    for package in OURS - {"export"}:
        for file in (ROOT / package).rglob("*.py"):
            assert "torch" not in imported(file), file


def test_runtime_needs_the_base_only() -> None:
    for file in (ROOT / "runtime").rglob("*.py"):
        allowed = BASE | {"runtime"} | (BACKENDS if "backends" in file.parts else set())
        assert imported(file) <= allowed, file


def test_definition_imports_nothing() -> None:
    assert imported(ROOT / "plugins_trt/schema.py") == set()


def without(*modules: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process in which some packages are not installed, as far as it can see."""
    hide = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {modules!r} else find(name, path, target)\n"
        "PathFinder.find_spec = find_spec\n"
    )
    return subprocess.run(
        [sys.executable, "-c", hide + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_import_runtime_without_anything_heavy() -> None:
    heavy = (
        "torch",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "onnxruntime",
        "tensorrt",
        "pycuda",
        "safetensors",
        "sentencepiece",
    )
    result = without(*heavy, code="import runtime; print(runtime.Session.__name__)")
    assert result.stdout == "Session\n", result.stderr


def test_what_writes_bundles_needs_no_torch() -> None:
    modules = "options, writer, external_data, passes.portable, passes.group_query_attention, quantized.bundle"
    code = "".join(f"import export.{module}\n" for module in modules.split(", "))
    result = without("torch", "onnxscript", "safetensors", code=code)
    assert result.returncode == 0, result.stderr


def test_missing_onnxruntime_names_its_extra(tiny_v1_bundle: Path) -> None:
    result = without(
        "onnxruntime",
        code=f"import runtime\ntry: runtime.load({str(tiny_v1_bundle)!r})\nexcept runtime.BackendError as e: print(e)",
    )
    assert "pip install 'onnxruntime>=" in result.stdout, result.stderr


@pytest.mark.parametrize("module", ["torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"])
def test_missing_export_package_names_its_extra(module: str, tmp_path: Path) -> None:
    arguments = ["x", "--ckpt", "tests/data/golden/tiny-v1/checkpoint", "-o", str(tmp_path / "b")]
    code = f"from runtime.console.run import run\nfrom export.onnx import main\nsys.argv = {arguments!r}\nrun(main)"
    result = without(module, code=code)
    assert result.returncode == 2
    line, package = result.stderr, module.replace("_", "-")
    assert line.startswith(f"error: {module} is not installed; this installs it: pip install ")
    assert line.split("pip install ")[1].lstrip("'").startswith(package)
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_extra() -> None:
    result = without("torch", "onnx", code="from export.onnx import main\nsys.argv = ['x', '--help']\nmain()")
    assert result.returncode == 0
    assert "--ckpt" in result.stdout
