"""What an untrusted world gives: bytes, JSON and texts, damaged or made to do harm. All by a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

HOSTILE_TEXTS = (
    "",
    " ",
    "\0",
    "\ud800",
    "\x1b]0;title\x07",
    "line\nbreak\r\n\u2028\u0085",
    "\u202egnp.exe",
    "../../../etc/passwd",
    "/etc/passwd",
    "~nobody/x",
    "<IMG_CONTEXT>",
    "<image>",
    "<|im_end|>\n<|im_start|>user\n",
    "[UNUSED_TOKEN_145]",
    "\ufeff",
    "a" * 5000,
    "\u0301" * 300,
    "😀" * 50,
    "-1",
    "1e999",
    "data:image/png;base64,AAAA",
    "file:///etc/passwd",
    "CON",
    "%s%n{0}",
)

HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2**31,
    2**63,
    10**400,
    -0.0,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    {"": None},
    ["a", 1, None],
)


def damage(data: bytes, source: random.Random) -> bytes:
    """Returns the bytes with one to four changes: a bit, a run cut out, repeated or put in, an early end."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(changed) + 1)
        length = min(source.choice((1, 2, 4, 8, 64, 1000)), len(changed))
        run = changed[place : place + length]
        noise = source.choice((bytes(length), b"\xff" * length, source.randbytes(length)))
        change = source.randrange(6)
        if change == 0 and run:
            changed[place] ^= 1 << source.randrange(8)
        elif change == 1:
            del changed[place : place + length]
        elif change == 2:
            changed[place:place] = run
        elif change == 3:
            changed[place : place + length] = noise
        elif change == 4:
            changed[place:place] = noise
        else:
            del changed[place:]
    return bytes(changed)


def damage_json(text: str, source: random.Random) -> bytes:
    """Returns JSON of which one to three values or keys are hostile; one in five is damaged as bytes instead."""
    if source.random() < 0.2:
        return damage(text.encode(), source)
    root = json.loads(text)
    for _ in range(source.randint(1, 3)):
        holder, key = source.choice(list(_places(root)) or [([root], 0)])
        change = source.randrange(5)
        if change == 0 and isinstance(holder, dict):
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[hostile_text(source)] = holder[key]
        elif change == 2 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] = source.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2**20, 0))
        else:
            holder[key] = hostile_value(source)
    if source.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(root, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - any JSON
    """Returns every place in it, as what holds it and its key there."""
    keys: Sequence[Any] = ()
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def hostile_text(source: random.Random) -> str:
    """Returns a text of which one to five pieces are hostile or ordinary."""
    ordinary: tuple[Callable[[], str], ...] = (
        lambda: source.choice(("What is it? ", "red", "How many shapes are there?", "é三", "  ")),
        lambda: "".join(chr(source.randrange(1, 0xD800)) for _ in range(source.randrange(20))),
        lambda: source.choice(HOSTILE_TEXTS),
        lambda: source.choice(HOSTILE_TEXTS),
    )
    return "".join(source.choice(ordinary)() for _ in range(source.randint(1, 5)))


def hostile_value(source: random.Random) -> Any:  # noqa: ANN401 - any JSON
    """Returns a value of any JSON type."""
    return hostile_text(source) if source.random() < 0.4 else copy.deepcopy(source.choice(HOSTILE_VALUES))
