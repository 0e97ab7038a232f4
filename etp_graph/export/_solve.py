"""Find the configuration that describes a pruned model.

No table of families is needed. One field after the other is changed, and the class is built on the meta device: this
tells which sizes each field decides. A field takes the value that gives the sizes which it alone decides. Then the
next field can be read, until all sizes are explained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from etp_graph._config import quoted
from etp_graph.errors import ExportError

from ._facts import Fact, Facts, fact_text, facts_of, pattern, read_facts
from ._fields import Path, path_text, read_value, unset_fields, width_fields, with_values

_TRIED = 512
"""Largest value up to which every value of a field is tried where its sizes do not tell it."""

UNEVEN = "allocate with Budget(..., uniform=True), which keeps all layers equally wide, or keep the model with etp.save"


@dataclass(frozen=True, slots=True)
class Field:
    """Field of a configuration with its dense value, and by how much each size changes with it."""

    path: Path
    value: int
    slopes: Mapping[Fact, Fraction]


def find_config(model: nn.Module) -> Any:
    """Return the configuration of the class of ``model`` with which it builds the sizes that the model has.

    Raises:
        ExportError: no values of the fields give these sizes; the message says which field describes two of them.
    """
    return ConfigSearch(model).solve()


class ConfigSearch:
    """Search for the values of the fields of the configuration of a pruned model.

    Attributes:
        base: the sizes of the dense model.
        wanted: the sizes of the pruned model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model_class = type(model)
        self.dense: Any = model.config
        self.config, self.wanted = self.dense, read_facts(model)
        base = facts_of(self.model_class, self.dense)
        if isinstance(base, str):
            raise ExportError(
                f"{self.model_class.__name__} cannot be built from the config of the model ({base}): restore it."
            )
        self.base: Facts = base
        self._require_same_names()

    def _require_same_names(self) -> None:
        """Raise unless the class has the tensors of the model, whatever their sizes."""
        others = sorted({fact_text(fact) for fact in self.wanted.keys() ^ self.base.keys()})
        if others:
            raise ExportError(
                f"the model has other tensors than its class {self.model_class.__name__} builds ({quoted(others)}): "
                "merge adapters (merge_and_unload), take off wrappers and parametrizations, and dequantize first."
            )

    def solve(self) -> Any:
        """Return the configuration with the wanted sizes, or raise :class:`ExportError` with the reason."""
        if self.wanted == self.base:
            return with_values(self.dense, {})
        left, done, values = self.probe_fields(), list[Field](), dict[Path, int]()
        while left:
            field = _most_telling(left)
            left.remove(field)
            value = self._value(field, left, done, values)
            if value != field.value:
                values[field.path] = value
                done.append(field)
        return self._checked(values)

    def probe_fields(self) -> list[Field]:
        """Return the fields that decide sizes; also those whose default the class computes."""
        self._set_unset()
        return [field for path in width_fields(self.config) if (field := self._probe(path)) is not None]

    def _set_unset(self) -> None:
        """Write down defaults that the class computes, so that they stay when the fields they come from change."""
        for path in list(unset_fields(self.config)):
            for guess in (24, 32):
                found = self._facts({path: guess})
                moved = [] if isinstance(found, str) else [f for f in self.base if found.get(f) != self.base[f]]
                if isinstance(found, str) or not moved or moved[0] not in found:
                    continue
                default = with_values(self.config, {path: guess * self.base[moved[0]] // found[moved[0]]})
                if facts_of(self.model_class, default) == self.base:
                    self.config = default
                    break

    def _facts(self, values: Mapping[Path, int]) -> Facts | str:
        try:
            config = with_values(self.config, values)
        except Exception as error:  # noqa: BLE001  # the validation of configurations raises classes of its own
            return str(error)
        return facts_of(self.model_class, config)

    def _probe(self, path: Path) -> Field | None:
        """Return the field with the sizes that it decides, or ``None`` if it decides none."""
        value = read_value(self.config, path)
        for probe in (2 * value, value // 2, value - 1, value + 1, 3 * value):
            found = self._facts({path: probe}) if probe > 0 else ""
            if isinstance(found, str):
                continue
            moved = {
                f: Fraction(found[f] - size, probe - value)
                for f, size in self.base.items()
                if found.get(f, size) != size
            }
            return Field(path, value, moved) if moved else None
        return None

    def accepted_step(self, field: Field) -> int:
        """Return the smallest step in which the configuration lets a field shrink; 1 if it takes any value."""
        for step in range(1, min(field.value // 2, _TRIED)):
            smaller = [with_values(self.config, {field.path: field.value - n * step}) for n in (1, 2)]
            if field.value % step == 0 and all(refused_by_config(config) is None for config in smaller):
                return step
        return 1

    def _value(self, field: Field, left: list[Field], done: list[Field], values: Mapping[Path, int]) -> int:
        """Return the value of a field by the sizes that it decides and no field in ``left`` does.

        The fields in ``done`` have changed. A size that one of them decides too is no linear function of this field.
        """
        mine = field.slopes.keys() - _decided_by(left)
        alone = mine - _decided_by(done)
        if alone:
            return self._linear(field, alone)
        value: int
        for value in (field.value, *range(1, min(field.value, _TRIED))):
            found = self._facts({**values, field.path: value})
            if not isinstance(found, str) and all(found.get(fact) == self.wanted[fact] for fact in mine):
                return value
        return field.value

    def _linear(self, field: Field, facts: Iterable[Fact]) -> int:
        """Return the value that gives the wanted sizes, or raise :class:`ExportError` if there is more than one."""
        found: dict[Fraction, list[Fact]] = {}
        for fact in sorted(facts, key=str):
            value = field.value + (self.wanted[fact] - self.base[fact]) / field.slopes[fact]
            found.setdefault(value, []).append(fact)
        if len(found) == 1 and next(iter(found)).denominator == 1:
            return int(next(iter(found)))
        raise ExportError(self._two_values(field, found))

    def _two_values(self, field: Field, found: Mapping[Fraction, list[Fact]]) -> str:
        """Return why one value of a field cannot describe the model, and which selection fits."""
        name, model_class = path_text(field.path), self.model_class.__name__
        places = "; ".join(f"{_number(value)} ({fact_text(facts[0])})" for value, facts in list(found.items())[:4])
        text = f"{model_class} has one {name} for all of these, and the pruned model needs {places}"
        patterns = Counter(place for facts in found.values() for place in {pattern(fact) for fact in facts})
        if max(patterns.values()) > 1:
            return f"{text}: {UNEVEN}."
        sizes = " or ".join(_number(value) for value in sorted(found))
        return (
            f"{text}. The nearest selections that it can say keep {sizes} in all of these places: prune all of these "
            "kinds of units to that size or none of them (trace(..., prune=...)), or keep the model with etp.save."
        )

    def _checked(self, values: Mapping[Path, int]) -> Any:
        """Return the dense configuration with these values if it gives the wanted sizes, or raise the reason."""
        plain = with_values(self.dense, values)
        config = plain if facts_of(self.model_class, plain) == self.wanted else with_values(self.config, values)
        told = ", ".join(f"{path_text(path)}={value}" for path, value in values.items())
        found, refusal = facts_of(self.model_class, config), refused_by_config(config)
        if isinstance(found, str) or refusal is not None:
            raise ExportError(
                f"{self.model_class.__name__} refuses {told} ({found if isinstance(found, str) else refusal}). "
                f"{self._nearest(values)}"
            )
        wrong = [fact for fact in self.wanted if found.get(fact) != self.wanted[fact]]
        if wrong:
            places = "; ".join(f"{fact_text(f)} is {self.wanted[f]}, not {found.get(f)}" for f in wrong[:3])
            raise ExportError(
                f"no configuration of {self.model_class.__name__} describes the pruned model: with "
                f"{told or 'its dense sizes'} {places}. The class derives one from the other: prune both in proportion "
                "or neither (trace(..., prune=...)), or keep the model with etp.save."
            )
        return config

    def _nearest(self, values: Mapping[Path, int]) -> str:
        """Return the nearest value of one field that the class accepts, as a sentence."""
        for step in range(1, _TRIED):
            for path, value in values.items():
                for other in (value + step, value - step):
                    config = with_values(self.config, {**values, path: other}) if other > 0 else None
                    if config is None or refused_by_config(config) is not None:
                        continue
                    if not isinstance(facts_of(self.model_class, config), str):
                        return f"The nearest that it accepts is {path_text(path)}={other}: see Budget(round_to=)."
        return "Prune fewer kinds of units (trace(..., prune=...)), or keep the model with etp.save."


def refused_by_config(config: Any) -> str | None:
    """Return why the class of a configuration refuses its own values, or ``None`` if it reads them."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # noqa: BLE001  # the validation raises classes of its own, which differ by release
        return str(error).strip().splitlines()[-1].strip()
    return None


def _most_telling(left: list[Field]) -> Field:
    """Return the field that alone decides the most sizes; if none does, one that decides a size of heads."""
    shared = Counter(fact for field in left for fact in field.slopes)

    def rank(field: Field) -> tuple[int, bool]:
        alone = sum(shared[fact] == 1 for fact in field.slopes)
        return alone, any(isinstance(place, str) for _, place in field.slopes)

    return max(left, key=rank)


def _decided_by(fields: Iterable[Field]) -> set[Fact]:
    return {fact for field in fields for fact in field.slopes}


def _number(value: Fraction) -> str:
    return str(int(value)) if value.denominator == 1 else f"{float(value):.1f}"
