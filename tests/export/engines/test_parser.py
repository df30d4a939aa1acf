"""What the parser of TensorRT 10.3 knows, and plans for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.engine import main
from export.engines.options import Options, check_bundle
from export.engines.parser import check_graph, load_parser
from export.engines.plan import PORTABLE_CHUNK, PREFILL_CHUNK, graph_for, plans
from export.passes.nodes import load_graph
from export.passes.portable import portable
from plugins_trt.function import opset_of
from plugins_trt.schema import DOMAIN
from runtime.backends.graph import UPDATE
from runtime.bundle.engines import plan_name
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import PORTABLE_TARGET, TARGETS
from runtime.errors import BundleError

TARGET = TARGETS[PORTABLE_TARGET]
PARSER = load_parser("trt10.3.json")


def test_the_list_says_where_it_is_from() -> None:
    path = Path(load_parser.__code__.co_filename).parent / "parsers/trt10.3.json"
    values = json.loads(path.read_text())
    assert "onnx-tensorrt" in values["source"][0]
    assert (PARSER.tensorrt, PARSER.opset) == ("10.3", 20)
    # Spot checks of a list of 150; what it is there for comes first.
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"} & set(PARSER.operators)
    assert len(PARSER.operators) == 150
    assert PARSER.operators["Softmax"] == {"FP32", "FP16", "BF16"}
    assert PARSER.operators["And"] == {"BOOL"}
    # Every name is an operator of opset 20 or before, but two of TensorRT's own.
    unknown = [name for name in PARSER.operators if not onnx.defs.has(name)]
    assert sorted(unknown) == ["ImageScaler", "ParametricSoftplus", "ScaledTanh"]


@pytest.mark.parametrize("graph", [DECODER_GRAPH, VISION_GRAPH])
def test_portable_graphs_keep_to_it(bf16_bundle: Path, tiny_bundle: Path, graph: str) -> None:
    for folder in (bf16_bundle, tiny_bundle):
        check_graph(portable(load_graph(Bundle(folder), graph)), PARSER)


def small_model(op_type: str, element: int = TensorProto.FLOAT, domain: str = "", opset: int = 20) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x"], ["y"], "layers.0/it", domain=domain)
    values = [helper.make_tensor_value_info(name, element, [2, 3]) for name in "xy"]
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(helper.make_graph([node], "decoder", values[:1], values[1:]), opset_imports=imports)


def test_refused(tiny_v1_bundle: Path) -> None:
    says = "^decoder, layers.0/it: the ONNX parser of TensorRT 10.3 "
    with pytest.raises(BundleError, match=says + "does not have BitwiseNot: export the bundle again$"):
        check_graph(small_model("BitwiseNot", TensorProto.INT32), PARSER)
    with pytest.raises(BundleError, match=says + "does not have Softmax for DOUBLE: export the bundle again$"):
        check_graph(small_model("Softmax", TensorProto.DOUBLE), PARSER)
    with pytest.raises(BundleError, match=says + "does not have Relu of domain other: export the bundle again$"):
        check_graph(small_model("Relu", domain="other"), PARSER)
    with pytest.raises(BundleError, match=r"^decoder: the ONNX parser of TensorRT 10\.3 reads opset 20, .* of 24$"):
        check_graph(load_graph(Bundle(tiny_v1_bundle), DECODER_GRAPH), PARSER)

    model = small_model("Relu")
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], "layers.0/it")
    model.graph.input.append(helper.make_tensor_value_info("axes", TensorProto.INT64, [1]))
    model.graph.node[0].CopyFrom(node)
    with pytest.raises(BundleError, match=says + "takes ReduceMean with constant axes only: export the bundle again$"):
        check_graph(model, PARSER)


def test_plans(bf16_bundle: Path) -> None:
    bundle = Bundle(bf16_bundle)
    decoder, vision = plans(bundle, Options(TARGET, 87, 2048, 1))
    for plan in (decoder, vision):
        assert plan.name == plan_name(plan.graph, "trt10.3", 87, "bf16")
        assert opset_of(plan.model) == 20
        assert set(plan.standard_operators) <= set(PARSER.operators)
    prefill, decode = decoder.profiles
    assert prefill["inputs_embeds"].maximum[1] == PORTABLE_CHUNK < PREFILL_CHUNK
    assert decode["inputs_embeds"].maximum[1] == 1
    sizes = {value.name: value.type.tensor_type.shape.dim for value in decoder.model.graph.output}
    assert sizes[f"{UPDATE}0.key"][2].dim_param == "sequence"
    assert set(decoder.plugins) <= {"FusedMoE", "ExpertLinear"}


@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_plans_of_int8(bf16_bundle: Path, quantize: Callable[..., Path], mode: str) -> None:
    """Attention of 1.0 and the head are dequantized in the graph, the rest by plugins."""
    decoder, _ = plans(Bundle(quantize(bf16_bundle, mode, everything=True)), Options(TARGET, 87, 2048, 1))
    assert "DequantizeLinear" in decoder.standard_operators
    assert set(decoder.standard_operators) <= set(PARSER.operators)
    assert f"FusedMoE{mode.upper()}" in decoder.plugins


def test_a_decoder_for_a_cpu_is_no_plan(tiny_v1_bundle: Path, quantize: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"made for ONNX Runtime on a CPU: for TensorRT export"):
        check_bundle(Bundle(quantize(tiny_v1_bundle, form="cpu")).manifest)


@pytest.mark.parametrize("name", TARGETS)
def test_no_target_is_given_a_body_in_place_of_a_plugin(bf16_bundle: Path, name: str) -> None:
    model = graph_for(TARGETS[name], Bundle(bf16_bundle), DECODER_GRAPH)
    assert any(node.domain == DOMAIN for node in model.graph.node)
    assert not model.functions


def test_a_portable_bundle_is_taken_as_it_is(tiny_v1_portable_bundle: Path) -> None:
    bundle = Bundle(tiny_v1_portable_bundle)
    for name in ("trt10.3", "trt"):
        model = graph_for(TARGETS[name], bundle, DECODER_GRAPH)
        assert list(model.graph.node) == list(load_graph(bundle, DECODER_GRAPH).graph.node)


def test_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "graphs"
    arguments = ["--bundle", str(bundle), "--target", "trt10.3", "--sm", "87", "--max-length", "256"]
    main([*arguments, "--write-onnx", str(folder), "--print-trtexec"])
    printed = capsys.readouterr().out
    assert f"--saveEngine={bundle}/engines/trt10.3-sm87-bf16.decoder.plan" in printed
    assert "--target trt10.3 --sm 87 --max-length 256" in printed
    assert opset_of(onnx.load(folder / DECODER_GRAPH, load_external_data=False)) == 20
    plan = tmp_path / "trt10.3-sm87-bf16.decoder.plan"
    plan.write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 30]) + bytes(64))
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"plugin")
    main([*arguments, "--register", str(plan), "--plugin", str(plugin)])
    ((name, record),) = Bundle(bundle).manifest.engines.items()
    assert (name, record.target, record.tensorrt) == (
        "engines/trt10.3-sm87-bf16.decoder.plan",
        "trt10.3",
        "10.3.0.30",
    )
