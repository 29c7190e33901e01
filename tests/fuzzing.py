"""Mutations of valid files, as a careless or hostile user would make them, from a seed."""

import json
import random
from collections.abc import Callable
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 7.5, 1e308, 2**31, 2**63, 10**400, float("nan"), float("inf"),
    "", "x", "no", "0", "../..", "/", "[/x]", "a\nb", "\x00", "é\ud800",
    [], {}, [[]], [None], [1, "a"], {"": None}, {"a": {"b": []}}, {"0": "x"}, ["x"] * 3,
]  # fmt: skip


def mutated_data(data: Any, draw: random.Random) -> Any:
    """Return data with one value of it replaced, removed, doubled or put under another key."""
    if not isinstance(data, dict | list) or not data or draw.random() < 0.1:
        return draw.choice(ODD)
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key = draw.choice(list(keys))
    changed = dict(data) if isinstance(data, dict) else list(data)
    action = draw.random()
    if action < 0.15:
        del changed[key]
    elif action < 0.25 and isinstance(changed, dict):
        changed[draw.choice(["x", "", key + "s", key.upper(), "0"])] = changed.pop(key)
    elif action < 0.3 and isinstance(changed, list):
        changed.append(changed[key])
    elif action < 0.5:
        changed[key] = draw.choice(ODD)
    else:
        changed[key] = mutated_data(changed[key], draw)
    return changed


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes cut off, overwritten, encoded otherwise, or with others among them."""
    place = draw.randrange(len(content) + 1)
    length = draw.choice([1, 1, 2, 8, 64])
    noise = draw.randbytes(length)
    marks = b"{}[]:,\"'&*!|>%@`-#\n\t \\<~=?0"
    changes: list[Callable[[], bytes]] = [
        lambda: content[:place],
        lambda: content[place:],
        lambda: content[:place] + noise + content[place + length :],
        lambda: content[:place] + content[place + length :],
        lambda: content[:place] + bytes([draw.choice(marks)]) + content[place:],
        lambda: content[:place] + content[place : place + length] * 3 + content[place:],
        lambda: content[:place] + b"\0" * length + content[place + length :],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: (content.decode(errors="replace") + "é").encode("latin-1", "replace"),
        lambda: b"",
        lambda: b"[" * 2_000,
    ]
    return draw.choice(changes)()


def mutations(content: bytes, data: Any, dump: Callable[[Any], str], seed: str, n: int):
    """Yield ``n`` mutations of a file, by what it holds and by its bytes in turn."""
    for i in range(n):
        draw = random.Random(f"{seed}/{i}")
        if i % 3:
            changed = data
            for _ in range(draw.choice([1, 1, 1, 2, 3])):
                changed = mutated_data(changed, draw)
            try:
                yield dump(changed).encode("utf-8", "surrogatepass")
            except (ValueError, OverflowError):
                yield b"9" * 5000
        else:
            yield mutated_bytes(content, draw)


def json_dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)
