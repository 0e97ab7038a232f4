"""Registries, configurations that go to JSON and back, and checks of settings.

A *registry* is a table of entries by name. Forces, schedules, criteria and methods each have one. Built-in entries and
entries of a user are added in the same way, so that JSON, tables and the command line know both.

A *configuration* is a frozen dataclass. :class:`Configured` is one entry of a registry; JSON says its class by name.
:class:`Composed` has fields that are such configurations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from inspect import Parameter, isabstract, signature
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

from etp_graph._json import JsonReader, shorten
from etp_graph.errors import EtpError, ForceError, SettingError

E = TypeVar("E")

C = TypeVar("C", bound="Configured")

D = TypeVar("D", bound="Composed")

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Mapping[str, E]):
    """Table of entries by name, in the order of their registration.

    Nothing is imported to find an entry. So a file that names one cannot make this process run code.

    Args:
        what: word for an entry, used in error messages.
        error: class of the errors.
        remedy: sentence at the end of the error for an unknown name.
    """

    def __init__(self, what: str, *, error: type[EtpError] = SettingError, remedy: str = "") -> None:
        self.what, self.error, self.remedy = what, error, remedy
        self._entries: dict[str, E] = {}
        self._paths: dict[str, str] = {}

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.what}: {', '.join(self._entries)})"

    def register(self, name: str, entry: E, *, path: str = "") -> E:
        """Add an entry, and return it.

        Args:
            name: its name.
            entry: the entry.
            path: import path of the definition. An entry with the path of the known one replaces it, so that a cell of
                a notebook and a reloaded module can register again.

        Raises:
            EtpError: the name is not a non-empty string, or another entry has it. It is an instance of ``error``.
        """
        require(isinstance(name, str) and bool(name), f"a {self.what} has a name, not {name!r}.", self.error)
        known = self._entries.setdefault(name, entry)
        again = bool(path) and "<" not in path and self._paths.get(name) == path
        require(known == entry or again, self._taken(name), self.error)
        self._entries[name] = entry
        self._paths[name] = path
        return entry

    def discard(self, name: str) -> None:
        """Remove the entry of this name, if there is one."""
        self._entries.pop(name, None)
        self._paths.pop(name, None)

    def find(self, name: object) -> E:
        """Return the entry of this name.

        Raises:
            EtpError: the name is unknown; the message lists the known ones. It is an instance of ``error``.
        """
        if isinstance(name, str) and name in self._entries:
            return self._entries[name]
        remedy = f"{self.remedy} {_remedy_for_path(name)}".strip()
        raise self.error(
            f"there is no {self.what} {shorten(name)}; known are {', '.join(self._entries)}. {remedy}".strip()
        )

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Remove what is registered inside of the block when it ends, for tests and examples."""
        entries, paths = dict(self._entries), dict(self._paths)
        try:
            yield
        finally:
            self._entries, self._paths = entries, paths

    def _taken(self, name: str) -> str:
        return f"there is already another {self.what} named {name!r}; choose another name."


def import_path(definition: object) -> str:
    """Return ``module:qualname`` of a function or class; an empty string for an object without these."""
    module, qualname = getattr(definition, "__module__", None), getattr(definition, "__qualname__", None)
    return f"{module}:{qualname}" if module and qualname else ""


def importable(path: str) -> bool:
    """Return True if an import path leads to its object, which it does not for a lambda or a local definition."""
    return bool(path) and "<" not in path


def _remedy_for_path(name: object) -> str:
    """Return the sentence for an unknown name that is an import path; empty for other names."""
    module, colon, _ = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon:
        return ""
    if module == "__main__":
        return "It was registered in a script: run the script that defines it, or move it to a module."
    return (
        f"Import {shorten(module, quote=False)}, which has to register it: no file makes this process import a module."
    )


LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a field with the default ``None`` that a later version added to a configuration.

