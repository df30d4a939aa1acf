"""``python -m runtime.chat`` as a process of its own, in pipes and in a real pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import runtime

ROOT = Path(__file__).resolve().parents[3]
SHAPES = ROOT / "examples/shapes"
PICTURE = SHAPES / "pictures/p000.png"
ANSWERS = [json.loads(line) for line in (SHAPES / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
QUESTION = "How many shapes are there?"
PATIENCE = 120
"""Seconds after which a silent process counts as hanging."""


def environment() -> dict[str, str]:
    # A dumb terminal, so that readline echoes what is typed and nothing else.
    return {key: value for key, value in os.environ.items() if key != "MONOEDGE_BUNDLE"} | {"TERM": "dumb"}


def chat(*arguments: str | Path, stdin: str | bytes | None = None, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "runtime.chat", *map(str, arguments)],
        cwd=ROOT,
        env=environment() | variables,
        input=stdin.encode() if isinstance(stdin, str) else stdin or b"",
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def answered(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def refused(result: subprocess.CompletedProcess) -> str:
    """What stderr says of an error: one line, exit code 2 and nothing on stdout."""
    message = result.stderr.decode()
    assert result.returncode == 2, message
    assert result.stdout == b""
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """As a phone writes a portrait: pixels lie on their side, and EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((600, 300), 50).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


# With a question.


@pytest.mark.parametrize("row", ANSWERS[:: len(ANSWERS) // 4], ids=lambda row: row["prompt"])
def test_gives_the_recorded_answer_and_nothing_else(shapes_bundle, row):
    result = chat("--bundle", shapes_bundle, "--image", SHAPES / row["image"], row["prompt"])
    assert answered(result) == row["pytorch"] + "\n"
    assert result.stderr == b""


def test_reads_the_question_from_a_pipe_and_the_bundle_from_the_environment(shapes_bundle):
    result = chat("--image", PICTURE, stdin=f"\ufeff{QUESTION}\n", MONOEDGE_BUNDLE=str(shapes_bundle))
    assert answered(result) == ANSWERS[0]["pytorch"] + "\n"


def test_stats_go_to_stderr(shapes_bundle):
    result = chat("--bundle", shapes_bundle, "--image", PICTURE, "--stats", QUESTION)
    assert answered(result) == ANSWERS[0]["pytorch"] + "\n"
    line = result.stderr.decode()
    assert re.fullmatch(r"prompt \d+ tokens \(256 visual, 0 from the cache\), answer 6, .* a second; .*stop\n", line)


def test_images_stand_where_the_question_has_them(shapes_bundle):
    first, second = SHAPES / "pictures/p002.png", SHAPES / "pictures/p013.png"
    question = "What color is the circle in <image> or <image>?"
    result = chat("--bundle", shapes_bundle, "--image", first, "--image", second, question)
    model = runtime.load(shapes_bundle)
    assert answered(result) == model.session([first, second], question).text + "\n"
    assert model.session([second, first], question).text != model.session([first, second], question).text


def test_options_reach_the_session(tiny_v1_bundle):
    result = chat(
        *("--bundle", tiny_v1_bundle, "--image", PICTURE, "--max-tiles", "1", "--system", "Be brief."),
        *("--sample", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.95", "--seed", "7"),
        *("--repetition-penalty", "1.05", "--max-new-tokens", "60", "--threads", "1", "--backend", "onnxruntime"),
        *("--stop", "e", "--stop", "zz", "What is it?"),
    )
    expected = runtime.load(tiny_v1_bundle, threads=1).session(
        PICTURE,
        "What is it?",
        max_tiles=1,
        system="Be brief.",
        do_sample=True,
        temperature=0.9,
        top_k=20,
        top_p=0.95,
        seed=7,
        repetition_penalty=1.05,
        max_new_tokens=60,
        stop=["e", "zz"],
    )
    assert answered(result) == expected.text + "\n"


def test_photos_are_read_upright_or_as_stored(tiny_v1_bundle, photo):
    model, stored = runtime.load(tiny_v1_bundle), Image.open(photo)
    limits = {"max_new_tokens": 12, "max_tiles": 2}
    for options, image in (([], ImageOps.exif_transpose(stored)), (["--as-stored"], stored.convert("RGB"))):
        expected = model.session(np.asarray(image), QUESTION, **limits).text
        arguments = ("--image", photo, "--max-new-tokens", "12", "--max-tiles", "2", *options, QUESTION)
        assert answered(chat("--bundle", tiny_v1_bundle, *arguments)) == expected + "\n"


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "posix"],
)
def test_speaks_utf8_in_any_locale(tiny_v1_bundle, variables):
    result = chat("--bundle", tiny_v1_bundle, "--max-new-tokens", "60", stdin="你好？", **variables)
    text = runtime.Session(None, "你好？", bundle=tiny_v1_bundle, max_new_tokens=60).text
    assert not text.isascii()
    assert answered(result) == text + "\n"


# What is refused.


def test_missing_bundle(tmp_path):
    assert "no such bundle" in refused(chat("--bundle", tmp_path / "none", QUESTION))
    assert "MONOEDGE_BUNDLE" in refused(chat(QUESTION))
    assert "has no manifest.json" in refused(chat("--bundle", tmp_path, "--verify", QUESTION))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--image", "none.png", QUESTION], "'none.png' does not exist"),
        (["--image", "pyproject.toml", QUESTION], "not an image"),
        (["--max-new-tokens", "0", QUESTION], "max_new_tokens must be a whole number of at least 1"),
        (["--max-new-tokens", "1000000", QUESTION], "the bundle was exported with --max-length "),
        (["--max-tiles", "0", QUESTION], "max_tiles must be"),
        (["--temperature", "0.5", QUESTION], "--temperature does nothing without --sample"),
        (["--top-k", "5", QUESTION], "--top-k does nothing without --sample"),
        (["--sample", "--temperature", "nan", QUESTION], "temperature must be"),
        (["--repetition-penalty", "0", QUESTION], "repetition_penalty must be"),
        (["--stop", "", QUESTION], "stop must be"),
        (["--threads", "0", QUESTION], "threads must be"),
        (["--backend", "abacus", QUESTION], "backend 'abacus' is not known"),
        (["--image", PICTURE, "<image> or <image>?"], "2 in the prompt and 1 new images"),
        ([""], "expected a question, got none"),
        ([], "expected a question, got none"),
    ],
    ids=str,
)
def test_tells_an_error_in_one_line(shapes_bundle, options, expected):
    assert expected in refused(chat("--bundle", shapes_bundle, *options))


