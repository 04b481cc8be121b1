"""The record of what was done to a model, and the structures in that record, which are changes of the model's shape.

The record is a small JSON-able dict under the key ``lit_prune`` of the Hugging Face config, so that it is in the
config.json of an exported folder and in every checkpoint. Its fields: `recipe` (of the last cut), `rates` (share
removed from each block), `masked` (whether weights were set to zero), `structures` (see :class:`Structure`), `added`
(number of structures of the last cut, 0 for masks), and of what came after this cut `recovery`, `form` (of the export
of quantised weights) and `distillation` (from the dense model).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel

from lit_prune.errors import InputError

KEY = "lit_prune"
STRUCTURES = "structures"
ADDED = "added"
KIND = "kind"
IMPORT = "import lit_prune  # or pass trust_remote_code=True below"  # before a model of a class of ours is opened
AFTER_CUT = ("recovery", "form", "distillation")


def record(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the record of what was done to ``model``; empty for a model that was never pruned."""
    return dict(getattr(model.config, KEY, None) or {})


def write(model: PreTrainedModel, **fields: Any) -> None:
    """Adds ``fields`` to the record in the model's config."""
    setattr(model.config, KEY, {**record(model), **fields})


def write_cut(model: PreTrainedModel, recipe: Mapping[str, Any], rates: Sequence[float], *, added: int) -> None:
    """Adds the recipe of a cut, its rates, and the number of structures that it added, to the record of ``model``.

    What came after an earlier cut is no longer in the record.
    """
    before = {name: value for name, value in record(model).items() if name not in AFTER_CUT}
    setattr(model.config, KEY, {**before, "recipe": recipe, "rates": rates, ADDED: added})


def masked(model: PreTrainedModel) -> bool:
    """Returns whether weights of ``model`` were set to zero and must stay zero."""
    return bool(record(model).get("masked"))


@dataclass(frozen=True)
class Description:
    """The description of a structure for the table, the picture and the model card.

    Attributes:
        name: Key of the structure in report.json: `slice`.
        facts: Contents of report.json under that key, in plain JSON types.
        done: Beginning of the model card's first sentence: `Sliced`.
        outcome: End of that sentence, about the resulting sizes.
        rows: Texts of the table's rows, by label.
        unit: Unit of ``sizes``, the label of the picture's axis: `dimensions of the residual stream`.
        noun: Name of one size in the picture's legend: `width`.
        sizes: Size of each block of the dense model now, 0 for a block that was removed.
        full: Size of each block before.
        achieved: Share that was removed, mean over the blocks.
        loading: Line of Python that is needed before the model is opened; empty if there is none.
        added_parameters: Number of parameters that the structure adds to the model.
        parts: The descriptions that this one joins, see :func:`joined`; empty for that of one structure.
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
    parts: tuple[Description, ...] = ()


class Structure(ABC):
    """A change of a model's shape that the dense model has to be given before the weights can be loaded.

    A subclass is a frozen dataclass whose fields are plain JSON types (a tuple would come back as a list). It is
    defined at the top level of a module, so that it can be imported by the path in its record. A model has at most one
    structure of each class; a method that cuts again records one that covers both cuts.

    Attributes:
        rebuilt_first: Whether a dense model is given this shape before others, which are recorded for what it leaves.
    """

    rebuilt_first: ClassVar[bool] = False

    def record(self) -> dict[str, Any]:
        """Returns the structure in plain JSON types: its fields, and the path of its class as `kind`."""
        return {KIND: _path(type(self)), **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def rebuild(self, model: PreTrainedModel) -> None:
        """Gives a dense model this shape, in place, so that weights of this shape can be loaded into it.

        The values of the weights are undefined until then, and may be on the meta device. A model that has the shape
        already is not changed.
        """

    @abstractmethod
    def describe(self, model: PreTrainedModel) -> Description:
        """Returns the description for the report of ``model``, which has the structure and no adapter."""

    def of_blocks(self, kept: Sequence[int]) -> Structure:
        """Returns the structure of the same model with the blocks ``kept`` alone; the same without sizes by block."""
        return self


Kind = TypeVar("Kind", bound=Structure)


def structures(model: PreTrainedModel) -> tuple[Structure, ...]:
    """Returns the structures of ``model``, in the order in which they were added."""
    return structures_in(record(model))


def find_structure(model: PreTrainedModel, kind: type[Kind]) -> Kind | None:
    """Returns the structure of ``model`` that is a ``kind``; None if there is none."""
    return next((found for found in structures(model) if isinstance(found, kind)), None)


def structures_in(recorded: Mapping[str, Any]) -> tuple[Structure, ...]:
    """Returns the structures in the record of a model.

    Raises:
        InputError: if the class of one cannot be imported.
    """
    return tuple(_structure(fields) for fields in recorded.get(STRUCTURES, ()))


def add_structure(model: PreTrainedModel, structure: Structure) -> None:
    """Adds ``structure`` to the record of ``model`` as the last one, replacing an earlier one of the same class."""
    others = [present for present in structures(model) if type(present) is not type(structure)]
    write(model, **{STRUCTURES: [present.record() for present in (*others, structure)]})


def keep_blocks(model: PreTrainedModel, structure: Structure, kept: Sequence[int]) -> None:
    """Adds ``structure``, which has the blocks ``kept`` alone, to the record of ``model`` as the last one.

    The others are recorded as they are for these blocks, since a dense model loses blocks before those get other sizes.
    """
    write(model, **{STRUCTURES: [present.of_blocks(kept).record() for present in structures(model)]})
    add_structure(model, structure)


def describe(model: PreTrainedModel) -> list[Description]:
    """Returns the description of each structure of ``model``, which has no adapter."""
    return [structure.describe(model) for structure in structures(model)]


def joined(descriptions: Sequence[Description], name: str) -> Description:
    """Returns one description of several structures that the same cut added.

    Args:
        descriptions: The descriptions, at least one, which is returned as it is if it is the only one.
        name: Key of all of them in report.json, where their facts are stored by their own names.
    """
    first = descriptions[0]
    if len(descriptions) == 1:
        return first
    return replace(
        first,
        name=name,
        done=first.done if len({described.done for described in descriptions}) == 1 else "Shrunk",
        facts={"parts": {described.name: described.facts for described in descriptions}},
        outcome="; ".join(described.outcome.removesuffix(".") for described in descriptions) + ".",
        rows={label: text for described in descriptions for label, text in described.rows.items()},
        parts=tuple(descriptions),
    )


def _structure(recorded: Mapping[str, Any]) -> Structure:
    kind = _class(recorded[KIND])
    try:
        return kind(**{name: value for name, value in recorded.items() if name != KIND})
    except TypeError as error:
        raise InputError(
            f"`model`: its config has a {kind.__name__} of another version of lit_prune ({error}): cut the model again "
            "with this one."
        ) from error


def _class(path: str) -> type[Structure]:
    """Returns the subclass of Structure at a dotted path, after importing its module."""
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