While it is ``None``, it is left out of JSON, so that states and checkpoints of earlier versions stay equal to new ones.
"""


def _unset_later(configuration: object) -> set[str]:
    """Return the names of the fields with the metadata :data:`LATER` that are ``None``."""
    found = fields(configuration)  # type: ignore[arg-type]  # a dataclass
    return {f.name for f in found if f.metadata.get("later") and getattr(configuration, f.name) is None}


class Configured:
    """Mixin for a frozen dataclass that JSON identifies by its ``name``.

    A subclass without a ``name`` of its own gets its import path ``module:qualname`` as its name.
    """

    __slots__ = ()
    name: ClassVar[str]
    registry: ClassVar[Registry[type[Any]]]
    """Table in which JSON looks up the class; the base class of each kind sets it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = import_path(cls)

    def describe(self) -> dict[str, Any]:
        """Return the name and every field, also for a class that is not registered; see :data:`LATER`."""
        unset = _unset_later(self)
        values = asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
        return {"name": self.name, **{name: value for name, value in values.items() if name not in unset}}

    def to_dict(self) -> dict[str, Any]:
        """Return the name and every field as values that JSON can store.

        Raises:
            EtpError: the class is not registered, so that nothing could read the JSON.
        """
        self._check_registered()
        return self.describe()

    def to_json(self) -> str:
        """Return the name and every field as JSON text. Raises like :meth:`to_dict`."""
        return json.dumps(self.to_dict())

    def _check_registered(self) -> None:
        cls, registry = type(self), self.registry
        known = registry.get(self.name)
        if known is cls or (
            known is not None and importable(import_path(cls)) and import_path(known) == import_path(cls)
        ):
            return
        raise registry.error(
            f"{registry.what} {self.name!r} is not registered, so it cannot be read back from JSON. Register it where "
            f"it is defined: etp_graph.{registry.what}s.register({cls.__name__})."
        )


def register_class(cls: type[C], base: type[Configured]) -> type[C]:
    """Add a subclass of ``base`` to the registry of its kind, and return it.

    Raises:
        EtpError: this is no concrete dataclass that derives from ``base``, or another class has its name.
    """
    registry, what = base.registry, base.__name__
    require(
        isinstance(cls, type) and issubclass(cls, base) and is_dataclass(cls),
        f"{cls!r} is no frozen dataclass that derives from {what}: put @register above @dataclass(frozen=True).",
        registry.error,
    )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    require(not isabstract(cls), f"{cls.__name__} lacks {', '.join(missing)}, which a {what} has.", registry.error)
    if ":" in cls.name:
        require(importable(cls.name), f"{cls.name} is no import path: give the class a name.", registry.error)
    registry.register(cls.name, cls, path=import_path(cls))
    return cls


class Composed:
    """Mixin for a frozen dataclass with fields that are named configurations or ``None``.

    A field with ``metadata=before("other")`` stands before the field ``other``, which may be inherited. So a class that
    inherits fields is written and shown in the order in which its fields are read.
    """

    __slots__ = ()
    readers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """Name of such a field -> function that builds its configuration from what ``to_dict`` returned."""

    def describe(self) -> dict[str, Any]:
        """Return every field as :meth:`to_dict` does, also with forces or schedules that are not registered."""
        return self._collect(lambda value: value.describe() if isinstance(value, Configured) else value.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return every field as a value that JSON can store.

        Raises:
            EtpError: a field holds a force, a schedule or a criterion that is not registered.
        """
        return self._collect(lambda value: value.to_dict())

    def to_json(self) -> str:
        """Return every field as JSON text; :meth:`from_json` reads it back. Raises like :meth:`to_dict`."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> Self:
        """Return the object from what ``to_json`` or ``to_dict`` returned.

        Raises:
            ForceError: ``source`` does not hold the fields of this class, or a class in it is not registered.
        """
        try:
            body = dict(read_mapping(source, f"these are not the fields of a {cls.__name__}"))
            later = {field.name for field in fields(cls) if field.metadata.get("later")}  # type: ignore[arg-type]
            for name, read in cls.readers.items():
                if name in body or name not in later:
                    body[name] = None if body[name] is None else read(body[name])
            return cls(**body)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, EtpError):
                raise
            raise ForceError(f"these are not the fields of a {cls.__name__}: {shorten(error)}.") from error

    def __repr__(self) -> str:
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in ordered_fields(type(self)))
        return f"{type(self).__name__}({values})"

    def _collect(self, store: Callable[[Any], Any]) -> dict[str, Any]:
        unset = _unset_later(self)
        values = {f.name: getattr(self, f.name) for f in ordered_fields(type(self)) if f.name not in unset}
        return {name: store(v) if name in self.readers and v is not None else v for name, v in values.items()}


def build_named(known: Registry[type[C]], source: str | Mapping[str, Any]) -> C:
    """Return the configuration from what ``to_json`` or ``to_dict`` returned.

    Args:
        known: the registry of its class.
        source: JSON text, or the dictionary in it.

    Raises:
        EtpError: the text is not JSON, the name is unknown, or a field is unknown or out of range.
    """
    try:
        body = read_mapping(source, f"this is not a {known.what}", known.error)
        name = body.pop("name")
    except KeyError as error:
        raise known.error(
            f"this is not a {known.what}: it has no name. Expected a JSON object with a 'name'."
        ) from error
    found = known.find(name)
    try:
        return found(**body)
    except TypeError as error:
        raise known.error(
            f"{known.what} {name!r}: {shorten(str(error), quote=False)}. Its fields are {field_names(found)}."
        ) from error


