"""What bundles are compared with: PyTorch computes the same, llama.cpp what the file says, both print records."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runtime
from export.checkpoint.reader import Checkpoint
from export.model.weights import DTYPES, load_decoder, load_vision
from runtime.bench.record import Record
from runtime.errors import MonoedgeError
from runtime.generation import Sequence

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "golden" / "tiny-v15" / "checkpoint"
WORKLOAD = ("--text-tokens", "20", "--tiles", "1", "--new-tokens", "3", "--warmup", "0", "--repeats", "2")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def contender(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_pytorch_prints_a_record():
    done = contender("eager.py", "--ckpt", CHECKPOINT, "--dtype", "bf16", "--threads", "1", *WORKLOAD)
    assert done.returncode == 0, done.stderr
    record = Record.from_json(done.stdout)
    assert (record.prompt_tokens, record.visual_tokens) == (276, 256)
    assert record.contender["precision"] == "bf16"
    assert "1 threads" in record.contender["computes"]
    assert [len(steps) for steps in record.steps] == [2, 2]


def test_pytorch_as_a_backend_answers_as_the_bundle_does(tiny_v15_bundle):
    """The same sequence of calls, so that what is timed is the same work; caches grow on the way."""
    import eager

    model = runtime.load(tiny_v15_bundle)
    session = model.session(np.zeros((448, 448, 3), np.uint8), "What is it?", max_new_tokens=2)
    prompt = session.answer.prompt
    checkpoint, dtype = Checkpoint(CHECKPOINT), DTYPES["fp32"]
    backend = eager.EagerBackend(load_decoder(checkpoint, dtype, 8192), load_vision(checkpoint, dtype), dtype)
    # Three short of where the caches grow first.
    steps = -len(prompt) % 256 + 3
    logits = []
    for each in (model.backend, backend):
        sequence = Sequence(each, model.embed)
        found = [sequence.prefill(prompt, lambda: False)]
        found += [sequence.step(token % 1000) for token in range(steps)]
        logits.append(np.stack(found))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


# ---- llama.cpp -------------------------------------------------------------------------------------------


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def test_the_full_size_is_that_of_internlm2():
    """1,889,110,016 parameters, as published; the released vocabulary is 9 ids smaller than the multimodal one."""
    make_gguf = importlib.import_module("make_gguf")
    shapes = make_gguf.tensors(make_gguf.SHAPES["2b"] | {"vocab_size": 92544})
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_889_110_016


def test_blocks_are_random_weights_of_unit_gain():
    make_gguf = importlib.import_module("make_gguf")
    blocks = make_gguf.q8_0("blk.0.ffn_down.weight", (64, 512)).reshape(-1, 34)
    values = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
    assert values.size == 64 * 512
    assert values.std() == pytest.approx(512**-0.5, rel=0.03)
    assert (make_gguf.q8_0("blk.0.ffn_down.weight", (64, 512)).reshape(-1, 34) == blocks).all()


@needs("gguf", "llama_cpp")
def test_llama_cpp_reads_what_is_written(tmp_path):
    file = tmp_path / "tiny.gguf"
    assert contender("make_gguf.py", file, "--size", "tiny").returncode == 0
    done = contender("llama.py", "--gguf", file, *WORKLOAD)
    assert done.returncode == 0, done.stderr
    record = Record.from_json(done.stdout)
    assert record.prompt_tokens == 276
    assert "internlm2, 2 layers, hidden 256" in record.contender["name"]
    assert record.contender["precision"] == "Q8_0"
    again = contender("make_gguf.py", file, "--size", "tiny")
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already" in again.stderr
    assert list(tmp_path.iterdir()) == [file]


@needs("gguf")
def test_an_interruption_leaves_nothing(tmp_path):
    make_gguf = importlib.import_module("make_gguf")

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_gguf.write(tmp_path / "tiny.gguf", make_gguf.SHAPES["tiny"], interrupt)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch):
    make_gguf = importlib.import_module("make_gguf")
    with pytest.raises(MonoedgeError, match=r"no_such_module is not installed; this adds it: pip install its-package"):
        make_gguf.need_pip(no_such_module="its-package")
