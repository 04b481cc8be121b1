"""The JSON form of dataclasses, as report.json and the callback's checkpoint state store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from lit_prune.schedule import Cut

OMIT = object()


@runtime_checkable
class HasToDict(Protocol):
    """A record that defines its JSON form itself, instead of having its fields stored."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""


def json_form(*, key: str | None = None, none_as: Any = None) -> dict[str, Any]:
    """Returns the metadata of a dataclass field that is stored under another key, or whose None is stored otherwise.

    Args:
        key: The key; None is the name of the field.
        none_as: The value that is stored for None; ``OMIT`` leaves the field out.
    """
    return {"key": key, "none_as": none_as}


def to_plain(value: Any) -> Any:
    """Returns ``value`` as plain JSON types: dataclasses become dicts in the order of their fields, tuples lists.

    >>> to_plain({"next": Cut(step=4, sparsity=0.5), "rates": (0.4, 0.6)})
    {'next': {'step': 4, 'sparsity': 0.5}, 'rates': [0.4, 0.6]}
    """
    if isinstance(value, HasToDict):
        return to_plain(value.to_dict())
    if isinstance(value, Cut):
        return value._asdict()
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return fields_to_plain(value)
    return value


def fields_to_plain(record: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass as plain JSON types, see :func:`json_form`."""
    items = (_item(record, field) for field in fields(record))
    return {name: to_plain(item) for name, item in items if item is not OMIT}


def _item(record: Any, field: Field[Any]) -> tuple[str, Any]:
    """Returns the key and the value under which a field is stored."""
    value = getattr(record, field.name)
    return field.metadata.get("key") or field.name, field.metadata.get("none_as") if value is None else value
