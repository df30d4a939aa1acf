"""``python -m calibration``: quantizes the experts of a bundle to INT8, and reports how far its answers moved."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime.console.run import MOST, make_parser, need, run
from runtime.options import require_whole

_DESCRIPTION = """\
Makes a bundle whose text experts are INT8. Decoding then is faster, since it reads all their weights for each token.
The bundle answers your questions while the inputs of its matrices are observed, and scales are chosen from these.
Other questions then measure how far the answers moved. The report is in the new bundle: calibration.json and
calibration.html.

examples:
  python -m calibration --bundle bundle/ --data pairs.jsonl -o bundle-int8/
  python -m calibration --bundle bundle/ --data photos/ --prompt "What is this?" -o bundle-int8/ --mode w8a8
  python -m calibration --bundle bundle/ --data pairs.jsonl -o bundle-int8/ --max-kl 1e-3
  python -m calibration --bundle fp32/ --apply-to bf16/ --data pairs.jsonl -o bf16-int8/     # for TensorRT
  python -m calibration --compare bundle/ bundle-int8/ --data pairs.jsonl
  python -m calibration --inspect bundle-int8.observed.npz

--data is a JSONL file with lines like
  {"image": "photos/1.jpg", "prompt": "What is on the table?", "answer": "Two cups."}
image may be a list of paths, or null. Without an answer, the bundle answers itself. --data may also be a folder of
pictures: then --prompt is the question about each.

The observations are kept in a file beside the new bundle. After an interruption the same command goes on from it, and
other scales can be chosen without observing again."""


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrates, compares or inspects, as the command line says; by default that of this process."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if sum(value is not None for value in (arguments.bundle, arguments.compare, arguments.inspect)) != 1:
        parser.error("expected one of --bundle, --compare and --inspect")
    for option in ("samples", "test_samples", "max_tiles", "max_new_tokens", "threads"):
        require_whole(f"--{option.replace('_', '-')}", getattr(arguments, option), 1, MOST)
    require_whole("--seed", arguments.seed, 0)
    if arguments.max_kl is not None and not arguments.max_kl > 0:
        parser.error("argument --max-kl: expected a number above 0")
    if arguments.inspect is None and arguments.data is None:
        parser.error("--data is needed: a JSONL file of questions, or a folder of pictures")
    if arguments.bundle is not None and arguments.output is None:
        parser.error("-o is needed: the bundle to write")
    arguments.experts = tuple(arguments.experts.split(","))
    need("onnx", "onnx_ir", "ml_dtypes", "matplotlib", "threadpoolctl")
    from calibration.command import calibrate_bundle, compare_bundles, inspect_record

    if arguments.inspect is not None:
        inspect_record(arguments)
    elif arguments.compare is not None:
        compare_bundles(arguments)
    else:
        calibrate_bundle(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("calibration", _DESCRIPTION)
    add = parser.add_argument_group("what to do").add_argument
    add("--bundle", type=Path, metavar="BUNDLE", help="the bundle to observe, fp32 or fp16, not quantized")
    add("-o", "--output", type=Path, metavar="OUT", help="the bundle to write")
    other = "the same model in another number format, as bf16 for TensorRT"
    add("--apply-to", type=Path, metavar="BUNDLE", help=f"quantize this bundle instead: {other}")
    far = "measure how far the answers of B are from those of A"
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help=far)
    add("--inspect", type=Path, metavar="FILE", help="show what a file of observations holds")
    add("--overwrite", action="store_true", help="replace a bundle that exists")

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, metavar="DATA", help="a JSONL file, or a folder of pictures with --prompt")
    add("--prompt", metavar="TEXT", help="the question about each picture of a folder")
    add("--samples", type=int, default=128, metavar="N", help="the most questions to observe (default 128)")
    add("--test-data", type=Path, metavar="DATA", help="other data to measure with")
    most = "the most questions to measure with (default 32); taken from --data unless --test-data is given"
    add("--test-samples", type=int, default=32, metavar="N", help=most)
    add("--seed", type=int, default=0, metavar="N", help="the seed of all random choices (default 0)")
    add("--as-stored", action="store_true", help="read pictures as the official code does, not as viewers show them")
    add("--max-tiles", type=int, metavar="N", help="the most tiles of a picture (default: the checkpoint's limit)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="the most tokens of an answer (default 64)")
    add("--record", type=Path, metavar="FILE", help="the file of observations (default OUT.observed.npz)")

    add = parser.add_argument_group("what is quantized, and how").add_argument
    modes = "INT8 weights (default), or INT8 activations too"
    add("--mode", choices=("w8a16", "w8a8"), default="w8a16", help=modes)
    forms = "cpu: for ONNX Runtime on a CPU, the default for w8a16 of an fp32 bundle; qdq: for TensorRT"
    add("--form", choices=("qdq", "cpu"), help=forms)
    add("--experts", choices=("text", "text,visual"), default="text", help="experts to quantize (default text)")
    add("--attention", action="store_true", help="quantize the attention of these experts too")
    add("--lm-head", action="store_true", help="quantize the head too")
    caches = "a quarter of the memory, and long conversations are faster"
    add("--kv-cache", action="store_true", help=f"store the caches in INT8 too (form cpu): {caches}")
    clipped = "clip each row where the error on observed activations is least (default); absmax: clip nothing"
    add("--weights", choices=("mse", "absmax"), default="mse", help=f"mse: {clipped}")
    methods = ("mse", "absmax", "percentile", "entropy")
    how = "least error of the output (default), not at all, at their 99.99th percentile, or by least KL divergence"
    add("--activations", choices=methods, default="mse", help=f"how activations are clipped with w8a8: {how}")
    moved = "move outliers of activations into weights"
    exponent = "auto chooses an exponent for each layer (default), X is the exponent of all layers"
    add("--smoothing", type=_smoothing, default="auto", metavar="auto|off|X", help=f"{moved}: {exponent}")
    budget = "budget for the mean KL divergence, in nats: the worst layers are left unquantized until it is kept"
    add("--max-kl", type=float, metavar="X", help=budget)
    add("--threads", type=int, metavar="N", help="CPU threads to use")
    add("--report", type=Path, metavar="PATH", help="also write the report to PATH.json and PATH.html")
    return parser


def _smoothing(text: str) -> str | float:
    if text in ("auto", "off"):
        return text
    try:
        exponent = float(text)
    except ValueError:
        exponent = -1.0
    if not 0 <= exponent <= 1:
        raise argparse.ArgumentTypeError(f"expected auto, off or an exponent from 0 to 1, got {text!r}")
    return exponent


if __name__ == "__main__":
    run(main)
