"""What ``python -m calibration`` takes on its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime.console.run import make_parser

_DESCRIPTION = """\
Makes a bundle whose text experts are INT8, which is what makes decoding faster: it is text only, and bound by
memory. The bundle answers questions of yours while what reaches its matrices is observed; scales are chosen from
that; then other questions tell how far the answers moved. The report lies in the new bundle, as calibration.json
and calibration.html.

examples:
  python -m calibration --bundle bundle/ --data pairs.jsonl -o bundle-int8/
  python -m calibration --bundle bundle/ --data photos/ --prompt "What is this?" -o bundle-int8/ --mode w8a8
  python -m calibration --bundle bundle/ --data pairs.jsonl -o bundle-int8/ --max-kl 1e-3
  python -m calibration --bundle fp32/ --apply-to bf16/ --data pairs.jsonl -o bf16-int8/     # for TensorRT
  python -m calibration --compare bundle/ bundle-int8/ --data pairs.jsonl
  python -m calibration --inspect bundle-int8.observed.npz

--data is a JSONL file with lines like
  {"image": "photos/1.jpg", "prompt": "What is on the table?", "answer": "Two cups."}
where image may be a list of paths or null, and answer may be missing: the bundle then answers itself. Or it is a
folder of pictures, all asked the --prompt.

What was observed is kept in a file beside the new bundle; the same command goes on where it was interrupted, and
other scales can be chosen without observing again."""

_BUNDLE_HELP = "the bundle to observe, fp32 or fp16, not quantized"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, by default this process's; what does not fit together ends the process with code 2."""
    parser = make_parser("calibration", _DESCRIPTION)
    _add_options(parser)
    arguments = parser.parse_args(argv)
    if sum(value is not None for value in (arguments.bundle, arguments.compare, arguments.inspect)) != 1:
        parser.error("expected one of --bundle, --compare and --inspect")
    for option, least in (("samples", 1), ("test_samples", 1), ("seed", 0), ("max_new_tokens", 1)):
        if getattr(arguments, option) < least:
            parser.error(f"argument --{option.replace('_', '-')}: expected {least} or more")
    if arguments.max_kl is not None and not arguments.max_kl > 0:
        parser.error("argument --max-kl: expected a number above 0")
    if arguments.inspect is None and arguments.data is None:
        parser.error("--data is needed: a JSONL file of questions, or a folder of pictures")
    if arguments.bundle is not None and arguments.output is None:
        parser.error("-o is needed: the bundle to make")
    return arguments


def _add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to do")
    what.add_argument("--bundle", type=Path, metavar="BUNDLE", help=_BUNDLE_HELP)
    what.add_argument("-o", "--output", type=Path, metavar="OUT", help="the bundle to make")
    what.add_argument(
        "--apply-to",
        type=Path,
        metavar="BUNDLE",
        help="the same model in another number format (bf16 for TensorRT), to be quantized instead",
    )
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="how far the answers of B are from those of A"
    )
    what.add_argument("--inspect", type=Path, metavar="FILE", help="say what a file of observations holds")
    what.add_argument("--overwrite", action="store_true", help="replace a bundle that is there already")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DATA", help="a JSONL file, or a folder of pictures with --prompt")
    data.add_argument("--prompt", metavar="TEXT", help="what is asked about each picture of a folder")
    data.add_argument("--samples", type=int, default=128, metavar="N", help="questions to observe, at most (128)")
    data.add_argument("--test-data", type=Path, metavar="DATA", help="other data to measure with")
    data.add_argument(
        "--test-samples",
        type=int,
        default=32,
        metavar="N",
        help="questions to measure with, at most; without --test-data they are set aside from --data (32)",
    )
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice among the data (0)")
    data.add_argument("--max-tiles", type=int, metavar="N", help="most tiles of a picture (the checkpoint's limit)")
    data.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens of an answer (64)")
    data.add_argument("--record", type=Path, metavar="FILE", help="file of the observations (OUT.observed.npz)")
    scales = parser.add_argument_group("what is quantized, and how")
    scales.add_argument(
        "--mode", choices=("w8a16", "w8a8"), default="w8a16", help="INT8 weights (default), or activations too"
    )
    scales.add_argument(
        "--form",
        choices=("qdq", "cpu"),
        help="qdq: for TensorRT; cpu: for ONNX Runtime on a CPU (default: cpu for w8a16 of an fp32 bundle, else qdq)",
    )
    scales.add_argument(
        "--experts", choices=("text", "text,visual"), default="text", help="experts to quantize (default text)"
    )
    scales.add_argument("--attention", action="store_true", help="the attention of these experts too")
    scales.add_argument("--lm-head", action="store_true", help="the head too")
    scales.add_argument(
        "--kv-cache",
        action="store_true",
        help="keys and values that are kept too, with form cpu: a quarter of the memory, and faster far into a "
        "conversation",
    )
    scales.add_argument(
        "--weights",
        choices=("mse", "absmax"),
        default="mse",
        help="clip rows where observed activations make the error least (default), or nowhere",
    )
    scales.add_argument(
        "--activations",
        choices=("mse", "absmax", "percentile", "entropy"),
        default="mse",
        help="with w8a8, where activations are clipped: least error of the output (default), nowhere, 99.99 %%, or KL",
    )
    scales.add_argument(
        "--smoothing",
        type=_smoothing,
        default="auto",
        metavar="auto|off|X",
        help="move outliers of activations into weights: exponent chosen for each layer (default), not at all, or X",
    )
    scales.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="budget of the mean KL divergence, in nats: the worst layers stay as they are until it holds",
    )
    scales.add_argument("--threads", type=int, metavar="N", help="threads to compute with")
    scales.add_argument("--report", type=Path, metavar="PATH", help="write the report to PATH.json and PATH.html too")


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
