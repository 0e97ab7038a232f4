"""Damage files and JSON: flipped bits in every region of a file, and changes that keep the text readable."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

JUNK: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 7, 2**26 + 1, 2**31, 2**53, 2**63, 10**8, 10**30, 10**400, -(2**63), 0.5, 1e308,
    float("nan"), float("inf"), -0.0, "", "conv1", "conv1.weight", "training", "__class__", "forward", "_modules",
    "../../etc/passwd", "a\0b", "\ud800", "\u202e", "x" * 5000, "[" * 3000, "0" * 64, "float32", [], {}, [[]], [-1],
    [0, 2**62], {"": {}}, {"range": [0, 2**31]}, {"name": "x"}, [None] * 50, '{"conv1": [2147483648, []]}',
)  # fmt: skip
"""Values that a reader does not expect: of other types, huge, without a number, nested, or names of something else."""


def regions(size: int, count: int) -> list[int]:
    """Return ``count`` numbers of bits, evenly spaced over a file of ``size`` bytes; all bits if it has no more."""
    if count >= 8 * size:
        return list(range(8 * size))
    return [8 * (size * (2 * i + 1) // (2 * count)) + i % 8 for i in range(count)]


def flipped(content: bytes, bit: int) -> bytes:
    """Return the content with one other bit."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def each_flip(file: Path, count: int) -> Iterator[int]:
    """Flip one bit of a file after the other, ``count`` in all; the file is as before after each."""
    content = file.read_bytes()
    for bit in regions(len(content), count):
        file.write_bytes(flipped(content, bit))
        yield bit
        file.write_bytes(content)


def mutated(text: str, chance: random.Random) -> str:
    """Return JSON text with one to four changes: of values, keys and their order, or of a few characters."""
    if chance.random() < 0.2:
        return _mutated_text(text, chance)
    body = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        body = _mutate(body, chance)
    return json.dumps(body)


def _mutated_text(text: str, chance: random.Random) -> str:
    """Cut a text off, repeat, drop or exchange a part of it, or nest it deeply."""
    start, length = chance.randrange(len(text)), chance.randrange(1, 40)
    kind = chance.randrange(5)
    if kind == 0:
        return text[:start]
    if kind == 1:
        return text[:start] + text[start + length :]
    if kind == 2:
        return text[:start] + text[start : start + length] * 2 + text[start + length :]
    if kind == 3:
        return text[:start] + chr(chance.choice((0, 10, 34, 44, 57, 91, 123, 0xD800, 0x202E))) + text[start + 1 :]
    return "[" * 50_000 + text


def _mutate(body: Any, chance: random.Random) -> Any:
    places = [path for path in _paths(body) if path]
    if not places:
        return _junk(chance)
    *path, key = chance.choice(places)
    place = body
    for step in path:
        place = place[step]
    kind = chance.randrange(6)
    if kind <= 1:
        place[key] = _junk(chance)
    elif kind == 2:
        del place[key]
    elif kind == 3:
        if isinstance(place, dict):
            place[str(chance.choice(("x" * 3000, "\ud800", "format", "macs", key)))] = place[key]
        else:
            place.insert(key, place[key])
    elif kind == 4 and isinstance(place[key], int | float) and not isinstance(place[key], bool):
        place[key] += chance.choice((-1, 1, -2, 10**8, -(10**8), 2**40))
    else:
        other = body
        for step in chance.choice(places):
            other = other[step]
        place[key] = json.loads(json.dumps(other))
    return body


def _junk(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(JUNK))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _paths(value[key], (*path, key))
