"""The house as drawn in docs/architecture.md: who imports whom, and what is imported only when it is chosen."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import runtime
from runtime.bundle.reader import Bundle

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


# Rooms of export that never need PyTorch.
TORCH_FREE = ("passes", "quantized", "engines", "recorded", "writer.py")

LONGEST = 300
"""Lines of a file."""
FULLEST = 12
"""Python files of a folder, its ``__init__.py`` included."""
CORE = 2700
"""Lines from ``runtime.Session`` to ONNX Runtime's call."""

MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in sorted(OURS)
    for file in (ROOT / package).rglob("*.py")
}


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    return {name.split(".")[0] for name in _names(file)} - set(sys.stdlib_module_names)


def _names(file: Path) -> set[str]:
    """Full names of what a file imports, wherever in it; what only type checkers see is left out."""
    tree = ast.parse(file.read_text())
    unseen = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _module(name: str) -> str | None:
    """The module of ours that an imported name is, or stands in."""
    return name if name in MODULES else name.rpartition(".")[0] if name.rpartition(".")[0] in MODULES else None


def _arrows(group: Callable[[str], str]) -> dict[str, set[str]]:
    """Who imports whom, among groups of modules."""
    arrows: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        others = {group(other) for other in map(_module, _names(file)) if other is not None}
        arrows.setdefault(group(module), set()).update(others - {group(module)})
    return arrows


def _room(module: str) -> str:
    """The folder of a module; files that stand at the top of a package are rooms of their own."""
    return module.rpartition(".")[0] if module.count(".") > 1 and MODULES[module].name != "__init__.py" else module


@pytest.mark.parametrize("group", [str, _room], ids=["modules", "rooms"])
def test_no_circles(group: Callable[[str], str]) -> None:
    """``static_order`` raises for a circle, and names it."""
    assert list(TopologicalSorter(_arrows(group)).static_order())


@pytest.mark.parametrize("package", sorted(OURS))
def test_arrows(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert imported(file) & OURS <= ARROWS[package] | {package}, file


def test_only_parts_of_export_import_torch() -> None:
    for file in MODULES.values():
        room = file.relative_to(ROOT).parts
        if room[0] != "export" or room[1] in TORCH_FREE:
            assert "torch" not in imported(file), file


def test_sizes() -> None:
    for package in OURS:
        for folder in (ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())):
            files = list(folder.glob("*.py"))
            assert len(files) <= FULLEST, folder
            assert not files or len(files) >= 3, folder
            for file in (path for path in folder.iterdir() if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}):
                assert len(file.read_text().splitlines()) <= LONGEST, file


def test_the_core_path_is_short_and_listed() -> None:
    """docs/architecture.md lists the files, and what stands beside them; no import leads anywhere else."""
    page = (ROOT / "docs/architecture.md").read_text()
    path, beside = (
        {ROOT / name for name in re.findall(r"`(runtime/[\w/]+\.py)`", part)}
        for part in page.split("## The core path")[1].split("\n## ")[0].split("\nBeside that path")
    )
    assert sum(len(file.read_text().splitlines()) for file in path) <= CORE
    reached, waiting = set[str](), ["runtime.session", "runtime.backends.onnxruntime.backend"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += {other for other in map(_module, _names(MODULES[module])) if other is not None}
    missing = {MODULES[module] for module in reached} - path - beside
    assert {file for file in missing if file.name != "__init__.py"} == set()


def test_pages_name_files_that_are_there() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`((?:runtime|export|calibration|plugins_trt)/[\w/.]*)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


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


def test_a_checkout_that_is_not_installed_exports(tmp_path: Path) -> None:
    arguments = ["x", "--ckpt", "tests/data/golden/tiny-v1/checkpoint", "-o", str(tmp_path / "b")]
    code = (
        "import importlib.metadata as metadata\n"
        "distributions = metadata.MetadataPathFinder.find_distributions\n"
        "def find_distributions(context):\n"
        "    return [found for found in distributions(context) if found.name != 'monoedge']\n"
        "metadata.MetadataPathFinder.find_distributions = find_distributions\n"
        "try: print(metadata.version('monoedge'))\n"
        "except metadata.PackageNotFoundError: print('not installed')\n"
        f"from export.onnx import main\nsys.argv = {arguments!r}\nmain()\n"
    )
    result = without(code=code)
    assert result.stdout == "not installed\n"
    assert result.returncode == 0, result.stderr
    assert Bundle(tmp_path / "b").manifest.created_by["monoedge"] == runtime.__version__


def test_help_needs_no_extra() -> None:
    result = without("torch", "onnx", code="from export.onnx import main\nsys.argv = ['x', '--help']\nmain()")
    assert result.returncode == 0
    assert "--ckpt" in result.stdout
