"""Read JSON that may be damaged or hostile: strict values, errors of one class, and short texts."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import isfinite
from sys import float_info
from typing import Any, NoReturn

LARGEST = 2**62
"""Largest integer that is read, so that sums and products of a few fit into 64 bits or are refused later."""

_MOST = float_info.max

SHORT = 200
"""Most characters of one value in an error message."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 100, 100, 40

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def shorten(value: object, *, quote: bool = True) -> str:
    """Return the value as text of at most :data:`SHORT` characters, so that no error message holds a whole file.

    With ``quote=False`` a string is shown as it is, else as ``repr`` shows it.
    """
    text = value if isinstance(value, str) and not quote else _REPR.repr(value)
    return text if len(text) <= SHORT else f"{text[: SHORT - 33]}...{text[-30:]}"


@dataclass(frozen=True, slots=True)
class JsonReader:
    """Checks of values that come from a file. Each raises ``error`` with the place, what was found, and ``remedy``.

    ``where`` is the place of a value in the error message, such as ``manifest.json: edits[3]``.
    """

    error: type[Exception]
    remedy: str = ""

    def refuse(self, where: str, what: str, cause: BaseException | None = None) -> NoReturn:
        """Raise the error."""
        raise self.error(f"{where}: {what}. {self.remedy}".rstrip()) from cause

    def parse(self, data: object, where: str, *, fractions: bool = True) -> Any:
        """Parse JSON text, or bytes in UTF-8.

        NaN, infinite numbers, repeated keys and characters that UTF-8 cannot store are refused, because later steps
        would raise or hide them. So is text that is nested more deeply than Python can read. With
        ``fractions=False`` all numbers have to be integers.
        """
        try:
            text = data.decode() if isinstance(data, bytes) else data
            if not isinstance(text, str):
                raise ValueError(f"expected text, got {shorten(data)}")
            found = json.loads(
                text,
                object_pairs_hook=_pairs,
                parse_float=_finite if fractions else _no_number,
                parse_constant=_no_number,
            )
            if _SURROGATE.search(text):
                text = json.dumps(found, ensure_ascii=False)
            if not text.isascii():
                text.encode()  # raises for a lone surrogate
        except (ValueError, RecursionError) as error:
            self.refuse(where, f"not valid JSON ({shorten(str(error), quote=False)})", error)
        return found

    def require_object(
        self, value: Any, where: str, keys: Collection[str] | None = None, *, optional: Collection[str] | None = ()
    ) -> dict[str, Any]:
        """Return the value if it is an object.

        Args:
            value: the value.
            where: its place.
            keys: the keys that it must have; ``None`` for any.
            optional: further keys that it may have; ``None`` for any.
        """
        if type(value) is not dict:
            self.refuse(where, f"expected an object, got {shorten(value)}")
        if keys is None:
            return value
        missing = [key for key in keys if key not in value]
        other = [] if optional is None else [key for key in value if key not in keys and key not in optional]
        if missing or other:
            self.refuse(where, f"expected the keys {', '.join(keys)}, got {shorten(sorted(value))}")
        return value

    def require_list(self, value: Any, where: str) -> list[Any]:
        """Return the value if it is a list."""
        if type(value) is not list:
            self.refuse(where, f"expected a list, got {shorten(value)}")
        return value

    def list_items(self, value: Any, where: str) -> list[tuple[str, Any]]:
        """Return the entries of a list, each with its place."""
        return [(f"{where}[{i}]", entry) for i, entry in enumerate(self.require_list(value, where))]

    def list_entries(self, value: Any, where: str) -> list[tuple[str, str, Any]]:
        """Return the entries of an object: place, key, value."""
        return [(f"{where}[{shorten(key)}]", key, entry) for key, entry in self.require_object(value, where).items()]

    def require_text(self, value: Any, where: str) -> str:
        """Return the value if it is a text."""
        if type(value) is not str:
            self.refuse(where, f"expected a text, got {shorten(value)}")
        return value

    def require_texts(self, value: Any, where: str) -> tuple[str, ...]:
        """Return the value, a list of different texts, as a tuple."""
        found = tuple(self.require_text(entry, place) for place, entry in self.list_items(value, where))
        self.require_unique(found, where)
        return found

    def require_integer(self, value: Any, where: str, *, low: int = 0, high: int = LARGEST) -> int:
        """Return the value if it is an integer from ``low`` to ``high``."""
        if type(value) is not int or not low <= value <= high:  # isinstance would accept a bool
            self.refuse(where, f"expected an integer from {low} to {high}, got {shorten(value)}")
        return value

    def require_number(self, value: Any, where: str, *, low: float = -_MOST) -> float:
        """Return the value as a float if it is a finite number of at least ``low``."""
        if type(value) not in (int, float) or not low <= value <= _MOST:
            least = "" if low == -_MOST else f" of at least {low:g}"
            self.refuse(where, f"expected a finite number{least}, got {shorten(value)}")
        return float(value)

    def require_boolean(self, value: Any, where: str) -> bool:
        """Return the value if it is true or false."""
        if type(value) is not bool:
            self.refuse(where, f"expected true or false, got {shorten(value)}")
        return value

    def require_unique(self, values: Iterable[Any], where: str) -> None:
        """Raise unless all values differ."""
        seen = set()
        for value in values:
            if value in seen:
                self.refuse(where, f"{shorten(value)} occurs twice")
            seen.add(value)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is no number that is allowed here")
