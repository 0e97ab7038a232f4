"""Named configurations: frozen dataclasses that go to JSON and back by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self, TypeVar

from .errors import EtpError, ForceError

C = TypeVar("C", bound="Configured")


class Configured:
    """Mixin of a frozen dataclass that is known by ``name``."""

    __slots__ = ()
    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The name and every field, ready for JSON."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]  # every subclass is a dataclass

    def to_json(self) -> str:
        """The name and every field as JSON text."""
        return json.dumps(self.to_dict())


class Composed:
    """Mixin of a frozen dataclass some of whose fields are configurations with a name, or ``None``."""

    __slots__ = ()
    readers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """Field -> the function that reads its configuration, which has a ``to_dict``."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass
        return {name: v.to_dict() if name in self.readers and v is not None else v for name, v in values.items()}

    def to_json(self) -> str:
        """Every field as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Self:
        """What ``to_json`` or ``to_dict`` wrote. Raises :class:`ForceError` if it is something else."""
        try:
            body = dict(json.loads(source) if isinstance(source, str) else source)
            for name, read in cls.readers.items():
                body[name] = None if body[name] is None else read(body[name])
            return cls(**body)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, EtpError):
                raise
            raise ForceError(f"these are not the fields of a {cls.__name__}: {error!r}.") from error


def build(known: Mapping[str, type[C]], source: str | Mapping[str, Any], *, what: str) -> C:
    """The configuration that ``to_json`` or ``to_dict`` wrote.

    Args:
        known: the classes to choose from, by name.
        source: JSON text or the dictionary in it.
        what: what is being built, for the error.

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


def number(value: object) -> bool:
    """Whether a value is an int or a float (``bool`` is neither here)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first names in quotes, and how many more there are."""
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _fields(cls: type[Any]) -> str:
    return ", ".join(field.name for field in fields(cls)) or "none"
