"""The record of what was done to a model, and the structures in it: changes of the model's shape.

The record is a small JSON-able dict under the key ``lit_prune`` of the Hugging Face config, so that it is in the
config.json of an exported folder and in every checkpoint. Its fields: `recipe` (what was asked for), `rates` (share
removed, by block), `masked` (weights were set to zero), `structures` (see :class:`Structure`), `recovery` (what was
trained after that), `form` (of the export of quantised weights), `distillation` (how the dense model taught it).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from lit_prune.errors import InputError

KEY = "lit_prune"
STRUCTURES = "structures"
KIND = "kind"


def record(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what was done to ``model`` so far; empty for a model that was never pruned."""
    return dict(getattr(model.config, KEY, None) or {})


def write(model: PreTrainedModel, **fields: Any) -> None:
    """Adds ``fields`` to the record in the model's config."""
    setattr(model.config, KEY, {**record(model), **fields})


def masked(model: PreTrainedModel) -> bool:
    """Returns whether weights of ``model`` were set to zero, and are to stay so."""
    return bool(record(model).get("masked"))


@dataclass(frozen=True)
class Description:
    """What the table, the picture and the card of a report show of a structure.

    Attributes:
        name: Key of the structure in report.json, and the first word of its row of what was requested: `slice`.
        facts: What report.json has under that key, as JSON can hold it.
        done: What was done to the model, as the card's first sentence begins: `Sliced`.
        outcome: What that leaves, as the sentence ends.
        rows: Rows of the table, label and text.
        unit: What ``sizes`` count, as the picture labels its axis.
        noun: What one size is called there: `width`.
        sizes: What each block of the dense model keeps, 0 for a block that was removed.
        full: What each had.
        achieved: The share that was removed, mean over the blocks.
        loading: Line of Python that has to come before ``from_pretrained``; empty where none has to.
        added_parameters: Number of parameters that the model has only because of the structure.
    """

    name: str
    facts: dict[str, Any]
    done: str
    outcome: str
    rows: dict[str, str]
    unit: str
    noun: str
    sizes: tuple[int, ...]
    full: int
    achieved: float
    loading: str = ""
    added_parameters: int = 0


class Structure(ABC):
    """A change of a model's shape, so that the dense model's code and weights alone no longer make it.

    A leaf is a frozen dataclass whose fields JSON can hold (lists come back as lists), at the top of a module, which is
    how its record finds it again. A model has at most one structure of a kind; a method that cuts a second time records
    one that holds both cuts.
    """

    def record(self) -> dict[str, Any]:
        """Returns the structure as JSON can hold it: its fields, and the path of its class as `kind`."""
        return {KIND: _path(type(self)), **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def rebuild(self, model: PreTrainedModel) -> None:
        """Gives a dense model this shape, in place, so that the weights of a model that has it can be loaded.

        The values mean nothing yet, and may be on the meta device. Nothing happens to a model that has the shape.
        """

    @abstractmethod
    def describe(self, model: PreTrainedModel) -> Description:
        """Returns what a report shows of ``model``, which has the structure and no adapter."""


def structures(model: PreTrainedModel) -> tuple[Structure, ...]:
    """Returns the structures of ``model``, in the order in which it got them."""
    return structures_in(record(model))


def structures_in(recorded: Mapping[str, Any]) -> tuple[Structure, ...]:
    """Returns the structures that the record of a model names.

    Raises:
        InputError: if the class of one cannot be imported.
    """
    return tuple(_structure(fields) for fields in recorded.get(STRUCTURES, ()))


def add_structure(model: PreTrainedModel, structure: Structure) -> None:
    """Records that ``model`` has ``structure`` now, in the place of an earlier one of the same kind."""
    by_kind = {type(present): present for present in structures(model)} | {type(structure): structure}
    write(model, **{STRUCTURES: [present.record() for present in by_kind.values()]})


def describe(model: PreTrainedModel) -> list[Description]:
    """Returns what a report shows of each structure of ``model``, which has no adapter."""
    return [structure.describe(model) for structure in structures(model)]


def _structure(recorded: Mapping[str, Any]) -> Structure:
    kind = _class(recorded[KIND])
    return kind(**{name: value for name, value in recorded.items() if name != KIND})


def _class(path: str) -> type[Structure]:
    """The subclass of Structure at a dotted path; its module is imported, so that it is known by then."""
    module = path.rpartition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"`model`: its config names the structure {path}, which cannot be imported ({error}): install the package "
            "that has it."
        ) from error
    for kind in _subclasses(Structure):  # type: ignore[type-abstract]
        if _path(kind) == path:
            return kind
    raise InputError(f"`model`: its config names the structure {path}, which {module} does not have.")


def _path(kind: type[Structure]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type[Structure]) -> Iterator[type[Structure]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)
