"""Configurations: frozen dataclasses that convert to JSON and back. A name in the JSON says which class it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self, TypeVar

from etp_graph.errors import EtpError, ForceError

C = TypeVar("C", bound="Configured")


class Configured:
    """Mixin for a frozen dataclass that JSON identifies by its ``name``."""

    __slots__ = ()
    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the name and every field as values that JSON can store."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]  # every subclass is a dataclass

    def to_json(self) -> str:
        """Return the name and every field as JSON text."""
        return json.dumps(self.to_dict())


class Composed:
    """Mixin for a frozen dataclass with fields that are named configurations or ``None``."""

    __slots__ = ()
    readers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """Name of such a field -> function that builds its configuration from what ``to_dict`` returned."""

    def to_dict(self) -> dict[str, Any]:
        """Return every field as a value that JSON can store."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass
        return {name: v.to_dict() if name in self.readers and v is not None else v for name, v in values.items()}

    def to_json(self) -> str:
        """Return every field as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Self:
        """Return the object from what ``to_json`` or ``to_dict`` returned.

        Raises:
            ForceError: ``source`` does not hold the fields of this class.
        """
        try:
            body = dict(json.loads(source) if isinstance(source, str) else source)
            for name, read in cls.readers.items():
                body[name] = None if body[name] is None else read(body[name])
            return cls(**body)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, EtpError):
                raise
            raise ForceError(f"these are not the fields of a {cls.__name__}: {error!r}.") from error


def build_named(known: Mapping[str, type[C]], source: str | Mapping[str, Any], *, what: str) -> C:
    """Return the configuration from what ``to_json`` or ``to_dict`` returned.

    Args:
        known: name -> class.
        source: JSON text, or the dictionary in it.
        what: word for the kind of configuration, used in error messages.

    Raises:
        ForceError: the text is not JSON, the name is unknown, or a field is unknown or out of range.
    """
    try:
        body = dict(json.loads(source) if isinstance(source, str) else source)
        name = body.pop("name")
    except (KeyError, TypeError, ValueError) as error:
        raise ForceError(f"this is not a {what}: {error!r}. Expected a JSON object with a 'name'.") from error
    if not isinstance(name, str) or name not in known:
        raise ForceError(f"there is no {what} named {name!r}; known are {', '.join(known)}.")
    try:
        return known[name](**body)
    except TypeError as error:
        raise ForceError(f"{what} {name!r}: {error}. Its fields are {_fields(known[name])}.") from error


def require(condition: bool, message: str) -> None:
    """Raise :class:`ForceError` with the message unless the condition holds."""
    if not condition:
        raise ForceError(message)


def is_number(value: object) -> bool:
    """True if the value is an int or a float, and not a ``bool``."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def quoted(names: Iterable[str], limit: int = 4) -> str:
    """Return the first ``limit`` names in quotes, and how many more there are."""
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _fields(cls: type[Any]) -> str:
    return ", ".join(field.name for field in fields(cls)) or "none"
