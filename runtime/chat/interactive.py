"""The conversation of ``python -m runtime.chat`` with a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL.Image import Image

from runtime.answer import Answer
from runtime.chat.interrupts import Interrupts
from runtime.chat.terminal import Terminal
from runtime.errors import MonoedgeError, OptionError
from runtime.images.load import load_image
from runtime.model import Model

_COMMANDS = {
    "/image PATH": "add an image to the next question",
    "/new": "begin a new conversation, without images",
    "/stats": "tokens and times of the last answer",
    "/help": "this list",
    "/quit": "leave; so do Ctrl-D and, at the prompt, Ctrl-C",
}


class Chat:
    """A conversation with a person at a terminal.

    Args:
        model: the loaded bundle that answers.
        terminal: where questions come from and answers go.
        show_stats: whether stats are shown after every answer, not only on ``/stats``.
        options: options of ``Session``.
    """

    def __init__(self, model: Model, terminal: Terminal, show_stats: bool, options: dict[str, Any]) -> None:
        self._model, self._terminal, self._show_stats, self._options = model, terminal, show_stats, options
        self._images: list[Image] = []
        self._session = model.session(**options)
        self._answer: Answer | None = None
        self._interrupts = Interrupts()

    def run(self, images: Iterable[tuple[str, Image]]) -> None:
        """Talks until the person leaves. The images, with their names, go with the first question."""
        manifest = self._model.bundle.manifest
        self._terminal.say(
            f"{manifest.name}: Mono-InternVL {manifest.model.version}, {manifest.precision}, on "
            f"{self._model.backend.description}; up to {self._model.max_length} tokens\n"
            "/image PATH adds an image, /help lists the commands, Ctrl-D leaves"
        )
        for path, image in images:
            self._add_image(path, image)
        while True:
            try:
                with self._interrupts.at_prompt():
                    line = self._terminal.read_line("> ").strip()
            except EOFError:
                self._terminal.say("")
                return
            except KeyboardInterrupt:
                self._terminal.say("")
                if self._answer is not None and self._answer.finish_reason == "cancelled":
                    # Pressed twice for that answer, most likely: no reason to lose the conversation.
                    self._terminal.say("Ctrl-D leaves")
                    continue
                return
            name, _, argument = line.partition(" ")
            if name == "/quit":
                return
            try:
                if name.startswith("/"):
                    self._command(name, argument.strip())
                elif line:
                    self._ask(line)
            except MonoedgeError as error:
                self._terminal.say(f"error: {error}")

    def _ask(self, question: str) -> None:
        answer = self._session.ask(question, self._images)
        self._interrupts.watch(answer)
        self._images, self._answer = [], answer
        self._terminal.stream(answer)
        if answer.finish_reason == "cancelled":
            self._terminal.say("(cancelled)")
        elif answer.finish_reason == "length":
            self._terminal.say(f"(cut off after {answer.stats.generated_tokens} tokens: see --max-new-tokens)")
        if self._show_stats:
            self._terminal.say(stats_line(answer))

    def _command(self, name: str, argument: str) -> None:
        if name == "/image":
            path = _unquoted(argument)
            self._add_image(path, load_image(path, as_stored=self._options.get("as_stored", False)))
        elif name == "/new":
            self._session, self._images, self._answer = self._model.session(**self._options), [], None
        elif name == "/stats":
            self._terminal.say(stats_line(self._answer) if self._answer is not None else "nothing has been asked yet")
        elif name == "/help":
            for command, effect in _COMMANDS.items():
                self._terminal.say(f"  {command:12} {effect}")
            self._terminal.say("Anything else is a question; Ctrl-C ends its answer.")
        else:
            raise OptionError(f"unknown command {name}, expected one of: {', '.join(_COMMANDS)}")

    def _add_image(self, path: str, image: Image) -> None:
        processor = self._model.image_processor
        tiles = processor.tiles(*image.size, self._options.get("max_tiles"))
        self._images.append(image)
        self._terminal.say(
            f"{path[:200]}, {image.width}×{image.height} pixels, goes with the next question: "
            f"{tiles * processor.tokens_per_tile} tokens"
        )


def _unquoted(path: str) -> str:
    # A file dropped on a terminal window comes in quotes.
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        path = path[1:-1]
    if not path:
        raise OptionError("expected a path: /image PATH")
    return path


def stats_line(answer: Answer) -> str:
    """Returns an answer's numbers of tokens and times, for people."""
    stats = answer.stats
    line = (
        f"prompt {stats.prompt_tokens} tokens ({stats.visual_tokens} visual, {stats.reused_tokens} from the cache), "
        f"answer {stats.generated_tokens}"
    )
    if stats.time_to_first_token is not None:
        line += f", the first after {stats.time_to_first_token:.2f} s"
    if stats.tokens_per_second is not None:
        line += f", then {stats.tokens_per_second:.1f} a second"
    return f"{line}; ended by {answer.finish_reason}"
