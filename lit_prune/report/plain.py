"""The JSON form of records: what report.json and the callback's checkpoint state have of a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from lit_prune.schedule import Cut

OMIT = object()


@runtime_checkable
class OwnForm(Protocol):
    """A record whose JSON form is not simply its fields."""

    def to_dict(self) -> dict[str, Any]:
        """Returns that form."""


def json_form(*, key: str | None = None, none_as: Any = None) -> dict[str, Any]:
    """Returns the metadata of a field whose JSON form is not its name and its value.

    Args:
        key: Its name there.
        none_as: The value that stands for None; ``OMIT`` leaves the field out.
    """
    return {"key": key, "none_as": none_as}


def to_plain(value: Any) -> Any:
    """Returns ``value`` as JSON can hold it: dataclasses become dicts, in the order of their fields, tuples lists.

    >>> to_plain({"next": Cut(step=4, sparsity=0.5), "rates": (0.4, 0.6)})
    {'next': {'step': 4, 'sparsity': 0.5}, 'rates': [0.4, 0.6]}
    """
    if isinstance(value, OwnForm):
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
    """Returns the fields of a dataclass as JSON can hold them, see :func:`json_form`."""
    items = (_item(record, one) for one in fields(record))
    return {name: to_plain(item) for name, item in items if item is not OMIT}


def _item(record: Any, one: Field[Any]) -> tuple[str, Any]:
    """The name and the value of a field, as its metadata has them."""
    item = getattr(record, one.name)
    return one.metadata.get("key") or one.name, one.metadata.get("none_as") if item is None else item
