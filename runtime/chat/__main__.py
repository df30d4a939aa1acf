"""``python -m runtime.chat``: questions about images, answered in a terminal or a pipe."""

from __future__ import annotations

import argparse
import os
from typing import Any

from runtime.backends import DEFAULT, NAMES
from runtime.bundle.reader import Bundle
from runtime.chat.interactive import Chat, stats_line
from runtime.chat.terminal import Terminal
from runtime.console.run import make_parser, run
from runtime.errors import OptionError
from runtime.images.load import load_image
from runtime.loaded import BUNDLE_VARIABLE
from runtime.model import Model, load
from runtime.options import DEFAULT_MAX_NEW_TOKENS, AnswerOptions

_DESCRIPTION = """\
Answers a question about images, or holds a conversation about them.

With a question, on the command line or piped to stdin, the answer is written to stdout as it is generated,
and nothing else is. Without one, in a terminal, a conversation begins; /help in it lists its commands.

examples:
  python -m runtime.chat --bundle bundle/ --image photo.jpg "What is on the table?"
  python -m runtime.chat --bundle bundle/ --image a.jpg --image b.jpg "What differs?"
  python -m runtime.chat --bundle bundle/ --image a.jpg --image b.jpg "Is <image> older than <image>?"
  echo "What is it?" | python -m runtime.chat --bundle bundle/ --image photo.jpg > answer.txt
  python -m runtime.chat --bundle bundle/ --image photo.jpg       # a conversation

exit codes: 0; 2 for an error, which is one line on stderr; 130 when interrupted with Ctrl-C."""

_SAMPLING = ("temperature", "top_k", "top_p", "seed")


def main() -> None:
    """Reads the command line and answers."""
    terminal = Terminal()
    parser = _parser()
    arguments = parser.parse_args()
    options = _options(arguments)

    # What can be wrong is checked before the model is loaded, which may take a while.
    AnswerOptions().changed(options)
    question: str | None = arguments.question
    if question is None and not terminal.interactive:
        question = terminal.read_all().strip()
    if question is not None and not question.strip():
        raise OptionError('expected a question, got none: give one in quotes, "What is it?", or on stdin')
    images = [load_image(path, as_stored=arguments.as_stored) for path in arguments.image]

    model = _load(arguments, terminal)
    if arguments.max_tiles is not None:
        model.image_processor.tiles(1, 1, arguments.max_tiles)  # refuses what no image could be cut into
    if arguments.system is not None:
        options["system"] = arguments.system
    if question is None:
        Chat(model, terminal, arguments.stats, options).run(zip(arguments.image, images, strict=True))
        return
    answer = model.session(images, question, **options).answer
    terminal.stream(answer)
    if arguments.stats:
        terminal.say(stats_line(answer))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("runtime.chat", _DESCRIPTION, '%(prog)s --bundle DIR [--image PATH]... [options] ["question"]')
    add = parser.add_argument
    variable = f"(default: the environment variable {BUNDLE_VARIABLE})"
    add("question", nargs="?", help="<image> in it stands for an image; otherwise they come first")
    add("--bundle", default=os.environ.get(BUNDLE_VARIABLE), metavar="DIR", help=f"the bundle's folder {variable}")
    add("--image", action="append", default=[], metavar="PATH", help="for the first question; may be repeated")
    add("--as-stored", action="store_true", help="read images as the official code does, not as viewers show them")
    add("--system", metavar="TEXT", help="a system message instead of the model's own")
    add("--stats", action="store_true", help="after an answer, write its tokens and times to stderr")

    add = parser.add_argument_group("the answer").add_argument
    most = f"(default {DEFAULT_MAX_NEW_TOKENS}, or as many as there is room for)"
    add("--max-new-tokens", type=int, metavar="N", help=f"tokens that it may have {most}")
    few = "fewer are faster and show less detail (default: the model's own)"
    add("--max-tiles", type=int, metavar="N", help=f"most tiles that an image is cut into: {few}")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT; may be repeated")
    add("--repetition-penalty", type=float, metavar="X", help="above 1, repeat less; 1.1 is strong already (default 1)")
    add("--sample", action="store_true", help="draw tokens at random instead of taking the most probable")
    add("--temperature", type=float, metavar="X", help="with --sample: more varied above 1, less below (default 1)")
    add("--top-k", type=int, metavar="N", help="with --sample: among the N most probable (default 50; 0 for all)")
    add("--top-p", type=float, metavar="X", help="with --sample: among the most probable X, 0 … 1 (default 1)")
    add("--seed", type=int, metavar="N", help="with --sample: the same draws each time")

    add = parser.add_argument_group("the machine").add_argument
    add("--backend", metavar="NAME", help=f"what computes: {', '.join(NAMES)} (default {DEFAULT}, on the CPU)")
    add("--threads", type=int, metavar="N", help="CPU threads to compute with (default: the backend's choice)")
    add("--verify", action="store_true", help="check the SHA-256 of every file of the bundle first")
    return parser


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of ``Session`` that were given."""
    names = (*_SAMPLING, "max_new_tokens", "max_tiles", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if not arguments.sample and (idle := [name for name in _SAMPLING if name in given]):
        raise OptionError(f"--{idle[0].replace('_', '-')} does nothing without --sample: add it")
    return {"do_sample": arguments.sample, "stop": arguments.stop, "as_stored": arguments.as_stored, **given}


def _load(arguments: argparse.Namespace, terminal: Terminal) -> Model:
    choices = {"backend": arguments.backend, "threads": arguments.threads}
    if not (arguments.verify and arguments.bundle):
        return load(arguments.bundle, **choices)
    manifest = Bundle(arguments.bundle).manifest
    total = sum(record.size for record in (*manifest.files.values(), *manifest.engines.values()))
    with terminal.bar("checking the bundle", total, "B") as progress:
        return load(arguments.bundle, verify=True, progress=progress, **choices)


if __name__ == "__main__":
    run(main)