def read_mapping(source: object, where: str, error: type[EtpError] = ForceError) -> dict[str, Any]:
    """Return the object in JSON text, or a copy of a dictionary.

    Args:
        source: JSON text, or the dictionary in it.
        where: beginning of the error message.
        error: class of the error.

    Raises:
        EtpError: this is neither. It is an instance of ``error``.
    """
    reader = JsonReader(error)
    return reader.require_object(dict(source) if isinstance(source, Mapping) else reader.parse(source, where), where)


def change_fields(configuration: D, values: Mapping[str, Any]) -> D:
    """Return the configuration with other values of the fields that ``values`` names.

    Raises:
        ForceError: a name is unknown, or a value is out of range.
    """
    known = {field.name for field in ordered_fields(type(configuration))}
    unknown = [name for name in values if name not in known]
    require(
        not unknown,
        f"there is no setting {quoted(unknown)} of a {type(configuration).__name__}; known are "
        f"{field_names(type(configuration))}.",
    )
    changed: D = replace(configuration, **values) if values else configuration  # type: ignore[type-var]  # a dataclass
    return changed


def show_fields(cls: type[Any]) -> Callable[[T], T]:
    """Return a decorator that shows the fields of ``cls`` in the signature of a function in place of ``**values``.

    ``help()`` and editors then list them with their types and defaults, and no second list has to be kept. It also puts
    the parameters of a dataclass with inherited fields in their order: ``show_fields(cls)(cls.__init__)``.
    """
    types = get_type_hints(cls)
    shown = [Parameter(f.name, Parameter.KEYWORD_ONLY, default=_default(f), annotation=types[f.name])
             for f in ordered_fields(cls)]  # fmt: skip

    def decorate(function: T) -> T:
        found = signature(function)
        parameters = [p for p in found.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        own = [p for p in parameters if p.name not in types]
        function.__signature__ = found.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate


def _default(field: Field[Any]) -> Any:
    return Parameter.empty if field.default is MISSING else field.default


def before(name: str) -> dict[str, str]:
    """Return the metadata of a field that stands before the field ``name``, see :class:`Composed`."""
    return {"before": name}


def ordered_fields(cls: type[Any]) -> list[Field[Any]]:
    """Return the fields of a dataclass, each with ``metadata=before(...)`` at its place."""
    placed = [field for field in fields(cls) if "before" not in field.metadata]
    for field in fields(cls):
        if "before" in field.metadata:
            placed.insert([f.name for f in placed].index(field.metadata["before"]), field)
    return placed


def field_names(cls: type[Any]) -> str:
    """Return the names of the fields of a dataclass in one line."""
    return ", ".join(field.name for field in ordered_fields(cls)) or "none"


def require(condition: bool, message: str, error: type[Exception] = ForceError) -> None:
    """Raise ``error`` with the message unless the condition holds."""
    if not condition:
        raise error(message)


def require_choice(name: str, value: object, choices: Collection[str], error: type[Exception] = ForceError) -> None:
    """Raise ``error`` unless the setting ``name`` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name}={shorten(value)}; choose one of {', '.join(map(repr, choices))}.")


def require_number(
    name: str,
    value: object,
    least: float,
    most: float = math.inf,
    error: type[Exception] = ForceError,
    *,
    excluded: Collection[float] = (),
    why: str = "",
) -> None:
    """Raise ``error`` unless the setting ``name`` is a finite number from ``least`` to ``most``.

    Args:
        name: name of the setting, for the message.
        value: its value.
        least, most: the bounds, which are allowed.
        error: class of the error.
        excluded: bounds that are not allowed.
        why: reason for the bounds, as the end of the message.
    """
    if is_number(value) and least <= value < math.inf and value <= most and value not in excluded:  # type: ignore[operator]
        return
    left, right = "(" if least in excluded else "[", ")" if most in excluded or most == math.inf else "]"
    raise error(f"{name}={shorten(value)}; it must lie in {left}{least:g}, {most:g}{right}{', ' * bool(why)}{why}.")


def require_count(name: str, value: object, least: int, error: type[Exception] = ForceError) -> None:
    """Raise ``error`` unless the setting ``name`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise error(f"{name}={shorten(value)}; it must be an integer of at least {least}.")


def plain_number(value: Any) -> Any:
    """Return a scalar of NumPy or PyTorch as Python's number, and any other value as it is."""
    if type(value) in (int, float, bool, str) or not hasattr(value, "item") or getattr(value, "ndim", 1) != 0:
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # a tensor without a value; the check of the setting refuses it
        return value


def is_number(value: object) -> bool:
    """True if the value is an int or a float, and not a ``bool``."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def quoted(names: Iterable[str], limit: int = 4) -> str:
    """Return the first ``limit`` names in quotes, and how many more there are."""
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
