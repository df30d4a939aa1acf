"""``python -m runtime.bench.bundle``: measures one bundle in this process, and prints the record."""

from __future__ import annotations

from runtime.backends import DEFAULT
from runtime.bench.measure import Loaded, measure
from runtime.bench.record import workload, workload_parser
from runtime.bundle.manifest import MODES, PRECISIONS, QDQ, W4A16, Manifest, Quantization
from runtime.console.console import Console
from runtime.console.run import run
from runtime.model import load

_DESCRIPTION = """\
Measures one bundle in this process and prints one record, a line of JSON. It is the contender behind a bundle's
folder in python -m runtime.bench --compare, which prints tables; name it there to choose another backend:

  python -m runtime.bench --bundle bundle/ --compare \\
      "python -m runtime.bench.bundle --bundle bundle/ --backend NAME" """


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = workload_parser("python -m runtime.bench.bundle", _DESCRIPTION)
    parser.add_argument("--bundle", metavar="DIR", required=True, help="what to measure")
    parser.add_argument("--backend", metavar="NAME", help=f"what computes (default {DEFAULT})")
    arguments = parser.parse_args()
    what = workload(arguments)
    record = measure(what, lambda: _loaded(arguments.bundle, arguments.backend, what.threads))
    Console().write(record.to_json() + "\n")


def _loaded(bundle: str, backend: str | None, threads: int | None) -> Loaded:
    model = load(bundle, backend=backend, threads=threads)
    manifest = model.bundle.manifest
    sizes, quantization = manifest.model, manifest.quantization
    return Loaded(
        backend=model.backend,
        embed=model.embed,
        vocab_size=sizes.vocab_size,
        image_id=model.tokenizer.id_of(model.template.image_context),
        image_processor=model.image_processor,
        facts={
            "name": f"{bundle}: {manifest.name}, Mono-InternVL {sizes.version}, {sizes.num_hidden_layers} layers, "
            f"hidden {sizes.hidden_size}",
            "precision": manifest.precision
            + (f", {quantization.mode} in form {quantization.form}" if quantization else "")
            + (", INT8 caches" if quantization and quantization.kv_cache else ""),
            "computes": model.backend.description,
        },
        weight_bytes=lambda: weight_bytes(manifest),
    )


def weight_bytes(manifest: Manifest) -> int:
    """Returns the bytes of the matrices that one decoded text token reads: attention, text experts and head.

    INT8 counts as one byte a weight. Norms, a thousandth of that, and scales are left out: scales are less than a
    twentieth, with experts in 4 bits a fifth.
    """
    sizes = manifest.model
    quantization = manifest.quantization or Quantization(MODES[0], QDQ, (), attention=False, lm_head=False)
    heads = sizes.num_attention_heads + sizes.num_key_value_heads
    attention = 2 * heads * sizes.head_dim * sizes.hidden_size
    experts = 3 * sizes.hidden_size * sizes.intermediate_size
    head = sizes.vocab_size * sizes.hidden_size
    full = PRECISIONS[manifest.precision].itemsize
    expert_bytes = experts * (1 if "text" in quantization.experts else full)
    if quantization.mode == W4A16:
        expert_bytes //= 2
    layer = expert_bytes + attention * (1 if quantization.attention else full)
    return sizes.num_hidden_layers * layer + head * (1 if quantization.lm_head else full)


if __name__ == "__main__":
    run(main)