def test_an_image_on_stdin_is_no_question(shapes_bundle):
    assert "--image" in refused(chat("--bundle", shapes_bundle, stdin=PICTURE.read_bytes()))


@pytest.mark.parametrize("options", [["--max-new-tokens", "many"], ["--unknown"], ["one", "two"]], ids=str)
def test_usage_errors(options):
    result = chat(*options)
    assert result.returncode == 2
    usage, message = result.stderr.decode().splitlines()
    assert usage.startswith("usage: python -m runtime.chat")
    assert "error: " in message


def test_help_teaches():
    text = answered(chat("--help"))
    assert 'python -m runtime.chat --bundle bundle/ --image photo.jpg "What is on the table?"' in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_verify_finds_an_altered_file(shapes_bundle, tmp_path):
    shutil.copytree(shapes_bundle, tmp_path, dirs_exist_ok=True)
    assert answered(chat("--bundle", tmp_path, "--verify", QUESTION))
    weights = bytearray((tmp_path / "decoder.weights").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "decoder.weights").write_bytes(weights)
    assert "decoder.weights was altered" in refused(chat("--bundle", tmp_path, "--verify", QUESTION))


# What comes in between.


def long_answer(bundle: Path) -> list[str]:
    """Options with which a random model talks on and on: more than a pseudo-terminal's buffer holds unread."""
    facts = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["model"]
    return ["--bundle", str(bundle), "--max-new-tokens", str(facts["max_length"] * 3 // 4)]


def speaking(bundle: Path) -> subprocess.Popen:
    """A process in the midst of a long answer."""
    command = [sys.executable, "-m", "runtime.chat", *long_answer(bundle), "Hello"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout.read(5)
    return process


def test_a_closed_pipe_ends_quietly(tiny_v1_bundle):
    process = speaking(tiny_v1_bundle)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(PATIENCE) == 0


def test_ctrl_c_ends_an_answer_in_a_pipe(tiny_v1_bundle):
    process = speaking(tiny_v1_bundle)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=PATIENCE)
    assert said == b"interrupted\n"
    assert rest.endswith(b"\n")
    assert process.returncode == -signal.SIGINT  # which a shell tells as 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_told(shapes_bundle):
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "runtime.chat", "--bundle", str(shapes_bundle), QUESTION],
            cwd=ROOT,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr == b"error: stdout cannot be written to: No space left on device\n"


# In a terminal.

TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Makes stdin the controlling terminal, so that Ctrl-C typed there is a signal."""


class Person:
    """Somebody at a terminal in which the chat runs."""

    def __init__(self, *arguments: str | Path, stdout: int | None = None) -> None:
        fcntl = pytest.importorskip("fcntl", reason="the system has no pseudo-terminals")
        termios = pytest.importorskip("termios")
        self.screen, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, "-m", "runtime.chat", *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            stdin=terminal,
            stdout=terminal if stdout is None else stdout,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.seen = ""
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def read_until(self, expected: str) -> str:
        """What appears up to and with ``expected``."""
        while expected.encode() not in self._unread:
            assert self.more(), f"the process ended and this never came: {expected!r}; on the screen: {self.seen}"
        before, _, self._unread = self._unread.partition(expected.encode())
        return before.decode(errors="replace") + expected

    def ask(self, question: str, after: str = "\n> ") -> str:
        """Types a line at the prompt; what is answered, until ``after``."""
        self.type(question + "\n")
        return self.read_until(after).removeprefix(question + "\n").removesuffix(after)

    def interrupt_at_prompt(self) -> None:
        """Presses Ctrl-C until something comes of it.

        Python's readline notices a signal while it waits for a key. One that comes just before it waits is noticed
        with the next, and a prompt on the screen does not say which it is.
        """
        self.type("\x03")
        while not select.select([self.screen], [], [], 2)[0]:
            self.type("\x03")

    def read_to_end(self) -> str:
        """What appears until the process has ended well."""
        while self.more():
            pass
        assert self.process.wait(PATIENCE) == 0, self.seen
        return self._unread.decode(errors="replace")

    def more(self) -> bool:
        """Reads what has come; false when nothing more will."""
        ready, _, _ = select.select([self.screen], [], [], PATIENCE)
        assert ready, f"silence; on the screen: {self.seen}"
        try:
            data = os.read(self.screen, 1024)
        except OSError:  # how Linux tells that the other side is closed
            return False
        data = data.replace(b"\r", b"")
        self._unread += data
        self.seen += data.decode(errors="replace")
        return bool(data)

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture
def sit_down() -> Iterator[Callable[..., Person]]:
    people: list[Person] = []

    def start(*arguments: str | Path, stdout: int | None = None) -> Person:
        people.append(Person(*arguments, stdout=stdout))
        return people[-1]

    yield start
    for person in people:
        person.leave()


def test_a_conversation(sit_down, shapes_bundle):
    person = sit_down("--bundle", shapes_bundle, "--image", PICTURE)
    banner = person.read_until("\n> ")
    assert "Mono-InternVL 1.0" in banner
    assert "onnxruntime" in banner
    assert "up to 8192 tokens" in banner
    assert "Ctrl-D leaves" in banner
    assert f"{PICTURE}, 448×448 pixels, goes with the next question: 256 tokens" in banner
    session = runtime.Session(PICTURE, QUESTION, bundle=shapes_bundle)
    assert person.ask(QUESTION) == session.text == ANSWERS[0]["pytorch"]
    assert person.ask("What color is the triangle?") == session.ask("What color is the triangle?").text
    assert f"(256 visual, {session.stats.reused_tokens} from the cache)" in person.ask("/stats")
    person.type("\x04")
    assert person.read_to_end() == "\n"


def test_images_come_with_a_command(sit_down, shapes_bundle, tmp_path):
    picture = tmp_path / "my picture.png"
    picture.write_bytes(PICTURE.read_bytes())
    person = sit_down("--bundle", shapes_bundle)
    person.read_until("\n> ")
    assert "goes with the next question" in person.ask(f"/image {picture}")
    assert person.ask(QUESTION) == ANSWERS[0]["pytorch"]
    assert person.ask("/new\n/stats", "yet\n> ").endswith("nothing has been asked ")
    assert "goes with the next question" in person.ask(f"/image '{picture}'")
    assert person.ask(QUESTION) == ANSWERS[0]["pytorch"]
    person.type("/quit\n")
    assert person.read_to_end() == "/quit\n"


def test_the_command_reads_photos_as_the_options_say(sit_down, shapes_bundle, photo):
    for options, size in (([], "300×600"), (["--as-stored"], "600×300")):
        person = sit_down("--bundle", shapes_bundle, "--image", photo, *options)
        assert f"{photo}, {size} pixels" in person.read_until("\n> ")
        assert f"{photo}, {size} pixels" in person.ask(f"/image {photo}")
        assert "'~no-such-user/x.png' cannot be read" in person.ask("/image ~no-such-user/x.png")
        person.type("/quit\n")
        person.read_to_end()


def test_errors_do_not_end_a_conversation(sit_down, shapes_bundle):
    person = sit_down("--bundle", shapes_bundle, "--image", PICTURE, "--stats")
    person.read_until("\n> ")
    assert person.ask("/image none.png").startswith("error: expected the path of an image file")
    assert person.ask("/image").startswith("error: expected a path: /image PATH")
    assert person.ask("/dance now").startswith("error: unknown command /dance, expected one of: /image PATH, /new,")
    assert person.ask("<image><image>?").startswith("error: expected one <image> placeholder")
    assert "/quit" in person.ask("/help")
    person.type("\n")
    assert person.read_until("> ") == "\n> "
    # The image is still there for the first question that has an answer.
    answer, stats = person.ask(QUESTION).splitlines()
    assert answer == ANSWERS[0]["pytorch"]
    assert stats.startswith("prompt ")
    person.interrupt_at_prompt()
    assert person.read_to_end() == "\n"


def test_ctrl_c_ends_the_answer_and_not_the_conversation(sit_down, tiny_v1_bundle):
    person = sit_down(*long_answer(tiny_v1_bundle))
    person.read_until("\n> ")
    for question in ("Hello", "Go on"):
        person.type(question + "\n")
        person.read_until(question + "\n")
        person.more()  # the answer has begun, and cannot end while nobody reads it
        person.type("\x03")
        person.read_until("\n(cancelled)\n> ")
    stats = person.ask("/stats")
    assert stats.endswith("ended by cancelled")
    # The first answer, as far as it came, stayed in the cache.
    assert int(re.search(r"(\d+) from the cache", stats)[1]) > 0
    # Who presses it once too often does not lose the conversation.
    person.interrupt_at_prompt()
    person.read_until("\nCtrl-D leaves\n> ")
    person.type("\x04")
    # On a busy machine it was pressed again before the first was seen.
    assert re.fullmatch(r"(\^?C?\nCtrl-D leaves\n> )*\n", person.read_to_end())


def test_tells_an_answer_that_was_cut_off(sit_down, tiny_v1_bundle):
    person = sit_down("--bundle", tiny_v1_bundle, "--max-new-tokens", "3")
    person.read_until("\n> ")
    assert person.ask("Hello").endswith("\n(cut off after 3 tokens: see --max-new-tokens)")


def test_a_terminal_gets_no_control_characters_and_a_pipe_all(sit_down, tiny_v1_bundle):
    question = "Describe the image."
    text = runtime.Session(None, question, bundle=tiny_v1_bundle, max_new_tokens=300).text
    assert "\x1b" in text, "this test needs a model that says ESC"
    arguments = ("--bundle", tiny_v1_bundle, "--max-new-tokens", "300", question)
    assert answered(chat(*arguments)) == text + "\n"
    shown = sit_down(*arguments).read_to_end()
    assert "␛" in shown
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f]", shown)) <= {"\n", "\t"}
    assert [c for c in shown if c.isalnum()] == [c for c in text if c.isalnum()]


def test_prompts_do_not_get_into_a_piped_conversation(sit_down, shapes_bundle, tmp_path):
    with (tmp_path / "answers.txt").open("wb") as file:
        person = sit_down("--bundle", shapes_bundle, "--image", PICTURE, stdout=file.fileno())
        person.read_until("\n> ")
        person.ask(QUESTION, "> ")
        person.type("\x04")
        person.read_to_end()
    assert (tmp_path / "answers.txt").read_text(encoding="utf-8") == ANSWERS[0]["pytorch"] + "\n"


def test_checking_a_bundle_shows_how_far_it_is(sit_down, shapes_bundle):
    shown = sit_down("--bundle", shapes_bundle, "--verify", QUESTION).read_to_end()
    assert re.search(r"checking the bundle: 100%", shown)
